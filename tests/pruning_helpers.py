"""Shared by the tests of prune/: selections and rows that are drawn, and the loss of a layer from whole logits."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import torch
from limbeck.models.axes import Axis, axis_sizes, group_axis, tensor_table
from limbeck.models.config import HybridConfig
from limbeck.models.hybrid import HybridLM
from limbeck.prune.rotation import Rotation, rotated
from limbeck.prune.slice import Selection, filled, slice_model
from torch import Tensor


def draw_selection(config: HybridConfig, kinds: Sequence[str], draw: random.Random) -> Selection:
    """Random units of the named axes, equally many in each layer, and in each group; those that live in groups that
    are named go with them."""
    layers = list(range(config.num_layers))
    if "layers" in kinds:
        layers = sorted(draw.sample(layers, draw.randint(1, len(layers))))
    counts: dict[str, int] = {}
    kept: dict[Axis, tuple[int, ...]] = {}
    sizes = axis_sizes(config)
    for axis in sorted(sizes, key=lambda axis: group_axis(axis) is not None):  # groups before what lives in them
        owner = group_axis(axis)
        followed = owner is not None and owner.kind in kinds
        if not (axis.kind in kinds or followed) or (axis.layer is not None and axis.layer not in layers):
            continue
        per_group = sizes[axis] // axis.groups(config)
        count = counts.setdefault(axis.kind, draw.randint(1, per_group) if axis.kind in kinds else per_group)
        groups = kept[owner] if owner is not None and followed else range(axis.groups(config))
        kept[axis] = tuple(
            g * per_group + unit for g in groups for unit in sorted(draw.sample(range(per_group), count))
        )
    return Selection(tuple(layers), kept)


@dataclasses.dataclass(frozen=True)
class Rows:
    """What prune/ asks of a batch, and no more."""

    input_ids: Tensor
    labels: Tensor
    seq_idx: Tensor

    def take(self, rows: Sequence[int]) -> Rows:
        return Rows(*(getattr(self, field.name)[list(rows)] for field in dataclasses.fields(self)))


def draw_rows(vocabulary: int, rows: int = 8, tokens: int = 21) -> Rows:
    """Rows of two documents; the tail of each row is padding of its own length (label -100)."""
    ids = torch.randint(vocabulary, (rows, tokens))
    labels = torch.cat([ids[:, 1:], torch.full((rows, 1), -100)], 1)
    labels[:, 8] = -100
    for row in range(rows):
        labels[row, tokens - 1 - row :] = -100
    seq_idx = (torch.arange(tokens) > 8).int().expand(rows, -1)
    return Rows(ids, labels, seq_idx)


def split(batch: Rows, order: Sequence[int], size: int) -> list[Rows]:
    return [batch.take(order[start : start + size]) for start in range(0, len(order), size)]


def naive_mse(model: HybridLM, batches: Sequence[Rows], gone: Sequence[int]) -> float:
    """The mean over counted positions and vocabulary of the squared difference of the logits."""
    without = slice_model(model, Selection(tuple(i for i in range(model.config.num_layers) if i not in gone)))
    errors = []
    with torch.no_grad():
        for batch in batches:
            difference = model(batch.input_ids, seq_idx=batch.seq_idx) - without(batch.input_ids, seq_idx=batch.seq_idx)
            errors.append(difference[batch.labels != -100])
    return torch.cat(errors).square().mean().item()


def turned(model: HybridLM, scale: float = 1.0) -> HybridLM:
    """The model with its stream in a random basis."""
    width = model.config.hidden_size
    turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    get_tensor = rotated(model.state_dict().__getitem__, model.config, Rotation(turn, 0, scale), "cpu")
    return filled(model.config, ((name, get_tensor(name)) for name in tensor_table(model.config)), model)
