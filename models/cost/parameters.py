"""How many numbers a config has, by the table of axes; layers of a kind are alike, so that it is read once a kind."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping

from ..axes import MATRICES, tensor_table
from ..config import HybridConfig


def count_parameters(config: HybridConfig) -> int:
    """Parameters, summed over the table of axes."""
    return sum(config.pattern.count(kind) * numel if kind else numel for kind, (numel, _) in kind_sizes(config).items())


def kind_sizes(config: HybridConfig) -> Mapping[str, tuple[int, int]]:
    """Elements of all tensors, and of the matrices among them: of one layer of each kind by its letter, and of what
    is outside of the layers under "". Layers of a kind are alike, so that the table is made of one of each."""
    kinds = "".join(sorted(set(config.pattern)))
    return shape_sizes(config.replace(pattern=kinds, bos_token_id=None, eos_token_id=None, pad_token_id=None))


@functools.lru_cache(maxsize=1024)
def shape_sizes(config: HybridConfig) -> Mapping[str, tuple[int, int]]:
    """`kind_sizes` of a config whose pattern names each kind once; a search asks for thousands, many of them alike."""
    sizes = dict.fromkeys(("", *config.pattern), (0, 0))
    for tensor in tensor_table(config).values():
        kind = "" if tensor.layer is None else config.pattern[tensor.layer]
        numel, matrices = sizes[kind]
        size = tensor.numel
        sizes[kind] = numel + size, matrices + (size if tensor.role in MATRICES else 0)
    return types.MappingProxyType(sizes)


def num_tensors(config: HybridConfig) -> int:
    """Tensors of a checkpoint of this config."""
    return len(tensor_table(config))
