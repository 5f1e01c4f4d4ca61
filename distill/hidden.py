"""Hidden-state losses: the student's residual stream in front of some layers, against what the teacher reads there.

Stream j is what layer j reads, and stream num_layers what the final norm reads. Where layers have gone, the student's
layer j stands for the teacher's layer l_j, so its stream is to be what layer l_j reads: the layers in front learn what
those that went between them did. Both streams are divided by their RMS first, as every layer does that reads them, so a
token's distance is the mean squared difference, 2 - 2 cos: from 0 to 4, whatever the widths.

Widths that differ are compared on the kept channels where the student was cut out of this teacher without a rotation:
channel for channel, and nothing beside the student can lower the loss. Otherwise (a rotation, another model) a matrix a
stream maps the student's channels to the teacher's. It is fitted by least squares before the first step, and fixed: a
trained one would need optimizer state, shards and a checkpoint of its own, starts at random although the pruned student
already knows the answer, and lets the loss fall without the student. Source of the loss: arXiv 2407.14679 (a state loss
pays where many layers go). Shapes: [B, T] tokens, [Hs] and [Ht] the hidden widths of student and teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.hybrid import HybridLM
from ..models.row_split import RowSplit
from .options import HiddenLoss
from .row_parts import part_rows, states_of

RIDGE = 1e-4  # of the mean of the second moments


@dataclasses.dataclass(frozen=True)
class KeptParts:
    """What a student is of its teacher: layers and channels of the residual stream, numbered as in the teacher."""

    layers: tuple[int, ...]
    channels: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Pairing:
    """Which of the student's streams is compared with which of the teacher's, and how: on `channels` of the teacher's,
    by `maps` from student to teacher [Hs, Ht], or as they are where both are None."""

    pairs: tuple[tuple[int, int], ...]
    channels: Tensor | None = None
    maps: tuple[Tensor, ...] | None = None

    def distance(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The mean over the pairs of a token's distance [B, T], of streams [B, T, H] each, in float32 or wider."""
        total: Tensor | float = 0.0
        for number, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
            if self.channels is not None:
                theirs = theirs.index_select(-1, self.channels)
            ours = unit(ours)
            if self.maps is not None:
                ours = unit(ours @ self.maps[number].to(ours.dtype))
            total = total + (ours - unit(theirs)).square().mean(-1)
        assert isinstance(total, Tensor)
        return total / len(self.pairs)


def unit(stream: Tensor) -> Tensor:
    """A stream [..., H] divided by its RMS, in float32 or wider."""
    stream = stream if stream.dtype == torch.float64 else stream.float()
    return stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-12)


class StreamObserver:
    """An observer of `HybridLM.hidden_states` that keeps the streams of some numbers."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self.numbers = tuple(numbers)
        self.kept: dict[int, Tensor] = {}

    def __call__(self, kind: str, layer: int, tensor: Tensor) -> None:
        if kind == "residual" and layer in self.numbers:
            self.kept[layer] = tensor

    def take(self) -> list[Tensor]:
        kept, self.kept = self.kept, {}
        return [kept[number] for number in self.numbers]


def make_pairing(
    teacher: HybridLM,
    student: HybridLM,
    options: HiddenLoss,
    kept: KeptParts | None,
    batches: Iterable[Any],
    split: RowSplit | None = None,
) -> Pairing:
    """The pairing of a student as it is before its first step; `batches` are read where a map has to be fitted, with a
    `split` in parts.

    Raises InputError where pairs do not exist, or the kept channels are requested and not known.
    """
    device = student.head_weight.device
    pairs = choose_pairs(teacher.config, student.config, options, kept)
    if options.compare != "fitted":
        if kept is not None and kept.channels is not None:
            every = kept.channels == tuple(range(teacher.config.hidden_size))
            return Pairing(pairs, None if every else torch.tensor(kept.channels, device=device))
        if options.compare == "kept":
            raise InputError(
                "loss: hidden.compare=kept, but which channels of the teacher the student kept is not known (it is"
                " where the student's folder was pruned from just this teacher without a rotation); take fitted"
            )
    return Pairing(pairs, maps=fit_maps(teacher, student, pairs, batches, split))


def choose_pairs(
    teacher: HybridConfig, student: HybridConfig, options: HiddenLoss, kept: KeptParts | None
) -> tuple[tuple[int, int], ...]:
    """(student's stream, teacher's stream), the last of both always among them. Raises InputError."""
    ours, theirs = student.num_layers, teacher.num_layers
    if options.pairs:
        for a, b in options.pairs:
            if not (0 <= a <= ours and 0 <= b <= theirs):
                raise InputError(f"loss: hidden.pairs has [{a}, {b}]; streams are 0..{ours} and 0..{theirs}")
        return tuple((a, b) for a, b in options.pairs)
    if kept is not None:
        counterparts = [*kept.layers, theirs]
    else:
        counterparts = [round(layer * theirs / ours) for layer in range(ours + 1)]
    number = min(options.streams, ours)
    chosen = [round((place + 1) * ours / number) for place in range(number)]
    return tuple((stream, counterparts[stream]) for stream in chosen)


@torch.no_grad()
def fit_maps(
    teacher: HybridLM,
    student: HybridLM,
    pairs: Sequence[tuple[int, int]],
    batches: Iterable[Any],
    split: RowSplit | None,
) -> tuple[Tensor, ...]:
    """The matrix [Hs, Ht] of each pair that brings the student's stream nearest to the teacher's, by least squares over
    the batches' tokens; moments are float64, and a small ridge holds channels that hardly move."""
    ours, theirs = StreamObserver(a for a, _ in pairs), StreamObserver(b for _, b in pairs)
    moments = [[torch.zeros((), dtype=torch.float64)] * 2 for _ in pairs]
    for batch in batches:
        rows = part_rows(batch, split)
        for model, streams in ((student, ours), (teacher, theirs)):
            states_of(model, rows, streams)
        counted = rows.labels >= 0
        for moment, a, b in zip(moments, ours.take(), theirs.take(), strict=True):
            x, y = unit(a[counted]).double(), unit(b[counted]).double()
            moment[0] = moment[0].to(x.device) + x.T @ x
            moment[1] = moment[1].to(x.device) + x.T @ y
    maps = []
    for second, cross in moments:
        if split is not None:
            second, cross = (split.gather(moment).sum(0) for moment in (second, cross))
        ridge = RIDGE * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype, device=second.device)
        maps.append(torch.linalg.solve(second + ridge, cross).float())
    return tuple(maps)
