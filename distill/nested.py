"""Nested students: each step trains one of several sizes, which are prefixes of one model's units (models/submodel.py).

The objective is the mean of the sizes' losses, each with its share of the steps; a step is a draw of it. So weights
that the drawn size has not got have the gradient 0 and not none: their moments decay, and momentum still moves them,
as by any other draw of a mean. The size of a step follows from seed and number alone.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.axes import AXES, Axis
from ..models.config import HybridConfig
from ..models.cost.parameters import count_parameters
from ..models.errors import InputError
from ..models.hybrid import HybridLM
from ..models.row_split import row_split
from ..models.submodel import SubModel
from .gap.measure import measure_gap
from .losses import Distillation
from .nested_options import WHERE, NestedSizes
from .parallel import Trained, prepare
from .teacher import CachedTeacher
from .teaching import figures_of, held_out_figures

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 times the golden ratio, without its whole part
TURN = 2**64


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of the student's. `part` cuts it out; None: it is the student itself."""

    name: str
    share: float
    config: HybridConfig
    part: SubModel | None

    def of(self, student: HybridLM) -> HybridLM:
        """The model of this size, as the student's weights are now."""
        return student if self.part is None else self.part.of(student)


class Nest:
    """The sizes of a student, whose units are in order of importance. `cuts` are their configs with what each keeps of
    the student's units, the first of them all; `parameters` are those that shares are counted of (in names).

    Raises InputError where two sizes would have one name.
    """

    def __init__(
        self,
        options: NestedSizes,
        cuts: Sequence[tuple[HybridConfig, Mapping[Axis, Sequence[int]]]],
        parameters: int,
    ) -> None:
        self.options, whole = options, cuts[0][0]
        total = sum(size.share for size in options.sizes)
        self.sizes = tuple(
            Size(
                size.name or f"{count_parameters(config) / parameters:.0%}", size.share / total, config,
                SubModel(whole, config, kept) if config != whole else None,
            )
            for size, (config, kept) in zip(options.sizes, cuts, strict=True)
        )  # fmt: skip
        names = [size.name for size in self.sizes]
        if len(set(names)) != len(names):
            raise InputError(f"{WHERE}.sizes would have the names {', '.join(names)}; give each a name of its own")

    def drawn(self, seed: int, step: int) -> Size:
        """The size of a step. Steps of a golden angle around a circle on which each size has its share: after any
        number of them each size was drawn as often as its share says, give or take a few."""
        offset = int.from_bytes(hashlib.sha256(f"nested {seed}".encode()).digest()[:8], "little")
        left = (offset + step * GOLDEN) % TURN / TURN
        for size in self.sizes[:-1]:
            left -= size.share
            if left < 0:
                return size
        return self.sizes[-1]

    def loss(self, inner: Any, seed: int) -> NestedLoss:
        """The loss of a stage whose sizes are drawn from `seed`; `inner` is that of a single student."""
        assert isinstance(inner, Distillation)
        return NestedLoss(inner, self, seed)

    def figures(
        self, teacher: HybridLM | CachedTeacher, student: HybridLM, sample: Sequence[Any], context_parallel: int = 1
    ) -> dict[str, float]:
        """Held-out figures as `held_out_figures` has them: the mean over the sizes by their shares, and each one's KL
        and bits per byte under its name."""
        models = {size.name: size.of(student) for size in self.sizes}
        if isinstance(teacher, CachedTeacher):
            each = [held_out_figures(teacher, model, sample, context_parallel) for model in models.values()]
        else:
            numbered = {f"{number}": model for number, model in enumerate(models.values())}
            report = measure_gap(teacher, numbered, sample, resamples=2, split=row_split(context_parallel))
            each = [figures_of(report.models[number]) for number in numbered]
        mean = {
            name: sum(size.share * own[name] for size, own in zip(self.sizes, each, strict=True)) for name in each[0]
        }
        for size, own in zip(self.sizes, each, strict=True):
            mean |= {f"{name}_{size.name}": own[name] for name in ("validation_kl", "validation_bits_per_byte")}
        return mean

    def models(self, student: HybridLM) -> dict[str, HybridLM]:
        """Each size by its name, as the student's weights are now: the largest is the student, the others copies."""
        return {size.name: student if size.part is None else size.part.copy(student) for size in self.sizes}

    def content(self) -> dict[str, Any]:
        """nested.json: by what `limbeck prune` cuts a size out."""
        rows = [
            {"name": size.name, "share": size.share, "parameters": count_parameters(size.config),
             "widths": {row.width: width for row in AXES.values() if (width := getattr(size.config, row.width))}}
            for size in self.sizes
        ]  # fmt: skip
        return {"sizes": rows}


def open_nest(
    options: NestedSizes,
    largest: HybridLM,
    cuts: Sequence[tuple[HybridConfig, Mapping[Axis, Sequence[int]]]],
    parameters: int,
    dtype: torch.dtype,
) -> tuple[Trained, Nest]:
    """The largest size in training, its matrices in `dtype` where they are used, and the sizes within it (`Nest`)."""
    return prepare(largest.train(), dtype), Nest(options, cuts, parameters)


class NestedLoss:
    """A `loss_of` for `trainer.train`, told of each step before it: the loss of the size that is drawn for it."""

    def __init__(self, inner: Distillation, nest: Nest, seed: int) -> None:
        self.inner, self.nest, self.seed = inner, nest, seed
        whole = nest.sizes[0].config
        # The largest size as it stands, without gradients, where it teaches the others.
        self.frozen = SubModel(whole, whole, {}) if nest.options.teacher == "largest" else None
        self.at(0)

    def at(self, step: int) -> None:
        self.size = self.nest.drawn(self.seed, step)
        self.inner.at(step)

    def figures(self) -> dict[str, float]:
        """What the step's record says: the parameters of the size that it trained."""
        return {"size_parameters": count_parameters(self.size.config)}

    def __call__(self, student: HybridLM, rows: Any, normalizer: float) -> Tensor:
        if self.size.part is None:
            return self.inner(student, rows, normalizer)
        loss = self.inner
        if self.frozen is not None:
            loss = copy.copy(loss)
            loss.teacher = self.frozen.of(student, trained=False)
        return loss(self.size.of(student), rows, normalizer)
