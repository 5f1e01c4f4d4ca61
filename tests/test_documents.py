"""Where text comes from: files, records, the hub, lists in memory; tokenised once on disk, known by its contents."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from limbeck.distill.text import corpus_cache
from limbeck.distill.text import resolve as inputs
from limbeck.distill.text.corpus_cache import cached_corpus, content_digest, corpus_folder
from limbeck.distill.text.documents import SPLITS, read_documents, split_of
from limbeck.distill.text.hub import Hub, rows_of
from limbeck.distill.text.packing import Batch, Corpus, tokenize
from limbeck.distill.text.records import Document
from limbeck.models.errors import InputError
from limbeck.models.tokenizer import Tokenizer, train_tokenizer
from limbeck.tests.helpers import limbeck, make_workshop
from safetensors import safe_open

TEXTS = [f"# {i}\nvalue = {'x' * (i % 17)} + {i}\n" for i in range(90)]
FIELDS = [field.name for field in dataclasses.fields(Batch) if field.default is dataclasses.MISSING]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, 300, tmp_path_factory.mktemp("words"))


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    return make_workshop(tmp_path)


def documents(start: int = 0, stop: int = 90) -> list[Document]:
    return [Document(f"text {i}", TEXTS[i]) for i in range(start, stop)]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


def test_corpus_on_disk_is_the_one_in_memory(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    made, facts = tokenize(documents(), tokenizer), {"content": "of this test"}
    calls = []

    def source() -> Iterator[Document]:
        calls.append(1)
        yield from documents()

    monkeypatch.setattr("limbeck.distill.text.pieces.AT_ONCE", 7)
    first, second = (cached_corpus(facts, source, tokenizer) for _ in range(2))
    assert len(calls) == 1
    for found in (first, second):
        assert isinstance(found.ids, np.memmap) and np.array_equal(found.ids, made.ids)
        assert np.array_equal(found.starts, made.starts) and list(found.names) == list(made.names)
        assert found.names[-1] == "text 89" and found.names[3:5] == ["text 3", "text 4"] and len(found) == 90
        options: dict[str, Any] = {"batch_size": 4, "seq_len": 32, "seed": 3}
        assert same(next(found.train_batches(**options)), next(made.train_batches(**options)))
    with safe_open(corpus_folder(facts) / "ids.safetensors", "pt") as file:  # as any reader sees it
        assert torch.equal(file.get_tensor("ids"), torch.from_numpy(made.ids))
    with pytest.raises(IndexError):
        first.names[90]


def test_cache_appears_whole_or_not_at_all(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))

    def broken() -> Iterator[Document]:
        yield from documents(0, 5)
        raise InputError("data: no more")

    def raced() -> Iterator[Document]:
        yield from documents(0, 5)
        cached_corpus({"content": 1}, lambda: iter(documents(0, 5)), tokenizer)  # another one is faster

    with pytest.raises(InputError, match="no more"):
        cached_corpus({"content": 1}, broken, tokenizer)
    assert list((tmp_path / "tokens").iterdir()) == []
    assert len(cached_corpus({"content": 1}, raced, tokenizer)) == 5
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    left = tmp_path / "tokens" / ".making-old"
    left.mkdir()
    monkeypatch.setattr(corpus_cache, "STALE", -10)
    cached_corpus({"content": 2}, lambda: iter(documents(0, 5)), tokenizer)
    assert not left.exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="LIMBECK_CACHE"):
        cached_corpus({"content": 3}, lambda: iter(documents(0, 5)), tokenizer)


def test_content_and_nothing_else_names_a_text(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("one")
    digests = [content_digest(tmp_path / folder, ["x.txt"]) for folder in ("a", "b", "a")]
    assert len(set(digests)) == 1
    (tmp_path / "a" / "x.txt").write_text("two!")
    assert content_digest(tmp_path / "a", ["x.txt"]) != digests[0]
    with pytest.raises(InputError, match="cannot be read"):
        content_digest(tmp_path / "a", ["y.txt"])


def test_tokens_of_data_are_made_once(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(workshop / "cache"))
    first = inputs.corpus(str(workshop / "text"), "train", workshop / "model")
    monkeypatch.setattr(inputs, "read_documents", None)  # not to be read again
    second = inputs.corpus(str(workshop / "text"), "train", workshop / "model")
    assert isinstance(first, Corpus) and isinstance(second, Corpus) and np.array_equal(first.ids, second.ids)


def test_records_are_read_line_by_line(tmp_path: Path) -> None:
    """A line separator of Unicode within a text is no end of a line; columns are joined; bytes are counted."""
    records = [{"q": f"one\u2028{i}", "a": "two\r"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in records), "utf-8")
    told: list[tuple[int, int]] = []
    found = list(read_documents(str(tmp_path), ("q", "a"), lambda done, total: told.append((done, total))))
    assert [document.text for document in found] == [f"one\u2028{i}\ntwo\r" for i in range(3)]
    assert [document.name for document in found] == [f"a.jsonl:{i}" for i in range(3)]
    size = (tmp_path / "a.jsonl").stat().st_size
    assert told[-1] == (size, size) and told == sorted(told)
    (tmp_path / "half.jsonl").write_text('{"text": "a\\ud800b"}')
    assert [document.text for document in read_documents(str(tmp_path / "half.jsonl"))] == ["a?b"]
    (tmp_path / "b.parquet").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="no Parquet"):
        list(read_documents(str(tmp_path / "b.parquet")))
    with pytest.raises(InputError, match="has the columns 'q', 'a'; expected a column 'text'"):
        list(read_documents(str(tmp_path / "a.jsonl")))
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"n": [1]}).to_parquet(str(tmp_path / "b.parquet"))
    with pytest.raises(InputError, match="has the columns 'n'; expected a column 'text'"):
        list(read_documents(str(tmp_path / "b.parquet")))
    with pytest.raises(InputError, match="no column 'body'; it has n"):
        list(read_documents(str(tmp_path / "b.parquet"), ("body",)))


COMMIT = "0123456789" * 4


@pytest.mark.parametrize("streaming", (False, True))
def test_hub(streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own loader, on a data set in a folder in the place of the hub's."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "train.jsonl").write_text("".join(f'{{"body": "{i}"}}\n' for i in range(9)))
    loaded = []
    load = datasets.load_dataset

    def local(name: str, config: str | None, **options: Any) -> Any:
        loaded.append((name, config, options.pop("revision")))
        return load(str(tmp_path / name), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    path = f"hf:owner/name@{COMMIT}"
    told: list[tuple[int, int]] = []
    found = list(read_documents(path, ("body",), lambda *done: told.append(done), streaming=streaming, limit=5))
    assert [document.text for document in found] == list("01234")
    assert found[3].name == "owner/name::train:3" and told[-1] == (5, 5) and loaded == [("owner/name", None, COMMIT)]
    with pytest.raises(InputError, match="'text'"):
        list(read_documents(path, streaming=streaming, limit=5))
    with pytest.raises(InputError, match="cannot be loaded"):
        list(read_documents(f"hf:owner/other@{COMMIT}", ("body",), limit=5))


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    assert Hub.parse("hf:a/b") == Hub("a/b") and Hub.parse("hf:a/b:c") == Hub("a/b", None, "c")
    assert Hub.parse("hf:a/b@v1:c:test") == Hub("a/b", "v1", "c", "test")
    assert Hub.parse("hf:a/b::test") == Hub("a/b", None, None, "test")
    for name in ("hf:a/b@v1:c:test", "hf:a/b", "hf:a/b::test"):
        assert Hub.parse(Hub.parse(name).text) == Hub.parse(name)
    for wrong in ("hf:a", "hf:a/b:c:d:e", "hf:a/b/c", "hf:"):
        with pytest.raises(InputError, match="OWNER/NAME"):
            Hub.parse(wrong)
    assert Hub.parse(f"hf:a/b@{COMMIT}").resolved().revision == COMMIT
    with pytest.raises(InputError, match="does not tell its commit"):
        Hub.parse("hf:a/b").resolved()  # the tests have no network

    class Info:
        sha = COMMIT

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, revision: Info())
    assert Hub.parse("hf:a/b:c").resolved().text == f"hf:a/b@{COMMIT}:c:train"


def test_names_of_files_that_are_not_utf8(workshop: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each is a document of a name of its own that can be hashed and written; other names stay, and so do splits."""
    (folder := tmp_path / "odd").mkdir()
    names = [b"n\xff%d.txt" % number for number in range(8)] + [b"n\xff.txt", rb"n\xff\xff.txt", b"n\xff\\xff.txt"]
    names += ["größe.txt".encode(), rb"a\b.txt", b"z\xfe.bin"]
    for number, name in enumerate(names):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text(f"text {number}\n" * 40)
    found = {document.name: document.text for document in read_documents(str(folder))}
    assert len(found) == len(names) - 1 and {r"n\xff0.txt", "größe.txt", r"a\b.txt"} <= found.keys()
    assert all(name.encode() and split_of(name) in SPLITS for name in found)
    small = ["tokens=256", "seq_len=32", "batch=2", "details.prompts=0", "details.resamples=20", "split=train"]
    code, _, err = limbeck("evaluate", f"teacher={workshop / 'model'}", f"student.s={workshop / 'model'}",
                           f"data={folder}", f"output={tmp_path / 'gap'}", *small)  # fmt: skip
    assert code == 0, err
    assert r"z\xfe.bin" in caplog.text  # what was skipped
    windows = json.loads((tmp_path / "gap" / "gap.json").read_text())["worst"]["s"]
    assert windows and {window["document"] for window in windows} <= found.keys()


def test_a_list_of_texts_is_data(workshop: Path) -> None:
    """Each text a document, empty and equal ones left out; splits by its name, as for files; nothing on disk."""
    texts = [*TEXTS, "", TEXTS[0]]
    named = list(inputs.documents(texts, "all"))
    assert [document.text for document in named] == list(dict.fromkeys(TEXTS))
    assert named[3] == Document("text-3", TEXTS[3])
    train = inputs.corpus(texts, "train", workshop / "model")
    assert isinstance(train, Corpus) and isinstance(train.ids, np.ndarray) and not isinstance(train.ids, np.memmap)
    assert list(train.names) == [document.name for document in named if split_of(document.name) == "train"]
    assert str(inputs.data_input(texts)).startswith("texts:") and inputs.data_input(texts) != inputs.data_input(TEXTS)
    rows = inputs.sample(texts, "all", workshop / "model", tokens=64, seq_len=16, batch=2, seed=0)
    assert sum(len(batch.labels) for batch in rows) == 4
    with pytest.raises(InputError, match="split 'test'"):
        inputs.corpus(TEXTS[:1], "test", workshop / "model")


def test_what_breaks_on_the_way_is_said() -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"text": "a"}
        raise ConnectionError("gone\nfar")

    rows = rows_of(broken(), "hf:a/b")
    assert next(rows) == {"text": "a"}
    with pytest.raises(InputError, match=r"hf:a/b cannot be read at row 1: gone$"):
        next(rows)


def test_a_folder_within_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b/c", ".d"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.txt").write_text("text of " + name)
    shut, scandir = {".d"}, os.scandir

    def refusing(place: Any) -> Any:
        if os.path.basename(place) in shut:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    assert [document.text for document in read_documents(str(tmp_path))] == ["text of a", "text of b/c"]
    shut.add("c")
    with pytest.raises(InputError, match=r"^data: .*/b/c cannot be read: Permission denied"):
        list(read_documents(str(tmp_path)))


def test_text_and_jsonl_are_read_without_datasets(tmp_path: Path) -> None:
    """Which takes a second to import."""
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    code = (
        "import sys; from limbeck.distill.text.resolve import documents;"
        f"assert len([*documents({str(tmp_path)!r}, 'all'), *documents(['x'], 'all')]) == 3;"
        "next(documents('stdlib', 'all')); assert not {'datasets', 'pyarrow', 'yaml'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
