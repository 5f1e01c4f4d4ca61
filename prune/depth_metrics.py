"""How far logits are from the original model's, or from the labels, without a [tokens, V] buffer.

Squared errors: with logits W h they are d^T (W^T W) d for a difference d of what the head reads. Divergence and
cross-entropy go through the head in runs of rows, with sums of exponentials that are rescaled when a larger logit
comes (the online softmax, arXiv 1805.02867). Shapes: [N] counted tokens, [H] hidden, [V] vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.offload import Layers

TOKENS = 1024  # a piece of logits is [TOKENS, layers.HEAD_ROWS]


@dataclasses.dataclass
class Reading:
    """What the head reads of one batch at its counted tokens: the original model's [N, H] (None where the labels [N]
    are what counts), and that of several smaller models."""

    original: Tensor | None
    labels: Tensor
    found: list[Tensor]


def head_gram(source: Layers) -> Tensor:
    """W^T W [H, H] of the head, float64."""
    size = source.config.hidden_size
    gram = torch.zeros(size, size, dtype=torch.float64, device=source.device)
    for _, rows in source.head_pieces():
        gram += rows.double().T @ rows.double()
    return gram


def squared_errors(gram: Tensor, readings: Sequence[Reading]) -> list[Tensor]:
    """The sums over logits of the squared difference: [found] (float64) for each reading."""
    return [
        stacked([squared_error(gram, original_of(reading), found) for found in reading.found]) for reading in readings
    ]


def squared_error(gram: Tensor, original: Tensor, found: Tensor) -> Tensor:
    difference = found.double() - original.double()
    return ((difference @ gram) * difference).sum().clamp(min=0)


class LogSum:
    """log sum exp over the vocabulary, [N], from pieces of logits: the largest so far, and the sum beyond it."""

    def __init__(self, like: Tensor) -> None:
        work = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.largest = torch.full((len(like),), -torch.inf, dtype=work, device=like.device)
        self.total = torch.zeros(len(like), dtype=torch.float64, device=like.device)

    def add(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Takes logits [n, R] of these tokens; exp(logits - largest) [n, R], and what earlier sums shrink by [n]."""
        largest = torch.maximum(self.largest[rows], logits.amax(1))
        shrink = (self.largest[rows] - largest).exp().double()
        powers = (logits - largest[:, None]).exp_()
        self.total[rows] = self.total[rows] * shrink + powers.sum(1, dtype=torch.float64)
        self.largest[rows] = largest
        return powers, shrink

    def result(self) -> Tensor:
        return self.largest.double() + self.total.log()


def divergences(source: Layers, readings: Sequence[Reading]) -> list[Tensor]:
    """The sums over tokens of KL(original || found), in nats: [found] (float64) for each reading."""
    originals = [original_of(reading) for reading in readings]
    teachers = [LogSum(original) for original in originals]
    students = [[LogSum(found) for found in reading.found] for reading in readings]
    cross = [[torch.zeros_like(sums.total) for sums in row] for row in students]
    for _, head in source.head_pieces():
        for number, reading in enumerate(readings):
            for rows in token_runs(originals[number]):
                teacher = logits_of(originals[number][rows], head)
                powers, shrink = teachers[number].add(teacher, rows)
                for found, sums, differences in zip(reading.found, students[number], cross[number], strict=True):
                    student = logits_of(found[rows], head)
                    sums.add(student, rows)
                    weighted = (powers * (teacher - student)).sum(1, dtype=torch.float64)
                    differences[rows] = differences[rows] * shrink + weighted
    return [
        stacked(
            [
                (differences / teacher.total - teacher.result() + sums.result()).clamp(min=0).sum()
                for sums, differences in zip(row, rest, strict=True)
            ]
        )
        for teacher, row, rest in zip(teachers, students, cross, strict=True)
    ]


def cross_entropies(source: Layers, readings: Sequence[Reading]) -> list[Tensor]:
    """The sums over tokens of the labels' negative log-likelihood, in nats: [found] (float64) for each reading."""
    sums = [[LogSum(found) for found in reading.found] for reading in readings]
    chosen = [[torch.zeros_like(sum_.total) for sum_ in row] for row in sums]
    for start, head in source.head_pieces():
        for number, reading in enumerate(readings):
            inside = (reading.labels >= start) & (reading.labels < start + len(head))
            for found, sum_, own in zip(reading.found, sums[number], chosen[number], strict=True):
                for rows in token_runs(found):
                    logits = logits_of(found[rows], head)
                    index = (reading.labels[rows] - start).clamp(0, len(head) - 1)
                    label = logits.gather(1, index[:, None])[:, 0].double()
                    own[rows] = torch.where(inside[rows], label, own[rows])
                    sum_.add(logits, rows)
    return [
        stacked([(sum_.result() - own).clamp(min=0).sum() for sum_, own in zip(row, rest, strict=True)])
        for row, rest in zip(sums, chosen, strict=True)
    ]


def stacked(sums: list[Tensor]) -> Tensor:
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64)


def logits_of(hidden: Tensor, head: Tensor) -> Tensor:
    """[n, R], float32 at least."""
    logits = hidden @ head.T
    return logits if logits.dtype == torch.float64 else logits.float()


def token_runs(hidden: Tensor) -> list[slice]:
    return [slice(start, start + TOKENS) for start in range(0, len(hidden), TOKENS)]


def original_of(reading: Reading) -> Tensor:
    assert reading.original is not None
    return reading.original
