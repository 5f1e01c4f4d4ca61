"""Widths for a number of parameters: what a target of so many, or of such a share, asks for.

hidden_size shrinks, and intermediate_size by the square of its factor, as from Nemotron Nano 2's 12B to its 9B (5120 to
4480, 20480 to 15680: arXiv 2508.14444); the parameters that this leaves go to intermediate_size. Heads of either kind
stay as they are, as they did there.
"""

from __future__ import annotations

import bisect
import functools

from ..models.config import HybridConfig
from ..models.cost.parameters import count_parameters
from ..models.errors import InputError

WIDE = 2048  # from this hidden size on


def alignment(config: HybridConfig) -> int:
    """Widths are multiples of it: whole tiles of a GPU's matrix product where the model is large, and else what its
    tensor cores ask for."""
    return 64 if config.hidden_size >= WIDE else 8


def goal_of(config: HybridConfig, parameters: float) -> float:
    """Parameters asked for: a share of the config's up to 1, or a count. Raises InputError."""
    own = count_parameters(config)
    goal = parameters * own if parameters <= 1 else parameters
    if not 0 < goal <= own:
        raise InputError(
            f"target: parameters is {parameters:g}; expected a share of the model's, such as 0.75, or a count of at"
            f" most its {own:,}"
        )
    return goal


def widths_for(config: HybridConfig, goal: float, hidden: int | None, intermediate: int | None) -> tuple[int, int]:
    """hidden_size and intermediate_size for `goal` parameters at most of a config whose layers and heads are the
    target's; those that are given stay. Raises InputError where no width leaves so few, or both are given."""
    has_mlp, align = "-" in config.pattern, alignment(config)
    if hidden is not None and (intermediate is not None or not has_mlp):
        raise InputError("target: parameters stands beside the widths that it is to find; leave one of them out")

    if hidden is not None:
        config.replace(hidden_size=hidden).to_hf()  # says what is wrong with it

    def fits(hidden: int, intermediate: int) -> bool:
        smaller = config.replace(hidden_size=hidden, intermediate_size=intermediate)
        return count_parameters(smaller) <= goal and unwritable(smaller) is None

    for width in [hidden] if hidden is not None else downwards(config.hidden_size, align):
        if intermediate is not None or not has_mlp:
            inner = [intermediate or config.intermediate_size]
        else:
            least = 0 if hidden is not None else (width / config.hidden_size) ** 2 * config.intermediate_size
            inner = [size for size in downwards(config.intermediate_size, align) if size >= least - align / 2]
        if inner and fits(width, inner[-1]):
            return width, inner[bisect.bisect_left(inner, True, key=functools.partial(fits, width))]
    raise InputError(
        f"target: no widths leave as few as {goal:,.0f} parameters; ask for more, or for fewer layers, too"
    )


def downwards(size: int, align: int) -> list[int]:
    """The size itself, then the multiples of `align` below it."""
    return [size, *range((size - 1) // align * align, 0, -align)]


def unwritable(config: HybridConfig) -> str | None:
    """Why no checkpoint folder can hold a model of this config; None where one can."""
    try:
        config.to_hf()
    except InputError as error:
        return str(error)
    return None
