"""Nested students: several sizes that one distillation leaves in one checkpoint (nested.py), as options."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from ..models.errors import InputError

if TYPE_CHECKING:
    from .options import DistillOptions

TEACHERS = ("teacher", "largest")
WHERE = "distill.nested"


@dataclasses.dataclass(frozen=True)
class NestedSize:
    """A size: `target` as of `limbeck prune` (parameters, or widths), `share` of the steps that train it, beside those
    of the others, and its `name` (None: the share of the student's parameters that it has, such as 75%)."""

    target: dict[str, Any]
    share: float = 1.0
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class NestedSizes:
    """The `sizes`, from the largest to the smallest, each within the one before it. All learn from the teacher, or all
    but the largest from the "largest" as it is at that step."""

    sizes: tuple[NestedSize, ...]
    teacher: str = "teacher"

    def __post_init__(self) -> None:
        if len(self.sizes) < 2:
            raise InputError(f"{WHERE}.sizes has {len(self.sizes)}; expected two at least, from the largest on")
        if self.teacher not in TEACHERS:
            raise InputError(f"{WHERE}.teacher {self.teacher!r} is unknown; known: {', '.join(TEACHERS)}")
        for number, size in enumerate(self.sizes):
            if not 0 < size.share < math.inf:
                raise InputError(f"{WHERE}.sizes[{number}].share is {size.share}; expected more than 0")
        names = [size.name for size in self.sizes if size.name is not None]
        if len(set(names)) != len(names):
            raise InputError(f"{WHERE}.sizes: two have one name, of {', '.join(names)}; expected a name for each")

    @property
    def targets(self) -> tuple[dict[str, Any], ...]:
        return tuple(size.target for size in self.sizes)


def check_nested(how: DistillOptions) -> None:
    """Raises InputError where a stage does what sizes within each other cannot."""
    train, loss = how.train, how.loss
    for name, refused, right in (
        ("rollouts", how.own_rows > 0, "without: the student that writes is one size"),
        ("loss.hidden.weight", loss.hidden_weighs, "0: streams of different widths are not paired"),
        ("loss.mtp_weight", loss.mtp_weight > 0, "0: multi-token prediction keeps its layers' widths"),
        ("train.quantize", train.quantize is not None, "null: a slice is rounded by other scales than the whole"),
        ("train.expert_balance", train.expert_balance > 0, "0: each size has a load of its own"),
        ("train.compile", train.compile, "false: weights are sliced anew at every step"),
    ):
        if refused:
            raise InputError(f"{WHERE} does not go with distill.{name}; expected {right}")
