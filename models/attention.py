"""Grouped-query causal attention over packed documents and a key-value cache; with rotary positions and an RMSNorm of
each query and key head where the config has them.

Shapes: [B, T] batch and tokens, [L] tokens in the cache, [H] query heads, [K] key-value heads, [D] head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.attention import attention, decode_attention, document_mask
from ..kernels.norm import rms_norm
from ..kernels.rotary import rotary, rotary_angles
from ..kernels.ssd import document_numbers
from ..kernels.tracing import STATE
from .axes import Axis, Dimension, Factor, Parts, Role, fixed
from .errors import InputError
from .layer import Context, LayerKind, NormWeight, ScoreSource, Sharing, StateBytes, zeros
from .multipliers import scaled

if TYPE_CHECKING:
    from .config import HybridConfig

Angles = tuple[Tensor, Tensor]


class Attention(nn.Module):
    def __init__(self, config: HybridConfig, layer: int, **place: Any) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, queries, bias, **place)
        self.k_proj = nn.Linear(hidden, keys, bias, **place)
        self.v_proj = nn.Linear(hidden, keys, bias, **place)
        self.o_proj = nn.Linear(queries, hidden, bias, **place)
        if config.qk_norm:
            self.q_norm = NormWeight(config.head_dim, **place)
            self.k_norm = NormWeight(config.head_dim, **place)

    def forward(self, u: Tensor, context: Context) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden]"""
        config, split = self.config, (-1, self.config.head_dim)
        positions: Positions = context.shared[share_positions]
        cached: KeyValues | None = context.state(self.layer)
        u = scaled(u, config.multipliers.attention_in)
        q, k, v = (context.project(p, u).unflatten(-1, split) for p in (self.q_proj, self.k_proj, self.v_proj))
        if config.qk_norm:
            q = rms_norm(q, self.q_norm.weight, config.norm_eps)
            k = rms_norm(k, self.k_norm.weight, config.norm_eps)
        q = scaled(q, score_multiplier(config))
        if positions.angles is not None:
            q, k = rotary(q, *positions.angles), rotary(k, *positions.angles)
        if positions.rows is not None:  # a decoding step: one token a row, rows of any lengths
            assert cached is not None
            cached.write(positions.rows, k.flatten(0, 2), v.flatten(0, 2))
            y = decode_attention(q.squeeze(1), cached.keys, cached.values, positions.lengths).unsqueeze(1)
        else:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            if cached is not None:
                k, v = cached.append(k, v, context.past)
            if context.part is not None:
                k, v = context.part.keys_and_values(k, v)
            y = attention(q, k, v, positions.mask).transpose(1, 2)
        context.note("attn_heads", self.layer, y)
        return scaled(context.project(self.o_proj, y.flatten(2)), config.multipliers.attention_out)


def score_multiplier(config: HybridConfig) -> float:
    """Of a query: operators multiply scores by 1 / sqrt(head_dim), and keys enter them alone, as queries do."""
    scale = config.multipliers.attention
    return config.multipliers.key * (1.0 if scale is None else scale * math.sqrt(config.head_dim))


@dataclasses.dataclass
class KeyValues:
    """One layer's keys and values [B, K, L max, D] of B sequences; what is valid of a row its owner knows."""

    keys: Tensor
    values: Tensor

    def append(self, k: Tensor, v: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """Writes k and v [B, K, T, D] after `past` tokens, and gives all up to them [B, K, past + T, D]."""
        stop = past + k.shape[2]
        if stop > self.keys.shape[2]:
            raise InputError(f"the cache holds {self.keys.shape[2]} tokens, and {stop} were requested")
        self.keys[:, :, past:stop] = k
        self.values[:, :, past:stop] = v
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def write(self, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Writes k and v [B K, D] into rows [B K] of the flattened caches [B K L, D] (see `Positions`)."""
        self.keys.flatten(0, 2).index_copy_(0, rows, k)
        self.values.flatten(0, 2).index_copy_(0, rows, v)

    def rows(self, start: int, count: int) -> KeyValues:
        return KeyValues(self.keys.narrow(0, start, count), self.values.narrow(0, start, count))

    def clear(self, row: int) -> None:
        """Nothing: what lies beyond a row's length is not read."""

    def move(self, source: int, target: int, length: int) -> None:
        for tensor in (self.keys, self.values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def recurrent(self) -> tuple[Tensor, ...]:
        return ()


def new_key_values(
    config: HybridConfig,
    rows: int,
    max_length: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    ssm_dtype: torch.dtype,
) -> KeyValues:
    shape = (rows, config.num_key_value_heads, max_length, config.head_dim)
    return KeyValues(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))


@dataclasses.dataclass(frozen=True)
class Positions:
    """Where the tokens of a call stand, shared by its attention layers: `mask` says who may see whom (`attention_mask`;
    None: causal), `angles` are the tokens' `rotary_angles` (None: no positions). Of a decoding step `rows` [B K] are
    the rows of the flattened caches [B K L, D] that its tokens are written to, and `lengths` [B] count them."""

    mask: Any = None
    angles: Angles | None = None
    rows: Tensor | None = None
    lengths: Tensor | None = None


def share_positions(
    config: HybridConfig, context: Context, tokens: int, device: torch.device, dtype: torch.dtype
) -> Positions:
    if context.lengths is None:
        mask, where = mask_and_positions(context, tokens, device, rotated=config.rope_theta is not None)
        return Positions(mask, angles_at(where, config, dtype))
    heads = config.num_key_value_heads
    each = context.lengths.unsqueeze(1)
    begins = torch.arange(each.shape[0] * heads, device=device).view(-1, heads) * context.max_length
    where = each if config.rope_theta else None
    return Positions(None, angles_at(where, config, dtype), (begins + each).flatten(), context.lengths + 1)


def mask_and_positions(context: Context, tokens: int, device: torch.device, rotated: bool) -> tuple[Any, Tensor | None]:
    """`attention_mask` of a call's tokens, and where `rotated` their `token_positions`. A part of rows has those that
    its tokens have in the rows, and keys of all that comes before."""
    past, seq_idx, part = context.past, context.seq_idx, context.part
    if part is None:
        document = None if seq_idx is None else F.pad(document_numbers(seq_idx), (past, 0))
        where = token_positions(tokens, past, seq_idx, device) if rotated else None
        return attention_mask(tokens, past, document, device), where
    document = None if part.document is None else part.own_and_before(part.document)
    where = token_positions(part.stop, 0, document, device)[:, part.start :] if rotated else None
    if document is not None and device.type == "cuda":
        return document_mask(document, part.start), where
    return attention_mask(tokens, part.start, document, device), where


def angles_at(positions: Tensor | None, config: HybridConfig, dtype: torch.dtype) -> Angles | None:
    if positions is None or config.rope_theta is None:
        return None
    theta, scaling = config.rope_theta, config.rope_scaling
    slowed = None if scaling is None else functools.partial(scaling.slowed, theta=theta)
    return rotary_angles(positions, config.head_dim, theta, dtype, slowed)


def attention_mask(tokens: int, past: int, document: Tensor | None, device: torch.device) -> Any:
    """Who may see whom, [1 or B, 1, T, past + T]: what came before, in the same of the documents [B, past + T]; None:
    plainly causal.

    One token that follows a past sees all of it, which needs no mask. On a GPU plainly causal with a past needs none
    either, and documents without a past are a mask of FlexAttention."""
    if document is None and (past == 0 or tokens == 1 or device.type == "cuda" or STATE.gpu):
        return None
    if document is not None and past == 0 and device.type == "cuda":
        return document_mask(document)
    last = torch.arange(past, past + tokens, device=device)
    mask = torch.arange(past + tokens, device=device) <= last[:, None]
    if document is None:
        return mask[None, None]
    own = document.narrow(1, past, tokens)
    return (mask & (own[:, :, None] == document[:, None, :]))[:, None]


def token_positions(tokens: int, past: int, seq_idx: Tensor | None, device: torch.device) -> Tensor:
    """Positions [1 or B, T]: they continue after the past, and begin at 0 again with each further document."""
    index = torch.arange(tokens, device=device)[None]
    if seq_idx is None:
        return index + past
    document = document_numbers(seq_idx)
    begins = F.pad(document[:, 1:] != document[:, :-1], (1, 0))
    return index - torch.where(begins, index, -past).cummax(1).values


def attention_tensors(config: HybridConfig, layer: int, hidden: Dimension) -> Parts:
    # Whole query heads come and go inside their key-value head, and all of them with it.
    query: Dimension = ((Factor(Axis("attn_heads", layer), config.num_attention_heads), Factor(None, config.head_dim)),)
    groups = Factor(Axis("kv_groups", layer), config.num_key_value_heads)
    key: Dimension = ((groups, Factor(None, config.head_dim)),)
    tensors: Parts = {
        "q_proj.weight": (Role.MATRIX, (query, hidden)),
        "k_proj.weight": (Role.MATRIX, (key, hidden)),
        "v_proj.weight": (Role.MATRIX, (key, hidden)),
        "o_proj.weight": (Role.MATRIX, (hidden, query)),
    }
    if config.attention_bias:
        biases = {"q_proj.bias": query, "k_proj.bias": key, "v_proj.bias": key, "o_proj.bias": hidden}
        tensors |= {name: (Role.VECTOR, (dimension,)) for name, dimension in biases.items()}
    if config.qk_norm:
        tensors["q_norm.weight"] = tensors["k_norm.weight"] = (Role.NORM, (fixed(config.head_dim),))
    return tensors


def check_heads(config: HybridConfig) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise InputError(
            f"config: num_attention_heads ({config.num_attention_heads}) is not a multiple of"
            f" num_key_value_heads ({config.num_key_value_heads})"
        )


def key_value_bytes(config: HybridConfig, kv: int, ssm: int, conv: int) -> StateBytes:
    return StateBytes(token=2 * config.num_key_value_heads * config.head_dim * kv)


def score_and_mix(config: HybridConfig, context: int) -> float:
    """Scores, and values weighted by them, over half of the context on average."""
    return config.num_attention_heads * config.head_dim * 2 * context / 2


KIND = LayerKind(
    letter="*",
    name="attention",
    key="attention",
    fields=("num_attention_heads", "num_key_value_heads", "head_dim"),
    check=check_heads,
    tensors=attention_tensors,
    build=Attention,
    share=share_positions,
    new_state=new_key_values,
    state_bytes=key_value_bytes,
    work=score_and_mix,
    ranks={"num_attention_heads": Sharing.EQUAL, "num_key_value_heads": Sharing.FEWER_COPIED},
    writers={"o_proj.weight": "attn_heads"},
    multipliers={"o_proj.weight": lambda config: config.multipliers.attention_out},
    scores={"attn_heads": ScoreSource({"": "attn_heads"}, reduce=True)},
    initial=dict.fromkeys(("q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias"), zeros),
    size_label=lambda config: f"A{config.num_attention_heads}",
)
