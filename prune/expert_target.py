"""Widths for a number of parameters of a model whose MLPs are experts.

hidden_size shrinks, and the number of experts and the shared expert by the square of its factor, as the MLP does where
there is one; of what this leaves experts take what they can, and the shared expert (the experts' own width, where there
is none) the rest, in small steps. For scale: NVIDIA cut Nemotron-3-Nano's 31.6B to 22.3B by hidden 2688 to 2304, 128
experts to 104 and a shared 3712 to 3072.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

from ..models.axes import AXES
from ..models.config import HybridConfig
from ..models.cost.parameters import count_parameters
from ..models.errors import InputError

HIDDEN, EXPERTS, SHARED, WIDTH = (AXES[name].width for name in ("hidden", "experts", "shared_ffn", "expert_ffn"))
MANY = 64  # from so many experts on they stay in multiples of 8, which split evenly over the GPUs of a node
NEAR, FINE = 1e-3, 8
NEARBY = 0.9  # of the largest hidden size that fits: smaller ones are not tried

Sizes = dict[str, int]


def expert_widths(
    config: HybridConfig, goal: float, given: Mapping[str, int], align: int, sized: Callable[[Sizes], HybridConfig]
) -> Sizes:
    """The widths for `goal` parameters at most, and within `NEAR` of it where such steps allow that, of a config of
    experts; those that are given stay, and `sized` makes a config of the others. Raises InputError where nothing leaves
    so few, or nothing is left to find."""
    free = [name for name in (HIDDEN, EXPERTS, SHARED, WIDTH) if name not in given and getattr(config, name)]
    if HIDDEN not in free and not {EXPERTS, SHARED} & set(free):
        raise InputError("target: parameters stands beside the widths that it is to find; leave one of them out")
    filling = SHARED if getattr(config, SHARED) else WIDTH
    fill = filling if filling in free else None

    def left(sizes: Sizes) -> float | None:
        """The share of the goal that is left; None where sizes are too large, or cannot be."""
        try:
            smaller = sized(sizes)
            smaller.to_hf()
        except InputError:
            return None
        share = 1 - count_parameters(smaller) / goal
        return share if share >= 0 else None

    fullest = functools.partial(widest, left, {name: getattr(config, name) for name in free})
    best: tuple[float, Sizes] | None = None
    coarse = config.n_group * (8 if config.n_routed_experts >= MANY else 1)
    one = config.n_group
    # Whole tiles first, then odd sizes, other proportions last.
    tries = (align, coarse, FINE, 2), (align, one, FINE, 2), (FINE, one, FINE, 2), (FINE, one, 1, 2), (FINE, one, 1, 4)
    for tile, step, fine, power in tries:
        first = None
        for sizes in starts(config, free, fill, tile, step, power):
            if left(sizes) is None:
                continue
            found = fullest(fullest(sizes, EXPERTS, step), fill, fine)
            share = left(found)
            assert share is not None
            if best is None or share < best[0]:
                best = share, found
            if share <= NEAR:
                return found
            first = first or sizes
            if sizes.get(HIDDEN, 0) <= first.get(HIDDEN, 0) * NEARBY:
                break
    # Near all parameters no smaller hidden size comes as near as a little less of what fills.
    whole = {name: getattr(config, name) for name in free}
    if fill is not None and left(little := whole | {fill: max(whole[fill] // 2, 1)}) is not None:
        found = fullest(fullest(little, fill, FINE), fill, 1)
        share = left(found)
        if share is not None and (best is None or share < best[0]):
            best = share, found
    if best is None:
        raise InputError(
            f"target: no widths leave as few as {goal:,.0f} parameters; give a larger number, or fewer layers, too"
        )
    return best[1]


def widest(
    left: Callable[[Sizes], float | None], whole: Mapping[str, int], sizes: Sizes, name: str | None, step: int
) -> Sizes:
    """The sizes with the largest of a width that fits, from their own up; `whole` are the source's widths that are
    free."""
    if name is None or name not in whole:
        return sizes
    for size in [whole[name], *range((whole[name] - 1) // step * step, sizes[name], -step)]:
        if left(sizes | {name: size}) is not None:
            return sizes | {name: size}
    return sizes


def starts(
    config: HybridConfig, free: list[str], fill: str | None, tile: int, step: int, power: int
) -> Iterator[Sizes]:
    """The least of each width at every hidden size, a multiple of `tile`, the largest first: it shrinks by that power
    of hidden's factor; experts by `step`."""
    hidden = config.hidden_size
    for size in [hidden, *range((hidden - 1) // tile * tile, 0, -tile)] if HIDDEN in free else [hidden]:
        factor, sizes = (size / hidden) ** power if HIDDEN in free else 0.0, Sizes()
        if HIDDEN in free:
            sizes[HIDDEN] = size
        if EXPERTS in free:
            least = config.num_experts_per_tok * config.n_group // config.topk_group
            sizes[EXPERTS] = max(int(config.n_routed_experts * factor) // step * step, -(-least // step) * step)
        if fill is not None:
            sizes[fill] = max(int(getattr(config, fill) * factor) // FINE * FINE, min(FINE, getattr(config, fill)))
        yield sizes
