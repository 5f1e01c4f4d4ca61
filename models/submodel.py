"""A smaller model within a model: each of its tensors is the part of the larger one's that stays when units of some
axes go (prune/slice.py cuts the same), so that its gradients reach that part and no other.

The slices are attributes of ordinary modules, in the places of their parameters. They stay there until the next call,
because a layer that is run again in the backward pass (activation checkpointing) has to meet those of the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .axes import Axis, Dimension, Role, TensorSpec, segment_size, tensor_table
from .config import HybridConfig
from .hybrid import HybridLM


def kept_rows(dimension: Dimension, kept: Mapping[Axis, Sequence[int]]) -> Tensor:
    """Indices along one dimension (int64, on the CPU) that survive when each axis keeps the units in `kept`."""
    parts = []
    offset = 0
    for segment in dimension:
        index = torch.zeros(1, dtype=torch.int64)
        for axis, size in segment:
            units = torch.tensor(kept[axis]) if axis is not None and axis in kept else torch.arange(size)
            index = (index[:, None] * size + units).flatten()
        parts.append(index + offset)
        offset += segment_size(segment)
    return torch.cat(parts)


def rescaled(tensor: Tensor, source: TensorSpec, spec: TensorSpec) -> Tensor:
    """A tensor that is cut from `source` to `spec`: the weight of a norm over fewer channels times sqrt(before /
    after), because RMS divides by their number; any other as it is."""
    if spec.role is not Role.NORM or spec.numel == source.numel:
        return tensor
    return (tensor.double() * math.sqrt(source.numel / spec.numel)).to(tensor.dtype)


class TensorPart(NamedTuple):
    """A tensor of the smaller model: the module that holds it, its name there, and what of the larger one's it is: the
    first so many along a dimension, or those of an index; None: all of them."""

    owner: torch.nn.Module
    field: str
    source: TensorSpec
    spec: TensorSpec
    parts: tuple[int | Tensor | None, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The part, contiguous, as kernels read it."""
        for dimension, part in enumerate(self.parts):
            if isinstance(part, int):
                tensor = tensor.narrow(dimension, 0, part)
            elif part is not None:
                tensor = tensor.index_select(dimension, part.to(tensor.device))
        return rescaled(tensor, self.source, self.spec).contiguous()


class SubModel:
    """The model of `config` that is left of any model of `source`'s config where each axis keeps the units in `kept`;
    both have the same layers. Multi-token prediction is no part of it."""

    def __init__(self, source: HybridConfig, config: HybridConfig, kept: Mapping[Axis, Sequence[int]]) -> None:
        self.config, self.model = config.replace(mtp_steps=0), HybridLM(config.replace(mtp_steps=0), device="meta")
        whole = tensor_table(source)
        self.tensors: dict[str, TensorPart] = {}
        for name, spec in tensor_table(self.config).items():
            place, _, field = name.rpartition(".")
            owner = self.model.get_submodule(place)
            # In the place of a parameter a slice would be no leaf, which a module refuses: it is a plain attribute.
            owner._parameters.pop(field, None)
            parts = tuple(part_of(dimension, kept) for dimension in whole[name].dimensions)
            self.tensors[name] = TensorPart(owner, field, whole[name], spec, parts)

    def of(self, model: HybridLM, *, trained: bool = True) -> HybridLM:
        """The smaller model as `model`'s tensors are now; without `trained` no gradient reaches these. It is the same
        object in every call, and the last one's slices are gone."""
        held: dict[str, Any] = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, part in self.tensors.items():
            setattr(part.owner, part.field, part.of(held[name] if trained else held[name].detach()))
        for own, theirs in zip(self.model.layers, model.layers, strict=True):
            own.recompute = theirs.recompute
        return self.model.train(model.training)

    @torch.no_grad()
    def copy(self, model: HybridLM) -> HybridLM:
        """The smaller model as `model`'s tensors are now, with tensors of its own."""
        held: dict[str, Any] = dict(model.named_parameters()) | dict(model.named_buffers())
        weight = model.embeddings.weight
        own = HybridLM(self.config, device=weight.device, dtype=weight.dtype)
        for name, target in own.state_dict().items():
            target.copy_(self.tensors[name].of(held[name]))
        own.tokenizer = model.tokenizer
        return own.eval()


def part_of(dimension: Dimension, kept: Mapping[Axis, Sequence[int]]) -> int | Tensor | None:
    """What stays along a dimension, as `TensorPart` has it."""
    index = kept_rows(dimension, kept)
    if not torch.equal(index, torch.arange(len(index))):
        return index
    return None if len(index) == sum(map(segment_size, dimension)) else len(index)
