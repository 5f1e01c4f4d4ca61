"""Scores and a target in, kept indices out: the best layers, channels, neurons and heads.

Sources: Minitron-SSM (arXiv 2504.11409, section 3): one ranking of head channels for all heads of a Mamba layer, a
head's score on the kept channels only (eq. 17), heads ranked inside their group, equally many kept in each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..models.axes import HIDDEN, Axis, axis_sizes
from ..models.config import HybridConfig
from ..models.errors import InputError
from .scores import WidthScores, check_width_scores
from .sizing import goal_of, widths_for
from .slice import GROUPS_OF_AXIS, WIDTH_OF_AXIS, Selection


@dataclasses.dataclass(frozen=True)
class Target:
    """The size to prune to: a number of layers and widths, named as in the config; None keeps the source's.
    `keep_layers` names the source layers that stay, whatever the order of the scores. `parameters`, a share of the
    source's or a count, stands for hidden_size and intermediate_size, or for the one not given (see sizing.py)."""

    layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    mamba_num_heads: int | None = None
    mamba_head_dim: int | None = None
    keep_layers: tuple[int, ...] | None = None
    parameters: float | None = None


def select(config: HybridConfig, widths: WidthScores, layer_order: Sequence[int], target: Target) -> Selection:
    """The units that score highest, as many as the target asks for, in the source's order.

    `layer_order` lists layers, the first to be removed first. Channel scores (hidden) are summed over the norms
    of the layers that stay and the final norm. Of equal scores the lower index stays.
    Raises InputError when the target is larger than the source, below 1, not divisible by the groups it has to
    respect, when it names a width that no remaining layer has, and when the scores do not fit the config.
    """
    check_width_scores(config, widths, "scores")
    if target.keep_layers is None:
        layers = kept_layers(config, layer_order, target.layers)
    else:
        layers = named_layers(config, target.keep_layers, target.layers)
    target = with_widths(config, "".join(config.pattern[layer] for layer in layers), target)
    sizes = {axis: size for axis, size in axis_sizes(config).items() if axis.layer is None or axis.layer in layers}
    counts = {kind: check_width(config, sizes, kind, getattr(target, width)) for kind, width in WIDTH_OF_AXIS.items()}
    kept: dict[Axis, tuple[int, ...]] = {}
    for axis in sizes:
        count = counts[axis.kind]
        if count is None:
            continue
        if axis == HIDDEN:
            kept[axis] = best(widths[axis][[*layers, config.num_layers]].sum(0), count)
        elif axis.kind == "mamba_head_dim":
            kept[axis] = best(channel_scores(widths, axis), count)
        elif axis.kind == "mamba_heads":
            channels = counts["mamba_head_dim"] or config.mamba_head_dim
            kept[axis] = best(head_scores(widths, axis, channels), count, config.n_groups)
        else:
            groups = getattr(config, GROUPS_OF_AXIS[axis.kind]) if axis.kind in GROUPS_OF_AXIS else 1
            kept[axis] = best(widths[axis], count, groups)
    return Selection(layers, kept)


def with_widths(config: HybridConfig, pattern: str, target: Target) -> Target:
    """The target with the widths that its `parameters` stand for where layers of that pattern stay. Raises
    InputError."""
    if target.parameters is None:
        return target
    asked = {name: getattr(target, name) for name in WIDTH_OF_AXIS.values() if getattr(target, name) is not None}
    smaller = config.replace(pattern=pattern, **asked)
    goal = goal_of(config, target.parameters)
    hidden, intermediate = widths_for(smaller, goal, target.hidden_size, target.intermediate_size)
    return dataclasses.replace(
        target,
        parameters=None,
        hidden_size=None if hidden == config.hidden_size else hidden,
        intermediate_size=None if intermediate == config.intermediate_size else intermediate,
    )


def kept_layers(config: HybridConfig, layer_order: Sequence[int], count: int | None) -> tuple[int, ...]:
    """The layers that stay, ascending, when all but `count` go in `layer_order`. Raises InputError."""
    total = config.num_layers
    if count is None:
        return tuple(range(total))
    if not 1 <= count <= total:
        raise InputError(f"target: layers is {count}; expected 1..{total}, the model's {total} layers at most")
    size = len(config.block) or 1
    if count % size:
        raise InputError(
            f"target: layers is {count}; expected a multiple of {size}, because {config.family} has whole blocks"
            f" {config.block!r}"
        )
    removed = layer_order[: total - count]
    if len(set(removed)) != total - count or not all(0 <= layer < total for layer in removed):
        raise InputError(
            f"target: {count} of {total} layers need an order of {total - count} distinct layers to remove,"
            f" the scores have {list(layer_order)}; score with importance.remove_layers={total - count} or more"
        )
    if len({layer // size for layer in removed}) * size != len(removed):
        raise InputError(
            f"target: the scores remove layers {list(removed)}, which are not whole blocks {config.block!r};"
            f" score {config.family} again"
        )
    return tuple(layer for layer in range(total) if layer not in removed)


def named_layers(config: HybridConfig, layers: tuple[int, ...], count: int | None) -> tuple[int, ...]:
    """The layers that a target names. Raises InputError."""
    if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < config.num_layers:
        raise InputError(
            f"target: keep_layers is {list(layers)}; expected ascending numbers within 0..{config.num_layers - 1}"
        )
    if count not in (None, len(layers)):
        raise InputError(f"target: keep_layers names {len(layers)} layers, but layers is {count}; give one of the two")
    return layers


def check_width(config: HybridConfig, sizes: Mapping[Axis, int], kind: str, count: int | None) -> int | None:
    """A width of the target, checked against the source's axes that stay. Raises InputError."""
    if count is None:
        return None
    name = WIDTH_OF_AXIS[kind]
    size = next((size for axis, size in sizes.items() if axis.kind == kind), None)
    if size is None:
        raise InputError(f"target: {name} is {count}, but no layer of the pruned model has that width; leave it out")
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= size:
        raise InputError(f"target: {name} is {count}; expected a whole number of 1..{size}, the source's width")
    if kind in GROUPS_OF_AXIS and count % getattr(config, GROUPS_OF_AXIS[kind]):
        groups = GROUPS_OF_AXIS[kind]
        raise InputError(
            f"target: {name} is {count}; expected a multiple of {groups} ({getattr(config, groups)}),"
            " because every group keeps equally many heads"
        )
    return count


def channel_scores(widths: WidthScores, axis: Axis) -> Tensor:
    """Scores [head_dim] of the channels of a Mamba layer's heads: the L2 norm over its heads."""
    return torch.linalg.vector_norm(widths[Axis("mamba_heads", axis.layer)], dim=0)


def head_scores(widths: WidthScores, axis: Axis, channels: int) -> Tensor:
    """Scores [heads] of a Mamba layer's heads: the L2 norm over the channels that are kept of them."""
    matrix = widths[Axis("mamba_heads", axis.layer)]
    return torch.linalg.vector_norm(matrix[:, best(channel_scores(widths, axis), channels)], dim=1)


def best(scores: Tensor, count: int, groups: int = 1) -> tuple[int, ...]:
    """Indices of the `count` highest scores [U], ascending; equally many of each of `groups` runs of units."""
    per_group = scores.reshape(groups, -1)
    order = per_group.argsort(dim=1, descending=True, stable=True)[:, : count // groups].sort(dim=1).values
    return tuple((order + torch.arange(groups)[:, None] * per_group.shape[1]).flatten().tolist())
