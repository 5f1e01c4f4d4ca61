"""How many numbers a config has, by the table of axes; layers of a kind are alike, so that it is read once a kind."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..axes import AXES, MATRICES, Role, tensor_table
from ..config import HybridConfig
from ..families.family import stored_tensors


class KindSize(NamedTuple):
    """Of one layer: `parameters`, those of the `matrices` among them, and those of the `experts` among these, of which
    a token uses a share; `wide` numbers, buffers among them, are float32 at least (`axes.PRECISE`), `buffers` no
    parameters."""

    parameters: int = 0
    matrices: int = 0
    experts: int = 0
    wide: int = 0
    buffers: int = 0


def count_parameters(config: HybridConfig) -> int:
    """Parameters, summed over the table of axes."""
    return sum(size.parameters * count for size, count in counted(config))


def count_active(config: HybridConfig) -> int:
    """Parameters that a token meets, embedding and head included: of the experts those that it chooses, of multi-token
    prediction none."""
    own = config.replace(mtp_steps=0)
    return round(count_parameters(own) - unused(own, 1))


def unused(config: HybridConfig, tokens: int) -> float:
    """Parameters of the experts that none of so many tokens chooses, on average and each choice as likely as any other:
    of E experts, k a token, each is left by all of them with probability (1 - k / E)^tokens."""
    sizes, left = kind_sizes(config), 0.0
    for kind in dict.fromkeys(config.kinds):
        chosen, experts = kind.chosen(config)
        left += config.pattern.count(kind.letter) * sizes[kind.letter].experts * (1 - chosen / experts) ** tokens
    return left


def weight_bytes(config: HybridConfig, dtype: torch.dtype) -> int:
    """Bytes of all weights and buffers of a model in a dtype."""
    wide = torch.promote_types(dtype, torch.float32).itemsize
    return sum(
        ((size.parameters + size.buffers - size.wide) * dtype.itemsize + size.wide * wide) * count
        for size, count in counted(config)
    )


def counted(config: HybridConfig) -> list[tuple[KindSize, int]]:
    """The sizes of all parts, and how many there are of each."""
    return [(size, config.pattern.count(kind) if kind else 1) for kind, size in kind_sizes(config).items()]


@functools.lru_cache(maxsize=64)
def kind_sizes(config: HybridConfig) -> Mapping[str, KindSize]:
    """The size of one layer of each kind by its letter, and of what is outside of the layers under "". Layers of a kind
    are alike, so that the table is made of one of each. A report asks for it again and again."""
    kinds = "".join(sorted(set(config.pattern)))
    return shape_sizes(config.replace(pattern=kinds, bos_token_id=None, eos_token_id=None, pad_token_id=None))


@functools.lru_cache(maxsize=1024)
def shape_sizes(config: HybridConfig) -> Mapping[str, KindSize]:
    """`kind_sizes` of a config whose pattern names each kind once; a search asks for thousands, many of them alike."""
    sizes = dict.fromkeys(("", *config.pattern), KindSize())
    for tensor in tensor_table(config).values():
        kind = "" if tensor.layer is None else config.pattern[tensor.layer]
        size, buffer = tensor.numel, tensor.role is Role.BUFFER
        own = KindSize(
            0 if buffer else size,
            size if tensor.role in MATRICES else 0,
            size if tensor.role is Role.EXPERTS else 0,
            size if tensor.is_precise else 0,
            size if buffer else 0,
        )
        sizes[kind] = KindSize(*(one + other for one, other in zip(sizes[kind], own, strict=True)))
    return types.MappingProxyType(sizes)


def num_tensors(config: HybridConfig) -> int:
    """Tensors of a checkpoint of this config."""
    return len(stored_tensors(config))


def size_rows(before: HybridConfig, after: HybridConfig) -> list[tuple[str, object, object]]:
    """Layers, widths and parameters of a model and of a smaller one, by their titles."""
    widths = [("layers", "num_hidden_layers"), *((row.title, row.width) for row in AXES.values())]
    rows: list[tuple[str, object, object]] = [
        (title, getattr(before, name), getattr(after, name)) for title, name in widths if getattr(before, name, 0)
    ]
    counts = count_parameters(before), count_parameters(after)
    rows += [("parameters", f"{counts[0]:,}", f"{counts[1]:,} ({counts[1] / counts[0]:.1%})")]
    active = count_active(before), count_active(after)
    if active[0] < counts[0]:
        rows += [("active parameters", f"{active[0]:,}", f"{active[1]:,} ({active[1] / active[0]:.1%})")]
    return rows
