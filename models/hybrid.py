"""The decoder: embedding, blocks x + mixer(norm(x)) after the pattern, final norm, head. The only loop over layers.

Shapes: [B, T] batch and tokens, [V] vocabulary. Parameters are named as in `axes.tensor_table`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.linear import linear
from ..kernels.norm import rms_norm
from ..kernels.rotary import rotary_angles
from .attention import Angles, Attention, attention_mask, token_positions
from .config import HybridConfig
from .generate.cache import Cache, KeyValues, MambaState
from .mamba2 import Mamba2Mixer, NormWeight
from .mlp import MLP

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

Observe = Callable[[str, int, Tensor], None]
MIXERS: dict[str, Callable[..., nn.Module]] = {"M": Mamba2Mixer, "*": Attention, "-": MLP}


class Block(nn.Module):
    """One layer: its norm, and the mixer that its letter stands for.

    With `recompute` a training step keeps what enters the layer alone, and runs it again in the backward pass.
    """

    recompute = False

    def __init__(self, config: HybridConfig, layer: int, **place: Any) -> None:
        super().__init__()
        self.letter, self.layer, self.norm_eps = config.pattern[layer], layer, config.norm_eps
        self.norm = NormWeight(config.hidden_size, **place)
        self.mixer = MIXERS[self.letter](config, layer, **place)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        angles: Angles | None,
        seq_idx: Tensor | None,
        state: KeyValues | MambaState | None = None,
        observe: Observe | None = None,
    ) -> Tensor:
        """What the layer adds to the residual stream [B, T, hidden]."""
        inputs = (hidden, mask, angles, seq_idx, state, observe)
        if self.recompute and torch.is_grad_enabled() and state is None:
            return checkpoint(self.mix, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self.mix(*inputs)

    def mix(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        angles: Angles | None,
        seq_idx: Tensor | None,
        state: KeyValues | MambaState | None,
        observe: Observe | None,
    ) -> Tensor:
        u = rms_norm(hidden, self.norm.weight, self.norm_eps)
        if observe is not None:
            observe("hidden", self.layer, u)
        if self.letter == "M":
            return self.mixer(u, seq_idx, state, observe)
        if self.letter == "*":
            return self.mixer(u, mask, angles, state, observe)
        return self.mixer(u, observe)


class HybridLM(nn.Module):
    """A hybrid language model. Weights are uninitialised until `initialize` or a checkpoint fills them.

    `tokenizer` is that of the folder, where `api.load` found one.

    `observe(kind, layer, tensor)`, where a method takes it, sees intermediates as they pass: "residual" before a
    layer, "hidden" after its norm (both also at `num_layers`, around the final norm), "ffn" what `up_proj` gives,
    "ffn_act" what `down_proj` reads (behind the activation, and the gate where there is one), "attn_heads"
    [B, T, heads, head_dim] before `o_proj`, and "mamba_x", "mamba_z" (from `in_proj`) and "mamba_out" (before
    `out_proj`), each [B, T, heads, head_dim].
    """

    tokenizer: Tokenizer | None = None

    def __init__(
        self,
        config: HybridConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, **place)
        self.layers = nn.ModuleList(Block(config, layer, **place) for layer in range(config.num_layers))
        self.norm_f = NormWeight(config.hidden_size, **place)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, **place)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix [V, hidden]; the embedding's where they are tied."""
        return self.embeddings.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        *,
        seq_idx: Tensor | None = None,
        cache: Cache | None = None,
        observe: Observe | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of input_ids [B, T]; see `hidden_states`."""
        hidden = self.hidden_states(input_ids, seq_idx=seq_idx, cache=cache, observe=observe)
        return linear(hidden, self.head_weight)

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        seq_idx: Tensor | None = None,
        cache: Cache | None = None,
        observe: Observe | None = None,
    ) -> Tensor:
        """What the head reads, [B, T, hidden]. Where `seq_idx` [B, T] changes along a row, a new document begins:
        state, attention and positions start anew. With a cache the tokens follow those that it holds (any number
        of them)."""
        hidden = self.embed(input_ids)
        hidden = self.forward_layers(hidden, 0, self.config.num_layers, seq_idx=seq_idx, cache=cache, observe=observe)
        if observe is not None:
            observe("residual", self.config.num_layers, hidden)
        hidden = rms_norm(hidden, self.norm_f.weight, self.config.norm_eps)
        if observe is not None:
            observe("hidden", self.config.num_layers, hidden)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return hidden

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, hidden]"""
        return self.embeddings(input_ids)

    def forward_layers(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        *,
        seq_idx: Tensor | None = None,
        cache: Cache | None = None,
        observe: Observe | None = None,
    ) -> Tensor:
        """The residual stream [B, T, hidden] after layers start..stop-1."""
        tokens = hidden.shape[1]
        past = 0 if cache is None else cache.length
        config = self.config
        mask = angles = None
        if "*" in config.pattern[start:stop]:
            mask = attention_mask(tokens, past, seq_idx, hidden.device)
            if config.rope_theta is not None:
                positions = token_positions(tokens, past, seq_idx, hidden.device)
                angles = rotary_angles(positions, config.head_dim, config.rope_theta, hidden.dtype)
        for layer in range(start, stop):
            if observe is not None:
                observe("residual", layer, hidden)
            state = None if cache is None else cache.layers[layer]
            hidden = hidden + self.layers[layer](hidden, mask, angles, seq_idx, state, observe)
        return hidden


@torch.no_grad()
def initialize(model: HybridLM, generator: torch.Generator, *, std: float = 0.02) -> None:
    """Fills every weight in place: normal(0, std), projections into the residual stream divided by sqrt(layers);
    A uniform in [1, 16] and dt_bias such that dt starts log-uniform in [1e-3, 1e-1], as mamba_ssm's Mamba-2 module
    starts; norms and D one; the convolution uniform in +-1/sqrt(width)."""
    for name, weight in model.named_parameters():
        kind = name.rsplit(".", 2)[-2:]
        if name.endswith("A_log"):
            weight.uniform_(1, 16, generator=generator).log_()
        elif name.endswith("dt_bias"):
            step = weight.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
            weight.copy_(step + torch.log(-torch.expm1(-step)))
        elif name.endswith(".D") or "norm" in kind[0]:
            weight.fill_(1)
        elif kind[0] == "conv1d":
            bound = 1 / math.sqrt(model.config.conv_kernel)
            weight.uniform_(-bound, bound, generator=generator)
        else:
            residual = kind[0] in ("out_proj", "o_proj", "down_proj")
            weight.normal_(0, std / math.sqrt(model.config.num_layers) if residual else std, generator=generator)
