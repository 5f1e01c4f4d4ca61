"""Which sizes fit a budget, and in what order to try them: the grid over layers and widths, exact bytes, proxies.

Sources: Nemotron Nano 2 (arXiv 2508.14444, section 4) lists the widths that fit, largest first, and distils the first
three; Minitron (2407.14679) finds that the order of candidates settles only after a short distillation.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ..models.axes import AXES, group_row
from ..models.config import HybridConfig
from ..models.cost.hardware import GIB, Hardware
from ..models.cost.inference import MemoryReport, memory
from ..models.cost.parameters import count_parameters
from ..models.cost.speed import Throughput, throughput
from ..models.errors import InputError
from ..models.kinds import KINDS
from ..models.quantities import check_between
from .choose import kept_layers, numbered_layers, select
from .kept import kept_share, scored_weights
from .patterns import Rules, broken_rule, count_patterns, embed, odd_gap
from .ranges import Values, values_of, whole
from .scores import LayerScores, WidthScores
from .slice import Selection, check_ahead
from .target import HIDDEN, INNER, ByWidth, Target, by_width, followed, unwritable, with_hidden

RANKS = ("memory", "importance", "loss")


@dataclasses.dataclass(frozen=True, init=False)
class Space(ByWidth):
    """The grid: for each width, by its config field, the values to try; None for the source's own.

    layers: numbers of layers, which go in the scores' order; or patterns: the layer patterns themselves.
    intermediate_ratio: multiples of the hidden size, instead of intermediate_size. Values that the kinds of layers like
    aligned (`LayerKind.aligned`, and hidden_size) and that are no multiples of `align` are left out, and so are numbers
    of heads that their groups do not divide, and ratios beyond the source; the source's own widths always count as
    aligned.
    """

    layers: Values
    patterns: tuple[str, ...] | None
    intermediate_ratio: Values
    align: int
    widths: Mapping[str, Values]

    def __init__(
        self,
        layers: Values = None,
        patterns: tuple[str, ...] | None = None,
        intermediate_ratio: Values = None,
        align: int = 8,
        **widths: Values,
    ) -> None:
        content = {"layers": layers, "patterns": patterns, "intermediate_ratio": intermediate_ratio, "align": align}
        for name, value in (content | {"widths": by_width(widths, "space")}).items():
            object.__setattr__(self, name, value)
        if align < 1:
            raise InputError(f"space: align is {align}; expected at least 1")
        sizes: dict[str, Values] = {"layers": layers, "intermediate_ratio": intermediate_ratio, **widths}
        for name, values in sizes.items():
            if isinstance(values, tuple) and not all(0 < size < math.inf for size in values):
                raise InputError(f"space: {name} is {list(values)}; expected sizes of more than 0")
        for one, other in (("layers", "patterns"), (INNER, "intermediate_ratio")):
            if all((content | widths).get(name) is not None for name in (one, other)):
                raise InputError(f"space: {one} and {other} are both given; they say the same, keep one")

    @classmethod
    def option_types(cls) -> dict[str, Any]:
        own = {"layers": Values, "patterns": tuple[str, ...] | None, "intermediate_ratio": Values, "align": int | None}
        return own | dict.fromkeys((row.width for row in AXES.values()), Values)


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bytes for weights and caches, and what has to fit in them: `batch` sequences of `context` tokens."""

    bytes: float
    context: int
    batch: int = 1
    dtypes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # torch dtypes, named as for `cost.memory`


@dataclasses.dataclass(frozen=True)
class Requests:
    """What throughput is estimated for (see `cost.throughput`); batch 0 is the largest that fits the budget."""

    input_tokens: int
    output_tokens: int
    batch: int = 0
    compute_efficiency: float = 0.5
    bandwidth_efficiency: float = 0.7

    def __post_init__(self) -> None:
        check_between(self, "requests.", 1, math.inf, "input_tokens", "output_tokens")
        check_between(self, "requests.", 0, math.inf, "batch")
        check_between(self, "requests.", 0, 1, "compute_efficiency", "bandwidth_efficiency", above=True)


@dataclasses.dataclass(frozen=True)
class Depth:
    """Source layers that stay; `named` where they were requested as a pattern and not by the scores' order. `label`
    tells depths apart: the number of layers, and a letter where several patterns have as many."""

    layers: tuple[int, ...]
    label: str
    named: bool = False


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A size that fits: its config, the target that prunes to it, and what is known of it; proxies are None where they
    were not requested."""

    name: str
    config: HybridConfig
    depth: Depth
    target: Target
    parameters: int
    memory: MemoryReport
    throughput: Throughput | None
    importance: float | None = None
    loss: float | None = None

    def selection(self, source: HybridConfig, widths: WidthScores) -> Selection:
        """What stays of a source with these scores."""
        target = self.target.replace(layers=None, keep_layers=numbered_layers(source, self.depth.layers))
        return select(source, widths, (), target)

    def words(self) -> list[str]:
        """The target as overrides of `limbeck prune`."""
        words = []
        for name, value in self.target.options().items():
            listed = f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
            words.append(f"target.{name}={listed}")
        return words


@dataclasses.dataclass(frozen=True)
class Found:
    """The candidates of a space, in the grid's order, and how many combinations there were, and were aligned."""

    candidates: tuple[Candidate, ...]
    combinations: int
    aligned: int


def find_depths(config: HybridConfig, space: Space, rules: Rules, scores: LayerScores | None) -> tuple[Depth, ...]:
    """The choices of layers of a space. A number of layers that the rules forbid is left out.

    A named pattern is made by the choice that removes what the first step of `scores` misses least together.
    Raises InputError where a pattern cannot be made of the source's, where the scores order too few layers, and
    where the rules leave nothing.
    """
    total = config.num_hidden_layers
    if space.patterns is not None:
        found = [embedded(config, pattern, rules, scores) for pattern in space.patterns]
        lengths = [len(numbered_layers(config, layers)) for layers in found]
        labels = [
            str(n) + ("" if lengths.count(n) == 1 else f"-{lengths[:i].count(n) + 1}") for i, n in enumerate(lengths)
        ]
        return tuple(Depth(layers, label, named=True) for layers, label in zip(found, labels, strict=True))
    numbers = [total] if space.layers is None else whole("layers", space.layers, total)
    order = () if scores is None else scores.order
    if min(numbers) < total and scores is None:
        raise InputError(f"space: layers is {numbers}; without scores give space.patterns, or scores=FOLDER")
    depths, broken = [], []
    for number in numbers:
        layers = kept_layers(config, order, number)
        pattern = "".join(config.pattern[layer] for layer in layers)
        rule = broken_rule(pattern, rules) or unwritable(config.replace(pattern=pattern))
        if rule is None and rules.pairs and odd_gap(layers, config.num_layers):
            rule = "layers that went one by one where pairs is true"
        if rule is None:
            depths.append(Depth(layers, str(number)))
        else:
            broken.append(f"{number} layers leave {rule}")
    if not depths:
        raise InputError(f"space: the rules allow no number of layers: {'; '.join(broken)}")
    return tuple(depths)


def pattern_counts(config: HybridConfig, candidates: Sequence[Candidate], rules: Rules) -> dict[str, int]:
    """How many patterns can be left at each number of layers that the candidates have."""
    size, lengths = config.block_size, sorted({candidate.config.num_layers for candidate in candidates})
    return {str(number // size): count_patterns(config.pattern, number, rules, size=size) for number in lengths}


def embedded(config: HybridConfig, pattern: str, rules: Rules, scores: LayerScores | None) -> tuple[int, ...]:
    """The layers that become a named pattern. Raises InputError."""
    (config.replace(pattern=pattern) if pattern else config).to_hf()
    cost = scores.candidates[0] if scores is not None and scores.candidates else {}
    layers = embed(config.pattern, pattern, rules, cost, size=config.block_size)
    if not layers:
        rule = broken_rule(pattern, rules)
        why = f"it has {rule}" if rule else "no layers of it are left in that order" + ", by pairs" * rules.pairs
        raise InputError(f"space: pattern {pattern!r} cannot be made of the model's {config.pattern}: {why}")
    return layers


def find_candidates(
    config: HybridConfig,
    space: Space,
    depths: Sequence[Depth],
    budget: Budget,
    hardware: Hardware,
    requests: Requests | None = None,
) -> Found:
    """Every combination of the space that is aligned, that a folder of the family can hold, and that fits the budget,
    with exact parameters and bytes.

    Raises InputError where a value is not one that the source can be cut to, and where nothing fits.
    """
    combinations, aligned, smallest, candidates = 0, 0, float("inf"), list[Candidate]()
    for depth in depths:
        pattern = "".join(config.pattern[layer] for layer in depth.layers)
        base = config.replace(pattern=pattern)
        for widths in grid(base, space):
            combinations += 1
            smaller = resized(base, widths) if is_aligned(config, widths, space.align) else None
            if smaller is None or unwritable(smaller) is not None:
                continue
            aligned += 1
            report = memory(smaller, budget.context, budget.batch, chunk=None, **budget.dtypes)
            smallest = min(smallest, report.total)
            if report.total > budget.bytes:
                continue
            tied = with_hidden(base, {HIDDEN: smaller.hidden_size})  # said also where it is the source's
            changed: dict[str, Any] = {
                n: int(value) for n, value in widths.items() if value != getattr(config, n) or n in tied
            }
            if len(depth.layers) < config.num_layers:
                stay = numbered_layers(config, depth.layers)
                changed |= {"keep_layers": stay} if depth.named else {"layers": len(stay)}
            speed = None
            if requests is not None:
                speed = throughput(
                    smaller, hardware, budget=budget.bytes,
                    **dataclasses.asdict(requests) | {"batch": requests.batch or None}, **budget.dtypes,
                )  # fmt: skip
            name, parameters = name_of(smaller, depth, config), count_parameters(smaller)
            candidates.append(Candidate(name, smaller, depth, Target(**changed), parameters, report, speed))
    if not aligned:
        raise InputError(f"space: none of {combinations} combinations is aligned (align={space.align}, whole groups)")
    if not candidates:
        raise InputError(
            f"space: none of {aligned:,} sizes fits: the smallest takes {smallest / GIB:.2f} GiB,"
            f" the budget is {budget.bytes / GIB:.2f} GiB; give smaller widths, fewer layers, or a shorter context"
        )
    return Found(tuple(candidates), combinations, aligned)


def resized(base: HybridConfig, widths: Mapping[str, float]) -> HybridConfig | None:
    """The config of these widths; None where they cannot be together, as more experts a token than there are, or where
    layers of multi-token prediction keep others."""
    try:
        if base.mtp_layers is not None:
            check_ahead(base, base.mtp_layers, {name: int(value) for name, value in widths.items()})
        return base.replace(**{name: int(value) for name, value in widths.items()})
    except InputError:
        return None


def grid(base: HybridConfig, space: Space) -> Iterable[dict[str, float]]:
    """The combinations of widths for a pattern; a width that no layer has stays out. Raises InputError."""
    axes: dict[str, list[Any]] = {}
    for name in widths_of(base):
        values = space.widths.get(name)
        axes[name] = [getattr(base, name)] if values is None else whole(name, values, getattr(base, name))
    ratios, fixed = None, {name for name, values in space.widths.items() if values is not None}
    fixed |= {row.width for row in AXES.values() if row.groups in fixed and group_row(row) is not None}
    if space.intermediate_ratio is not None and INNER in axes:
        ratios = axes[INNER] = values_of("intermediate_ratio", space.intermediate_ratio)
    for values in itertools.product(*axes.values()):
        widths = dict(zip(axes, values, strict=True))
        if ratios is not None:
            widths[INNER] *= widths[HIDDEN]
        for row in AXES.values():
            if group_row(row) is not None and row.width in widths and space.widths.get(row.width) is None:
                widths[row.width] = followed(base, row, int(widths[str(row.groups)]))
        widths |= with_hidden(base, {name: int(widths[name]) for name in widths if name in fixed})
        yield widths


def widths_of(config: HybridConfig) -> list[str]:
    """The config fields of the widths that a model has, in the order of the axes."""
    own = {name for kind in dict.fromkeys(config.kinds) for name in kind.widths() if getattr(config, name)}
    return [row.width for row in AXES.values() if row.width == HIDDEN or row.width in own]


def is_aligned(config: HybridConfig, widths: Mapping[str, float], align: int) -> bool:
    """Whether tensor cores and groups like the widths, and the source has as much."""
    if any(value != int(value) or value > getattr(config, name) for name, value in widths.items()):
        return False
    for fields in ((HIDDEN,), *(fields for kind in dict.fromkeys(config.kinds) for fields in kind.aligned)):
        if all(name in widths for name in fields):
            size = math.prod(widths[name] for name in fields)
            if size % align and size != math.prod(getattr(config, name) for name in fields):
                return False
    for row in AXES.values():
        if row.groups is None or row.per_group or row.width not in widths:
            continue
        every = getattr(config, row.groups)
        groups = widths.get(row.groups, every)
        if widths[row.width] % groups or widths[row.width] // groups > getattr(config, row.width) // every:
            return False
    return True


def name_of(config: HybridConfig, depth: Depth, source: HybridConfig) -> str:
    """Short, readable, a folder's name, and different for every size of a space: such as L56-H4480-F15680-M128x80."""
    rows = [row for row in AXES.values() if row.letter and row.width in widths_of(config)]
    others = [f"{row.letter}{new}" for row in rows if (new := getattr(config, row.width)) != getattr(source, row.width)]
    kinds = sorted(
        dict.fromkeys(config.kinds), key=lambda kind: list(KINDS).index(kind.like or kind.letter), reverse=True
    )
    sizes = [kind.size_label(config) for kind in kinds]
    name = "-".join([f"L{depth.label}", f"H{config.hidden_size}", *filter(None, sizes), *others])
    assert PurePath(name).name == name
    return name


def with_importance(
    config: HybridConfig, widths: WidthScores, candidates: Sequence[Candidate]
) -> tuple[Candidate, ...]:
    """The candidates with the share of importance that they keep, of 1 for the source. See `kept.importance_kept`."""
    known: dict[tuple[Any, ...], float] = {}
    weights = scored_weights(config, widths)

    def share(candidate: Candidate, kind: str) -> float:
        rows = [AXES[kind], *(row for row in AXES.values() if row.within == kind or row.width == AXES[kind].groups)]
        counts: dict[str, Any] = {row.width: candidate.target.widths.get(row.width) for row in rows}
        key = (candidate.depth.layers, kind, *counts.values())
        if key not in known:
            target = Target(keep_layers=numbered_layers(config, candidate.depth.layers), **counts)
            known[key] = kept_share(config, widths, select(config, widths, (), target), kind)
        return known[key]

    return tuple(
        dataclasses.replace(
            candidate,
            importance=sum(share(candidate, kind) * weight for kind, weight in weights.items()) / sum(weights.values()),
        )
        for candidate in candidates
    )


def ranked(candidates: Iterable[Candidate], by: str) -> tuple[Candidate, ...]:
    """Best first: by `memory` the largest (the paper's order), by `importance` the one that keeps most, by `loss` the
    lowest, those without a measured loss after the others by importance. Names decide between equals."""
    if by == "memory":
        return tuple(sorted(candidates, key=lambda c: (-c.memory.total, -c.parameters, c.name)))
    if by == "importance":
        return tuple(sorted(candidates, key=lambda c: (-c.importance, -c.memory.total, c.name)))  # type: ignore[operator]
    assert by == "loss", by
    unmeasured = float("inf")
    return tuple(sorted(ranked(candidates, "importance"), key=lambda c: unmeasured if c.loss is None else c.loss))
