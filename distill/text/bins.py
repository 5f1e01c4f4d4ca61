"""Rows of whole documents: a conversation is not cut where a row ends, since what comes after the cut would lack what
it answers. Documents are put into rows as best-fit decreasing has it, rows are padded, and one that is too long is
split where an exchange begins, each part after what stood before the first exchange (bos, the system message).

Documents of a row do not see each other, so that which ones lie together is settled once, and epochs differ by the
order of rows. Shapes: [P] pieces.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Sequence

import numpy as np

from ...models.errors import InputError
from .conversations import ANSWER, EXCHANGE, HEAD, KIND, PROMPT
from .notes import say
from .packing import Batch, Corpus

CHUNK = 2**24  # tokens whose parts are looked at together
SILENT = "conversations without an answer are left out"
EMPTY = "conversations of which the template writes nothing are left out"


class Bins:
    """The rows of `seq_len` tokens and the one after. A piece of a document is its first `heads` tokens and those from
    `begins` to `ends`. Raises InputError where nothing fits, or a document does not and may not be split."""

    def __init__(self, corpus: Corpus, seq_len: int) -> None:
        assert corpus.parts is not None
        self.corpus, self.parts, self.seq_len = corpus, corpus.parts, seq_len
        self.left_out: dict[str, list[str]] = {}
        pieces = np.array(list(self.pieces()), dtype=np.int64).reshape(-1, 4)
        self.documents, self.heads, self.begins, self.ends = pieces.T
        if not len(pieces):
            left = "; ".join(f"{len(names):,} {kind}" for kind, names in self.left_out.items())
            hint = "" if self.left_out.keys() <= {SILENT, EMPTY} else "; give longer rows"
            raise InputError(
                f"{corpus.where}: none of {len(corpus):,} conversations and texts has something to learn in a row of"
                f" {seq_len} tokens: {left}{hint}"
            )
        self.rows = best_fit(self.heads + self.ends - self.begins, seq_len + 1)
        say(
            (f"{len(names):,} {kind} (the first: {names[0]})" for kind, names in self.left_out.items()),
            f"data in rows of {seq_len} tokens",
        )

    def __len__(self) -> int:
        return len(self.rows)

    def pieces(self) -> Iterator[tuple[int, int, int, int]]:
        """Of each piece its document, the tokens of the head that is put before it, and where it begins and ends."""
        starts, longest = self.corpus.starts, self.seq_len + 1
        silent = self.silent()
        for document in range(len(self.corpus)):
            begin, end = int(starts[document]), int(starts[document + 1])
            if begin == end:
                self.leave_out(EMPTY, document)
            elif silent[document]:
                self.leave_out(SILENT, document)
            elif end - begin <= longest:
                yield document, 0, begin, end
            elif (int(self.parts[begin : begin + 1][0]) & KIND) == 0:  # a text may be cut anywhere
                for place in range(begin, end - 1, self.seq_len):
                    yield document, 0, place, min(place + longest, end)
            else:
                yield from self.split(document, begin, end)

    def silent(self) -> np.ndarray:
        """Which documents have no token that counts [documents]."""
        silent = np.zeros(len(self.corpus), dtype=bool)
        if self.corpus.prompts:
            return silent
        starts, document = self.corpus.starts, 0
        while document < len(self.corpus):
            last = max(int(np.searchsorted(starts, starts[document] + CHUNK, "right")) - 1, document + 1)
            kinds = self.parts[int(starts[document]) : int(starts[last])] & KIND
            counts = np.concatenate(([0], np.cumsum(kinds != PROMPT)))  # of the tokens before each
            places = (starts[document : last + 1] - starts[document]).astype(np.int64)
            silent[document:last] = np.diff(counts[places]) == 0
            document = last
        return silent

    def split(self, document: int, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """A conversation in pieces of whole exchanges, as many as fit."""
        longest, parts = self.seq_len + 1, self.parts[begin:end]
        if self.corpus.long == "refuse":
            turns = answers_before(parts, longest)
            raise InputError(
                f"data: {record(self.corpus.names[document])} has {end - begin} tokens, and rows have {self.seq_len}:"
                f" its answer {turns + 1} would be cut off; give longer rows, or data.long=split or drop"
            )
        if self.corpus.long == "drop":
            self.leave_out("conversations that are too long are dropped", document)
            return
        head = int(np.count_nonzero(parts & HEAD))
        bounds = [head, *np.flatnonzero(parts & EXCHANGE).tolist(), len(parts)]
        first = 0
        if len(bounds) > 2:
            self.leave_out("conversations are split at their turns", document)
        while first + 1 < len(bounds):
            last = bisect.bisect_right(bounds, bounds[first] + longest - head) - 1
            if last <= first:
                self.leave_out("exchanges that are longer than a row are dropped", document)
                last = first + 1
            elif (parts[bounds[first] : bounds[last]] & KIND >= ANSWER).any() or self.corpus.prompts:
                yield document, head, begin + bounds[first], begin + bounds[last]
            first = last

    def leave_out(self, kind: str, document: int) -> None:
        self.left_out.setdefault(kind, []).append(record(self.corpus.names[document]))

    def batch(self, numbers: Sequence[int] | np.ndarray) -> Batch:
        """Some of the rows, as a batch [rows, seq_len]."""
        ids = np.full((len(numbers), self.seq_len + 1), self.corpus.pad_token_id, np.int32)
        owner, pieces = np.full(ids.shape, -1, np.int64), np.full(ids.shape, -1, np.int64)
        parts = np.zeros(ids.shape, np.uint8)
        for row, number in enumerate(numbers):
            column = 0
            for piece in self.rows[int(number)]:
                document = int(self.documents[piece])
                start, head = int(self.corpus.starts[document]), int(self.heads[piece])
                for begin, end in ((start, start + head), (int(self.begins[piece]), int(self.ends[piece]))):
                    stop = column + end - begin
                    ids[row, column:stop], parts[row, column:stop] = self.corpus.ids[begin:end], self.parts[begin:end]
                    owner[row, column:stop], pieces[row, column:stop] = document, piece
                    column = stop
        return self.corpus.batch(ids, owner, pieces, parts)


def record(name: str) -> str:
    """A record by its file and its number from 1 on, as lines are counted; documents' names count from 0."""
    parts = re.fullmatch(r"(.*):(\d+)( \(.*\))?", name)
    return name if parts is None else f"{parts[1]}, record {int(parts[2]) + 1}"


def answers_before(parts: np.ndarray, place: int) -> int:
    """How many answers end before a place."""
    said = (parts[:place] & KIND) >= ANSWER
    return int(np.count_nonzero(said[:-1] & ~said[1:]))


def best_fit(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """The numbers of the pieces in each row: from the largest on, each goes where the least is left over."""
    rows: list[list[int]] = []
    left: dict[int, list[int]] = {}  # rows by what is left in them
    free: list[int] = []  # the keys of `left` in their order
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        place = bisect.bisect_left(free, size)
        if place == len(free):
            row, remaining = len(rows), capacity
            rows.append([])
        else:
            remaining = free[place]
            row = left[remaining].pop()
            if not left[remaining]:
                del left[remaining], free[place]
        rows[row].append(piece)
        remaining -= size
        if remaining not in left:
            left[remaining] = []
            bisect.insort(free, remaining)
        left[remaining].append(row)
    return rows
