"""Kept indices in, a smaller model out: every tensor is cut along the axes that models/axes.py names for it.

Nothing here knows what a tensor does: for each dimension of each tensor, the kept units of its axis are selected.
Axes and layers of a `Selection` are numbered as in the source model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..models.axes import Axis, TensorSpec, axis_sizes, group_axis, tensor_table
from ..models.checkpoint import row_blocks
from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.hybrid import HybridLM
from ..models.submodel import kept_rows as kept_rows
from ..models.submodel import rescaled
from ..models.tensors import take


@dataclasses.dataclass(frozen=True)
class Selection:
    """What stays: source layers in ascending order, and per axis the source units in their new order.

    An axis that is not named keeps everything. `ahead`: multi-token prediction stays, where there is any.
    """

    layers: tuple[int, ...]
    kept: Mapping[Axis, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    ahead: bool = True


def slice_config(config: HybridConfig, selection: Selection) -> HybridConfig:
    """The config of the model that `selection` leaves.

    Raises InputError when the selection names layers or units that do not exist, twice, or out of order (layers
    ascending; grouped heads inside their group, equally many in each), or when two layers of a kind would get
    different widths: a config has one number for all of them, and so has every tool that loads the result.
    """
    layers = selection.layers
    if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < config.num_layers:
        raise InputError(
            f"selection: layers are {list(layers)}; expected ascending numbers within 0..{config.num_layers - 1}"
        )
    sizes = {a: size for a, size in axis_sizes(config).items() if a.layer is None or a.layer in layers}
    for axis in selection.kept:
        if axis not in sizes:
            raise InputError(f"selection: {axis} is not an axis of a kept layer; known: {', '.join(map(str, sizes))}")
    widths: dict[str, int] = {}
    for axis, size in sizes.items():
        kept = selection.kept.get(axis, range(size))
        check_units(axis, size, kept)
        if axis.row.ranked and list(kept) != list(range(len(kept))):
            raise InputError(f"selection: {axis} keeps {abridged(kept)}; expected the first places of the order")
        owner = group_axis(axis)
        groups = range(axis.groups(config))
        if len(groups) > 1:
            check_groups(
                axis, size // len(groups), kept, groups if owner is None else selection.kept.get(owner, groups)
            )
        width = len(kept) // axis.units(config, 1)
        if widths.setdefault(axis.row.width, width) != width:
            raise InputError(
                f"selection: {axis} keeps {width} units where an earlier layer keeps {widths[axis.row.width]};"
                " expected the same number in every layer of a kind"
            )
    pattern = "".join(config.pattern[layer] for layer in layers)
    if config.mtp_layers is not None and selection.ahead:
        check_ahead(config, config.mtp_layers, widths)
    return config.replace(pattern=pattern, mtp_steps=config.mtp_steps if selection.ahead else 0, **widths)


def written_config(config: HybridConfig, selection: Selection) -> HybridConfig:
    """`slice_config`, of what a folder is to hold. Raises InputError where none can, with sizes that would work where
    the family knows any."""
    smaller = slice_config(config, selection)
    smaller.family_record.check_cut(config, smaller)
    smaller.to_hf()
    return smaller


def check_ahead(config: HybridConfig, ahead: HybridConfig, widths: Mapping[str, int]) -> None:
    """Raises InputError where layers of multi-token prediction would have to lose units that nothing has scored."""
    for name in (name for kind in ahead.kinds for name in kind.widths()):
        if widths.get(name, getattr(config, name)) != getattr(config, name):
            raise InputError(
                f"selection: {name} becomes {widths[name]}, but multi-token prediction keeps its layers' width"
                f" {getattr(config, name)}; leave it as it is, or drop multi-token prediction (target.drop_mtp=true)"
            )


def check_units(axis: Axis, size: int, kept: Sequence[int]) -> None:
    """Raises InputError unless `kept` holds at least one and only distinct units of 0..size-1."""
    if not kept or len(set(kept)) != len(kept) or min(kept) < 0 or max(kept) >= size:
        raise InputError(f"selection: {axis} keeps {abridged(kept)}; expected distinct units within 0..{size - 1}")


def check_groups(axis: Axis, per_group: int, kept: Sequence[int], groups: Sequence[int]) -> None:
    """Raises InputError unless each of the groups that stay, and no other, keeps equally many units, in their order."""
    left = len(kept) // len(groups)
    if len(kept) % len(groups) or any(unit // per_group != groups[n // left] for n, unit in enumerate(kept)):
        raise InputError(
            f"selection: {axis} keeps {abridged(kept)}; expected equally many units of each of"
            f" its {len(groups)} groups {abridged(groups)} of {per_group}, group after group"
        )


def abridged(units: Sequence[int]) -> str:
    return str(list(units)) if len(units) <= 16 else f"[{', '.join(map(str, units[:16]))}, ...] ({len(units)} units)"


def slice_tensors(
    get_tensor: Callable[[str], Tensor], config: HybridConfig, selection: Selection, *, rescale_norms: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the smaller model one by one, in the order of its table, each in its source's dtype.

    `get_tensor` reads a tensor of the source (`config`) by its internal name. A tensor that loses nothing is
    passed on untouched. With `rescale_norms`, the weight of a norm over fewer channels is multiplied by
    sqrt(channels before / channels after): RMS divides by the count, so without the factor the removal of
    channels that are zero would still scale all others (norm_eps apart, this leaves them as they were).
    Raises InputError as `slice_config` does.
    """
    source_table = tensor_table(config)
    for name, axes in tensor_table(slice_config(config, selection)).items():
        source = source_table[source_name(name, selection)]
        yield name, cut(get_tensor(source.name), source, axes, selection.kept, rescale_norms=rescale_norms)


def slice_rows(
    get_rows: Callable[[str, int, int], Tensor],
    config: HybridConfig,
    selection: Selection,
    *,
    dtypes: Mapping[str, torch.dtype],
    rescale_norms: bool = True,
    skip: Container[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """`slice_tensors` in pieces: yields (name, rows), a block of the source's rows in memory at a time.

    `get_rows(name, start, stop)` reads rows of a tensor of the source, `dtypes` says in which dtype they are; `skip`
    names tensors of the smaller model that are not wanted.
    """
    source_table = tensor_table(config)
    for name, axes in tensor_table(slice_config(config, selection)).items():
        if name in skip:
            continue
        source = source_table[source_name(name, selection)]
        first = kept_rows(source.dimensions[0], selection.kept)
        blocks = list(row_blocks(source.shape, dtypes[source.name]))
        if len(blocks) == 1 or bool((first.diff() < 0).any()):
            tensor = get_rows(source.name, 0, source.shape[0])
            yield name, cut(tensor, source, axes, selection.kept, rescale_norms=rescale_norms)
            continue
        others = [kept_rows(dimension, selection.kept) for dimension in source.dimensions[1:]]
        for start, stop in blocks:
            own = first[(start <= first) & (first < stop)] - start
            if len(own):
                yield name, chosen(get_rows(source.name, start, stop), [own, *others])


def cut(
    tensor: Tensor,
    source: TensorSpec,
    axes: TensorSpec,
    kept: Mapping[Axis, Sequence[int]],
    *,
    rescale_norms: bool = True,
) -> Tensor:
    """One tensor of the smaller model, `axes` in its table, from the source's, `source` there."""
    assert tensor.shape == source.shape, (source.name, tuple(tensor.shape), source.shape)
    tensor = chosen(tensor, [kept_rows(dimension, kept) for dimension in source.dimensions])
    if rescale_norms:
        tensor = rescaled(tensor, source, axes)
    assert tensor.shape == axes.shape, (axes.name, tuple(tensor.shape), axes.shape)
    return tensor


def chosen(tensor: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """What the indices name along each dimension; the tensor itself where that is all of it."""
    for number, index in enumerate(indices):
        if not torch.equal(index, torch.arange(tensor.shape[number])):
            tensor = take(tensor, number, index)
    return tensor


def source_name(name: str, selection: Selection) -> str:
    """The name in the source of a tensor of the smaller model: its layer's number is all that differs."""
    if not name.startswith("layers."):
        return name
    _, layer, rest = name.split(".", 2)
    return f"layers.{selection.layers[int(layer)]}.{rest}"


@torch.no_grad()
def slice_model(model: HybridLM, selection: Selection, *, rescale_norms: bool = True) -> HybridLM:
    """A smaller model with its own copy of what stays of `model`, on the same device and in the same dtype."""
    get_tensor = model.state_dict().__getitem__
    tensors = slice_tensors(get_tensor, model.config, selection, rescale_norms=rescale_norms)
    return filled(slice_config(model.config, selection), tensors, model)


@torch.no_grad()
def filled(config: HybridConfig, tensors: Iterable[tuple[str, Tensor]], like: HybridLM) -> HybridLM:
    """A model of `config` with these tensors, on the device and in the dtype of `like`."""
    reference = like.embeddings.weight
    model = HybridLM(config, device=reference.device, dtype=reference.dtype)
    targets = model.state_dict()
    for name, tensor in tensors:
        targets.pop(name).copy_(tensor)
    assert not targets, f"tensors of the smaller model that were not made: {sorted(targets)}"
    return model
