"""Batches in which some rows hold prompts, for the student to continue: a text's first tokens, a conversation up to its
last answer. Which prompt comes when follows from the seed alone. Shapes: [B] rows, [T] tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...models.errors import InputError
from .conversations import ANSWER, KIND
from .mixture import BLOCK, Mixture, Text
from .packing import IGNORED, Batch, Corpus, joined

LOOKED_AT = 20_000  # documents of a corpus, to see how many give a prompt


@dataclasses.dataclass(frozen=True)
class MixedBatch(Batch):
    """A batch of which the student writes the rows that are its `own` [B]. Such a row is slots of a fixed width, each a
    document of its own that begins with a prompt; what the prompt leaves is padding (document -1) until it is written.
    """

    own: Tensor | None = None

    @property
    def is_own(self) -> Tensor:
        assert self.own is not None
        return self.own

    def of(self, own: bool) -> Batch:
        """The rows that are the student's own, or the others."""
        taken = self.is_own if own else ~self.is_own
        return self.each(lambda column: column[taken])


class Prompts:
    """The prompts of a text, each at most `length` tokens, in the order of permutations of its documents; of the
    sources of a mixture in their shares. A text gives its first tokens (a short one its first half), a conversation
    what stands before its last answer; one that is longer than that gives its turn to the next."""

    def __init__(self, text: Text, length: int, seed: int) -> None:
        self.text, self.length, self.seed = text, length, seed
        self.corpora: Sequence[Corpus] = text.corpora if isinstance(text, Mixture) else (text,)

    def __getitem__(self, number: int) -> tuple[int, np.ndarray]:
        """The number of the document and the ids of a prompt, counted from 0 without an end. Raises InputError where
        the source has none."""
        source, place = self.place(number)
        corpus = self.corpora[source]
        epoch, first = divmod(place, len(corpus))
        order = permutation(len(corpus), self.seed + (source << 32) + epoch)
        for step in range(len(corpus)):
            document = int(order[(first + step) % len(corpus)])
            if len(ids := prompt_of(corpus, document, self.length)):
                return corpus.first_document + document, ids
        raise InputError(
            f"data: none of {len(corpus):,} documents gives a prompt of at most {self.length} tokens (a conversation is"
            " read up to its last answer); give more prompt_tokens"
        )

    def notes(self) -> Iterator[str]:
        """What is to be said of conversations that are skipped, by as many as `LOOKED_AT` of each corpus."""
        for corpus in (corpus for corpus in self.corpora if corpus.parts is not None):
            looked = np.unique(np.linspace(0, len(corpus) - 1, LOOKED_AT, dtype=np.int64))
            found = sum(len(prompt_of(corpus, int(document), self.length)) > 0 for document in looked)
            if found < len(looked):
                of = f" (of {len(corpus):,})" if len(looked) < len(corpus) else ""
                yield (
                    f"{found:,} of {len(looked):,} documents{of} give a prompt of at most {self.length} tokens; only"
                    " these are continued (a larger prompt_tokens takes more of them)"
                )

    def place(self, number: int) -> tuple[int, int]:
        """The source of a prompt, and its number among those of the source."""
        if not isinstance(self.text, Mixture):
            return 0, number
        block, place = divmod(number, BLOCK)
        order = self.text.block(block, self.seed)
        source = int(order[place])
        return source, block * self.text.shares()[source] + int(np.count_nonzero(order[:place] == source))


@functools.lru_cache(maxsize=8)
def permutation(count: int, seed: int) -> np.ndarray:
    found: np.ndarray = torch.randperm(count, generator=torch.Generator().manual_seed(seed % 2**63)).numpy()
    return found


def prompt_of(corpus: Corpus, document: int, length: int) -> np.ndarray:
    """The ids of a document's prompt; empty where it has none of at most `length` tokens."""
    begin, end = int(corpus.starts[document]), int(corpus.starts[document + 1])
    size = min(length, (end - begin) // 2)
    if corpus.parts is not None and (kinds := corpus.parts[begin:end] & KIND).any():  # a conversation
        said = np.flatnonzero(kinds >= ANSWER)
        last = int(said[-1]) if len(said) else 0
        before = np.flatnonzero(kinds[:last] < ANSWER)
        size = int(before[-1]) + 1 if len(before) else 0
    return corpus.ids[begin : begin + (size if size <= length else 0)]


def prompt_batches(
    text: Text,
    *,
    rows: int,
    own_rows: int,
    seq_len: int,
    prompt_tokens: int,
    width: int,
    seed: int,
    start: int = 0,
    repack: bool = True,
) -> Iterator[MixedBatch]:
    """Batches without end, from number `start` on, of `rows` rows: evenly among them `own_rows` of prompts in slots of
    `width` tokens, as many as fit, the others as `train_batches` has them. Raises InputError."""
    prompts, slots = Prompts(text, prompt_tokens, seed), seq_len // width
    pad = prompts.corpora[0].pad_token_id
    counts = torch.arange(rows + 1) * own_rows // rows
    own = counts.diff() > 0
    # Where each row of the batch stands among those of the text, which come first, and the prompts.
    order = torch.where(own, rows - own_rows + counts[1:] - 1, torch.arange(rows) - counts[1:])
    size = {"batch_size": rows - own_rows, "seq_len": seq_len}
    source = text.train_batches(**size, seed=seed, start=start, repack=repack) if own_rows < rows else None
    number = start * own_rows * slots
    while True:
        found = [prompts[number + place] for place in range(own_rows * slots)]
        number += len(found)
        parts = [] if source is None else [next(source)]
        parts.append(slotted(found, slots, seq_len, width, pad))
        whole = joined(parts)
        ordered = whole.each(lambda column: column[order])
        yield MixedBatch(**{field.name: getattr(ordered, field.name) for field in dataclasses.fields(Batch)}, own=own)


def slotted(found: list[tuple[int, np.ndarray]], slots: int, seq_len: int, width: int, pad: int) -> Batch:
    """Prompts in rows of so many slots."""
    shape = (len(found) // slots, seq_len)
    ids, documents = torch.full(shape, pad), torch.full(shape, -1)
    for number, (document, tokens) in enumerate(found):
        row, place = divmod(number, slots)
        taken = slice(place * width, place * width + len(tokens))
        ids[row, taken] = torch.from_numpy(tokens.astype(np.int64))
        documents[row, taken] = document
    seq_idx = (torch.arange(seq_len) // width).to(torch.int32).expand(shape).contiguous()
    return Batch(ids, torch.full(shape, IGNORED), seq_idx, torch.zeros(shape, dtype=torch.int32), documents)
