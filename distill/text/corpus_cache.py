"""Tokenised text on disk: made once, read as mapped memory, known by what it was made of.

A corpus lies in CACHE/tokens/DIGEST, the digest being that of the text's own (a sha256 of the files, a commit of the
hub), the tokenizer's, the split and the columns. The folder appears whole or not at all; processes that make it at the
same time each make their own, and the first one's stays. CACHE is $LIMBECK_CACHE, or ~/.cache/limbeck.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ...models.errors import DiskError, InputError
from ...models.folder import cache_folder, finish_folder, sha256_file, write_json
from ...models.foreign import read_object
from ...models.tensors import refusal, save_tensors
from ...models.tokenizer import Tokenizer
from .encoding import encoded
from .notes import Notes
from .packing import Corpus, Indexed
from .reading import Reading
from .records import Document

FORMAT = 6  # to be raised when what is written for the same facts changes
PARTS = "parts.safetensors"  # only where there are conversations
MAKING = ".making-"  # how unfinished folders' names begin
HEADER = 248  # bytes of the header of ids.safetensors, whose length is known before the number of tokens is
STALE = 2 * 86400  # seconds after which an unfinished folder is nobody's


def content_digest(base: Path, names: Sequence[str]) -> str:
    """The sha256 of files' names and contents. It is taken once: while size and time of change of all of them stay as
    they are, the sum that CACHE/sums has is theirs. Raises InputError where one cannot be read."""
    try:
        stats = [(name, (base / name).stat()) for name in names]
        looks = [(name, status.st_size, status.st_mtime_ns) for name, status in stats]
        mark = hashlib.sha256(json.dumps([str(base.resolve()), looks]).encode()).hexdigest()[:32]
        known = cache_folder() / "sums" / f"{mark}.json"
        with contextlib.suppress(OSError, ValueError, KeyError):
            return read_object(known)["content"]
        sums = {name: sha256_file(base / name) for name in names}
    except OSError as error:
        raise InputError(f"data: {error.filename or base} cannot be read: {error.strerror}") from None
    digest = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    with contextlib.suppress(OSError):  # it is only taken again
        known.parent.mkdir(parents=True, exist_ok=True)
        write_json(known, {"content": digest})
    return digest


def corpus_folder(facts: Mapping[str, Any]) -> Path:
    content = json.dumps({"format": FORMAT, **facts}, sort_keys=True)
    return cache_folder() / "tokens" / hashlib.sha256(content.encode()).hexdigest()[:32]


def write_corpus(
    folder: Path, facts: Mapping[str, Any], documents: Iterable[Document], tokenizer: Tokenizer, reading: Reading,
    notes: Notes,
) -> None:  # fmt: skip
    """Tokenises documents into a folder, the notes beside, which are read last. Raises DiskError where the disk
    refuses."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent)
        with tempfile.TemporaryDirectory(prefix=MAKING, dir=folder.parent, ignore_cleanup_errors=True) as temporary:
            write_tokens(Path(temporary), facts, documents, tokenizer, reading, notes)
            try:
                finish_folder(Path(temporary), folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
    except OSError as error:
        raise DiskError(f"{refusal(error, folder.parent)} (or set LIMBECK_CACHE to another folder)") from None


def write_tokens(
    folder: Path, facts: Mapping[str, Any], documents: Iterable[Document], tokenizer: Tokenizer, reading: Reading,
    notes: Notes,
) -> None:  # fmt: skip
    ends, total, has_chats = [0], 0, False
    names: list[bytes] = []
    with (folder / "ids.safetensors").open("wb") as stream, (folder / PARTS).open("wb") as beside:
        stream.write(bytes(8 + HEADER))
        beside.write(bytes(8 + HEADER))
        for some in encoded(documents, tokenizer, reading, notes):
            stream.write(some.ids.astype("<i4", copy=False).data)
            if some.chat and not has_chats:
                beside.seek(total, os.SEEK_CUR)  # texts so far, whose parts are zeros
                has_chats = True
            if has_chats:
                beside.write(some.parts.data)
            total += len(some.ids)
            if some.last:
                ends.append(total)
                names.append(some.name.encode("utf-8", "surrogateescape"))
        # A safetensors header of fixed length, now that the number of tokens is known: the file is read as any other.
        for file, name, dtype, size in ((stream, "ids", "I32", 4), (beside, "parts", "U8", 1)):
            form = {"dtype": dtype, "shape": [total], "data_offsets": [0, size * total]}
            file.seek(0)
            file.write(HEADER.to_bytes(8, "little") + json.dumps({name: form}).encode().ljust(HEADER))
    if not has_chats:
        (folder / PARTS).unlink()
    tensors = {
        "starts": torch.tensor(ends, dtype=torch.int64),
        "name_ends": torch.tensor([len(name) for name in names], dtype=torch.int64).cumsum(0),
        "names": torch.frombuffer(bytearray(b"".join(names) or b"\0"), dtype=torch.uint8),
    }
    save_tensors(folder / "documents.safetensors", tensors)
    write_json(folder / "corpus.json", {**facts, "documents": len(names), "tokens": total, "notes": list(notes)})


def open_corpus(folder: Path, tokenizer: Tokenizer, reading: Reading) -> Corpus:
    """The corpus in a folder; its tokens are read when they are needed."""
    with safe_open(folder / "documents.safetensors", "np") as file:
        starts, ends, names = (file.get_tensor(name) for name in ("starts", "name_ends", "names"))
    ids = np.memmap(folder / "ids.safetensors", "<i4", "r", 8 + HEADER, (int(starts[-1]),))
    notes = read_object(folder / "corpus.json")["notes"]
    parts = None
    if (folder / PARTS).is_file():
        parts = np.memmap(folder / PARTS, np.uint8, "r", 8 + HEADER, (int(starts[-1]),))
    return Corpus(
        ids, starts, DocumentNames(names, ends), tokenizer.token_bytes, tokenizer.pad_token_id, notes=tuple(notes),
        parts=parts, prompts=reading.prompts, long=reading.long,
    )  # fmt: skip


def cached_corpus(
    facts: Mapping[str, Any],
    documents: Callable[[], Iterator[Document]],
    tokenizer: Tokenizer,
    reading: Reading | None = None,
    notes: Notes | None = None,
) -> Corpus:
    """The corpus that was made of these facts, or is made now of the documents; `notes` are what reading them left to
    say."""
    folder, reading = corpus_folder(facts), reading or Reading()
    if not folder.exists():
        write_corpus(folder, facts, documents(), tokenizer, reading, Notes() if notes is None else notes)
    return open_corpus(folder, tokenizer, reading)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left."""
    for path in folder.glob(f"{MAKING}*"):
        if time.time() - path.stat().st_mtime > STALE:
            shutil.rmtree(path, ignore_errors=True)


class DocumentNames(Indexed[str]):
    """The documents' names, decoded when they are read."""

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text, self.ends = text, ends

    def __len__(self) -> int:
        return len(self.ends)

    def item(self, number: int) -> str:
        begin = self.ends[number - 1] if number else 0
        return self.text[begin : self.ends[number]].tobytes().decode("utf-8", "surrogateescape")
