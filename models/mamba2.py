"""The Mamba-2 mixer. Source: arXiv 2405.21060; layout of the published nemotron_h checkpoints.

`in_proj` gives z | x | B | C | dt; x, B and C pass the short convolution, the scan mixes tokens, the gated norm lets
z in, `out_proj` leads back. Shapes: [B, T] batch and tokens, [H] heads, [P] head_dim, [G] groups, [N] state,
[C] convolution channels (x, B and C).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels.activation import swiglu
from ..kernels.causal_conv1d import causal_conv1d
from ..kernels.entering_state import decay_from_start, with_entering_state
from ..kernels.mamba_step import PreparedStep, mamba_step, takes_prepared
from ..kernels.norm import gated_rms_norm, rms_norm
from ..kernels.parts import split_rows
from ..kernels.ssd import ssd_scan
from ..kernels.state_energy import state_energy
from .axes import Axis, Dimension, Factor, Parts, Role, fixed
from .errors import InputError
from .layer import Context, LayerKind, NormSource, NormWeight, ScoreSource, Sharing, StateBytes
from .multipliers import scaled

if TYPE_CHECKING:
    from .config import HybridConfig


class ConvWeights(nn.Module):
    """The depthwise convolution's weight [C, 1, K] and bias [C]."""

    def __init__(self, config: HybridConfig, **place: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.conv_dim, 1, config.conv_kernel, **place))
        self.bias = nn.Parameter(torch.empty(config.conv_dim, **place)) if config.conv_bias else None


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
        self.norm = NormWeight(config.d_inner, **place) if config.mamba_rms_norm else None
        self.out_proj = nn.Linear(config.d_inner, config.hidden_size, bias=False, **place)

    def forward(self, u: Tensor, context: Context) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden]; with a state, the tokens continue from it, and it advances in place."""
        config, heads = self.config, (self.config.mamba_num_heads, self.config.mamba_head_dim)
        state: MambaState | None = context.state(self.layer)
        projected, multipliers = context.project(self.in_proj, u), context.shared[share_multipliers]
        projected = projected if multipliers is None else projected * multipliers
        z, conv_in, dt = projected.split((config.d_inner, config.conv_dim, heads[0]), -1)
        if context.observe is not None:
            context.note("mamba_x", self.layer, conv_in[..., : config.d_inner].unflatten(-1, heads))
            context.note("mamba_z", self.layer, z.unflatten(-1, heads))
        if state is not None and u.shape[1] == 1 and context.seq_idx is None:
            step = context.once(self, lambda: self.one_token(state, many=context.bound is not None))
            normed = step(z, conv_in, dt)
        else:
            normed = self.mix_tokens(z, conv_in, dt, state, context)
        if context.observe is not None:
            normed = normed.unflatten(-1, heads)  # what is shown is what is used, so that gradients reach it
            context.note("mamba_out", self.layer, normed)
            normed = normed.flatten(-2)
        return scaled(context.project(self.out_proj, normed), config.multipliers.mamba_out)

    def mix_tokens(self, z: Tensor, conv_in: Tensor, dt: Tensor, state: MambaState | None, context: Context) -> Tensor:
        """What out_proj reads, [B, T, H P], of z [B, T, H P], conv_in [B, T, C] and dt [B, T, H]."""
        config, seq_idx, part = self.config, context.seq_idx, context.part
        before = None if state is None else state.conv
        if part is not None:
            before = part.inputs_before(conv_in, config.conv_kernel - 1)
        conv_out = causal_conv1d(
            conv_in,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            seq_idx=seq_idx,
            initial_state=before,
            return_final_state=state is not None,
        )
        if state is not None:
            conv_out, last = conv_out
            state.conv.copy_(last)
        x, B, C = self.split_heads(conv_out)
        A = -torch.exp(self.A_log.float())
        steps: dict[str, Any] = {"dt_bias": self.dt_bias, "dt_softplus": True, "dt_limit": config.dt_limit}
        options = steps | {"chunk_size": config.chunk_size, "seq_idx": seq_idx}
        if context.observe is not None:
            C = C.flatten(-2)
            context.note("mamba_c", self.layer, C)
            C = C.unflatten(-1, (config.n_groups, -1))
            for name, to_come in (("mamba_state", False), ("mamba_reach", True)):
                if context.wants(name):
                    energy = state_energy(x, dt, A, B, C, to_come=to_come, **options)
                    context.note(name, self.layer, energy.flatten(-2))
        y = ssd_scan(
            x,
            dt,
            A,
            B,
            C,
            D=self.D,
            **options,
            initial_state=None if state is None else state.ssm,
            return_final_state=state is not None or part is not None,
        )
        if state is not None:
            y, last = y
            state.ssm.copy_(last)
        if part is not None:  # the parts of a row are scanned side by side, and what entered each is added then
            y, last = y
            decay = decay_from_start(dt, A, part.continues(dt.device), **steps)
            y = with_entering_state(y, C, part.entering_state(last, decay[:, -1]), decay)
        return self.gated(y.flatten(-2), z, context)

    def gated(self, y: Tensor, z: Tensor, context: Context) -> Tensor:
        """What out_proj reads, of the scan's y and the gate z, [..., H P] each: normed after the gate, before it, or
        not at all."""
        if self.norm is None:
            return swiglu(z, y)
        weight, eps, groups = self.norm.weight, self.config.norm_eps, self.config.n_groups
        before = self.config.norm_before_gate
        normed = rms_norm(y, weight, eps, groups) if before else gated_rms_norm(y, z, weight, eps, groups)
        context.note("mamba_normed", self.layer, normed)
        return swiglu(z, normed) if before else normed

    def one_token(self, state: MambaState, many: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """`mix_tokens` of one token a row. What does not change from step to step is made here, once; for `many` steps
        in float32 on a CPU buffers and views, too."""
        config = self.config
        # [C, K] with channels innermost, as the state; a clone, which works on fake tensors too.
        weight = self.conv1d.weight.squeeze(1).mT.clone(memory_format=torch.contiguous_format).mT
        A = -torch.exp(self.A_log.float())
        norm = None if self.norm is None else self.norm.weight
        if many and takes_prepared(state.ssm, state.conv, self.D, weight) and not config.norm_before_gate:
            return PreparedStep(
                state.conv, state.ssm, weight, self.conv1d.bias, A, self.D, self.dt_bias, config.dt_limit,
                norm, config.norm_eps, config.n_groups,
            )  # fmt: skip
        constant: tuple[Any, ...] = (weight, self.conv1d.bias, A, self.D, self.dt_bias, norm)
        constant += (*config.dt_limit, config.norm_eps, config.norm_before_gate)
        arrived = torch.zeros(state.ssm.shape[0], config.n_groups, dtype=torch.int32, device=weight.device)

        def step(z: Tensor, conv_in: Tensor, dt: Tensor) -> Tensor:
            rows = (z.squeeze(1), conv_in.squeeze(1), dt.squeeze(1))
            return mamba_step(state.conv, state.ssm, arrived, *rows, *constant).unsqueeze(1)

        return step

    def split_heads(self, conv_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., C] -> x [..., H, P], B and C [..., G, N]"""
        config = self.config
        groups = (config.n_groups, config.ssm_state_size)
        x, B, C = split_rows(conv_out, (config.d_inner, groups[0] * groups[1], groups[0] * groups[1]))
        heads = (config.mamba_num_heads, config.mamba_head_dim)
        return x.unflatten(-1, heads), B.unflatten(-1, groups), C.unflatten(-1, groups)


@dataclasses.dataclass
class MambaState:
    """One layer's SSM states [B, H, P, N] and last convolution inputs [B, C, conv_kernel - 1], channels last in
    memory."""

    ssm: Tensor
    conv: Tensor

    def rows(self, start: int, count: int) -> MambaState:
        return MambaState(self.ssm.narrow(0, start, count), self.conv.narrow(0, start, count))

    def clear(self, row: int) -> None:
        self.ssm[row].zero_()
        self.conv[row].zero_()

    def move(self, source: int, target: int, length: int) -> None:
        for tensor in (self.ssm, self.conv):
            tensor[target] = tensor[source]

    def recurrent(self) -> tuple[Tensor, ...]:
        return self.ssm, self.conv


def new_mamba_state(
    config: HybridConfig,
    rows: int,
    max_length: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    ssm_dtype: torch.dtype,
) -> MambaState:
    ssm = (rows, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
    conv = (rows, config.conv_kernel - 1, config.conv_dim)
    return MambaState(
        torch.zeros(ssm, dtype=ssm_dtype, device=device), torch.zeros(conv, dtype=dtype, device=device).mT
    )


def share_multipliers(
    config: HybridConfig, context: Context, tokens: int, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """The multipliers of what in_proj gives, z | x | B | C | dt; None where all are 1."""
    by = config.multipliers.in_proj
    if set(by) == {1.0}:
        return None
    state = config.n_groups * config.ssm_state_size
    sizes = (config.d_inner, config.d_inner, state, state, config.mamba_num_heads)
    return torch.cat(
        [torch.full((size,), one, device=device, dtype=dtype) for size, one in zip(sizes, by, strict=True)]
    )


def mamba_tensors(config: HybridConfig, layer: int, hidden: Dimension) -> Parts:
    """The mixer's tensors; the norm before the mixer, which every layer has, is axes.tensor_table's. B and C belong to
    groups, keep their rows when heads go, and lose the same state indices."""
    heads = Factor(Axis("mamba_heads", layer), config.mamba_num_heads)
    head_dim = Factor(Axis("mamba_head_dim", layer), config.mamba_head_dim)
    inner: Dimension = ((heads, head_dim),)
    per_head: Dimension = ((heads,),)
    state = Factor(Axis("ssm_state", layer), config.n_groups * config.ssm_state_size)
    b_and_c: Dimension = ((state,), (state,))
    conv_channels = inner + b_and_c
    tensors: Parts = {
        "in_proj.weight": (Role.MATRIX, (inner + inner + b_and_c + per_head, hidden)),  # z | x | B, C | dt
        "conv1d.weight": (Role.CONVOLUTION, (conv_channels, fixed(1), fixed(config.conv_kernel))),
        "A_log": (Role.VECTOR, (per_head,)),
        "D": (Role.VECTOR, (per_head,)),
        "dt_bias": (Role.VECTOR, (per_head,)),
        "out_proj.weight": (Role.MATRIX, (hidden, inner)),
    }
    if config.mamba_rms_norm:
        tensors["norm.weight"] = (Role.NORM, (inner,))
    if config.conv_bias:
        tensors["conv1d.bias"] = (Role.VECTOR, (conv_channels,))
    return tensors


def check_groups(config: HybridConfig) -> None:
    if config.mamba_num_heads % config.n_groups:
        raise InputError(
            f"config: mamba_num_heads ({config.mamba_num_heads}) is not divisible by n_groups ({config.n_groups})"
        )


def mamba_state_bytes(config: HybridConfig, kv: int, ssm: int, conv: int) -> StateBytes:
    """States of one byte a number have a float32 scale for each channel of a head (`cost/state_formats.py`)."""
    scale = 4 if ssm == 1 else 0
    return StateBytes(
        ssm=config.d_inner * (config.ssm_state_size * ssm + scale),
        conv=config.conv_dim * (config.conv_kernel - 1) * conv,
    )


def scan_work(config: HybridConfig, context: int) -> float:
    """The SSD scan in chunks: C B^T, its product with x inside a chunk, into the state and out of it."""
    chunk, state = min(config.chunk_size, max(context, 1)), config.ssm_state_size
    return config.n_groups * state * chunk + config.d_inner * chunk + 2 * config.d_inner * state


def initial_decay(A_log: Tensor, generator: torch.Generator, config: HybridConfig) -> None:
    """A uniform in [1, 16], as mamba_ssm's Mamba-2 module starts."""
    A_log.uniform_(1, 16, generator=generator).log_()


def initial_step(dt_bias: Tensor, generator: torch.Generator, config: HybridConfig) -> None:
    """softplus(dt_bias) log-uniform in [1e-3, 1e-1], as mamba_ssm's Mamba-2 module starts."""
    step = dt_bias.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
    dt_bias.copy_(step + torch.log(-torch.expm1(-step)))


def initial_conv(weight: Tensor, generator: torch.Generator, config: HybridConfig) -> None:
    bound = 1 / math.sqrt(config.conv_kernel)
    weight.uniform_(-bound, bound, generator=generator)


def ones(weight: Tensor, generator: torch.Generator, config: HybridConfig) -> None:
    weight.fill_(1)


KIND = LayerKind(
    letter="M",
    name="Mamba-2",
    key="mamba",
    fields=("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel", "chunk_size"),
    check=check_groups,
    tensors=mamba_tensors,
    build=Mamba2Mixer,
    share=share_multipliers,
    new_state=new_mamba_state,
    state_bytes=mamba_state_bytes,
    work=scan_work,
    ranks={"mamba_num_heads": Sharing.EQUAL, "n_groups": Sharing.ONE_COPIED},
    writers={"out_proj.weight": "mamba_out"},
    multipliers={"out_proj.weight": lambda config: config.multipliers.mamba_out},
    # Heads and head channels are ranked by one matrix [heads, head_dim] (arXiv 2504.11409, section 3).
    scores={
        "mamba_heads": ScoreSource({"x": "mamba_x", "z": "mamba_z", "out": "mamba_out"}, option="mamba_source"),
        # C reads the state: scaled at an index it does what scaling the index itself would.
        "ssm_state": ScoreSource(
            {"now": "mamba_state", "to_come": "mamba_reach", "c": "mamba_c"}, option="state_source"
        ),
    },
    norms={"norm.weight": NormSource("mamba_normed", "n_groups")},
    initial={
        "A_log": initial_decay,
        "D": ones,
        "dt_bias": initial_step,
        "conv1d.weight": initial_conv,
        "conv1d.bias": initial_conv,
    },
    aligned=(("mamba_num_heads", "mamba_head_dim"), ("ssm_state_size",)),
    size_label=lambda config: f"M{config.mamba_num_heads}x{config.mamba_head_dim}",
)
