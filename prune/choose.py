"""Scores and a target in, kept indices out: the best layers, channels, neurons and heads.

Sources: Minitron-SSM (arXiv 2504.11409, section 3): one ranking of head channels for all heads of a Mamba layer, a
head's score on the kept channels only (eq. 17), heads ranked inside their group, equally many kept in each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..models.axes import AXES, HIDDEN, Axis, AxisRow, axis_sizes, columns_of, group_axis, group_row, holds_units
from ..models.config import HybridConfig
from ..models.errors import InputError
from .scores import WidthScores, check_width_scores
from .slice import Selection
from .target import Target, with_widths


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
    counts = {row.name: check_width(config, sizes, row, target) for row in AXES.values()}
    kept: dict[Axis, tuple[int, ...]] = {}
    for axis in sizes:
        width = counts[axis.kind]
        if width is None or holds_units(axis.row):
            continue
        count = axis.units(config, width)
        if axis.row.ranked:
            kept[axis] = tuple(range(count))
        elif axis == HIDDEN:
            kept[axis] = best(widths[axis][[*layers, config.num_layers]].sum(0), count)
        elif axis.row.within is not None:
            kept[axis] = best(column_scores(widths[Axis(axis.row.within, axis.layer)]), count)
        else:
            if axis not in widths:
                raise InputError(
                    f"target: {axis.row.width} is {width}, but the scores have none for {axis.row.title};"
                    " score the model again"
                )
            columns = [counts[other.kind] or sizes[other] for other in columns_of(axis)]
            scores, owner = unit_scores(widths[axis], *columns), group_axis(axis)
            groups = counts[owner.kind] if owner else None
            if owner is None or groups is None:
                kept[axis] = best(scores, count, axis.groups(config))
            else:
                kept[owner], kept[axis] = best_in_groups(scores.reshape(axis.groups(config), -1), groups, count)
    return Selection(layers, kept, ahead=not target.drop_mtp)


def kept_layers(config: HybridConfig, layer_order: Sequence[int], count: int | None) -> tuple[int, ...]:
    """The layers that stay, ascending, when all but `count` go in `layer_order`; counted as the config's
    num_hidden_layers, so that a block is one. Raises InputError."""
    total, size, blocks = config.num_hidden_layers, config.block_size, config.family_record.blocks_in_words()
    if count is None:
        return tuple(range(config.num_layers))
    if not 1 <= count <= total:
        raise InputError(f"target: layers is {count}; expected 1..{total}, the model's {total} layers at most")
    gone = total - count
    removed = layer_order[: gone * size]
    if len(set(removed)) != gone * size or not all(0 <= layer < config.num_layers for layer in removed):
        raise InputError(
            f"target: {count} of {total} layers need an order of {gone} distinct layers to remove, the scores have"
            f" {list(dict.fromkeys(layer // size for layer in layer_order))}; score with"
            f" importance.remove_layers={gone} or more"
        )
    if len({layer // size for layer in removed}) != gone:
        raise InputError(
            f"target: the scores remove layers {list(removed)}, which are not whole blocks {blocks};"
            f" score {config.family} again"
        )
    return tuple(layer for layer in range(config.num_layers) if layer not in removed)


def named_layers(config: HybridConfig, layers: tuple[int, ...], count: int | None) -> tuple[int, ...]:
    """The layers of those that a target names, which are numbered as the config's num_hidden_layers. Raises
    InputError."""
    total, size = config.num_hidden_layers, config.block_size
    if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < total:
        raise InputError(f"target: keep_layers is {list(layers)}; expected ascending numbers within 0..{total - 1}")
    if count not in (None, len(layers)):
        raise InputError(f"target: keep_layers names {len(layers)} layers, but layers is {count}; give one of the two")
    return tuple(size * layer + part for layer in layers for part in range(size))


def numbered_layers(config: HybridConfig, layers: Sequence[int]) -> tuple[int, ...]:
    """The inverse of `named_layers`. Raises InputError where layers are not whole blocks."""
    size = config.block_size
    numbers = tuple(dict.fromkeys(layer // size for layer in layers))
    if len(numbers) * size != len(layers):
        blocks = config.family_record.blocks_in_words()
        raise InputError(f"target: layers {list(layers)} are not whole blocks {blocks}, as {config.family} has them")
    return numbers


def check_width(config: HybridConfig, sizes: Mapping[Axis, int], row: AxisRow, target: Target) -> int | None:
    """A width of the target, checked against the source's axes that stay. Raises InputError."""
    name = row.width
    count = target.widths.get(name)
    if count is None:
        return None
    if not any(axis.kind == row.name for axis in sizes):
        raise InputError(f"target: {name} is {count}, but no layer of the pruned model has that width; leave it out")
    size = getattr(config, name)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= size:
        raise InputError(f"target: {name} is {count}; expected a whole number of 1..{size}, the source's width")
    if row.groups is None or row.per_group:
        return count
    all_groups, held = getattr(config, row.groups), group_row(row)
    groups = (None if held is None else target.widths.get(held.width)) or all_groups
    if count % groups:
        advice = "" if held is None else f"; give a multiple, or another {row.groups} as well"
        raise InputError(
            f"target: {name} is {count}; expected a multiple of {row.groups} ({groups}),"
            f" because every group keeps equally many {row.title}{advice}"
        )
    if count > size // all_groups * groups:
        raise InputError(
            f"target: {name} is {count} with {row.groups} {groups}; expected at most {size // all_groups * groups},"
            f" because each of the source's {all_groups} groups has {size // all_groups}"
        )
    return count


def column_scores(scores: Tensor) -> Tensor:
    """Scores [columns] of what is ranked once for all units of scores [units, columns]: the L2 norm over the units."""
    return torch.linalg.vector_norm(scores, dim=0)


def unit_scores(scores: Tensor, columns: int | None = None) -> Tensor:
    """Scores [units] of scores [units] or [units, columns]: of the latter, the L2 norm over the `columns` that are kept
    of them (arXiv 2504.11409, eq. 17)."""
    if columns is None:
        return scores
    return torch.linalg.vector_norm(scores[:, best(column_scores(scores), columns)], dim=1)


def best_in_groups(scores: Tensor, groups: int, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of scores [groups, units of each] the `groups` best groups, and `count` units of these, equally many of each: a
    group is worth the L2 norm of the scores that stay of it. Both ascending, units numbered over all groups."""
    per_group = scores.shape[1]
    stays = scores.topk(count // groups, dim=1).values
    kept = best(torch.linalg.vector_norm(stays, dim=1), groups)
    own = best(scores[list(kept)].flatten(), count, groups)
    return kept, tuple(kept[unit // per_group] * per_group + unit % per_group for unit in own)


def best(scores: Tensor, count: int, groups: int = 1) -> tuple[int, ...]:
    """Indices of the `count` highest scores [U], ascending; equally many of each of `groups` runs of units."""
    per_group = scores.reshape(groups, -1)
    order = per_group.argsort(dim=1, descending=True, stable=True)[:, : count // groups].sort(dim=1).values
    return tuple((order + torch.arange(groups)[:, None] * per_group.shape[1]).flatten().tolist())
