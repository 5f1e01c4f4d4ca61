"""An experiment's figures: rows of a table with their spread over the seeds, whether their order is the published one,
and what foretells the order at the end."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .cells import DISTILLED, PRUNED


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant's figure for each seed, and what was published."""

    values: tuple[float, ...]
    published: float | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> str:
        return spread(self.values)

    def less(self, other: Row) -> tuple[float, ...]:
        """The difference to another variant, seed by seed."""
        return tuple(a - b for a, b in zip(self.values, other.values, strict=True))


def spread(values: Sequence[float], sign: str = "") -> str:
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:{sign}.4f}"
    return f"{mean:{sign}.4f} [{min(values):{sign}.4f}, {max(values):{sign}.4f}]"


def agreement(rows: Mapping[str, Row], more_is_better: bool) -> str:
    """A sentence on whether the order is the published one; a pair counts where all seeds say the same of it."""
    known = {name: row for name, row in rows.items() if row.published is not None}
    if len(known) < 2:
        return "The source gives no figures to compare the order with."
    same, other, open_ = [], [], []
    for first, second in itertools.combinations(known, 2):
        a, b = known[first], known[second]
        assert a.published is not None and b.published is not None
        pair, signs = f"{first} and {second}", {math.copysign(1, value) for value in a.less(b)}
        if len(signs) > 1 or a.mean == b.mean:
            open_.append(pair)
        elif ((a.mean > b.mean) == more_is_better) == (a.published < b.published):
            same.append(pair)
        else:
            other.append(pair)
    parts = [f"{len(same)} of {len(same) + len(other) + len(open_)} pairs are in the published order"]
    if other:
        parts.append(f"the other way round: {'; '.join(other)}")
    if open_:
        parts.append(f"not the same with every seed: {'; '.join(open_)}")
    return ", ".join(parts) + "."


def order_of(rows: Mapping[str, Row], cells: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """How well the variants' order at the end is foretold (Spearman's correlation, one a seed): by their parameters, by
    the loss as they were pruned, and by the held-out KL after so many tokens. Of the figure less is better."""
    foretold: dict[str, list[float]] = {}
    for seed in range(len(next(iter(rows.values())).values)):
        end = [row.values[seed] for row in rows.values()]
        found = [each[seed] for each in cells.values()]
        by: dict[str, list[float]] = {
            "parameters": [-float(cell["models"][DISTILLED]["parameters"]) for cell in found],
            "loss as pruned": [cell["models"][PRUNED]["cross_entropy"]["value"] for cell in found],
        }
        curves = [{point["tokens"]: point["kl"] for point in cell["curve"]} for cell in found]
        for tokens in sorted(set.intersection(*map(set, curves))):
            by[f"{tokens:,} tokens"] = [curve[tokens] for curve in curves]
        for name, values in by.items():
            foretold.setdefault(name, []).append(rank_correlation(values, end))
    return foretold


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, with mean ranks for equals; 0 where all of one side are equal."""
    first, second = (ranks(values) for values in (a, b))
    return statistics.correlation(first, second) if len(set(first)) > 1 and len(set(second)) > 1 else 0.0


def ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values
    ]
