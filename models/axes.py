"""THE table: for every tensor of a config, which axis each of its dimensions lies on.

A dimension is a run of segments, a segment is a row-major product of factors, and a factor is an axis (or None
where the size is fixed) with its size. The rows of Mamba's `in_proj`, z | x | B, C | dt, read

    (mamba_heads x mamba_head_dim) + (mamba_heads x mamba_head_dim) + fixed(2 * groups * state) + mamba_heads

Expected shapes, the parameter count, memory, validation and slicing are all read from here, and nowhere else.
Names are those of `HybridLM.state_dict()`; `families` maps them to a checkpoint's.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from .config import HybridConfig


class Axis(NamedTuple):
    """A prunable axis: `hidden` of the whole model (layer None), or one that belongs to a layer."""

    kind: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}({self.layer})"


class Factor(NamedTuple):
    axis: Axis | None
    size: int


Segment = tuple[Factor, ...]
Dimension = tuple[Segment, ...]

HIDDEN = Axis("hidden")
AXIS_KINDS = ("hidden", "ffn", "attn_heads", "mamba_heads", "mamba_head_dim")


@dataclasses.dataclass(frozen=True)
class TensorAxes:
    """One tensor: its dimensions, and the layer that it belongs to (None for embedding, final norm and head)."""

    name: str
    dimensions: tuple[Dimension, ...]
    layer: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(dimension_size(dimension) for dimension in self.dimensions)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def segment_size(segment: Segment) -> int:
    return math.prod(factor.size for factor in segment)


def dimension_size(dimension: Dimension) -> int:
    return sum(segment_size(segment) for segment in dimension)


def axis_sizes(config: HybridConfig) -> dict[Axis, int]:
    """Every prunable axis of a config with its size, in the order of layers; read off the table itself."""
    sizes: dict[Axis, int] = {}
    for tensor in tensor_table(config).values():
        for dimension in tensor.dimensions:
            for segment in dimension:
                for axis, size in segment:
                    if axis is not None:
                        assert sizes.setdefault(axis, size) == size, (tensor.name, axis)
    return sizes


def tensor_table(config: HybridConfig) -> dict[str, TensorAxes]:
    """Every tensor of a model of this config by its name in `HybridLM.state_dict()`."""
    hidden: Dimension = ((Factor(HIDDEN, config.hidden_size),),)
    vocabulary = fixed(config.vocab_size)
    rows = [TensorAxes("embeddings.weight", (vocabulary, hidden))]
    for layer, letter in enumerate(config.pattern):
        rows.append(TensorAxes(f"layers.{layer}.norm.weight", (hidden,), layer))
        for name, dimensions in MIXER_TENSORS[letter](config, layer, hidden).items():
            rows.append(TensorAxes(f"layers.{layer}.mixer.{name}", dimensions, layer))
    rows.append(TensorAxes("norm_f.weight", (hidden,)))
    if not config.tie_word_embeddings:
        rows.append(TensorAxes("lm_head.weight", (vocabulary, hidden)))
    return {row.name: row for row in rows}


def fixed(size: int) -> Dimension:
    return ((Factor(None, size),),)


def mamba_tensors(config: HybridConfig, layer: int, hidden: Dimension) -> dict[str, tuple[Dimension, ...]]:
    heads = Factor(Axis("mamba_heads", layer), config.mamba_num_heads)
    head_dim = Factor(Axis("mamba_head_dim", layer), config.mamba_head_dim)
    inner: Dimension = ((heads, head_dim),)
    per_head: Dimension = ((heads,),)
    b_and_c = fixed(2 * config.n_groups * config.ssm_state_size)
    conv_channels = inner + b_and_c
    tensors = {
        "in_proj.weight": (inner + inner + b_and_c + per_head, hidden),
        "conv1d.weight": (conv_channels, fixed(1), fixed(config.conv_kernel)),
        "A_log": (per_head,),
        "D": (per_head,),
        "dt_bias": (per_head,),
        "norm.weight": (inner,),
        "out_proj.weight": (hidden, inner),
    }
    if config.conv_bias:
        tensors["conv1d.bias"] = (conv_channels,)
    return tensors


def attention_tensors(config: HybridConfig, layer: int, hidden: Dimension) -> dict[str, tuple[Dimension, ...]]:
    # Key and value heads stay; whole query heads come and go inside their kv group.
    query: Dimension = ((Factor(Axis("attn_heads", layer), config.num_attention_heads), Factor(None, config.head_dim)),)
    key = fixed(config.num_key_value_heads * config.head_dim)
    tensors: dict[str, tuple[Dimension, ...]] = {
        "q_proj.weight": (query, hidden),
        "k_proj.weight": (key, hidden),
        "v_proj.weight": (key, hidden),
        "o_proj.weight": (hidden, query),
    }
    if config.qk_norm:
        tensors["q_norm.weight"] = tensors["k_norm.weight"] = (fixed(config.head_dim),)
    return tensors


def mlp_tensors(config: HybridConfig, layer: int, hidden: Dimension) -> dict[str, tuple[Dimension, ...]]:
    ffn: Dimension = ((Factor(Axis("ffn", layer), config.intermediate_size),),)
    tensors: dict[str, tuple[Dimension, ...]] = {"up_proj.weight": (ffn, hidden), "down_proj.weight": (hidden, ffn)}
    if config.gated_mlp:
        tensors["gate_proj.weight"] = (ffn, hidden)
    return tensors


MIXER_TENSORS = {"M": mamba_tensors, "*": attention_tensors, "-": mlp_tensors}
