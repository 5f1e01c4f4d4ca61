"""The Mamba-2 mixer. Source: arXiv 2405.21060; layout of the published nemotron_h checkpoints.

`in_proj` gives z | x | B | C | dt; x, B and C pass the short convolution, the scan mixes tokens, the gated norm lets
z in, `out_proj` leads back. Shapes: [B, T] batch and tokens, [H] heads, [P] head_dim, [G] groups, [N] state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from ..kernels.linear import linear
from ..kernels.linear_step import prepared_linear
from ..kernels.mamba_step import PreparedStep, takes_prepared
from ..kernels.norm import gated_rms_norm
from ..kernels.ssd import ssd_scan
from ..kernels.state_update import state_update
from .config import HybridConfig
from .generate.cache import MambaState

Observe = Callable[[str, int, Tensor], None]
Stored = Callable[[Tensor], Tensor]


def as_it_is(weight: Tensor) -> Tensor:
    return weight


class ConvWeights(nn.Module):
    """The depthwise convolution's weight [C, 1, K] and bias [C]."""

    def __init__(self, config: HybridConfig, **place: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.conv_dim, 1, config.conv_kernel, **place))
        self.bias = nn.Parameter(torch.empty(config.conv_dim, **place)) if config.conv_bias else None


class NormWeight(nn.Module):
    """The weight of a norm."""

    def __init__(self, size: int, **place: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, **place))


class Mamba2Mixer(nn.Module):
    def __init__(self, config: HybridConfig, layer: int, **place: Any) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        heads = config.mamba_num_heads
        self.in_proj = nn.Linear(config.hidden_size, config.d_inner + config.conv_dim + heads, bias=False, **place)
        self.conv1d = ConvWeights(config, **place)
        self.A_log = nn.Parameter(torch.empty(heads, **place))
        self.D = nn.Parameter(torch.empty(heads, **place))
        self.dt_bias = nn.Parameter(torch.empty(heads, **place))
        self.norm = NormWeight(config.d_inner, **place)
        self.out_proj = nn.Linear(config.d_inner, config.hidden_size, bias=False, **place)

    def forward(
        self, u: Tensor, seq_idx: Tensor | None, state: MambaState | None, observe: Observe | None = None
    ) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden]; with a state, the tokens go on from it, and it moves on in place."""
        config = self.config
        if state is not None and u.shape[1] == 1 and seq_idx is None and observe is None:
            return self.step(u, state)
        z, conv_in, dt = linear(u, self.in_proj.weight).split(
            (config.d_inner, config.conv_dim, config.mamba_num_heads), -1
        )
        if observe is not None:
            heads = (config.mamba_num_heads, config.mamba_head_dim)
            observe("mamba_x", self.layer, conv_in[..., : config.d_inner].unflatten(-1, heads))
            observe("mamba_z", self.layer, z.unflatten(-1, heads))
        conv_out = causal_conv1d(
            conv_in,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            seq_idx=seq_idx,
            initial_state=None if state is None else state.conv,
            return_final_state=state is not None,
        )
        if state is not None:
            conv_out, last = conv_out
            state.conv.copy_(last)
        x, B, C = self.split_heads(conv_out)
        y = ssd_scan(
            x,
            dt,
            -torch.exp(self.A_log.float()),
            B,
            C,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=config.dt_limit,
            chunk_size=config.chunk_size,
            seq_idx=seq_idx,
            initial_state=None if state is None else state.ssm,
            return_final_state=state is not None,
        )
        if state is not None:
            y, last = y
            state.ssm.copy_(last)
        normed = gated_rms_norm(y.flatten(-2), z, self.norm.weight, config.norm_eps, config.n_groups)
        if observe is not None:
            normed = normed.unflatten(-1, heads)  # what is shown is what goes on, so that gradients reach it
            observe("mamba_out", self.layer, normed)
            normed = normed.flatten(-2)
        return linear(normed, self.out_proj.weight)

    def step(self, u: Tensor, state: MambaState) -> Tensor:
        """One token [B, 1, hidden] -> [B, 1, hidden]."""
        return MambaStep(self, state)(u[:, 0])[:, None]

    def split_heads(self, conv_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., conv_dim] -> x [..., H, P], B and C [..., G, N]"""
        config = self.config
        groups = (config.n_groups, config.ssm_state_size)
        x, B, C = conv_out.split((config.d_inner, groups[0] * groups[1], groups[0] * groups[1]), -1)
        heads = (config.mamba_num_heads, config.mamba_head_dim)
        return x.unflatten(-1, heads), B.unflatten(-1, groups), C.unflatten(-1, groups)


class MambaStep:
    """A mixer's step of one token for the sequences of a state, with all that does not change from step to step made
    ready once."""

    def __init__(self, mixer: Mamba2Mixer, state: MambaState, stored: Stored = as_it_is) -> None:
        """`stored` gives a matrix in the order that the step is to read it in."""
        config = mixer.config
        self.mixer, self.state = mixer, state
        self.widths = (config.d_inner, config.conv_dim, config.mamba_num_heads)
        self.weights = [stored(p.weight) for p in (mixer.in_proj, mixer.out_proj)]
        self.in_proj: Callable[[Tensor], Tensor] = functools.partial(linear, weight=self.weights[0])
        self.out_proj: Callable[[Tensor], Tensor] = functools.partial(linear, weight=self.weights[1])
        self.norm = mixer.norm.weight
        # [C, K] with channels innermost, as the state; a clone, which works on fake tensors too.
        self.conv_weight = mixer.conv1d.weight.squeeze(1).mT.clone(memory_format=torch.contiguous_format).mT
        self.A = -torch.exp(mixer.A_log.float())
        self.options: dict[str, Any] = {
            "D": mixer.D,
            "dt_bias": mixer.dt_bias,
            "dt_softplus": True,
            "dt_limit": config.dt_limit,
        }
        self.prepared: PreparedStep | None = None

    def prepare(self) -> None:
        """Lays out buffers on a CPU, for many steps; the state stays where it is."""
        mixer, config = self.mixer, self.mixer.config
        self.in_proj, self.out_proj = (prepared_linear(weight, len(self.state.ssm)) for weight in self.weights)
        if takes_prepared(self.state.ssm, self.state.conv, self.norm, self.conv_weight):
            self.prepared = PreparedStep(
                self.state.conv,
                self.state.ssm,
                self.conv_weight,
                mixer.conv1d.bias,
                self.A,
                mixer.D,
                mixer.dt_bias,
                config.dt_limit,
                self.norm,
                config.norm_eps,
                config.n_groups,
            )

    def __call__(self, u: Tensor) -> Tensor:
        """[B, hidden] -> [B, hidden]"""
        config = self.mixer.config
        z, conv_in, dt = self.in_proj(u).split(self.widths, -1)
        if self.prepared is not None:
            return self.out_proj(self.prepared(z, conv_in, dt))
        conv_out = causal_conv1d_step(self.state.conv, conv_in, self.conv_weight, self.mixer.conv1d.bias)
        x, B, C = self.mixer.split_heads(conv_out)
        y = state_update(self.state.ssm, x, dt, self.A, B, C, **self.options)
        normed = gated_rms_norm(y.flatten(1), z, self.norm, config.norm_eps, config.n_groups)
        return self.out_proj(normed)
