"""Several corpora read in stated shares, row by row: any row can be sought, and nothing depends on who reads it.

Of every BLOCK rows each source gives its share, spread evenly over them, so that a run of any length sees the mixture;
where in the block follows from the seed and the block's number. A source's own rows come as `Corpus.train_batches` has
them: an epoch permutes its documents and then its rows, and the next begins where it ends, not to the batch but to the
row. All rows have the same number of tokens, so shares of rows are shares of tokens. Source of such mixtures: arXiv
2508.14444 (70% reasoning data, 30% of pretraining's).
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import fnmatch
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import PurePath

import numpy as np
import torch

from ...models.errors import InputError
from .packing import AnyRows, Batch, Corpus, Ids, Indexed, Sample, epoch_rows, joined, sampled_rows
from .reading import Reading

BLOCK = 1000


@dataclasses.dataclass(frozen=True)
class Source(Reading):
    """Where text comes from, and its share. `path` is `stdlib`, a file, a folder or hf:OWNER/NAME[...]; `columns` are
    those of a record that make its text; `epochs` is how often it may be read at most (0: any number). Of its documents
    those count whose name (a path below the folder) is like one of `include`, where there are any, and like none of
    `exclude`; `*` in a pattern stands for any text, with slashes in it or not. Of the hub, `streaming`
    downloads only what is read, and `limit` rows are (0: all)."""

    path: str
    weight: float = 1.0
    epochs: float = 0.0
    columns: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    streaming: bool = False
    limit: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.weight < math.inf and self.epochs >= 0 and self.limit >= 0):
            raise InputError(
                f"data: source {self.path}: weight ({self.weight}) must be more than 0, epochs ({self.epochs}) and"
                f" limit ({self.limit}) 0 or more"
            )
        if (self.streaming or self.limit) and not self.path.startswith("hf:"):
            raise InputError(f"data: source {self.path}: streaming and limit are for hf:OWNER/NAME; leave them out")
        if self.streaming and not self.limit:
            raise InputError(f"data: source {self.path}: streaming needs limit=ROWS, or it would never end")

    def rows(self, corpus: Corpus, seq_len: int) -> int:
        """Rows of an epoch of its corpus. Raises InputError where there is none."""
        if (count := corpus.rows(seq_len)) < 1:
            raise InputError(
                f"data: source {self.path}: {corpus.tokens} tokens do not fill one row of {seq_len}; give more text"
            )
        return count

    def takes(self, name: str) -> bool:
        """Whether a document of that name counts."""
        like = functools.partial(fnmatch.fnmatchcase, name)
        return (not self.include or any(map(like, self.include))) and not any(map(like, self.exclude))


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Corpora with their sources' shares. Documents are numbered through all of them."""

    sources: tuple[Source, ...]
    corpora: tuple[Corpus, ...]

    @classmethod
    def of(cls, sources: Sequence[Source], corpora: Sequence[Corpus]) -> Mixture:
        first = np.cumsum([0, *(len(corpus) for corpus in corpora)])
        numbered = [
            dataclasses.replace(corpus, first_document=int(number))
            for corpus, number in zip(corpora, first, strict=False)
        ]
        return cls(tuple(sources), tuple(numbered))

    @property
    def tokens(self) -> int:
        return sum(corpus.tokens for corpus in self.corpora)

    def __len__(self) -> int:
        return sum(len(corpus) for corpus in self.corpora)

    def shares(self) -> list[int]:
        """Rows of a block that each source gives. Raises InputError where a weight is too small to give one."""
        weights = np.array([source.weight for source in self.sources])
        exact = weights / weights.sum() * BLOCK
        shares = np.floor(exact).astype(int)
        # Rows that rounding down has left over go to the largest remainders.
        shares[np.argsort(shares - exact, kind="stable")[: BLOCK - int(shares.sum())]] += 1
        for source, rows in zip(self.sources, shares, strict=True):
            if rows == 0:
                raise InputError(
                    f"data: source {source.path} has weight {source.weight} of {weights.sum():g}, less than one row in"
                    f" {BLOCK}; give it more, or leave it out"
                )
        return shares.tolist()

    def block(self, number: int, seed: int) -> np.ndarray:
        """The source of each row of a block [BLOCK]: a source's rows lie one in each of its equal parts of the block,
        at a place drawn from the seed."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        shares = self.shares()
        drawn = [torch.rand(rows, generator=generator, dtype=torch.float64).numpy() for rows in shares]
        places = np.concatenate([(np.arange(rows) + shift) / rows for rows, shift in zip(shares, drawn, strict=True)])
        return np.repeat(np.arange(len(shares)), shares)[np.argsort(places, kind="stable")]

    def rows(self, seq_len: int) -> list[int]:
        """Rows of an epoch of each source. Raises InputError where one has none."""
        return [source.rows(corpus, seq_len) for source, corpus in zip(self.sources, self.corpora, strict=True)]

    def batches_per_epoch(self, batch_size: int, seq_len: int) -> int:
        """How many whole batches the sources fill together. Raises InputError where one is too small for a row."""
        self.shares()
        return sum(self.rows(seq_len)) // batch_size

    def check_epochs(self, plan: Sequence[tuple[int, int]]) -> list[float]:
        """How often each source is read in a plan of (rows, seq_len) one after another. Raises InputError where that
        is more than its `epochs`."""
        epochs = np.zeros(len(self.sources))
        for rows, seq_len in plan:
            epochs += rows * np.array(self.shares()) / BLOCK / np.array(self.rows(seq_len))
        for source, times in zip(self.sources, epochs.tolist(), strict=True):
            if source.epochs and times > source.epochs + 1e-9:
                raise InputError(
                    f"data: source {source.path} would be read {times:.2f} times, its epochs are {source.epochs:g};"
                    " give more of its text, a smaller weight, or fewer steps"
                )
        return epochs.tolist()

    def reading(self, plan: Sequence[tuple[int, int]]) -> list[tuple[str, ...]]:
        """Of each source: path, share, documents, tokens, and how often a plan reads it; see `check_epochs`."""
        rows = zip(self.sources, self.shares(), self.corpora, self.check_epochs(plan), strict=True)
        return [
            (source.path, f"{share / BLOCK:.1%}", f"{len(corpus):,}", f"{corpus.tokens:,}", f"{epochs:.2f}")
            for source, share, corpus, epochs in rows
        ]

    def train_batches(
        self, *, batch_size: int, seq_len: int, seed: int, start: int = 0, repack: bool = True
    ) -> Iterator[Batch]:
        """Batches without end, from number `start` on. Raises InputError where a source does not fill one row."""
        sizes = self.rows(seq_len)
        shares = np.array(self.shares())
        epochs: dict[int, tuple[int, AnyRows, np.ndarray]] = {}
        row = start * batch_size
        block, place = divmod(row, BLOCK)
        order = self.block(block, seed)
        # Rows that each source gave before: its share of every whole block, and what the one that is begun has read.
        read = block * shares + np.bincount(order[:place], minlength=len(shares))
        while True:
            parts = []
            for _ in range(batch_size):
                if place == BLOCK:
                    block, place = block + 1, 0
                    order = self.block(block, seed)
                source = int(order[place])
                epoch, number = divmod(int(read[source]), sizes[source])  # a source's epochs are its own
                if source not in epochs or epochs[source][0] != epoch:
                    own = seed + (source << 32)
                    epochs[source] = (epoch, *epoch_rows(self.corpora[source], seq_len, own, epoch, repack))
                _, packing, shuffled = epochs[source]
                parts.append(packing.batch(shuffled[number : number + 1]))
                place, read[source] = place + 1, read[source] + 1
            yield joined(parts)

    def sample(
        self, *, batch_size: int, seq_len: int, seed: int | None = None, max_tokens: int | None = None
    ) -> Sample:
        """Rows for measuring, of each source its share of `max_tokens` (at least a row)."""
        most = [None if max_tokens is None else max_tokens * share // BLOCK for share in self.shares()]
        parts = [sampled_rows(corpus, seq_len, seed, own) for corpus, own in zip(self.corpora, most, strict=True)]
        return Sample(parts, batch_size)


Text = Corpus | Mixture


def whole(text: Text) -> Corpus:
    """All documents as one corpus; those of a mixture are named by their source, too, and read where they lie."""
    if not isinstance(text, Mixture):
        return text
    ends = np.cumsum([0, *(corpus.tokens for corpus in text.corpora)])
    starts = [corpus.starts[:-1] + end for corpus, end in zip(text.corpora, ends, strict=False)]
    names = SourceNames(labels(text.sources), [corpus.names for corpus in text.corpora])
    first, ids = text.corpora[0], SourceIds([corpus.ids for corpus in text.corpora])
    return Corpus(ids, np.concatenate([*starts, ends[-1:]]), names, first.token_bytes, first.pad_token_id)


def labels(sources: Sequence[Source]) -> list[str]:
    """What each source is called: the last part of its path; where that of others is the same, with the folder above
    if this differs, and with its number in the mixture if nothing does."""
    paths = [PurePath(source.path) for source in sources]
    above: dict[str, set[str]] = collections.defaultdict(set)
    for path in paths:
        above[path.name].add(path.parent.name)
    named = [
        f"{path.name} ({path.parent.name})" if len(above[path.name]) > 1 and path.parent.name else path.name
        for path in paths
    ]
    times = collections.Counter(named)
    return [f"{label}#{number}" if times[label] > 1 else label for number, label in enumerate(named, 1)]


class SourceIds:
    """The tokens of several corpora as those of one."""

    def __init__(self, parts: Sequence[Ids]) -> None:
        self.parts, self.starts = parts, [0, *itertools.accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, places: slice, /) -> np.ndarray:
        start, stop, step = places.indices(len(self))
        if step != 1:
            raise IndexError(f"tokens are read without a step, not by {step}")
        pairs = zip(self.parts, self.starts, strict=False)
        return np.concatenate([part[max(start - begin, 0) : max(stop - begin, 0)] for part, begin in pairs])


class SourceNames(Indexed[str]):
    """The documents' names of several corpora as those of one, each after its source's."""

    def __init__(self, sources: Sequence[str], parts: Sequence[Sequence[str]]) -> None:
        self.sources, self.parts, self.ends = sources, parts, list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def item(self, number: int) -> str:
        source = bisect.bisect_right(self.ends, number)
        return f"{self.sources[source]}/{self.parts[source][number - self.ends[source]]}"
