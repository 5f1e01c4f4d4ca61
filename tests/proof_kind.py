"""A kind of layer and a family of its own, defined here and nowhere else: test_new_kind.py has what is done with them.

The kind is a gated convolution: in_proj gives gate and value as a stack of two matrices, the value passes a short
causal convolution, whose last inputs are its state, a norm in groups lets the gate in, and out_proj leads back. The
family has alternative blocks of two layers, a fused matrix (gate and up of the MLP), the stack stored one by one, and a
number of its config that multiplies the embedding.
Shapes: [B, T] batch and tokens, [C] channels, [K] width of the convolution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from limbeck.kernels.causal_conv1d import causal_conv1d
from limbeck.kernels.linear import linear
from limbeck.kernels.norm import gated_rms_norm
from limbeck.models import attention, mlp
from limbeck.models.axes import Axis, AxisRow, Dimension, Factor, Parts, Role, fixed
from limbeck.models.config import HybridConfig
from limbeck.models.errors import InputError
from limbeck.models.families.family import Family, Fused, Scaled, Units
from limbeck.models.layer import Context, LayerKind, NormSource, NormWeight, ScoreSource, StateBytes
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class ProofConfig(HybridConfig):
    """The fields that the kind and the family need beside those that all have."""

    conv_channels: int = 0
    conv_groups: int = 1
    conv_width: int = 3
    embedding_multiplier: float = 1.0


class Weight(nn.Module):
    def __init__(self, *shape: int, **place: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, **place))


class GatedConv(nn.Module):
    def __init__(self, config: ProofConfig, layer: int, **place: Any) -> None:
        super().__init__()
        self.config, self.layer, channels = config, layer, config.conv_channels
        self.in_proj = Weight(2, channels, config.hidden_size, **place)
        self.conv = Weight(channels, config.conv_width, **place)
        self.norm = NormWeight(channels, **place)
        self.out_proj = nn.Linear(channels, config.hidden_size, bias=False, **place)

    def forward(self, u: Tensor, context: Context) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden]"""
        state: ConvState | None = context.state(self.layer)
        gate, value = linear(u, self.in_proj.weight.flatten(0, 1)).chunk(2, -1)
        y = causal_conv1d(
            value,
            self.conv.weight,
            activation=None,
            seq_idx=context.seq_idx,
            initial_state=None if state is None else state.last,
            return_final_state=state is not None,
        )
        if state is not None:
            y, last = y
            state.last.copy_(last)
        y = gated_rms_norm(y, gate, self.norm.weight, self.config.norm_eps, self.config.conv_groups)
        context.note("conv_out", self.layer, y)
        return context.project(self.out_proj, y)


@dataclasses.dataclass
class ConvState:
    """The last inputs of the convolution [B, C, K - 1]."""

    last: Tensor

    def rows(self, start: int, count: int) -> ConvState:
        return ConvState(self.last.narrow(0, start, count))

    def clear(self, row: int) -> None:
        self.last[row].zero_()

    def move(self, source: int, target: int, length: int) -> None:
        self.last[target] = self.last[source]

    def recurrent(self) -> tuple[Tensor, ...]:
        return (self.last,)


def new_conv_state(
    config: ProofConfig, rows: int, max_length: int, *, dtype: Any, device: Any, ssm_dtype: Any
) -> ConvState:
    return ConvState(torch.zeros(rows, config.conv_channels, config.conv_width - 1, dtype=dtype, device=device))


def conv_tensors(config: ProofConfig, layer: int, hidden: Dimension) -> Parts:
    channels: Dimension = ((Factor(Axis("conv_channels", layer), config.conv_channels),),)
    return {
        "in_proj.weight": (Role.EXPERTS, (fixed(2), channels, hidden)),
        "conv.weight": (Role.CONVOLUTION, (channels, fixed(config.conv_width))),
        "norm.weight": (Role.NORM, (channels,)),
        "out_proj.weight": (Role.MATRIX, (hidden, channels)),
    }


def check_channels(config: ProofConfig) -> None:
    if config.conv_channels % config.conv_groups:
        raise InputError(f"config: conv_channels ({config.conv_channels}) is no multiple of {config.conv_groups}")


CONV: Any = LayerKind(
    letter="C",
    name="gated convolution",
    key="conv",
    fields=("conv_channels", "conv_groups", "conv_width"),
    check=check_channels,  # type: ignore[arg-type]
    tensors=conv_tensors,  # type: ignore[arg-type]
    build=GatedConv,
    new_state=new_conv_state,
    state_bytes=lambda config, kv, ssm, conv: StateBytes(conv=config.conv_channels * (config.conv_width - 1) * conv),
    work=lambda config, context: config.conv_channels * config.conv_width,
    writers={"out_proj.weight": "conv_out"},
    scores={"conv_channels": ScoreSource({"": "conv_out"})},
    norms={"norm.weight": NormSource("conv_out", "conv_groups")},
    aligned=(("conv_channels",),),
    size_label=lambda config: f"C{config.conv_channels}",
)
ROW = AxisRow("conv_channels", "conv_channels", "convolution channels", groups="conv_groups")

OWN = ("pattern", *(field.name for field in dataclasses.fields(ProofConfig) if field.name not in ("extra", "pattern")))
SAME = {"activation": "silu", "gated_mlp": True}
BLOCK = "model.blocks.{block}."


def read_proof(hf: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: tuple(hf[name]) if isinstance(hf[name], list) else hf[name] for name in OWN if name in hf}
    return fields | SAME | {"family": "proof"}


def write_proof(config: HybridConfig) -> dict[str, Any]:
    left_out = (*SAME, "family", "dt_limit", "multipliers")
    return {name: getattr(config, name) for name in OWN if name not in left_out}


PROOF = Family(
    read_proof,
    write_proof,
    "ProofForCausalLM",
    fixed=SAME,
    config=ProofConfig,
    blocks=("C-", "*-"),
    outer={
        "embeddings.weight": Scaled("model.embed.weight", lambda config: config.embedding_multiplier),  # type: ignore[attr-defined]
        "norm_f.weight": "model.norm.weight",
        "lm_head.weight": "head.weight",
    },
    layers={
        CONV.letter: {
            "norm.weight": BLOCK + "norm_1.weight",
            "mixer.in_proj.weight": Units(BLOCK + "conv.in_proj.{unit}.weight"),
            "mixer.conv.weight": BLOCK + "conv.kernel",
            "mixer.norm.weight": BLOCK + "conv.norm.weight",
            "mixer.out_proj.weight": BLOCK + "conv.out.weight",
        },
        attention.KIND.letter: {
            "norm.weight": BLOCK + "norm_1.weight",
            **{f"mixer.{x}_proj.weight": f"{BLOCK}attn.{x}.weight" for x in "qkvo"},
        },
        mlp.KIND.letter: {
            "norm.weight": BLOCK + "norm_2.weight",
            "mixer.gate_proj.weight": Fused(BLOCK + "mlp.gate_up.weight"),
            "mixer.up_proj.weight": Fused(BLOCK + "mlp.gate_up.weight", after=("mixer.gate_proj.weight",)),
            "mixer.down_proj.weight": BLOCK + "mlp.down.weight",
        },
    },
)


def proof_config(**changes: Any) -> ProofConfig:
    sizes: dict[str, Any] = {
        "family": "proof", "pattern": "C-*-C-", "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "conv_channels": 12, "conv_groups": 2,
        "conv_width": 3, "embedding_multiplier": 4.0, "norm_eps": 1e-12, "rope_theta": 10000.0,
        "max_position_embeddings": 512, **SAME,
    }  # fmt: skip
    return ProofConfig(**(sizes | changes))
