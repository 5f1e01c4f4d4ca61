"""Probes of exact length with the fact in them, and answers as greedy generation gives them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from limbeck.distill.gap.probes import KINDS, Probe, check_probes, make_probe, retrieve, text_from
from limbeck.distill.text.packing import Corpus, tokenize
from limbeck.distill.text.records import Document
from limbeck.models.checkpoint import load_model
from limbeck.models.errors import InputError
from limbeck.models.generate.generate import generate
from limbeck.models.tokenizer import Tokenizer, load_tokenizer
from limbeck.scripts.run.resolve import ZOO
from limbeck.tests.tokenizer_helpers import byte_level, saved, sentencepiece


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(ZOO)


@pytest.fixture(scope="module")
def corpus(tokenizer: Tokenizer) -> Corpus:
    return tokenize([Document(f"{i}.py", f"import os\nprint('file {i}')\n" * 40) for i in range(4)], tokenizer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", (160, 400))
def test_the_answer_follows_from_the_text(kind: str, length: int, corpus: Corpus, tokenizer: Tokenizer) -> None:
    draw = np.random.default_rng(0)
    texts = []
    for _ in range(8):
        probe = make_probe(kind, length, corpus, tokenizer, draw)
        assert len(probe.ids) == length and tokenizer.begin == [1]
        assert probe.ids[0] == 1 and not (probe.ids[1:] == 1).any()  # begins as texts do
        text, answer = (tokenizer.decode(part.tolist()) for part in (probe.ids, probe.ids[-probe.answer :]))
        facts = dict(re.findall(r"^([a-z]{6}) = (\w+)$", text[: text.rindex("\n")], re.M))
        assert len(facts) == {"needle": 1, "multi-key": 8, "variables": 4}[kind]
        question = re.search(r"\n([a-z]{6}) = \d+$", text)
        assert question is not None
        value = question.group(1)
        steps = 0
        while value in facts:
            value, steps = facts[value], steps + 1
        assert answer == f" = {value}" and steps == (4 if kind == "variables" else 1)
        texts.append(text)
    assert len(set(texts)) == 8
    again = np.random.default_rng(0)
    assert tokenizer.decode(make_probe(kind, length, corpus, tokenizer, again).ids.tolist()) == texts[0]


@pytest.mark.parametrize("maker", (sentencepiece, byte_level, None))
@pytest.mark.parametrize("kind", ("needle", "multi-key"))
def test_whoever_copies_the_fact_answers(
    kind: str, maker: Callable[[], tokenizers.Tokenizer] | None, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """The question and its answer are spelled as the fact is: of SentencePiece's tokenizers, which put a space before
    a text, of byte-level ones, and of the shipped one, of which " = " is one token."""
    words = tokenizer if maker is None else load_tokenizer(saved(maker(), tmp_path / "words"))
    corpus = tokenize([Document("a.py", "import os\nprint('file')\n" * 80)], words)
    draw = np.random.default_rng(0)
    for _ in range(8):
        ids = (probe := make_probe(kind, 400, corpus, words, draw)).ids.tolist()
        text = words.decode(ids)
        line = text[text.rindex("\n") :]
        size = next(size for size in range(probe.answer, 400) if words.decode([ids[0], *ids[-size:]]).endswith(line))
        found = ids[-size:]
        facts = [place for place in range(400 - size) if ids[place : place + size] == found]
        assert len(facts) == 1 and "  " not in line and line.endswith(words.decode(ids[-probe.answer :]))
        assert found == words.encode("x" + line)[len(words.encode("x")) :]


def test_no_more_is_read_than_a_probe_takes(corpus: Corpus, tokenizer: Tokenizer) -> None:
    """From any token on, round over the last document to the first; and of much text a window alone."""
    ids = np.asarray(corpus.ids)
    text = [token for token in ids.tolist() if token not in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    for begin, before in ((0, 0), (7, 6), (corpus.tokens - 1, len(text))):  # `before`: the text ahead of it
        for size in (0, 1, 50, len(text)):
            assert text_from(corpus, begin, size, tokenizer) == (text[before:] + text)[:size]
        assert len(text_from(corpus, begin, len(text) + 1, tokenizer)) == len(text)
    read: list[int] = []

    class Long:
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, places: slice, /) -> np.ndarray:
            read.append(places.stop - places.start)
            return ids[np.arange(places.start, min(places.stop, len(self))) % len(ids)]

    make_probe("needle", 160, dataclasses.replace(corpus, ids=Long()), tokenizer, np.random.default_rng(0))
    assert 0 < sum(read) < 500


def test_answered_is_what_greedy_text_gives(corpus: Corpus, tokenizer: Tokenizer) -> None:
    model = load_model(ZOO)
    written = torch.from_numpy(corpus.ids[:60].astype(np.int64))
    greedy = generate(model, written[None], 3)[0]  # its own argmax
    other = greedy.clone()
    other[-1] = (other[-1] + 1) % 4096
    found = retrieve({"zoo": model}, [Probe(greedy, 3), Probe(other, 3)], resamples=20, seed=0)["zoo"]
    assert found.answered.value == 0.5
    with torch.no_grad():
        logs = torch.log_softmax(model(greedy[None]).double(), -1)[0]
    nats = [-float(logs[59:62].gather(1, ids[60:, None]).sum()) for ids in (greedy, other)]
    assert found.nats.value == pytest.approx(np.mean(nats), rel=1e-4)


def test_probes_that_do_not_fit(corpus: Corpus, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="known: needle, multi-key, variables"):
        check_probes(["noodle"], [10], 100)
    with pytest.raises(InputError, match="1 to 100"):
        check_probes(["needle"], [101], 100)
    check_probes([], [101], 100)
    for length in (5, 10**6):
        with pytest.raises(InputError, match="leaves"):
            make_probe("needle", length, corpus, tokenizer, np.random.default_rng(0))
