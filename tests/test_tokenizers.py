"""Tokenizers of other makers: what a file says of one batch, bytes of a token by what it decodes to, and no bos."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from limbeck.models.checkpoint import save_model
from limbeck.models.errors import InputError
from limbeck.models.tokenizer import check_agreement, load_tokenizer
from limbeck.tests.helpers import limbeck, make_workshop, random_model, tiny_config
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Größe, naïve café — “quoted”\t\tand  spaces\n\n",
    "日本語の文章です。量子化されたモデルを蒸留する。\n",
    "emoji 🙂🙃 and 汉字, кириллица, ελληνικά\n",
]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def sentencepiece() -> Tokenizer:
    """As Llama 2 and TinyLlama have it: BPE with byte fallback, spaces as U+2581, one taken away at the beginning."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    letters = sorted({letter for text in TEXTS for letter in text.replace(" ", "\u2581") if ord(letter) < 0x600})
    vocabulary = {
        piece: number for number, piece in enumerate(dict.fromkeys([*pieces, *letters, "me", "\u2581m", "日本"]))
    }
    merges = [("m", "e"), ("\u2581", "m")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def metaspace() -> Tokenizer:
    """As T5 and XLM-R have it: unigrams, spaces as U+2581."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=180, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return backend


def byte_level() -> Tokenizer:
    """As GPT-2 and Qwen have it, with a token added that is no special one."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens([AddedToken("naïve", normalized=False)])
    return backend


def saved(backend: Tokenizer, folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(("maker", "begins_with"), [(sentencepiece, 1), (metaspace, 1), (byte_level, 0)])
def test_bytes_of_tokens_are_those_of_the_text(
    maker: Callable[[], Tokenizer], begins_with: int, tmp_path: Path
) -> None:
    """Together they are the text's UTF-8 bytes, in any script; and the space put before a text, where one is."""
    backend = maker()
    tokenizer = load_tokenizer(saved(backend, tmp_path / "words"))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert "<unk>" not in text and backend.token_to_id("<unk>") not in ids
        assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode()) + begins_with
    if maker is sentencepiece:
        one = tokenizer.token_bytes[backend.token_to_id("<0xE6>")], tokenizer.token_bytes[backend.token_to_id("日本")]
        assert [int(count) for count in one] == [1, 6]
    assert int(tokenizer.token_bytes[backend.token_to_id("</s>")]) == 0


def test_how_a_batch_was_cut_and_padded_is_not_obeyed(workshop: Path, tmp_path: Path) -> None:
    plain = load_tokenizer(workshop / "model")
    backend = Tokenizer.from_file(str(workshop / "model" / "tokenizer.json"))
    backend.enable_truncation(7)
    backend.enable_padding(length=64, pad_id=0, pad_token="<pad>")
    cut = load_tokenizer(saved(backend, tmp_path / "cut"))
    text = TEXTS[0] * 20
    assert cut.encode(text) == plain.encode(text) and len(cut.encode(text)) > 64
    assert cut.encode_many(["a", text]) == plain.encode_many(["a", text])


def test_a_tokenizer_without_bos(workshop: Path, tmp_path: Path) -> None:
    """`"bos_token": null` (Qwen3 as published): every command reads text, which begins with nothing."""
    words = saved(Tokenizer.from_file(str(workshop / "model" / "tokenizer.json")), tmp_path / "words",
                  bos_token=None, eos_token="</s>", pad_token="<pad>")  # fmt: skip
    config = tiny_config(vocab_size=320, pad_token_id=0, bos_token_id=7, extra={"time_step_min": 1e-6})
    save_model(random_model(config).float(), tmp_path / "model", tokenizer_from=words)
    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenizer.bos_token_id is None and tokenizer.prompt("x") == tokenizer.encode("x")
    assert check_agreement(tmp_path / "model", tmp_path / "model") == []
    with pytest.raises(InputError, match=r"the prompt is empty, and .* has no bos_token"):
        tokenizer.prompt("")
    places = [f"model={tmp_path / 'model'}", f"data={workshop / 'text'}"]
    small = ["seq_len=32", "batch=2"]
    code, out, err = limbeck("generate", places[0], "prompt=def ", "max_new_tokens=4")
    assert code == 0 and out.startswith("def "), err
    code, _, err = limbeck("score", *places, f"output={tmp_path / 'scores'}", *small, "importance.tokens=64",
                           "importance.depth_tokens=64")  # fmt: skip
    assert code == 0, err
    probes = ["details.probe_lengths=[96]", "details.probe_count=2", "probes=[needle]", "tokens=256"]
    details = ["details.prompt_tokens=8", "details.new_tokens=4", "details.resamples=20", "split=all"]
    code, _, err = limbeck("evaluate", f"teacher={tmp_path / 'model'}", places[1], f"output={tmp_path / 'gap'}", *small,
                           *probes, *details)  # fmt: skip
    assert code == 0, err
