"""Which texts the earlier sources of a mixture have, so that a later one leaves them out: else a text could be in the
train split of one and in the test split of another, by two names. The sha256 of a source's texts are kept sorted in
CACHE/texts and looked up there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...models.errors import DiskError, InputError
from ...models.folder import cache_folder
from ...models.tensors import refusal
from .corpus_cache import FORMAT
from .notes import Notes
from .records import Document

DIGEST = np.dtype("S32")  # bytes of a sha256


@dataclasses.dataclass(frozen=True)
class EarlierTexts:
    """The texts of some sources: `key` stands for their contents, `digests` are sorted [texts], a source each."""

    key: str = ""
    digests: tuple[np.ndarray, ...] = dataclasses.field(default=(), compare=False)

    def __contains__(self, document: Document) -> bool:
        wanted = np.array(digest_of(document), DIGEST)
        for digests in self.digests:
            place = int(np.searchsorted(digests, wanted))
            if place < len(digests) and digests[place] == wanted:
                return True
        return False

    def without(self, documents: Iterable[Document], notes: Notes | None, where: str) -> Iterator[Document]:
        """The documents whose text no earlier source has. Raises InputError at the end where that leaves none."""
        kept = left_out = 0
        for document in documents:
            if document in self:
                left_out += 1
                if notes is not None:
                    notes.add("texts are left out, since an earlier source of the mixture has them", document.name)
            else:
                kept += 1
                yield document
        if left_out and not kept:
            raise InputError(f"{where}: an earlier source of the mixture has all of its texts; leave this one out")


def digest_of(document: Document) -> bytes:
    return hashlib.sha256(document.content.encode()).digest()


def earlier_texts(sources: Iterable[tuple[Mapping[str, Any], Callable[[], Iterable[Document]]]]) -> EarlierTexts:
    """The texts of sources, each given by what stands for its contents and by what reads it, which is called once while
    the cache has its texts. Raises DiskError where the disk refuses."""
    keys, digests = [], []
    for facts, documents in sources:
        content = json.dumps({"format": FORMAT, **facts}, sort_keys=True)
        keys.append(hashlib.sha256(content.encode()).hexdigest()[:32])
        path = cache_folder() / "texts" / f"{keys[-1]}.npy"
        if not path.is_file():
            found = np.frombuffer(b"".join(map(digest_of, documents())), DIGEST)
            try:
                write_digests(path, np.unique(found))
            except OSError as error:
                raise DiskError(f"{refusal(error, path.parent)} (or set LIMBECK_CACHE to another folder)") from None
        digests.append(np.load(path, mmap_mode="r" if path.stat().st_size > 2**20 else None))
    return EarlierTexts(" ".join(keys), tuple(digests))


def write_digests(path: Path, digests: np.ndarray) -> None:
    """A file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as stream:
        try:
            np.save(stream, digests)
            stream.flush()
            os.replace(stream.name, path)
        except BaseException:
            os.unlink(stream.name)
            raise
