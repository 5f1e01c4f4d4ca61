"""An experiment's figures: rows of a table with their spread over the seeds, whether their order is the published one,
and what predicts the order at the end."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .cells import PRUNED

TOKENS = " tokens"
STABLE = 0.9  # the correlation from which on an order counts as that of the end


@dataclasses.dataclass(frozen=True)
class VariantRow:
    """A variant's figure for each seed, and what was published."""

    values: tuple[float, ...]
    published: float | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> str:
        return spread(self.values)

    def less(self, other: VariantRow) -> tuple[float, ...]:
        """The difference to another variant, seed by seed."""
        return tuple(a - b for a, b in zip(self.values, other.values, strict=True))


def spread(values: Sequence[float], sign: str = "") -> str:
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:{sign}.4f}"
    return f"{mean:{sign}.4f} [{min(values):{sign}.4f}, {max(values):{sign}.4f}]"


def published_pairs(
    rows: Mapping[str, VariantRow], published_more: bool, orders: Sequence[Sequence[str]]
) -> list[tuple[str, str]]:
    """Pairs of variants of which the source holds the first for the better one: by its figures, of which more is better
    or less, and by what it says, in `orders` from the best to the worst."""
    pairs = [pair for order in orders for pair in itertools.combinations([name for name in order if name in rows], 2)]
    for first, second in itertools.combinations(rows, 2):
        a, b = rows[first].published, rows[second].published
        if a is not None and b is not None and a != b:
            pairs.append((first, second) if (a > b) == published_more else (second, first))
    return list(dict.fromkeys(pairs))


def agreement(rows: Mapping[str, VariantRow], more_is_better: bool, pairs: Sequence[tuple[str, str]]) -> str:
    """A sentence on whether the order is the published one; a pair counts where all seeds say the same of it."""
    if not pairs:
        return "The source compares none of these."
    same, other, open_ = [], [], []
    for better, worse in pairs:
        differences = rows[better].less(rows[worse])
        pair = f"{better} and {worse}"
        if min(differences) <= 0 <= max(differences):
            open_.append(pair)
        elif (differences[0] > 0) == more_is_better:
            same.append(pair)
        else:
            other.append(pair)
    count = f"{len(same)} of {len(pairs)} pairs are" if len(pairs) > 1 else f"The pair is{'' if same else ' not'}"
    parts = [f"{count} in the published order"]
    if other:
        parts.append(f"the other way round: {'; '.join(other)}")
    if open_:
        parts.append(f"not the same with every seed: {'; '.join(open_)}")
    return ", ".join(parts) + "."


def order_of(rows: Mapping[str, VariantRow], cells: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """How well the variants' order at the end is predicted (Spearman's correlation, one a seed): by the share of
    importance kept, by the loss as they were pruned, and by the held-out KL after so many tokens. Of the figure less is
    better."""
    predicted: dict[str, list[float]] = {}
    for seed in range(len(next(iter(rows.values())).values)):
        end = [row.values[seed] for row in rows.values()]
        row = [each[seed] for each in cells.values()]
        by: dict[str, list[float]] = {
            "importance kept": [-float(cell["importance_kept"]) for cell in row],
            "loss as pruned": [cell["models"][PRUNED]["cross_entropy"]["value"] for cell in row],
        }
        curves = [{point["tokens"]: point["kl"] for point in cell["curve"]} for cell in row]
        for tokens in sorted(set.intersection(*map(set, curves))):
            by[f"{tokens:,}{TOKENS}"] = [curve[tokens] for curve in curves]
        for name, values in by.items():
            predicted.setdefault(name, []).append(rank_correlation(values, end))
    return predicted


def stable_from(predicted: Mapping[str, Sequence[float]]) -> str:
    """A sentence on when the order is that of the end. predicted: as of `order_of`."""
    means = {name: statistics.fmean(values) for name, values in predicted.items() if name.endswith(TOKENS)}
    stable = list(itertools.takewhile(lambda name: means[name] >= STABLE, reversed(means)))
    if not stable:
        return f"At no time before the end is the mean correlation {STABLE:g} or more to stay."
    return f"The mean correlation is {STABLE:g} or more from {stable[-1]} on."


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, with mean ranks for equals; 0 where all of one side are equal."""
    from scipy.stats import spearmanr  # takes a second, which only an experiment's end waits for

    return float(spearmanr(a, b).statistic) if len(set(a)) > 1 and len(set(b)) > 1 else 0.0
