"""On-policy distillation: text that the student writes itself, and what it learns there. Sources: arXiv 2306.13649
(training on the student's own continuations, a share of them in a batch, any divergence), 2306.08543 (reverse KL)."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from ..kernels.divergence import DIVERGENCES, Divergence
from ..models.errors import InputError

ESTIMATORS = ("full", "top_k", "advantage")


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """`share` of a batch's rows (0: none) are continuations that the student draws before each step, `new_tokens` at
    most after a prompt of `prompt_tokens` at most; a row holds as many of them as fit. `at_once` are decoded together
    (0: all). Tokens are drawn at `temperature` (0: greedy), from the `top_p` nucleus where it is given.

    On these rows `divergence` is learned over the whole vocabulary ("full"); or reverse KL over the student's top `k`
    tokens and the rest as one outcome ("top_k"); or by the policy gradient of the drawn token, whose advantage
    log(teacher / student) is cut to -`clip` .. `clip` nats ("advantage").
    """

    share: float = 1.0
    prompt_tokens: int = 64
    new_tokens: int = 64
    at_once: int = 0
    temperature: float = 1.0
    top_p: float | None = None
    divergence: str = Divergence.REVERSE.option
    estimator: str = "full"
    k: int = 64
    clip: float = 10.0

    def __post_init__(self) -> None:
        where = "distill.rollouts"
        if not 0 <= self.share <= 1:
            raise InputError(f"{where}.share is {self.share}; expected 0 (no row) to 1 (every row)")
        for name, least in (("prompt_tokens", 1), ("new_tokens", 1), ("k", 1), ("at_once", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{where}.{name} is {getattr(self, name)}; expected at least {least}")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"{where}.temperature is {self.temperature}; expected 0 (greedy) or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"{where}.top_p is {self.top_p}; expected more than 0 and at most 1")
        if not 0 < self.clip < math.inf:
            raise InputError(f"{where}.clip is {self.clip}; expected more than 0")
        for name, known in (("divergence", tuple(DIVERGENCES)), ("estimator", ESTIMATORS)):
            if getattr(self, name) not in known:
                raise InputError(f"{where}.{name} {getattr(self, name)!r} is unknown; known: {', '.join(known)}")
        if self.estimator != "full" and self.divergence != Divergence.REVERSE.option:
            raise InputError(
                f"{where}.estimator={self.estimator} is one of reverse KL; give divergence=reverse instead of"
                f" {self.divergence}, or estimator=full"
            )
        if self.estimator == "advantage" and (self.temperature != 1 or self.top_p not in (None, 1)):
            raise InputError(
                f"{where}.estimator=advantage needs tokens drawn from the student's own distribution; give"
                f" temperature=1 and top_p=null instead of {self.temperature:g} and {self.top_p}"
            )

    @property
    def width(self) -> int:
        """The tokens of a prompt with its continuation, at most."""
        return self.prompt_tokens + self.new_tokens

    def rows(self, batch: int) -> int:
        """How many rows of a batch are the student's own. Raises InputError where a share rounds to none."""
        rows = round(self.share * batch)
        if self.share and not rows:
            raise InputError(
                f"distill.rollouts.share ({self.share:g}) of {batch} rows is not one row; give {1 / batch:g} or more,"
                " or a larger batch"
            )
        return rows


def changes_of(options: type, name: str) -> Any:
    """A dataclass with a field for each of `options`, None where a stage leaves it as it is; what may be null, "none"
    makes null."""
    kinds = {field: kind | None for field, kind in typing.get_type_hints(options).items()}
    kinds |= {
        field: kind | typing.Literal["none"]
        for field, kind in kinds.items()
        if type(None) in typing.get_args(typing.get_type_hints(options)[field])
    }
    return dataclasses.make_dataclass(name, [(field, kind, None) for field, kind in kinds.items()], frozen=True)


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a stage's options that are not left as they are."""
    return {name: None if value == "none" else value for name, value in options.items() if value is not None}


RolloutChanges = changes_of(Rollouts, "RolloutChanges")


def changed_rollouts(rollouts: Rollouts | None, changes: dict[str, Any] | None) -> Rollouts | None:
    """The rollouts of a stage with these changes: from the defaults where there are none otherwise."""
    return rollouts if changes is None else dataclasses.replace(rollouts or Rollouts(), **changes)
