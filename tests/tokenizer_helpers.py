"""Tokenizers as other makers have them, and a folder of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Größe, naïve café — “quoted”\t\tand  spaces\n\n",
    "日本語の文章です。量子化されたモデルを蒸留する。\n",
    "emoji 🙂🙃 and 汉字, кириллица, ελληνικά\n",
]


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
