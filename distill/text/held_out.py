"""What is held out of text whose documents are too few for every split to have one: a book, or a dozen files."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from .documents import SPLITS, EmptySplit
from .mixture import SourceIds
from .packing import Corpus

ENDS = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}  # of each document, from its begin on


def held_out(corpus: Corpus, split: str, where: str) -> Corpus:
    """A split of all of a source's text: the last 5% of each document are for the test, the 5% before for validation.
    Of conversations, which are kept whole, some, one at least. Raises EmptySplit where that leaves nothing."""
    conversations = corpus.parts is not None
    ranges = whole_documents(corpus, split) if conversations else stretches(corpus, split)
    kept = [number for number, (begin, end) in enumerate(ranges) if end > begin]
    lengths = [ranges[number][1] - ranges[number][0] for number in kept]
    if sum(lengths) < 2:
        raise EmptySplit(f"{where}: {len(corpus)} documents of {corpus.tokens} tokens leave no {split} text; give more")
    how = "the last 5% of each are for the test, the 5% before for validation"
    if conversations:
        how = "some of them are held out"
    note = f"its documents ({len(corpus):,}) do not fall into every split: {how}; {split} has {sum(lengths):,} of"
    return dataclasses.replace(
        corpus,
        ids=SourceIds([corpus.ids[slice(*ranges[number])] for number in kept]),
        parts=None if corpus.parts is None else SourceIds([corpus.parts[slice(*ranges[number])] for number in kept]),
        starts=np.cumsum([0, *lengths]),
        names=[corpus.names[number] for number in kept],
        notes=(*corpus.notes, f"{note} {corpus.tokens:,} tokens"),
    )


def stretches(corpus: Corpus, split: str) -> list[tuple[int, int]]:
    """The places of each document's tokens that are of a split."""
    begins, sizes = corpus.starts[:-1].tolist(), np.diff(corpus.starts).tolist()
    shares = ENDS[split]
    return [
        (begin + int(shares[0] * size), begin + (size if shares[1] == 1 else int(shares[1] * size)))
        for begin, size in zip(begins, sizes, strict=True)
    ]


def whole_documents(corpus: Corpus, split: str) -> list[tuple[int, int]]:
    """The places of the documents of a split, empty for the others: of those in the order of their names' sums the
    last twentieth (one at least) is for the test, as much before it for validation."""
    order = sorted(range(len(corpus)), key=lambda number: hashlib.sha256(corpus.names[number].encode()).digest())
    few = max(1, len(corpus) // 20)
    parts = dict(zip(reversed(SPLITS), (order[-few:], order[-2 * few : -few], order[: -2 * few]), strict=True))
    mine = set(parts[split])
    return [
        (int(corpus.starts[number]), int(corpus.starts[number + 1]) if number in mine else int(corpus.starts[number]))
        for number in range(len(corpus))
    ]
