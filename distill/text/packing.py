"""Text to batches: documents, a split that does not leak, packed rows with the documents' boundaries kept.

A document is `<s> tokens </s>`. An epoch permutes the documents, lays them end to end and cuts rows of T tokens;
where a document is cut its rest begins the next row, with an empty state. Which batch comes when follows from the seed
alone, so that any batch can be sought by its number. Shapes: [B] rows, [T] tokens.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...models.errors import InputError
from ...models.tokenizer import Tokenizer
from .pieces import encoded_texts
from .records import Document

IGNORED = -100
Item = TypeVar("Item", covariant=True)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of packed tokens. `labels` are the next tokens, -100 where there is none in the same document; `seq_idx`
    numbers the documents along a row; `n_bytes` are the UTF-8 bytes that a label stands for; `doc_id` numbers the
    documents of the corpus. All [B, T]."""

    input_ids: Tensor
    labels: Tensor
    seq_idx: Tensor
    n_bytes: Tensor
    doc_id: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))

    def rows(self, start: int, stop: int) -> Batch:
        """Some of the rows."""
        return Batch(*(getattr(self, field.name)[start:stop] for field in dataclasses.fields(self)))


def joined(parts: Sequence[Batch]) -> Batch:
    """Batches one below the other."""
    return Batch(*(torch.cat([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(Batch)))


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


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenised documents: ids laid end to end, and where each begins (one more entry than documents). In batches they
    are numbered from `first_document` on, so that those of several corpora stay apart; `notes`: what was left out."""

    ids: Ids
    starts: np.ndarray
    names: Sequence[str]
    token_bytes: Tensor
    pad_token_id: int
    first_document: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def sample(
        self, *, batch_size: int, seq_len: int, seed: int | None = None, max_tokens: int | None = None
    ) -> Sample:
        """Rows for measuring; see `sampled_rows`."""
        return Sample([sampled_rows(self, seq_len, seed, max_tokens)], batch_size)

    def batches_per_epoch(self, batch_size: int, seq_len: int) -> int:
        """How many whole batches the corpus fills. Raises InputError where it fills none."""
        count = (self.tokens - 1) // seq_len // batch_size
        if count < 1:
            raise InputError(
                f"data: {self.tokens} tokens do not fill one batch of {batch_size} rows x {seq_len} tokens;"
                " give more text, or a smaller batch or length"
            )
        return count

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

    def batch(self, ids: np.ndarray, owner: np.ndarray) -> Batch:
        """Windows [rows, T + 1] as a batch [rows, T]."""
        tokens, labels = torch.from_numpy(ids[:, :-1].astype(np.int64)), torch.from_numpy(ids[:, 1:].astype(np.int64))
        owner = np.where(owner < 0, -1, owner + self.first_document).astype(np.int64)
        documents, following = torch.from_numpy(owner[:, :-1].copy()), torch.from_numpy(owner[:, 1:])
        # A document's last token has no label: its successor in the row begins another one (padding is document -1).
        labels = labels.masked_fill((documents != following) | (documents < 0), IGNORED)
        n_bytes = torch.where(labels >= 0, self.token_bytes[labels.clamp_min(0)], 0)
        change = torch.zeros_like(documents)
        change[:, 1:] = documents[:, 1:] != documents[:, :-1]
        return Batch(tokens, labels, change.cumsum(1).to(torch.int32), n_bytes.to(torch.int32), documents)


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


class Sample(Indexed[Batch]):
    """Picked rows as batches, each put together when it is read; rows of several packings follow one another."""

    def __init__(self, parts: Sequence[tuple[Packing, np.ndarray]], batch_size: int) -> None:
        self.parts, self.batch_size = parts, batch_size
        self.rows = sum(len(picked) for _, picked in parts)

    def __len__(self) -> int:
        return (self.rows + self.batch_size - 1) // self.batch_size

    def item(self, number: int) -> Batch:
        start = number * self.batch_size
        stop, batches = start + self.batch_size, []
        for packing, picked in self.parts:
            if len(some := picked[max(start, 0) : max(stop, 0)]):
                batches.append(packing.batch(some))
            start, stop = start - len(picked), stop - len(picked)
        return joined(batches)


def encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    """Each document with its tokens, `<s> ... </s>` (`... </s>` where the tokenizer has no bos)."""
    names: collections.deque[Document] = collections.deque()

    def texts() -> Iterator[str]:
        for document in documents:
            names.append(document)
            yield document.text

    for ids in encoded_texts(texts(), tokenizer):
        framed = np.concatenate((tokenizer.begin, ids, [tokenizer.eos_token_id]), dtype=np.int32, casting="unsafe")
        yield names.popleft(), framed


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> Corpus:
    """Documents in memory to tokens in memory; see `corpus_cache` for those on disk."""
    read, parts = zip(*encoded(documents, tokenizer), strict=True)
    starts = np.concatenate(([0], np.cumsum([len(part) for part in parts])))
    names = tuple(document.name for document in read)
    return Corpus(np.concatenate(parts), starts, names, tokenizer.token_bytes, tokenizer.pad_token_id)


def epoch_rows(corpus: Corpus, seq_len: int, seed: int, epoch: int, repack: bool) -> tuple[Packing, np.ndarray]:
    """An epoch's rows, and the order in which they come."""
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(len(corpus), generator=generator)
    if not repack:  # the first epoch's documents; the rows' order below stays this epoch's own
        order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(seed))
    rows = Packing(corpus, order.numpy(), seq_len)
    return rows, torch.randperm(len(rows), generator=generator).numpy()


def sampled_rows(corpus: Corpus, seq_len: int, seed: int | None, max_tokens: int | None) -> tuple[Packing, np.ndarray]:
    """Rows for measuring and the numbers of those to take: every token once, or up to `max_tokens` of them. The last
    row is padded.

    The seed permutes the documents; of more tokens than wanted it picks rows here and there, so that many documents
    are among them (without a seed: evenly spaced rows). At least one row.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    count = len(corpus)
    order = np.arange(count) if generator is None else torch.randperm(count, generator=generator).numpy()
    rows = Packing(corpus, order, seq_len, pad=True)
    wanted = len(rows) if max_tokens is None else min(len(rows), max(max_tokens // seq_len, 1))
    if wanted == len(rows):
        return rows, np.arange(wanted)
    if generator is None:
        return rows, np.linspace(0, len(rows) - 1, wanted).astype(np.int64)
    return rows, torch.randperm(len(rows), generator=generator)[:wanted].sort()[0].numpy()
