"""Where a student is furthest from its teacher: the worst windows of a stream, kept while it goes by, shown as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.linear_figures import LinearFigures
from ...models.tokenizer import Tokenizer

WINDOW = 48  # tokens


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of a document: its mean KL, and for each token its KL, and the argmax of teacher and student."""

    document: int
    mean_kl: float
    tokens: tuple[int, ...]
    kl: tuple[float, ...]
    teacher: tuple[int, ...]
    student: tuple[int, ...]


class Worst:
    """The `count` windows of highest mean KL so far, the worst first and one a document. Rows are cut every WINDOW
    tokens; a window is of the document at its start, and counts where half of its tokens are of it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.windows: list[Window] = []

    def add(self, figures: LinearFigures, teacher: LinearFigures, labels: Tensor, doc_id: Tensor) -> None:
        """Figures of a batch's rows, labels and documents [B, T]; all on the CPU."""
        if not self.count:
            return
        shape = labels.shape
        kl, choice, wanted = (column.view(shape) for column in (figures.kl, figures.choice, teacher.choice))
        for start in range(0, shape[1], WINDOW):
            rows = slice(start, start + WINDOW)
            owner = doc_id[:, rows]
            first = owner.gather(1, (owner >= 0).long().argmax(1, keepdim=True))
            counted = (labels[:, rows] >= 0) & (owner == first)
            numbers = counted.sum(1)
            means = (kl[:, rows].double() * counted).sum(1) / numbers.clamp_min(1)
            for row in torch.nonzero(2 * numbers >= min(WINDOW, shape[1])).flatten().tolist():
                if len(self.windows) == self.count and means[row] <= self.windows[-1].mean_kl:
                    continue
                kept = counted[row]
                columns = (part[row, rows][kept].tolist() for part in (labels, kl, wanted, choice))
                self.keep(Window(int(first[row]), float(means[row]), *(tuple(column) for column in columns)))

    def keep(self, window: Window) -> None:
        known = next((number for number, kept in enumerate(self.windows) if kept.document == window.document), None)
        if known is not None:
            if self.windows[known].mean_kl >= window.mean_kl:
                return
            del self.windows[known]
        self.windows = sorted([*self.windows, window], key=lambda kept: (-kept.mean_kl, kept.document))[: self.count]


def as_text(window: Window, names: Sequence[str], tokenizer: Tokenizer) -> dict[str, Any]:
    """A window as JSON has it: the document's name, and pieces of text with the KL, and the argmax of teacher
    and student. Tokens that are parts of a character make one piece, with the largest KL."""
    pieces: list[dict[str, Any]] = []
    begin = 0
    for stop in range(1, len(window.tokens) + 1):
        text = tokenizer.decode_within(window.tokens[begin:stop])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and stop - begin < 4 and stop < len(window.tokens):
            continue
        chosen = {
            name: tokenizer.decode_within([ids[begin]])
            for name, ids in (("teacher", window.teacher), ("student", window.student))
        }
        pieces.append({"text": text, "kl": max(window.kl[begin:stop]), **chosen})
        begin = stop
    return {"document": names[window.document], "mean_kl": window.mean_kl, "pieces": pieces}
