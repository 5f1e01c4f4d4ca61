"""Several sizes in one checkpoint: its units lie in their order of importance, and a size is the first so many of each
axis, equally many in every group. (MatFormer, arXiv 2310.07707, nests the MLP so; Nemotron Elastic, 2511.16664, heads,
SSM heads and channels, too.)

The order is found once and before any training, by the scores that `choose.select` takes: a permutation, which leaves
the function as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from ..models.axes import AXES, HIDDEN, Axis, axis_sizes, columns_of, group_axis, holds_units
from ..models.checkpoint import load_config, load_model
from ..models.config import HybridConfig
from ..models.cost.parameters import count_parameters
from ..models.errors import InputError, guess
from ..models.hybrid import HybridLM
from ..models.schema import Read, Width, read_as
from .choose import column_scores, select, unit_scores
from .repair import RepairOptions
from .scores import LayerScores, Scores, WidthScores, check_width_scores, load_scores, width_score_shapes
from .slice import Selection, slice_config, slice_model
from .target import Target

WHERE = "distill.nested.sizes"
NESTED = "nested.json"  # in a checkpoint's folder: its sizes


class StoredSize(Read):
    """A size in nested.json: its widths by their config fields."""

    name: str
    share: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    parameters: Annotated[int, Field(ge=1)]
    widths: dict[str, Width]


class StoredSizes(Read):
    """nested.json: the sizes of a checkpoint, itself the first."""

    sizes: Annotated[list[StoredSize], Field(min_length=1)]


@dataclasses.dataclass(frozen=True)
class NestedCut:
    """`largest`: what the largest size has of a model, in order of importance. `sizes`: what each size has of the
    largest, the first of which is the whole of it."""

    largest: Selection
    sizes: tuple[Selection, ...]


@dataclasses.dataclass(frozen=True)
class NestedStudent:
    """The largest size's `model`, its units in order; of each size the config, and what it keeps of that model's units;
    and the `parameters` of the model that it was cut from."""

    model: HybridLM
    sizes: tuple[tuple[HybridConfig, Mapping[Axis, tuple[int, ...]]], ...]
    parameters: int


def nested_student(
    folder: Path, scores: Path, targets: Sequence[Mapping[str, Any]], dtype: torch.dtype, device: torch.device
) -> NestedStudent:
    """A checkpoint in `dtype`, float32 at least, cut and put in order by its scores, for the sizes that
    `distill.nested` targets. Raises InputError."""
    cut = nested_cut(load_config(folder), load_scores(scores).widths, targets)
    return cut_student(load_model(folder, torch.promote_types(dtype, torch.float32), device), cut)


def nested_model(model: HybridLM, widths: WidthScores, targets: Sequence[Mapping[str, Any]]) -> NestedStudent:
    """`nested_student` of a model in memory, which stays as it is."""
    cut, weight = nested_cut(model.config, widths, targets), model.head_weight
    wide = HybridLM(model.config, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
    wide.load_state_dict(model.state_dict())
    wide.tokenizer = model.tokenizer
    return cut_student(wide, cut)


def cut_student(model: HybridLM, cut: NestedCut) -> NestedStudent:
    largest = slice_model(model, cut.largest)
    largest.tokenizer = model.tokenizer
    sizes = tuple((slice_config(largest.config, size), size.kept) for size in cut.sizes)
    return NestedStudent(largest, sizes, count_parameters(model.config))


def nested_cut(config: HybridConfig, widths: WidthScores, targets: Sequence[Mapping[str, Any]]) -> NestedCut:
    """The cut of a model of `config` to sizes within each other, from the largest to the smallest: each is sought among
    the widths of the one before it. Targets have the options of `Target`; `parameters` up to 1 are a share of the
    config's.

    Raises InputError where a target is not smaller than the one before it, cannot be met, or takes more than widths.
    """
    if config.mtp_steps:
        raise InputError(
            f"{WHERE}: the student has multi-token prediction, whose layers keep their widths; prune it with"
            " target.drop_mtp=true first"
        )
    check_width_scores(config, widths, "scores")
    sizes = [config]
    for number, target in enumerate(targets):
        try:
            size = next_size(config, sizes[-1], target)
        except InputError as error:
            raise InputError(f"{WHERE}[{number}]: {error}") from None
        if number and count_parameters(size) >= count_parameters(sizes[-1]):
            raise InputError(
                f"{WHERE}[{number}]: target: {count_parameters(size):,} parameters are no fewer than those of the size"
                " before it; expected sizes from the largest to the smallest"
            )
        sizes.append(size)
    order = importance_order(config, widths)
    prefix = select(config, prefix_scores(config), (), between(config, sizes[1]))
    kept = dict(order.kept)
    for axis, units in prefix.kept.items():
        if axis not in kept and not axis.row.ranked:
            raise InputError(
                f"{WHERE}: {axis.row.width} shrinks, but the scores have none for {axis.row.title}; score the student"
                " again"
            )
        kept[axis] = tuple(order.kept[axis][unit] for unit in units) if axis in order.kept else units
    return NestedCut(Selection(order.layers, kept), tuple(prefixes(sizes[1], size) for size in sizes[1:]))


def next_size(config: HybridConfig, before: HybridConfig, target: Mapping[str, Any]) -> HybridConfig:
    """The config of a target, cut from that of the size before it. Raises InputError."""
    share = target.get("parameters")
    if share is not None and (type(share) not in (int, float) or not 0 < share < math.inf):
        raise InputError(f"target: parameters is {share!r}; expected a share, such as 0.75, or a count")
    wanted = Target(**target)
    if wanted.layers is not None or wanted.keep_layers is not None or wanted.drop_mtp is not None:
        raise InputError("target: all sizes have the student's layers; expected widths, or parameters")
    if share is not None:
        wanted = wanted.replace(parameters=share * count_parameters(config) if share <= 1 else share)
    return slice_config(before, select(before, prefix_scores(before), (), wanted))


def prefixes(config: HybridConfig, smaller: HybridConfig) -> Selection:
    """What a smaller config has of one whose units are in order: the first so many of each axis and group."""
    return select(config, prefix_scores(config), (), between(config, smaller))


def between(config: HybridConfig, smaller: HybridConfig) -> Target:
    """The target that leads from one config to another, by widths."""
    sizes = {row.width: getattr(smaller, row.width) for row in AXES.values()}
    return Target(**{name: size for name, size in sizes.items() if size != getattr(config, name)})


def prefix_scores(config: HybridConfig) -> WidthScores:
    """Scores by which an earlier unit, column or group is worth more than a later one."""
    scores: WidthScores = {}
    for axis, shape in width_score_shapes(config).items():
        places = [torch.arange(size, 0, -1, dtype=torch.float64) for size in shape]
        if axis == HIDDEN:
            scores[axis] = places[1].expand(shape).clone()
        else:
            scores[axis] = places[0] if len(places) == 1 else places[0][:, None] * places[1]
    return scores


def importance_order(config: HybridConfig, widths: WidthScores) -> Selection:
    """Every unit of a model, those that score highest first, within each group; groups that are units of their own (a
    key-value head with its query heads) by what all of theirs are worth. Units without scores stay where they are."""
    kept: dict[Axis, tuple[int, ...]] = {}
    for axis in axis_sizes(config):
        if holds_units(axis.row) or axis.row.ranked:
            continue
        if axis.row.within is not None:
            kept[axis] = descending(column_scores(widths[Axis(axis.row.within, axis.layer)]), 1)
        elif axis == HIDDEN:
            kept[axis] = descending(widths[axis].sum(0), 1)
        elif axis in widths:
            scores, owner, groups = widths[axis], group_axis(axis), axis.groups(config)
            if columns := columns_of(axis):
                scores = unit_scores(scores, axis_sizes(config)[columns[0]])
            order = descending(scores, groups)
            if owner is not None:
                each = len(order) // groups
                worth = torch.linalg.vector_norm(scores.reshape(groups, each), dim=1)
                kept[owner] = descending(worth, 1)
                order = tuple(unit for group in kept[owner] for unit in order[group * each : (group + 1) * each])
            kept[axis] = order
    return Selection(tuple(range(config.num_layers)), kept)


def descending(scores: torch.Tensor, groups: int) -> tuple[int, ...]:
    """The units of scores [U] in each of `groups` runs, the highest first; of equal ones the lower index."""
    per_group = scores.reshape(groups, -1)
    order = per_group.argsort(dim=1, descending=True, stable=True)
    return tuple((order + torch.arange(groups)[:, None] * per_group.shape[1]).flatten().tolist())


def nested_size(folder: Path, name: str) -> tuple[Scores, Target]:
    """By what `choose.select` takes the size of that name out of the checkpoint in a folder. Raises InputError."""
    config = load_config(folder)
    if not (folder / NESTED).is_file():
        raise InputError(f"nested={name}: {folder} has no {NESTED}; expected what distill=nested has left")
    stored = {size["name"]: size for size in read_as(StoredSizes, folder / NESTED)["sizes"]}
    if name not in stored:
        known = ", ".join(stored)
        raise InputError(f"nested={name}: {folder} has no such size{guess(name, list(stored))}; known: {known}")
    widths = stored[name]["widths"]
    if unknown := sorted(widths.keys() - {row.width for row in AXES.values()}):
        raise InputError(f"{folder / NESTED} has the unknown widths {', '.join(unknown)}")
    return Scores(prefix_scores(config), LayerScores()), between(config, config.replace(**widths))


def check_as_trained(name: str, target: Target, repair: RepairOptions, data: bool) -> None:
    """Raises InputError where anything stands beside a size that changes what was trained."""
    if target != Target() or data or repair.norms != RepairOptions().norms:
        raise InputError(
            f"prune: nested={name} is left as it was trained; expected no target, data and repair.norms beside it"
        )
