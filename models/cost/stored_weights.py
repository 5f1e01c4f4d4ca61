"""Bytes of weights that are quantised, as a server holds them: numbers and scales as the files do, the rest in the
dtype that it computes in. Of a folder by the headers of its files, of a format by the config alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container, Mapping, Sequence
from fractions import Fraction

import torch

from ..axes import Role
from ..checkpoint import Checkpoint
from ..config import HybridConfig
from ..errors import InputError
from ..families.family import StoredTensor, stored_tensors, tensor_table_of
from ..quantise import group_of, rounded_names
from ..rounding import Rounding
from ..stored import Header, Quantised, StoredPlace
from ..tensors import DTYPES as ALL_DTYPES
from .ranks import rank_config, rank_counts

SCALE_BYTES, SHAPE_BYTES = 2, 16  # a bfloat16 scale; the int64 rows and columns beside packed numbers


@dataclasses.dataclass(frozen=True)
class LayerBytes:
    """Bytes of a layer's weights, and those of them that are its experts'."""

    all: int = 0
    experts: int = 0


@dataclasses.dataclass(frozen=True)
class StoredWeights:
    """Bytes of a model's weights: by layer, of embedding, final norm and head together, and of multi-token
    prediction."""

    layers: tuple[LayerBytes, ...]
    outer: int
    ahead: int

    @property
    def total(self) -> int:
        return sum(layer.all for layer in self.layers) + self.outer + self.ahead

    def without(self, layer: int) -> StoredWeights:
        return dataclasses.replace(self, layers=self.layers[:layer] + self.layers[layer + 1 :])

    def read(self, config: HybridConfig, tokens: int, embedding: int) -> float:
        """Bytes that a pass of so many tokens reads: all but the `embedding`'s bytes, the experts that none of them
        chooses (`parameters.unused`), and multi-token prediction."""
        unused = 0.0
        for kind, layer in zip(config.kinds, self.layers, strict=True):
            chosen, experts = kind.chosen(config)
            unused += layer.experts * (1 - chosen / experts) ** tokens
        return self.total - self.ahead - embedding - unused


Size = Callable[[str, StoredTensor], int | None]


def of_checkpoint(checkpoint: Checkpoint, dtype: torch.dtype, ranks: int = 1) -> StoredWeights | None:
    """What a folder holds, its plain weights in `dtype`, or one of several GPUs that vLLM shares it out over; None
    where all are plain. Raises InputError where columns that have one scale would come apart, or `ranks.rank_config`
    does."""
    if not checkpoint.formats():
        return None
    places = {name: place for stored in checkpoint.stored.values() for name, place in stored.places.items()}
    whole, part = checkpoint.config, rank_config(checkpoint.config, ranks)
    shapes = {name: stored.shape for name, stored in stored_tensors(whole).items()} if ranks > 1 else {}

    def size(name: str, stored: StoredTensor) -> int | None:
        quantised = places[name].quantised
        if quantised is None:
            return None
        shares = [Fraction(own, all_) for own, all_ in zip(stored.shape, shapes.get(name, stored.shape), strict=True)]
        if not is_whole(stored, quantised, shares[-1]):
            raise InputError(
                f"tensor_parallel is {ranks}: each GPU would have {stored.shape[-1]:,} columns of {name}, whose scales"
                f" are for {quantised.block[1]} columns each; give a number that leaves whole ones:"
                f" {', '.join(map(str, whole_counts(whole, places)))}"
            )
        parts = (quantised.numbers, quantised.scale, quantised.zero)
        held = sum(shared_bytes(part, shares) for part in parts if part is not None)
        return held + (0 if quantised.bits is None else SHAPE_BYTES)

    return summed_weights(part, dtype, size)


def is_whole(stored: StoredTensor, quantised: Quantised, share: Fraction | float) -> bool:
    """Whether a GPU that has this share of a tensor's columns has all that one scale is for."""
    return share == 1 or not stored.shape[-1] % quantised.block[1] or quantised.scale.shape[1:] in ((), (1,))


def whole_counts(config: HybridConfig, places: Mapping[str, StoredPlace]) -> list[int]:
    """The numbers of GPUs over which a quantised model can be shared out."""
    shapes = {name: stored.shape for name, stored in stored_tensors(config).items()}

    def leaves_whole(ranks: int) -> bool:
        own = stored_tensors(rank_config(config, ranks))
        return all(
            is_whole(stored, quantised, Fraction(stored.shape[-1], shapes[name][-1]))
            for name, stored in own.items()
            if (quantised := places[name].quantised) is not None
        )

    return [count for count in rank_counts(config) if leaves_whole(count)]


def of_format(config: HybridConfig, rounding: Rounding, dtype: torch.dtype, kept: Container[int] = ()) -> StoredWeights:
    """What an export in a format holds, the layers `kept` plain. Raises InputError where the family or a width cannot
    be stored so."""
    names = rounded_names(config, rounding, kept)
    group = group_of(config, names) if rounding.grouped else None

    def size(name: str, stored: StoredTensor) -> int | None:
        if name not in names:
            return None
        rows, columns = stored.shape
        scales = rows * (columns // (group or columns)) * SCALE_BYTES
        if rounding.bits == 8:
            return rows * columns + scales
        return rows * -(-columns * rounding.bits // 32) * 4 + scales + SHAPE_BYTES

    return summed_weights(config, dtype, size)


def summed_weights(config: HybridConfig, dtype: torch.dtype, size: Size) -> StoredWeights:
    """Stored tensors summed: those that `size` gives bytes for, and the others in `dtype`."""
    table = tensor_table_of(config)
    layers = [[0, 0] for _ in range(config.num_layers)]
    outer = ahead = 0
    for name, stored in stored_tensors(config).items():
        spec = table[stored.pieces[0].ours]
        count = size(name, stored)
        if count is None:
            count = math.prod(stored.shape) * spec.dtype(dtype).itemsize
        if spec.layer is not None:
            layers[spec.layer][0] += count
            layers[spec.layer][1] += count if spec.role is Role.EXPERTS else 0
        elif spec.ahead is not None:
            ahead += count
        else:
            outer += count
    return StoredWeights(tuple(LayerBytes(*layer) for layer in layers), outer, ahead)


def shared_bytes(header: Header, shares: Sequence[Fraction]) -> int:
    """Bytes of a tensor, cut to these shares of its rows and columns as far as it has several of them: one scale for
    all columns is every rank's."""
    cut = (math.ceil(size * share) if size > 1 else size for size, share in zip(header.shape, shares, strict=False))
    return math.prod(cut) * ALL_DTYPES[header.dtype].itemsize
