"""Several cuts, one after the other, planned on configs alone: what each leaves, and whether the model allows it.

Source: Nemotron Nano 2 (arXiv 2508.14444) takes layers first, distils, and takes widths of what that left; the
teacher is the original model every time.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any

from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.kinds import key_of
from .choose import select
from .depth import check_removal, random_layers, step_size
from .slice import Selection, written_config
from .target import Target, with_widths
from .width_metrics import RandomScores

DRAWS = 10  # of layers, where a draw may leave nothing that the next can take


@dataclasses.dataclass(frozen=True)
class Cut:
    """What a round takes away; of its layers as many are put in order as `remove_layers` says, or as the target
    removes."""

    name: str
    seed: int
    target: Target
    remove_layers: int | None
    pairs: bool
    min_layers: Mapping[str, int]

    def removed(self, config: HybridConfig) -> int:
        """So many, counted as the config's num_hidden_layers."""
        if self.remove_layers is not None:
            return self.remove_layers
        return 0 if self.target.layers is None else max(config.num_hidden_layers - self.target.layers, 0)

    def some_layers(self, config: HybridConfig) -> tuple[int, ...]:
        """Layers that might be removed: drawn, and drawn again where one leaves nothing that the next can take."""
        remove = self.removed(config) * config.block_size
        check_removal(config, remove, step_size(config, self.pairs), self.min_layers)
        limits: dict[str, Any] = {"remove": remove, "pairs": self.pairs, "min_layers": self.min_layers}
        for seed in range(DRAWS - 1):
            with contextlib.suppress(InputError):
                return random_layers(config, seed=seed, **limits).order
        return random_layers(config, seed=DRAWS - 1, **limits).order


@dataclasses.dataclass(frozen=True)
class CutStep:
    """A cut's way from config to config, and what stays in between."""

    cut: Cut
    before: HybridConfig
    selection: Selection
    after: HybridConfig

    def left(self, pattern: str) -> HybridConfig:
        """What is left where layers of that pattern stay. Raises InputError where the target cannot be met so."""
        target = with_widths(self.before, pattern, self.cut.target)
        return self.after.replace(pattern=pattern, **target.widths)


@contextlib.contextmanager
def named_round(name: str) -> Iterator[None]:
    """Says in which round an input was wrong."""
    try:
        yield
    except InputError as error:
        raise InputError(f"round {name}: {error}" if name else str(error)) from None


def plan_cuts(config: HybridConfig, cuts: Sequence[Cut], orders: Sequence[Sequence[int]] = ()) -> Iterator[CutStep]:
    """The cuts on a config alone, by random scores; `orders` are the layers to remove where they are known.

    Raises InputError where one cannot be done, or would leave what no folder can hold.
    """
    for number, cut in enumerate(cuts):
        with named_round(cut.name):
            order = orders[number] if number < len(orders) else cut.some_layers(config)
            selection = select(config, RandomScores(cut.seed).scores(config), order, cut.target)
            after = written_config(config, selection)
        yield CutStep(cut, config, selection, after)
        config = after


def leftovers(step: CutStep, patterns: set[str]) -> set[str]:
    """Every mix of kinds of layers that a cut may leave of those; a pattern's order is of no account here.

    Of neighbours removed two at a time any two kinds are taken for possible, so that the mixes are no fewer.
    """
    config, cut = step.before, step.cut
    named = cut.target.keep_layers is not None
    if config.family_record.blocks or (named and len(patterns) == 1):
        return {in_kinds(step.after)}
    least = check_removal(config, 0, 1, {} if named else cut.min_layers)
    removed = config.num_layers - step.after.num_layers
    mixes = set()
    for pattern in patterns:
        for letters in combinations_with_replacement(sorted(set(pattern)), removed):
            left = {kind: pattern.count(kind) - letters.count(kind) for kind in sorted(set(pattern))}
            keys = Counter(key_of(kind) for kind, count in left.items() for _ in range(count))
            spared = all(keys[key] >= least[key] for key in set(map(key_of, letters)))
            if spared and min(left.values()) >= 0:
                mixes.add("".join(kind * count for kind, count in left.items()))
    return mixes


def in_kinds(config: HybridConfig) -> str:
    """The pattern with like layers side by side, unless they come in blocks."""
    return config.pattern if config.family_record.blocks else "".join(sorted(config.pattern))
