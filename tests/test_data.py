"""Text to batches: nothing lost, nothing leaked, the same again."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill.text.documents import of_split, read_documents, split_of, unique
from limbeck.distill.text.packing import Batch, Corpus, Packing, joined, tokenize
from limbeck.distill.text.records import Document
from limbeck.models.errors import InputError
from limbeck.models.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

TEXTS = [f"# {i}\nvalue = {'x' * (i % 17)} + {i}\n" + "naïve → 数\n" * (i % 5) for i in range(60)]
FIELDS = [field.name for field in dataclasses.fields(Batch) if field.default is dataclasses.MISSING]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, 300, tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def corpus(tokenizer: Tokenizer) -> Corpus:
    return tokenize([Document(str(i), text) for i, text in enumerate(TEXTS)], tokenizer)


@pytest.mark.parametrize(
    "text", ("", " ", "\n\n  \t\r\n", "def f(a):\n\treturn a\n", "é→数🙂\x00", "</s><s>", *TEXTS[:4])
)
def test_tokenizer_gives_back_every_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    if "<s>" not in text:
        assert int(tokenizer.token_bytes[ids].sum() if ids else 0) == len(text.encode())


@pytest.mark.parametrize("number", range(4))
def test_a_tokenizer_that_is_there_is_whole(
    number: int, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any moment of writing: tokenizer.json, by which pretrain knows a finished one, is the last to come."""
    moments = itertools.count()

    def killed(function: Callable[..., None], *arguments: Any) -> None:
        if next(moments) == number:
            raise KeyboardInterrupt
        function(*arguments)

    for function in (os.replace, os.fsync):
        monkeypatch.setattr(os, function.__name__, functools.partial(killed, function))
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(TEXTS, 300, tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "tokenizer.json").exists()
    train_tokenizer(TEXTS, 300, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert (tmp_path / "tokenizer.json").read_bytes() == (tokenizer.folder / "tokenizer.json").read_bytes()


def test_tokenizer_is_the_same_twice_and_opens_in_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    train_tokenizer(TEXTS, 300, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tokenizer.folder / name).read_bytes()
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(TEXTS[3], add_special_tokens=False) == tokenizer.encode(TEXTS[3])
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)


def test_splits_are_apart_and_contents_distinct() -> None:
    names = [f"folder/{i}.py" for i in range(2000)]
    shares = [sum(split_of(name) == split for name in names) / 2000 for split in ("train", "validation", "test")]
    assert sum(shares) == 1 and abs(shares[0] - 0.9) < 0.03 and min(shares) > 0.02
    twice = [Document("a", "same"), Document("b", "same"), Document("c", "other"), Document("d", "")]
    assert [document.name for document in unique(twice)] == ["a", "c"]
    with pytest.raises(InputError, match="no document falls"):
        list(
            of_split(
                [Document("folder/0.py", "x")], "validation" if split_of("folder/0.py") != "validation" else "test", ""
            )
        )


def test_stdlib_is_a_real_corpus() -> None:
    documents = list(read_documents("stdlib"))
    assert sum(len(document.text) for document in documents) > 5_000_000
    assert len({document.text for document in documents}) == len(documents)
    assert not any("site-packages" in document.name for document in documents)


def test_measuring_sees_every_token_once(corpus: Corpus) -> None:
    rows = joined(list(corpus.sample(batch_size=4, seq_len=32)))
    kept = rows.doc_id >= 0
    assert torch.equal(rows.input_ids[kept], torch.from_numpy(corpus.ids).long())
    assert int((rows.labels >= 0).sum()) == corpus.tokens - len(corpus)
    assert int(rows.n_bytes.sum()) == sum(len(text.encode()) for text in TEXTS)
    assert joined(list(corpus.sample(batch_size=4, seq_len=32, seed=1, max_tokens=100))).input_ids.shape == (3, 32)


@pytest.mark.parametrize(("seed", "max_tokens"), ((None, None), (3, None), (None, 500), (3, 500)))
def test_a_sample_is_made_as_it_is_read(
    seed: int | None, max_tokens: int | None, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches of the list, and none before it is read."""
    how: dict[str, Any] = {"batch_size": 4, "seq_len": 32, "seed": seed, "max_tokens": max_tokens}
    expected = list(corpus.sample(**how))
    made: list[int] = []
    put = Packing.batch
    monkeypatch.setattr(Packing, "batch", lambda rows, numbers: made.append(len(numbers)) or put(rows, numbers))
    sample = corpus.sample(**how)
    assert len(sample) == len(expected) > 3 and made == []
    for found, wanted in ((sample[1], expected[1]), (sample[-1], expected[-1])):
        assert all(torch.equal(getattr(found, f), getattr(wanted, f)) for f in FIELDS)
    assert made == [4, len(expected[-1].labels)]
    for some, part in ((sample, expected), (sample[:2], expected[:2]), (sample[1::2], expected[1::2])):
        assert torch.equal(joined(list(some)).doc_id, joined(part).doc_id)
    with pytest.raises(IndexError):
        sample[len(sample)]


def test_labels_stay_in_their_document(corpus: Corpus) -> None:
    for batch in (
        next(corpus.train_batches(batch_size=8, seq_len=40, seed=3)),
        corpus.sample(batch_size=9, seq_len=40)[0],
    ):
        inside = batch.labels >= 0
        assert torch.equal(batch.labels[:, :-1][inside[:, :-1]], batch.input_ids[:, 1:][inside[:, :-1]])
        same = batch.doc_id[:, 1:] == batch.doc_id[:, :-1]
        assert torch.equal(inside[:, :-1], same & (batch.doc_id[:, :-1] >= 0))
        assert torch.equal(batch.seq_idx[:, 1:] == batch.seq_idx[:, :-1], same)
        assert torch.equal(batch.input_ids == 2, (batch.doc_id >= 0) & ~inside), "only </s> has no label"


@pytest.mark.parametrize("start", (0, 1, 4, 5, 11, 23))
def test_any_batch_can_be_sought(corpus: Corpus, start: int) -> None:
    whole = corpus.train_batches(batch_size=3, seq_len=50, seed=5)
    for _ in range(start):
        next(whole)
    sought = corpus.train_batches(batch_size=3, seq_len=50, seed=5, start=start)
    for _ in range(9):
        a, b = next(whole), next(sought)
        assert all(torch.equal(getattr(a, f), getattr(b, f)) for f in FIELDS)


def test_epochs_differ_and_seeds_too(corpus: Corpus) -> None:
    per_epoch = (corpus.tokens - 1) // 50 // 3
    first, second = (next(corpus.train_batches(batch_size=3, seq_len=50, seed=5, start=s)) for s in (0, per_epoch))
    other = next(corpus.train_batches(batch_size=3, seq_len=50, seed=9))
    assert not torch.equal(first.input_ids, second.input_ids) and not torch.equal(first.input_ids, other.input_ids)
    with pytest.raises(InputError, match="do not fill"):
        next(corpus.train_batches(batch_size=10**6, seq_len=50, seed=0))


def test_files_records_and_tables(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three"}\n')
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["four", "one"]}).to_parquet(str(tmp_path / "c.parquet"))
    assert [document.text for document in read_documents(str(tmp_path))] == ["one", "two", "three", "four"]
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
