"""Grouped-query causal attention over packed documents and a key-value cache; with rotary positions and an RMSNorm of
each query and key head where the config has them.

Shapes: [B, T] batch and tokens, [L] tokens in the cache, [H] query heads, [K] key-value heads, [D] head_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.attention import attention, decode_attention, document_mask
from ..kernels.linear import linear
from ..kernels.linear_step import prepared_linear
from ..kernels.norm import rms_norm
from ..kernels.rotary import rotary, rotary_angles
from ..kernels.ssd import document_numbers
from .config import HybridConfig
from .generate.cache import KeyValues
from .mamba2 import NormWeight, Stored, as_it_is

Observe = Callable[[str, int, Tensor], None]
Angles = tuple[Tensor, Tensor]


class Attention(nn.Module):
    def __init__(self, config: HybridConfig, layer: int, **place: Any) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False, **place)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False, **place)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False, **place)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False, **place)
        if config.qk_norm:
            self.q_norm = NormWeight(config.head_dim, **place)
            self.k_norm = NormWeight(config.head_dim, **place)

    def forward(
        self,
        u: Tensor,
        mask: Any,
        angles: Angles | None,
        cache: KeyValues | None,
        observe: Observe | None = None,
    ) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden]; `mask` says who may see whom (`attention_mask`; None: causal), `angles`
        are the tokens' `rotary_angles` (None: no positions)."""
        split = (-1, self.config.head_dim)
        q, k, v = (
            linear(u, projection.weight).unflatten(-1, split) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            q = rms_norm(q, self.q_norm.weight, self.config.norm_eps)
            k = rms_norm(k, self.k_norm.weight, self.config.norm_eps)
        if angles is not None:
            q, k = rotary(q, *angles), rotary(k, *angles)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        y = attention(q, k, v, mask).transpose(1, 2)
        if observe is not None:
            observe("attn_heads", self.layer, y)
        return linear(y.flatten(2), self.o_proj.weight)


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a step's tokens go, one a sequence: rows of the flattened keys [B K L, D] that they are written to [B K],
    lengths [B] with them counted, and their angles."""

    rows: Tensor
    lengths: Tensor
    angles: Angles | None

    @classmethod
    def of(cls, lengths: Tensor, config: HybridConfig, max_length: int, dtype: torch.dtype) -> Places:
        """Behind sequences of lengths [B], in a cache of `max_length` tokens."""
        heads = config.num_key_value_heads
        begins = torch.arange(lengths.shape[0] * heads, device=lengths.device).view(-1, heads) * max_length
        each = lengths.unsqueeze(1)
        angles = None
        if config.rope_theta is not None:
            angles = rotary_angles(each, config.head_dim, config.rope_theta, dtype)
        return cls((begins + each).flatten(), lengths + 1, angles)


class AttentionStep:
    """A mixer's step of one token for sequences of any lengths."""

    def __init__(self, mixer: Attention, cached: KeyValues, stored: Stored = as_it_is) -> None:
        """`cached` are whole rows of a cache, side by side in memory; `stored` as in `MambaStep`."""
        self.mixer, self.cached = mixer, cached
        batch = len(cached.keys)
        self.projections = [
            prepared_linear(stored(p.weight), batch) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        ]
        self.o_proj = prepared_linear(stored(mixer.o_proj.weight), batch)
        self.flat = [tensor.flatten(0, 2) for tensor in (cached.keys, cached.values)]  # views

    def __call__(self, u: Tensor, places: Places) -> Tensor:
        """[B, hidden] -> [B, hidden]"""
        config, split = self.mixer.config, (-1, self.mixer.config.head_dim)
        q, k, v = (project(u).unflatten(-1, split) for project in self.projections)
        if config.qk_norm:
            q = rms_norm(q, self.mixer.q_norm.weight, config.norm_eps)
            k = rms_norm(k, self.mixer.k_norm.weight, config.norm_eps)
        if places.angles is not None:
            q, k = (rotary(heads.unsqueeze(1), *places.angles).squeeze(1) for heads in (q, k))
        for into, new in zip(self.flat, (k, v), strict=True):
            into.index_copy_(0, places.rows, new.flatten(0, 1))
        y = decode_attention(q, self.cached.keys, self.cached.values, places.lengths)
        return self.o_proj(y.flatten(1))


def attention_mask(tokens: int, past: int, seq_idx: Tensor | None, device: torch.device) -> Any:
    """Who may see whom, [1 or B, 1, T, past + T]: what came before, in the same document; None: plainly causal.

    The past is of the document of token 0. One token that follows a past sees all of it, which needs no mask. On a GPU
    plainly causal with a past needs none either, and documents without a past are a mask of FlexAttention."""
    if seq_idx is None and (past == 0 or tokens == 1 or device.type == "cuda"):
        return None
    if seq_idx is not None and past == 0 and device.type == "cuda":
        return document_mask(document_numbers(seq_idx))
    last = torch.arange(past, past + tokens, device=device)
    mask = torch.arange(past + tokens, device=device) <= last[:, None]
    if seq_idx is None:
        return mask[None, None]
    document = document_numbers(seq_idx)
    of_key = F.pad(document, (past, 0))
    return (mask & (document[:, :, None] == of_key[:, None, :]))[:, None]


def token_positions(tokens: int, past: int, seq_idx: Tensor | None, device: torch.device) -> Tensor:
    """Positions [1 or B, T]: they go on from the past, and begin at 0 again with each further document."""
    index = torch.arange(tokens, device=device)[None]
    if seq_idx is None:
        return index + past
    document = document_numbers(seq_idx)
    begins = F.pad(document[:, 1:] != document[:, :-1], (1, 0))
    return index - torch.where(begins, index, -past).cummax(1).values
