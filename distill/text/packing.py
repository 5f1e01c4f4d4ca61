"""Text to batches: documents, a split that does not leak, packed rows with the documents' boundaries kept.

A document is `<s> tokens </s>`. An epoch permutes the documents, lays them end to end and cuts rows of T tokens;
where a document is cut its rest begins the next row, with an empty state. Which batch comes when follows from the seed
alone, so that any batch can be sought by its number. Shapes: [B] rows, [T] tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...models.errors import InputError
from ...models.tokenizer import Tokenizer
from .conversations import KIND, PROMPT
from .encoding import encoded
from .notes import Notes
from .reading import Reading
from .records import Document

IGNORED = -100
LONGEST_ROW = 2**20  # tokens of a row where the text has fewer
Item = TypeVar("Item", covariant=True)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of packed tokens. `labels` are the next tokens, -100 where there is none in the same document; `seq_idx`
    numbers the documents along a row; `n_bytes` are the UTF-8 bytes that a label stands for; `doc_id` numbers the
    documents of the corpus; `weights` are those of the labels in the loss, where not all are 1; `parts` are what of a
    conversation a label is (`conversations.PARTS`), where there are any. All [B, T]."""

    input_ids: Tensor
    labels: Tensor
    seq_idx: Tensor
    n_bytes: Tensor
    doc_id: Tensor
    weights: Tensor | None = None
    parts: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        columns = (getattr(self, field.name) for field in dataclasses.fields(self))
        return type(self)(*(None if column is None else change(column) for column in columns))  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> Self:
        return self.each(lambda column: column.to(device))

    def rows(self, start: int, stop: int) -> Self:
        """Some of the rows."""
        return self.each(lambda column: column[start:stop])


def joined(parts: Sequence[Batch]) -> Batch:
    """Batches one below the other."""
    if any(part.weights is not None for part in parts):
        parts = [dataclasses.replace(part, weights=weights_of(part)) for part in parts]
    if any(part.parts is not None for part in parts):
        parts = [
            part if part.parts is not None
            else dataclasses.replace(part, parts=torch.zeros_like(part.labels, dtype=torch.uint8))
            for part in parts
        ]  # fmt: skip
    columns = ([getattr(part, field.name) for part in parts] for field in dataclasses.fields(Batch))
    return Batch(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def weights_of(batch: Batch) -> Tensor:
    """The weights of a batch's labels, 1 where there are no others."""
    return torch.ones_like(batch.labels, dtype=torch.float32) if batch.weights is None else batch.weights


class Ids(Protocol):
    """Tokens laid end to end, read by slices without a step: an array, mapped memory, or several of them."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: slice, /) -> np.ndarray: ...


class Indexed(Sequence[Item]):
    """A sequence whose items `item(number)` makes when they are read."""

    def item(self, number: int) -> Item:
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Any:
        places = range(len(self))[index]  # raises IndexError
        return self.item(places) if isinstance(places, int) else [self.item(number) for number in places]


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised documents: ids laid end to end, and where each begins (one more entry than documents). In batches they
    are numbered from `first_document` on, so that those of several corpora stay apart; `notes`: what was left out.

    Where there are conversations, `parts` are what each token is part of, with the bits of `conversations`: documents
    are kept whole (see `bins`), as `long` says those that are too long, and `prompts` is the weight in the loss of what
    is neither text nor the assistant's. `where` is what errors call the text."""

    ids: Ids
    starts: np.ndarray
    names: Sequence[str]
    token_bytes: Tensor
    pad_token_id: int
    first_document: int = 0
    notes: tuple[str, ...] = ()
    parts: Ids | None = None
    prompts: float = 0.0
    long: str = "split"
    where: str = "data"

    def __len__(self) -> int:
        return len(self.names)

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def rows(self, seq_len: int) -> int:
        """Rows of an epoch."""
        return (self.tokens - 1) // seq_len if self.parts is None else len(binned(self, seq_len))

    def sample(
        self, *, batch_size: int, seq_len: int, seed: int | None = None, max_tokens: int | None = None
    ) -> Sample:
        """Rows for measuring; see `sampled_rows`."""
        return Sample([sampled_rows(self, seq_len, seed, max_tokens)], batch_size)

    def batches_per_epoch(self, batch_size: int, seq_len: int) -> int:
        """How many whole batches the corpus fills. Raises InputError where it fills none."""
        rows = self.rows(seq_len)
        if rows < batch_size:
            # Conversations are not cut where a row ends: their tokens do not tell how many rows they fill.
            filled = "" if self.parts is None else f", in {rows} rows of whole conversations,"
            raise InputError(
                f"data: {self.tokens} tokens{filled} do not fill one batch of {batch_size} rows x {seq_len} tokens;"
                " give more text, or a smaller batch or length"
            )
        return rows // batch_size

    def train_batches(
        self, *, batch_size: int, seq_len: int, seed: int, start: int = 0, repack: bool = True
    ) -> Iterator[Batch]:
        """Batches without end, from number `start` on; epoch e is permuted by torch's generator seeded with seed + e.

        Documents are permuted first, then the rows that they are cut into; the rest of an epoch that fills no batch is
        left out. Without `repack` every epoch has the first one's rows, in an order of its own, so that what is known
        of a row (a cached teacher's answers) serves all of them. Raises InputError where an epoch fills no batch.
        """
        per_epoch = self.batches_per_epoch(batch_size, seq_len)
        number = start
        while True:
            epoch = number // per_epoch
            rows, shuffled = epoch_rows(self, seq_len, seed, epoch, repack)
            while number // per_epoch == epoch:
                place = number % per_epoch * batch_size
                yield rows.batch(shuffled[place : place + batch_size])
                number += 1

    def batch(
        self, ids: np.ndarray, owner: np.ndarray, pieces: np.ndarray | None = None, parts: np.ndarray | None = None
    ) -> Batch:
        """Windows [rows, T + 1] as a batch [rows, T]; `pieces` number what belongs together where documents do not."""
        tokens, labels = torch.from_numpy(ids[:, :-1].astype(np.int64)), torch.from_numpy(ids[:, 1:].astype(np.int64))
        owner = np.where(owner < 0, -1, owner + self.first_document).astype(np.int64)
        documents = torch.from_numpy(owner[:, :-1].copy())
        # A document's last token has no label: its successor in the row begins another one (padding is document -1).
        together = owner if pieces is None else pieces
        apart = torch.from_numpy(together[:, 1:] != together[:, :-1])
        labels = labels.masked_fill(apart | (documents < 0), IGNORED)
        weights = kinds = None
        if parts is not None:
            kinds = torch.from_numpy(parts[:, 1:] & KIND)
            weights = torch.where(kinds == PROMPT, self.prompts, 1.0)
            labels = labels.masked_fill(weights == 0, IGNORED)
            weights = None if self.prompts in (0, 1) else weights
        n_bytes = torch.where(labels >= 0, self.token_bytes[labels.clamp_min(0)], 0)
        change = torch.zeros_like(documents)
        change[:, 1:] = apart[:, :-1]
        numbered = change.cumsum(1).to(torch.int32)
        return Batch(tokens, labels, numbered, n_bytes.to(torch.int32), documents, weights, kinds)


class Packing:
    """The documents of a corpus in an order, laid end to end and cut into rows of seq_len tokens and the one after. A
    row is put together when it is read: nothing is held but where each document ends. What is left over at the
    end is dropped, or padded (document -1)."""

    def __init__(self, corpus: Corpus, order: np.ndarray, seq_len: int, pad: bool = False) -> None:
        self.corpus, self.order, self.seq_len = corpus, order, seq_len
        self.ends = np.cumsum(corpus.starts[order + 1] - corpus.starts[order])
        total = int(self.ends[-1])
        self.count = -(-total // seq_len) if pad else (total - 1) // seq_len

    def __len__(self) -> int:
        return self.count

    def batch(self, numbers: Sequence[int] | np.ndarray) -> Batch:
        """Some of the rows, as a batch [rows, seq_len]."""
        ids = np.full((len(numbers), self.seq_len + 1), self.corpus.pad_token_id, np.int32)
        owner = np.full(ids.shape, -1, np.int64)
        for row, number in enumerate(numbers):
            place = int(number) * self.seq_len
            end = min(place + self.seq_len + 1, int(self.ends[-1]))
            column = 0
            which = int(np.searchsorted(self.ends, place, "right"))
            while place < end:
                document, stop = int(self.order[which]), int(self.ends[which])
                # Counted back from the document's end, since it may have begun in an earlier row.
                size = min(stop, end) - place
                begin = int(self.corpus.starts[document + 1]) - (stop - place)
                ids[row, column : column + size] = self.corpus.ids[begin : begin + size]
                owner[row, column : column + size] = document
                place, column, which = place + size, column + size, which + 1
        return self.corpus.batch(ids, owner)


class AnyRows(Protocol):
    """Rows of a corpus, each put together when it is read."""

    def __len__(self) -> int: ...

    def batch(self, numbers: Sequence[int] | np.ndarray) -> Batch: ...


@functools.lru_cache(maxsize=16)
def binned(corpus: Corpus, seq_len: int) -> AnyRows:
    from .bins import Bins

    return Bins(corpus, seq_len)


class Sample(Indexed[Batch]):
    """Picked rows as batches, each put together when it is read; rows of several packings follow one another."""

    def __init__(self, parts: Sequence[tuple[AnyRows, np.ndarray]], batch_size: int) -> None:
        self.parts, self.batch_size = parts, batch_size
        self.rows = sum(len(picked) for _, picked in parts)

    def __len__(self) -> int:
        return (self.rows + self.batch_size - 1) // self.batch_size

    @property
    def whole(self) -> bool:
        """Whether all rows that there are have been picked."""
        return all(len(picked) == len(packing) for packing, picked in self.parts)

    def item(self, number: int) -> Batch:
        start = number * self.batch_size
        stop, batches = start + self.batch_size, []
        for packing, picked in self.parts:
            if len(some := picked[max(start, 0) : max(stop, 0)]):
                batches.append(packing.batch(some))
            start, stop = start - len(picked), stop - len(picked)
        return joined(batches)


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer, source: Reading | None = None) -> Corpus:
    """Documents in memory to tokens in memory; see `corpus_cache` for those on disk."""
    reading, notes = source or Reading(), Notes()
    read = list(encoded(documents, tokenizer, reading, notes))
    sizes = np.cumsum([len(some.ids) for some in read])
    ends = [size for size, some in zip(sizes.tolist(), read, strict=True) if some.last]
    names = tuple(some.name for some in read if some.last)
    ids = np.concatenate([some.ids for some in read])
    parts = np.concatenate([some.parts for some in read]) if any(some.chat for some in read) else None
    starts = np.array([0, *ends])
    return Corpus(
        ids, starts, names, tokenizer.token_bytes, tokenizer.pad_token_id, notes=tuple(notes), parts=parts,
        prompts=reading.prompts, long=reading.long,
    )  # fmt: skip


def epoch_rows(corpus: Corpus, seq_len: int, seed: int, epoch: int, repack: bool) -> tuple[AnyRows, np.ndarray]:
    """An epoch's rows, and the order in which they come."""
    generator = torch.Generator().manual_seed(seed + epoch)
    if corpus.parts is not None:  # documents apart from one another make the same rows in any company
        bins = binned(corpus, seq_len)
        return bins, torch.randperm(len(bins), generator=generator).numpy()
    order = torch.randperm(len(corpus), generator=generator)
    if not repack:  # the first epoch's documents; the rows' order below stays this epoch's own
        order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(seed))
    rows = Packing(corpus, order.numpy(), seq_len)
    return rows, torch.randperm(len(rows), generator=generator).numpy()


def sampled_rows(corpus: Corpus, seq_len: int, seed: int | None, max_tokens: int | None) -> tuple[AnyRows, np.ndarray]:
    """Rows for measuring and the numbers of those to take: every token once, or up to `max_tokens` of them. The last
    row is padded.

    The seed permutes the documents; of more tokens than wanted it picks rows here and there, so that many documents
    are among them (without a seed: evenly spaced rows). At least one row.
    """
    longest = max(LONGEST_ROW, corpus.tokens)
    if seq_len > longest:
        raise InputError(
            f"data: seq_len is {seq_len:,}; expected {longest:,} at most, since the text has {corpus.tokens:,} tokens"
        )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    rows: AnyRows
    if corpus.parts is not None:
        rows = binned(corpus, seq_len)
    else:
        count = len(corpus)
        order = np.arange(count) if generator is None else torch.randperm(count, generator=generator).numpy()
        rows = Packing(corpus, order, seq_len, pad=True)
    wanted = len(rows) if max_tokens is None else min(len(rows), max(max_tokens // seq_len, 1))
    if wanted == len(rows):
        return rows, np.arange(wanted)
    if generator is None:
        return rows, np.linspace(0, len(rows) - 1, wanted).astype(np.int64)
    return rows, torch.randperm(len(rows), generator=generator)[:wanted].sort()[0].numpy()


def check_measurable(batches: Iterable[Any], data: object, split: str) -> None:
    """Raises InputError where rows of a split of data= hold no label that stands for text: `gap.measure` would have no
    figures of them."""
    if not any(int(batch.n_bytes[batch.labels >= 0].sum()) for batch in batches):
        raise InputError(
            f"data={data}: the split {split!r} has no token to measure: none follows another of its document, or none"
            " stands for text; give more or longer documents"
        )
