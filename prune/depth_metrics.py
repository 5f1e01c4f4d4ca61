"""What a model loses without some of its layers, one class a metric: of the logits, of the labels, of the stream.

No [tokens, V] buffer is needed. Squared errors: with logits W h they are d^T (W^T W) d for a difference d of what the
head reads. Divergence and cross-entropy go through the head in runs of rows, with sums of exponentials rescaled when a
larger logit comes (the online softmax, arXiv 1805.02867). Sources of the metrics: depth.py.
Shapes: [N] counted tokens, [H] hidden, [V] vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.offload import Layers

TOKENS = 1024  # a piece of logits is [TOKENS, layers.HEAD_ROWS]


@dataclasses.dataclass
class Reading:
    """One batch at its counted tokens: the labels [N], of several smaller models what the head reads [N, H] each, and
    the original's; or (metrics that need the "stream") the residual stream after a candidate, and before it."""

    original: Tensor | None
    labels: Tensor
    candidates: list[Tensor]


class DepthMetric:
    """The cost of a candidate's absence: a mean over counted tokens of `terms` a token, none of them negative.

    `needs`: "original", what the head reads of the original model and of the smaller one; "labels", of the smaller one
    and the labels; "stream", the residual stream before and after the candidate in a model that still has it.
    """

    name: ClassVar[str]
    needs: ClassVar[str]
    terms = 1

    def __init__(self, source: Layers) -> None:
        self.source = source

    def costs(self, readings: Sequence[Reading]) -> list[Tensor]:
        """Sums of the terms over the tokens of each reading: [candidates] (float64)."""
        return [
            torch.stack([self.cost(reading, candidate) for candidate in reading.candidates]) for reading in readings
        ]

    def cost(self, reading: Reading, candidate: Tensor) -> Tensor:
        """The sum of the terms of one candidate, where that is found without the others."""
        raise NotImplementedError


class SquaredError(DepthMetric):
    """The squared difference of the logits, averaged over tokens and vocabulary."""

    name, needs = "mse", "original"

    def __init__(self, source: Layers) -> None:
        super().__init__(source)
        self.terms, size = source.config.vocab_size, source.config.hidden_size
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=source.device)  # W^T W of the head
        for _, rows in source.head_pieces():
            self.gram += rows.double().T @ rows.double()

    def cost(self, reading: Reading, candidate: Tensor) -> Tensor:
        difference = candidate.double() - original_of(reading).double()
        return ((difference @ self.gram) * difference).sum().clamp(min=0)


class BlockInfluence(DepthMetric):
    """1 - cosine of the residual stream before and after the candidate."""

    name, needs = "block_influence", "stream"

    def cost(self, reading: Reading, candidate: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(original_of(reading).double(), candidate.double(), dim=-1)).sum()


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


class Divergence(DepthMetric):
    """KL(original || smaller), in nats."""

    name, needs = "kl", "original"

    def costs(self, readings: Sequence[Reading]) -> list[Tensor]:
        # With logits t and s, KL = sum_v e^(t_v) (t_v - s_v) / Z_t - log Z_t + log Z_s: the first sum is rescaled with
        # Z_t when a larger t comes, so that one way through the head is enough.
        teachers = [LogSum(original_of(reading)) for reading in readings]
        students = [[LogSum(candidate) for candidate in reading.candidates] for reading in readings]
        cross = [[torch.zeros_like(sums.total) for sums in row] for row in students]
        for _, head in self.source.head_pieces():
            for number, reading in enumerate(readings):
                original = original_of(reading)
                for rows in token_runs(original):
                    teacher = logits_of(original[rows], head)
                    powers, shrink = teachers[number].add(teacher, rows)
                    for candidate, sums, own in zip(reading.candidates, students[number], cross[number], strict=True):
                        student = logits_of(candidate[rows], head)
                        sums.add(student, rows)
                        weighted = (powers * (teacher - student)).sum(1, dtype=torch.float64)
                        own[rows] = own[rows] * shrink + weighted
        return [
            torch.stack(
                [
                    (own / teacher.total - teacher.result() + sums.result()).clamp(min=0).sum()
                    for sums, own in zip(row, rest, strict=True)
                ]
            )
            for teacher, row, rest in zip(teachers, students, cross, strict=True)
        ]


class CrossEntropy(DepthMetric):
    """The labels' negative log-likelihood, in nats: the logarithm of the perplexity."""

    name, needs = "perplexity", "labels"

    def costs(self, readings: Sequence[Reading]) -> list[Tensor]:
        students = [[LogSum(candidate) for candidate in reading.candidates] for reading in readings]
        chosen = [[torch.zeros_like(sums.total) for sums in row] for row in students]  # the labels' own logits
        for start, head in self.source.head_pieces():
            for number, reading in enumerate(readings):
                inside = (reading.labels >= start) & (reading.labels < start + len(head))
                for candidate, sums, own in zip(reading.candidates, students[number], chosen[number], strict=True):
                    for rows in token_runs(candidate):
                        logits = logits_of(candidate[rows], head)
                        index = (reading.labels[rows] - start).clamp(0, len(head) - 1)
                        label = logits.gather(1, index[:, None])[:, 0].double()
                        own[rows] = torch.where(inside[rows], label, own[rows])
                        sums.add(logits, rows)
        return [
            torch.stack([(sums.result() - own).clamp(min=0).sum() for sums, own in zip(row, rest, strict=True)])
            for row, rest in zip(students, chosen, strict=True)
        ]


METRICS = {metric.name: metric for metric in (SquaredError, Divergence, CrossEntropy, BlockInfluence)}


def logits_of(hidden: Tensor, head: Tensor) -> Tensor:
    """[n, R], float32 at least."""
    logits = hidden @ head.T
    return logits if logits.dtype == torch.float64 else logits.float()


def token_runs(hidden: Tensor) -> list[slice]:
    return [slice(start, start + TOKENS) for start in range(0, len(hidden), TOKENS)]


def original_of(reading: Reading) -> Tensor:
    assert reading.original is not None
    return reading.original
