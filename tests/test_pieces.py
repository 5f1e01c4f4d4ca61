"""A long document gives the tokens of the whole, whatever the tokenizer, and in bounded memory."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from limbeck.distill.text import pieces
from limbeck.distill.text.encoding import encoded
from limbeck.distill.text.pieces import encoded_texts, joined_pieces, whole_tokens
from limbeck.distill.text.records import Document
from limbeck.models.named import SHIPPED
from limbeck.models.tokenizer import Tokenizer, load_tokenizer
from limbeck.tests.helpers import TEXT
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

PROSE = TEXT[:6000] + "It's a fine day, isn't it?  We'll see 数字 and é, 12345678 times.\n\n" * 40
WORDS = ("tokenizer_config.json", "tokenizer.json")
# The pattern of Llama 3 and its like.
LLAMA3 = (
    r"(?i:'[stmd]|'re|'ve|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(model: Any, trainer: Any, pre: Any, normalizer: Any = None) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.train_from_iterator([PROSE], trainer(vocab_size=500, show_progress=False))
    return backend


def byte_level(*before: Any, prefix: bool = False, normalizer: Any = None) -> tokenizers.Tokenizer:
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not before)
    pre = pre_tokenizers.Sequence([*before, level])

    def trainer(**options: Any) -> Any:
        return trainers.BpeTrainer(initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), **options)

    return trained(models.BPE(), trainer, pre, normalizer)


def without_words() -> tokenizers.Tokenizer:
    """As Llama 2 has it: no pre-tokenizer, a text is one word to BPE; bytes where a character is unknown."""
    backend = trained(models.BPE(), trainers.BpeTrainer, pre_tokenizers.Metaspace())
    content = json.loads(backend.to_str())
    content["pre_tokenizer"] = None
    content["normalizer"] = json.loads(
        '{"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"},'
        ' {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}'
    )
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    content["model"]["byte_fallback"] = True
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def unigram() -> tokenizers.Tokenizer:
    def trainer(**options: Any) -> Any:
        return trainers.UnigramTrainer(unk_token="<unk>", special_tokens=["<unk>"], **options)

    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace())


def word_piece() -> tokenizers.Tokenizer:
    def trainer(**options: Any) -> Any:
        return trainers.WordPieceTrainer(special_tokens=["[UNK]"], **options)

    model = models.WordPiece(unk_token="[UNK]")
    return trained(model, trainer, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer())


BACKENDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "shipped": lambda: load_tokenizer(SHIPPED["zoo"]).backend,
    "gpt2": byte_level,
    "gpt2 with a space before": lambda: byte_level(prefix=True),
    "llama3": lambda: byte_level(pre_tokenizers.Split(Regex(LLAMA3), "isolated")),
    "composed letters": lambda: byte_level(normalizer=normalizers.NFC()),
    "sentencepiece": lambda: trained(models.BPE(), trainers.BpeTrainer, pre_tokenizers.Metaspace()),
    "llama2": without_words,
    "unigram": unigram,
    "bert": word_piece,
}


def drawn_text(draw: random.Random, size: int) -> str:
    """Prose between runs of what pre-tokenizers cut by a look ahead or by threes."""
    parts: list[str] = []
    while sum(map(len, parts)) < size:
        run = draw.choice((" ", "\n", "\t \n", "a", "e\u0301x", "数字→é", "🙂'll don't", "digits", "prose", "prose"))
        if run == "digits":
            run, times = "".join(draw.choice("0123456789") for _ in range(draw.randrange(400))), 1
        elif run == "prose":
            run, times = PROSE[draw.randrange(6000) :][: draw.randrange(600)], 1
        else:
            times = draw.randrange(300) // len(run)
        parts.append(run * times)
    return "".join(parts)


@pytest.mark.parametrize("kind", BACKENDS)
def test_pieces_give_the_tokens_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, draw = BACKENDS[kind](), random.Random(0)
    for piece, overlap in ((1500, 300), (4000, 800)):
        monkeypatch.setattr(pieces, "PIECE", piece)
        monkeypatch.setattr(pieces, "OVERLAP", overlap)
        monkeypatch.setattr(pieces, "LONGEST", 16 * piece)
        for _ in range(4):
            text = drawn_text(draw, 9000)
            whole, found = backend.encode(text, add_special_tokens=False), whole_tokens(text, backend)
            assert found.ids.tolist() == whole.ids
            assert list(zip(found.begins.tolist(), found.ends.tolist(), strict=True)) == whole.offsets
            places = [draw.randrange(len(text)) for _ in range(100)]
            assert [found.at(place) for place in places] == [whole.char_to_token(place) for place in places]
            assert found.at(len(text)) is None


def test_no_piece_is_larger_than_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the text, one word of it included, of which the tokens are those of its parts."""
    sizes = []
    tokens_of = pieces.tokens_of

    def watched(text: str, begin: int, size: int, backend: tokenizers.Tokenizer) -> pieces.Tokens:
        sizes.append(size)
        return tokens_of(text, begin, size, backend)

    monkeypatch.setattr(pieces, "tokens_of", watched)
    for name, value in {"PIECE": 1000, "OVERLAP": 100, "LONGEST": 4000}.items():
        monkeypatch.setattr(pieces, name, value)
    backend = BACKENDS["gpt2"]()
    backend.decoder = decoders.ByteLevel()
    for text in (PROSE * 3, " " * 20_000 + "x", "ab" * 10_000):
        parts = list(joined_pieces(text, backend))
        assert backend.decode(np.concatenate([part.ids for part in parts]).tolist()) == text
        assert len(parts) > len(text) // 5000 and max(len(part.ids) for part in parts) <= 4000
    assert max(sizes) == 4000


def test_texts_come_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 500)
    monkeypatch.setattr(pieces, "OVERLAP", 100)
    monkeypatch.setattr(pieces, "AT_ONCE", 3)
    monkeypatch.setattr(pieces, "AT_ONCE_CHARACTERS", 700)
    tokenizer = load_tokenizer(SHIPPED["zoo"])
    texts = [PROSE[i : i + (i * 37) % 900] for i in range(0, 4000, 41)]
    found: list[list[int]] = [[]]
    stretches = list(encoded_texts(iter(texts), tokenizer))
    for ids, last in stretches:
        assert ids.dtype == np.int32
        found[-1] += ids.tolist()
        found += [[]] if last else []
    assert found == [*map(tokenizer.encode, texts), []] and len(stretches) > len(texts)


@pytest.mark.parametrize("adds", (True, False))
def test_documents_begin_as_the_tokenizer_says(adds: bool, tmp_path: Path) -> None:
    """Its post-processor, that is: not add_bos_token. They end with eos either way."""
    settings, words = (json.loads((SHIPPED["zoo"] / name).read_text()) for name in WORDS)
    (tmp_path / WORDS[0]).write_text(json.dumps(settings | {"add_bos_token": not adds}))
    (tmp_path / WORDS[1]).write_text(json.dumps(words if adds else words | {"post_processor": None}))
    tokenizer = load_tokenizer(tmp_path)
    (document,) = encoded([Document("a", "text")], tokenizer)
    begin = [tokenizer.bos_token_id] if adds else []
    assert document.ids.tolist() == [*begin, *tokenizer.encode("text"), tokenizer.eos_token_id]
    assert tokenizer.prompt("text") == [*begin, *tokenizer.encode("text")]


def test_special_tokens_in_a_text_are_text() -> None:
    tokenizer: Tokenizer = load_tokenizer(SHIPPED["zoo"])
    text = "a tag: </s> and <s>"
    literal, special = (next(encoded_texts([text], tokenizer, special))[0].tolist() for special in (False, True))
    assert tokenizer.eos_token_id in special and not {tokenizer.eos_token_id, tokenizer.bos_token_id} & set(literal)
    assert tokenizer.decode(literal) == tokenizer.decode(special) == text and special == tokenizer.encode(text)
