"""The size to prune to, and widths for a number of parameters.

For so many parameters hidden_size shrinks, and intermediate_size by the square of its factor, as from Nemotron Nano 2's
12B to its 9B (5120 to 4480, 20480 to 15680: arXiv 2508.14444); the parameters that this leaves go to intermediate_size.
Heads of either kind stay as they are, as they did there. Where such aligned sizes miss the number by more than 0.1%,
nearby and finer ones are tried.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, Self

from ..models.axes import AXES, AxisRow, group_row
from ..models.config import HybridConfig
from ..models.cost.parameters import count_parameters
from ..models.errors import InputError
from ..models.quantities import check_between
from .expert_target import expert_widths

WIDE = 2048  # from this hidden size on
FINE = 8  # what tensor cores like
NEAR = 1e-3  # of the parameters requested
NEARBY = 4  # hidden sizes to try below the first
HIDDEN, INNER = AXES["hidden"].width, AXES["ffn"].width


def by_width(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What is given for widths by their config fields, in the order of the axes. Raises InputError for other names."""
    known = [row.width for row in AXES.values()]
    for name in given:
        if name not in known:
            raise InputError(f"{where}.{name} is no option here; known widths: {', '.join(known)}")
    return {name: given[name] for name in known if given.get(name) is not None}


class ByWidth:
    """Options that name widths by their config fields, whichever axes there are, beside others of their own."""

    @classmethod
    def option_types(cls) -> dict[str, Any]:
        """The options with their types; all may be left out."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """What it says, by the names of its options; what is None is left out."""
        own: Any = self
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(own)}
        content |= content.pop("widths")
        return {name: value for name, value in content.items() if value is not None}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """How pydantic reads one: as a dataclass of `option_types`."""
        from pydantic_core import core_schema

        fields = [(name, kind, None) for name, kind in cls.option_types().items()]
        options = dataclasses.make_dataclass(cls.__name__, fields)

        def built(read: Any) -> ByWidth:
            return cls(**{name: value for name, value in vars(read).items() if value is not None})

        return core_schema.no_info_after_validator_function(built, handler.generate_schema(options))


@dataclasses.dataclass(frozen=True, init=False)
class Target(ByWidth):
    """The size to prune to: a number of layers, and widths of axes, named as in the config; None keeps the source's.
    `keep_layers` names the source layers that stay, whatever the order of the scores. `parameters`, a share of the
    source's or a count, stands for hidden_size and intermediate_size, or for the one not given. `drop_mtp` leaves
    multi-token prediction out.

    Raises InputError for a width that no axis has.
    """

    layers: int | None
    keep_layers: tuple[int, ...] | None
    parameters: float | None
    drop_mtp: bool | None
    widths: Mapping[str, int]

    def __init__(
        self,
        layers: int | None = None,
        keep_layers: tuple[int, ...] | None = None,
        parameters: float | None = None,
        drop_mtp: bool | None = None,
        **widths: int | None,
    ) -> None:
        content = {"layers": layers, "keep_layers": keep_layers, "parameters": parameters, "drop_mtp": drop_mtp}
        for name, value in (content | {"widths": by_width(widths, "target")}).items():
            object.__setattr__(self, name, value)
        check_between(self, "target: ", 0, math.inf, "parameters", above=True)

    def __getattr__(self, name: str) -> int | None:
        """A width by its config field, None where it stays: `target.hidden_size`."""
        if any(row.width == name for row in AXES.values()):
            return self.widths.get(name)
        raise AttributeError(name)

    @classmethod
    def option_types(cls) -> dict[str, Any]:
        own = {
            "layers": int | None, "keep_layers": tuple[int, ...] | None, "parameters": float | None,
            "drop_mtp": bool | None,
        }  # fmt: skip
        return own | dict.fromkeys((row.width for row in AXES.values()), int | None)

    def replace(self, **changes: Any) -> Self:
        """A copy with some of it changed."""
        return type(self)(**(self.options() | changes))


def with_widths(config: HybridConfig, pattern: str, target: Target) -> Target:
    """The target with the widths that its `parameters` stand for where layers of that pattern stay, and those that
    follow from others (the heads of key-value heads, and where a family's readers derive sizes from hidden_size, what
    goes with it). Raises InputError."""
    held = ((row, group_row(row)) for row in AXES.values())
    followers = {
        row.width: followed(config, row, target.widths[own.width])
        for row, own in held
        if own and own.width in target.widths and row.width not in target.widths
    }
    target = target.replace(**followers)
    target = target.replace(**with_hidden(config.replace(pattern=pattern), target.widths))
    if target.parameters is None:
        return target
    ahead = 0 if target.drop_mtp else config.mtp_steps
    smaller = config.replace(pattern=pattern, mtp_steps=ahead, **target.widths)
    goal = goal_of(config, target.parameters)
    if any(kind.experts is not None for kind in smaller.kinds):

        def tied(sizes: Mapping[str, int]) -> dict[str, int]:
            return {**sizes, **tied_widths(smaller, sizes.get(HIDDEN, smaller.hidden_size), target.widths)}

        def together(given: Mapping[str, int]) -> dict[str, int]:
            sizes = expert_widths(smaller, goal, given, alignment(config), lambda own: smaller.replace(**tied(own)))
            return tied(sizes)

        if tied_widths(smaller, smaller.hidden_size, target.widths):
            # Where hidden_size goes in few steps alone it stays, as long as experts and shared expert leave so few.
            with contextlib.suppress(InputError):
                whole = {**target.widths, HIDDEN: smaller.hidden_size}
                return target.replace(parameters=None, **changed_widths(config, together(whole)))
        return target.replace(parameters=None, **changed_widths(config, together(target.widths)))
    hidden, intermediate = widths_for(smaller, goal, target.hidden_size, target.intermediate_size, target.widths)
    sizes = {HIDDEN: hidden, INNER: intermediate, **tied_widths(smaller, hidden, target.widths)}
    return target.replace(parameters=None, **changed_widths(config, sizes))


def changed_widths(config: HybridConfig, sizes: Mapping[str, int]) -> dict[str, int | None]:
    """The sizes that are not the config's own; None for the others."""
    return {name: None if size == getattr(config, name) else size for name, size in sizes.items()}


def followed(config: HybridConfig, row: AxisRow, groups: int) -> int:
    """The units of a row in so many of the source's groups, as many in each as there."""
    return getattr(config, row.width) // max(getattr(config, str(row.groups)), 1) * groups


def tied_widths(config: HybridConfig, hidden: int, given: Mapping[str, int]) -> dict[str, int]:
    """The widths that go with another hidden_size where a family's readers derive one from the other, but for those
    that are given, which stay as they are."""
    tied = {} if HIDDEN in given else config.family_record.tied(config, hidden)
    return {name: size for name, size in tied.items() if name not in given}


def with_hidden(config: HybridConfig, given: Mapping[str, int]) -> dict[str, int]:
    """The widths that go with another hidden_size that is given (`Family.tied`), but for those that are given, too."""
    hidden = given.get(HIDDEN, config.hidden_size)
    others = {name: size for name, size in given.items() if name != HIDDEN}
    return {} if hidden == config.hidden_size else tied_widths(config, hidden, others)


def alignment(config: HybridConfig) -> int:
    """Widths are multiples of it: whole tiles of a GPU's matrix product where the model is large, and else what its
    tensor cores like."""
    return 64 if config.hidden_size >= WIDE else FINE


def goal_of(config: HybridConfig, parameters: float) -> float:
    """Parameters requested: a share of the config's up to 1, or a count. Raises InputError."""
    own = count_parameters(config)
    goal = parameters * own if parameters <= 1 else parameters
    if not 0 < goal <= own:
        raise InputError(
            f"target: parameters is {parameters:g}; expected a share of the model's, such as 0.75, or a count of at"
            f" most its {own:,}"
        )
    return goal


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Pairs of hidden_size and intermediate_size for `goal` parameters at most, of a config whose layers and heads are
    the target's; what is tied to hidden_size goes with it, but for what is `given`. `free`: intermediate_size is."""

    config: HybridConfig
    goal: float
    given: Mapping[str, int]
    intermediate: int
    free: bool

    def of(self, hidden: int, inner: int) -> HybridConfig:
        tied = tied_widths(self.config, hidden, self.given)
        return self.config.replace(**{HIDDEN: hidden, INNER: inner, **tied})

    def left(self, hidden: int, inner: int) -> float:
        """The share of the goal that is left, infinite where the sizes cannot be."""
        smaller = self.of(hidden, inner)
        count = count_parameters(smaller)
        return math.inf if count > self.goal or unwritable(smaller) is not None else 1 - count / self.goal

    def with_inner(self, width: int, align: int, least: float = 0) -> list[tuple[int, int]]:
        """The width with the largest inner size that fits; none where none does."""
        inner = [self.intermediate]
        if self.free:
            inner = [size for size in downwards(self.intermediate, align) if size >= least - align / 2]
        if not inner or self.left(width, inner[-1]) == math.inf:
            return []
        return [(width, inner[bisect.bisect_left(inner, True, key=lambda size: self.left(width, size) < math.inf)])]

    def square(self, width: int) -> float:
        """The inner size that goes with a width where it shrinks by the square of that's factor."""
        return (width / self.config.hidden_size) ** 2 * self.intermediate

    def first(self, widths: list[int], align: int) -> list[tuple[int, int]]:
        """The largest width that leaves its inner size the square; none where no width leaves so few."""
        return next((found for width in widths if (found := self.with_inner(width, align, self.square(width)))), [])

    def nearest(self, widths: list[int], align: int) -> list[tuple[int, int]]:
        """The width whose inner size comes nearest to the square, where widths are few; none as in `first`."""
        pairs = [pair for width in widths for pair in self.with_inner(width, align)]
        return sorted(pairs, key=lambda pair: abs(pair[1] - self.square(pair[0])))[:1]


def widths_for(
    config: HybridConfig, goal: float, hidden: int | None, intermediate: int | None, given: Mapping[str, int]
) -> tuple[int, int]:
    """hidden_size and intermediate_size for `goal` parameters at most, within `NEAR` of it where intermediate_size is
    free (else hidden_size stays a multiple of `FINE`), of a config whose layers and heads are the target's; what is
    tied to hidden_size goes with it. Raises InputError where no width leaves so few, or both are given."""
    has_mlp, align = any(INNER in kind.fields for kind in config.kinds), alignment(config)
    free = has_mlp and intermediate is None
    if hidden is not None and not free:
        raise InputError("target: parameters stands beside the widths that it is to find; leave one of them out")
    if hidden is not None:
        config.replace(hidden_size=hidden).to_hf()  # says what is wrong with it
    sizes = Sizes(config, goal, given, intermediate or config.intermediate_size, free)
    widths = [hidden] if hidden is not None else downwards(config.hidden_size, align)
    possible = [width for width in widths if unwritable(sizes.of(width, sizes.intermediate)) is None]
    coarse = free and len(possible) < len(widths)  # not every width can be written
    if hidden is not None:
        pairs = sizes.with_inner(hidden, align)
    else:
        pairs = sizes.nearest(possible, align) if coarse else sizes.first(widths, align)
    if not pairs:
        raise InputError(
            f"target: no widths leave as few as {goal:,.0f} parameters; give a larger number, or fewer layers, too"
        )
    ((width, _),) = pairs
    above, below = [[size for size in possible if sign * (size - width) > 0] for sign in (1, -1)]
    finer = [] if free or hidden is not None else downwards((above or [width])[-1], FINE)
    near = sorted([*above[-1:], *below[:NEARBY]], key=lambda size: abs(size - width)) if free else []
    steps = (4, 2, 1) if free else ()
    # Whole tiles came first; now what tensor cores like, then the nearest other hidden size, and odd sizes last: before
    # it where hidden sizes lie far apart, since by how much each of the two shrinks matters more than how odd they are.
    others = itertools.chain(
        (sizes.with_inner(width, FINE) for _ in range(free)),
        (sizes.with_inner(width, step) for step in steps if coarse),
        (sizes.with_inner(size, FINE) for size in finer if size > width),
        (sizes.with_inner(size, align) for size in near),
        (sizes.with_inner(min(pairs, key=lambda pair: sizes.left(*pair))[0], step) for step in steps),
    )
    while min(sizes.left(*pair) for pair in pairs) > NEAR and (more := next(others, None)) is not None:
        pairs += more
    return min(pairs, key=lambda pair: sizes.left(*pair))


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
