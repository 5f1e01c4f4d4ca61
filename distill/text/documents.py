"""Where text comes from: the standard library, files and folders, and data sets of the Hugging Face hub; which split a
document is in. Everything is read document by document, so that memory holds what is worked on and not the whole text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...models.errors import InputError

SPLITS = ("train", "validation", "test")
SUFFIXES = (".py", ".txt", ".md", ".rst", ".jsonl", ".parquet")  # what is read of a folder
STDLIB, HUB = "stdlib", "hf:"
COLUMNS = ("text",)

OnProgress = Callable[[int, int], None]  # how much is read, of how much in all (0: not known); bytes of files, or rows


class EmptySplit(InputError):
    """A split that no document falls in."""


@dataclasses.dataclass(frozen=True)
class Document:
    name: str
    text: str


def split_of(name: str) -> str:
    """The split of a document, by the sha256 of its name: 90% train, 5% validation, 5% test.

    By name and not by content: a library's file differs a little from version to version, and must not be in one
    version's training text and in another's test."""
    number = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100
    return "train" if number < 90 else "validation" if number < 95 else "test"


def of_split(documents: Iterable[Document], split: str, where: str) -> Iterator[Document]:
    """The documents of a split ("all" for every one). Raises InputError at the end where there are none."""
    if split not in (*SPLITS, "all"):
        raise InputError(f"data: split {split!r} is unknown; known: {', '.join(SPLITS)}, all")
    seen = kept = 0
    for seen, document in enumerate(documents, 1):  # noqa: B007 - counted
        if split == "all" or split_of(document.name) == split:
            kept += 1
            yield document
    if not kept:
        raise EmptySplit(
            f"{where}: no document falls in the split {split!r} ({seen} in all); give more text or split=all"
        )


def unique(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents with text, each text once; the first name counts."""
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.sha256(document.text.encode()).digest()
        if document.text and digest not in seen:
            seen.add(digest)
            yield document


def read_documents(
    path: str,
    columns: Sequence[str] = COLUMNS,
    on_progress: OnProgress | None = None,
    *,
    streaming: bool = False,
    limit: int = 0,
) -> Iterator[Document]:
    """The documents, each text once, of `stdlib`, of a data set of the hub (see `Hub`), of a file or of a folder.

    Raises InputError where it is missing, empty, unreadable or not UTF-8.
    """
    if path == STDLIB:
        documents = stdlib_files(on_progress)
    elif path.startswith(HUB):
        documents = Hub.parse(path, streaming=streaming, limit=limit).documents(columns, on_progress)
    else:
        documents = file_documents(Path(path).expanduser(), columns, on_progress)
    return unique(documents)


def stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_names() -> list[str]:
    root, apart = stdlib_root(), {"site-packages", "dist-packages", "__pycache__"}
    files = (path for path in root.rglob("*.py") if path.is_file() and os.access(path, os.R_OK))
    names = sorted(path.relative_to(root).as_posix() for path in files)
    return [name for name in names if apart.isdisjoint(name.split("/"))]


def stdlib_files(on_progress: OnProgress | None = None) -> Iterator[Document]:
    """The standard library's sources of the running Python: every .py file in UTF-8."""
    names = stdlib_names()
    for number, name in enumerate(names, 1):
        try:
            yield Document(name, (stdlib_root() / name).read_bytes().decode())
        except (OSError, UnicodeDecodeError):
            continue
        if on_progress is not None:
            on_progress(number, len(names))


def file_documents(
    path: Path, columns: Sequence[str] = COLUMNS, on_progress: OnProgress | None = None
) -> Iterator[Document]:
    """The text of a file, or of every text file below a folder (.jsonl and .parquet: a document for each record, its
    columns one after another with a line between).

    Raises InputError where the path is missing, empty, unreadable or not UTF-8.
    """
    files = text_files(path)
    base = path if path.is_dir() else path.parent
    total = sum(file.stat().st_size for file in files)
    before, some = 0, False
    for file in files:
        name = file.relative_to(base).as_posix()
        for document, done in RECORDS.get(file.suffix, whole_file)(file, name, columns):
            some = some or bool(document.text)
            yield document
            if on_progress is not None:
                on_progress(before + done, total)
        before += file.stat().st_size
        if on_progress is not None:
            on_progress(before, total)
    if not some:
        raise InputError(f"data: {path} holds no text; looked for {', '.join(SUFFIXES)}")


def content_of(path: str, digest: Callable[[Path, list[str]], str]) -> str:
    """What stands for the text of a path, so that equal contents are known as equal: `digest` of the files below a
    folder, or the hub's name with its commit."""
    if path.startswith(HUB):
        return Hub.parse(path).resolved().text
    if path == STDLIB:
        return digest(stdlib_root(), stdlib_names())
    place = Path(path).expanduser()
    base = place if place.is_dir() else place.parent
    return digest(base, [file.relative_to(base).as_posix() for file in text_files(place)])


def text_files(path: Path) -> list[Path]:
    """The files that `file_documents` reads, in its order."""
    if not path.exists():
        raise InputError(
            f"data: {path} does not exist; expected a folder, a text, .jsonl or .parquet file, a mixture's .yaml,"
            " hf:OWNER/NAME, or a name"
        )
    if not path.is_dir():
        return [path]
    with readable(path):
        return sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in SUFFIXES)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what the system refuses to read into InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"data: {path} cannot be read: {error.strerror}") from None


def decoded(path: Path, content: bytes, begin: int = 0) -> str:
    """The text of a file's bytes from `begin` on. Raises InputError where it is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"data: {path} is not UTF-8 (byte {begin + error.start}); convert it") from None


def whole_file(path: Path, name: str, columns: Sequence[str]) -> Iterator[tuple[Document, int]]:
    with readable(path):
        content = path.read_bytes()
    yield Document(name, decoded(path, content)), len(content)


def json_lines(path: Path, name: str, columns: Sequence[str]) -> Iterator[tuple[Document, int]]:
    """A document for each line with a record, numbered by the records, and the bytes read so far. (The reader of
    `datasets` takes 8 times as long, makes dates of texts that look like one, and names no line.)"""
    with readable(path), path.open("rb") as stream:
        done = count = 0
        for number, line in enumerate(stream, 1):
            text = decoded(path, line, done)
            done += len(line)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError:
                raise InputError(f"data: {path}, line {number} is no JSON") from None
            record = record if isinstance(record, dict) else {}
            yield Document(f"{name}:{count}", joined(record, columns, f"{path}, line {number}")), done
            count += 1


def joined(record: dict[str, Any], columns: Sequence[str], where: str) -> str:
    """The texts of a record's columns, a line between. Raises InputError where one is missing or no text."""
    for column in columns:
        if not isinstance(record.get(column), str):
            raise InputError(f"data: {where} has no {column!r} that is a text")
    text = "\n".join(record[column] for column in columns)
    return text.encode("utf-8", "replace").decode()  # JSON may spell half of a surrogate pair


def parquet_rows(path: Path, name: str, columns: Sequence[str]) -> Iterator[tuple[Document, int]]:
    """A document for each row, and no bytes; read in pieces, and nothing is copied to a cache."""
    import datasets

    try:
        table = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except Exception as error:
        raise InputError(f"data: {path} is no Parquet file: {first_line(error)}") from None
    check_columns(columns, table.column_names or (), str(path))
    for number, record in enumerate(rows_of(table.select_columns(list(columns)), str(path))):
        yield Document(f"{name}:{number}", joined(record, columns, f"{path}, row {number}")), 0


RECORDS = {".jsonl": json_lines, ".parquet": parquet_rows}


def rows_of(table: Iterable[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    """The rows of a table of `datasets`, which raises anything. Raises InputError."""
    number = 0
    try:
        for number, record in enumerate(table, 1):  # noqa: B007 - rows read before one breaks
            yield record
    except Exception as error:  # a broken file, a network that has gone
        raise InputError(f"data: {where} cannot be read at row {number}: {first_line(error)}") from None


def check_columns(columns: Sequence[str], known: Sequence[str], where: str) -> None:
    for column in columns:
        if column not in known:
            raise InputError(f"data: {where} has no column {column!r}; it has {', '.join(known)}")


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclasses.dataclass(frozen=True)
class Hub:
    """A data set of the hub, written hf:OWNER/NAME[@REVISION][:CONFIG][:SPLIT]; `streaming` downloads only what is
    read, and `limit` is the number of rows that are (0: all)."""

    name: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    limit: int = 0

    @classmethod
    def parse(cls, text: str, **options: Any) -> Hub:
        """Raises InputError where the text is none."""
        parts = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([\w.+-]*))?(?::([\w.+-]+))?", text)
        if parts is None:
            raise InputError(f"data={text}: expected hf:OWNER/NAME[@REVISION][:CONFIG][:SPLIT]")
        name, revision, config, split = parts.groups()
        return cls(name, revision, config or None, split or "train", **options)

    @property
    def text(self) -> str:
        """As `parse` reads it."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{HUB}{self.name}{revision}:{self.config or ''}:{self.split}"

    def resolved(self) -> Hub:
        """With the commit that the revision stands for now, so that the same name later is the same data. Raises
        InputError where the hub does not answer; a revision given as a commit needs no answer."""
        if self.revision is not None and re.fullmatch(r"[0-9a-f]{40}", self.revision):
            return self
        import huggingface_hub

        try:
            commit = huggingface_hub.HfApi().dataset_info(self.name, revision=self.revision).sha
        except Exception as error:
            raise InputError(
                f"data={self.text}: the hub does not tell its commit ({first_line(error)}); without a network give a"
                " folder, or name the commit as hf:OWNER/NAME@COMMIT where the data set is in the local cache"
            ) from None
        return dataclasses.replace(self, revision=commit)

    def documents(self, columns: Sequence[str] = COLUMNS, on_progress: OnProgress | None = None) -> Iterator[Document]:
        """Raises InputError where the data set cannot be loaded or has not these columns."""
        import datasets

        try:
            table = datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=self.streaming
            )
        except Exception as error:
            raise InputError(f"data={self.text} cannot be loaded: {first_line(error)}") from None
        if table.column_names is not None:
            check_columns(columns, table.column_names, self.text)
        total = self.limit if self.streaming else min(self.limit or len(table), len(table))
        for number, record in enumerate(rows_of(table, self.text)):
            if self.limit and number >= self.limit:
                break
            yield Document(f"{self.name}:{self.config or ''}:{self.split}:{number}", joined(record, columns, self.text))
            if on_progress is not None:
                on_progress(number + 1, total)
