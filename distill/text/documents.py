"""Where text comes from: the standard library, files and folders, and data sets of the Hugging Face hub; which split a
document is in. Everything is read document by document, so that memory holds what is worked on and not the whole text.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ...models.errors import InputError
from ...models.foreign import own_path, read_object
from .formats import READERS, is_prose, kind_of, readable, rows_of_file
from .hub import HUB, Hub
from .notes import Notes, printable
from .records import Document, OnProgress, known_shape, row_document

SPLITS = ("train", "validation", "test")
STDLIB = "stdlib"


class EmptySplit(InputError):
    """A split that no document falls in."""


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
        digest = hashlib.sha256(document.content.encode()).digest()
        if (document.text or document.chat is not None) and digest not in seen:
            seen.add(digest)
            yield document


def read_documents(
    path: str,
    columns: Sequence[str] = (),
    on_progress: OnProgress | None = None,
    *,
    streaming: bool = False,
    limit: int = 0,
    notes: Notes | None = None,
    takes: Callable[[str], bool] | None = None,
) -> Iterator[Document]:
    """The documents, each text once, of `stdlib`, of a data set of the hub (see `Hub`), of a file or of a folder; what
    is left out is counted in `notes`. Of those whose names it `takes`, if told: others hide no equal text.

    Raises InputError where it is missing, empty, unreadable or not UTF-8.
    """
    if path == STDLIB:
        check_records(path, [], columns)
        documents = stdlib_files(on_progress)
    elif path.startswith(HUB):
        documents = Hub.parse(path, streaming=streaming, limit=limit).documents(columns, on_progress, notes)
    else:
        documents = file_documents(own_path(path), columns, on_progress, notes)
    return unique(document for document in documents if takes is None or takes(document.name))


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
    path: Path,
    columns: Sequence[str] = (),
    on_progress: OnProgress | None = None,
    notes: Notes | None = None,
) -> Iterator[Document]:
    """The text of a file, or of every text file below a folder, of a file of records that of each of them.

    Raises InputError where the path is missing, empty, unreadable or not UTF-8, or a record holds nothing known.
    """
    notes = Notes() if notes is None else notes
    files = text_files(path, notes)
    check_records(path, files, columns)
    base = path if path.is_dir() else path.parent
    total = sum(file.stat().st_size for file in files)
    before, some = 0, False
    for file in files:
        name = printable(file.relative_to(base).as_posix())
        for number, row in enumerate(rows_of_file(file, columns)):
            if row.alone and path.is_dir() and not known_shape(row.value, columns):
                notes.add("JSON files of one object that is no record are skipped", str(file))
                continue
            document = row_document(row, name, number, columns, notes)
            if document is not None:
                some = some or bool(document.text)
                yield document
            if on_progress is not None:
                on_progress(before + row.done, total)
        before += file.stat().st_size
        if on_progress is not None:
            on_progress(before, total)
    if not some:
        raise InputError(f"data: {path} holds no text; looked for {', '.join(READERS)}, plain, .gz or .zst")


def check_records(path: Path | str, files: Sequence[Path], columns: Sequence[str]) -> None:
    """Raises InputError where columns are named and all is plain text, which has none."""
    if columns and all(map(is_prose, files)):
        raise InputError(f"data: {path} is plain text, without columns; leave columns={list(columns)} out")


def content_of(path: str, digest: Callable[[Path, list[str]], str]) -> str:
    """What stands for the text of a path, so that equal contents are known as equal: `digest` of the files below a
    folder, or the hub's name with its commit."""
    if path.startswith(HUB):
        return Hub.parse(path).resolved().text
    if path == STDLIB:
        return digest(stdlib_root(), stdlib_names())
    place = own_path(path)
    base = place if place.is_dir() else place.parent
    return digest(base, [file.relative_to(base).as_posix() for file in text_files(place)])


def text_files(path: Path, notes: Notes | None = None) -> list[Path]:
    """The files that `file_documents` reads, in its order; of a folder that `datasets` has saved its parts, of several
    splits the one called train."""
    if not path.exists():
        raise InputError(
            f"data: {path} does not exist; expected a folder, a file of text or records ({', '.join(READERS)}, plain,"
            " .gz or .zst), a mixture's .yaml, hf:OWNER/NAME, or a name"
        )
    if not path.is_dir():
        return [path]
    with readable(path):
        if (path / "dataset_dict.json").is_file():
            splits = sorted(each.name for each in path.iterdir() if (each / "dataset_info.json").is_file())
            if "train" not in splits:
                raise InputError(f"data: {path} is a saved data set without a split train; name one of its folders:"
                                 f" {', '.join(splits)}")  # fmt: skip
            path = path / "train"
        files = sorted(file for file in files_below(path) if file.is_file() and saved_part(file))
    if notes is not None:
        for file in files:
            if kind_of(file) not in READERS and not is_hidden(file.relative_to(path)):
                notes.add(f"files of other kinds than {', '.join(READERS)} are skipped", str(file))
    return [file for file in files if kind_of(file) in READERS]


def is_hidden(name: Path) -> bool:
    """Whether a file is hidden by its path below a folder; where that folder lies itself does not count."""
    return any(part.startswith((".", "__")) for part in name.parts)


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, also in folders that are linked into it. A folder that is reached twice, as one is that
    has a link to itself in it, is read once, under its own name if it has one below the folder. Raises OSError for one
    that cannot be read, and is not hidden: its text would be missing without a word."""

    def unread(error: OSError) -> None:
        if not is_hidden(Path(os.path.relpath(error.filename, folder))):
            raise error

    seen = set(map(str, Path(os.path.realpath(folder)).parents))  # to which a link is a loop, too
    waiting = [str(folder)]
    while waiting:
        links: list[str] = []
        for root in waiting:
            for place, folders, names in os.walk(root, onerror=unread):
                real = os.path.realpath(place)
                if real in seen:
                    folders.clear()
                    continue
                seen.add(real)
                links += [link for name in folders if os.path.islink(link := os.path.join(place, name))]
                yield from (Path(place, name) for name in names)
        waiting = sorted(links)


def has_links(folder: Path) -> bool:
    """Whether folders are linked into a folder, at any depth."""
    return any(os.path.islink(os.path.join(place, name)) for place, names, _ in os.walk(folder) for name in names)


def saved_part(file: Path) -> bool:
    """False for what stands beside the parts of a folder that `datasets` has saved: its own notes, and its caches."""
    state = file.parent / "state.json"
    if not (state.is_file() and (file.parent / "dataset_info.json").is_file()):
        return file.name != "dataset_dict.json"
    try:
        parts = read_object(state)["_data_files"]
        return file.name in [part["filename"] for part in parts]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"data: {state} does not say which files the saved data set has; save it anew") from None
