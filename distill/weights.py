"""Weights of a loss's parts: a number, or one that moves from a start to an end over the first steps."""

from __future__ import annotations

import dataclasses
import math

from ..models.errors import InputError

SHAPES = ("linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Ramp:
    """From `start` at step 0 to `end` at step `steps` and after, in a straight line or half a cosine."""

    start: float
    end: float
    steps: int
    shape: str = "linear"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"loss: a weight's steps are {self.steps}; expected at least 1")
        if self.shape not in SHAPES:
            raise InputError(f"loss: a weight's shape {self.shape!r} is unknown; known: {', '.join(SHAPES)}")


LossWeight = float | Ramp


def weight_at(weight: LossWeight, step: int) -> float:
    """The weight of a step, counted from 0."""
    if not isinstance(weight, Ramp):
        return weight
    share = min(step / weight.steps, 1.0)
    if weight.shape == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return weight.start + (weight.end - weight.start) * share


def greatest(weight: LossWeight) -> float:
    return max(weight.start, weight.end) if isinstance(weight, Ramp) else weight


def check_weight(name: str, weight: LossWeight) -> None:
    """Raises InputError where a weight is negative at some step."""
    least = min(weight.start, weight.end) if isinstance(weight, Ramp) else weight
    if not 0 <= least <= greatest(weight) < math.inf:
        raise InputError(f"loss: {name} is {weight}; expected 0 or more")
