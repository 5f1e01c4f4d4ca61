"""Grouped-query causal attention over packed documents and a key-value cache; with rotary positions and an RMSNorm of
each query and key head where the config has them.

Shapes: [B, T] batch and tokens, [L] tokens in the cache, [H] query heads, [K] key-value heads, [D] head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.attention import attention, document_mask
from ..kernels.linear import linear
from ..kernels.norm import rms_norm
from ..kernels.rotary import rotary
from ..kernels.ssd import document_numbers
from .cache import KeyValues
from .config import HybridConfig
from .mamba2 import NormWeight

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
