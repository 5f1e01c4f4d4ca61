"""The MLP layer: down(relu^2(up x)), or the gated form down(silu(gate x) * up x)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..kernels.activation import relu2, swiglu
from .axes import Axis, Dimension, Factor, Parts, Role
from .errors import InputError
from .layer import Context, LayerKind, ScoreSource, Sharing, zeros
from .multipliers import scaled

if TYPE_CHECKING:
    from .config import HybridConfig


class MLP(nn.Module):
    def __init__(self, config: HybridConfig, layer: int, **place: Any) -> None:
        super().__init__()
        if config.gated_mlp != (config.activation == "silu"):
            raise InputError(
                f"config: activation {config.activation!r} with gated_mlp={config.gated_mlp} is not supported;"
                " known: relu2 without a gate, silu with one"
            )
        self.layer = layer
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.up_proj = nn.Linear(hidden, inner, bias, **place)
        self.down_proj = nn.Linear(inner, hidden, bias, **place)
        if config.gated_mlp:
            self.gate_proj = nn.Linear(hidden, inner, bias, **place)
        self.gated = config.gated_mlp
        self.multipliers = config.multipliers.mlp_gate, config.multipliers.mlp_out

    def forward(self, u: Tensor, context: Context) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden]; with a gate, "ffn" shows the up projection without it."""
        gate, out = self.multipliers
        up = context.project(self.up_proj, u)
        active = swiglu(scaled(context.project(self.gate_proj, u), gate), up) if self.gated else relu2(up)
        context.note("ffn", self.layer, up)
        context.note("ffn_act", self.layer, active)
        return scaled(context.project(self.down_proj, active), out)


def mlp_tensors(config: HybridConfig, layer: int, hidden: Dimension) -> Parts:
    ffn: Dimension = ((Factor(Axis("ffn", layer), config.intermediate_size),),)
    tensors: Parts = {
        "up_proj.weight": (Role.MATRIX, (ffn, hidden)),
        "down_proj.weight": (Role.MATRIX, (hidden, ffn)),
    }
    if config.gated_mlp:
        tensors["gate_proj.weight"] = (Role.MATRIX, (ffn, hidden))
    if config.mlp_bias:
        for name, (_, (outputs, _)) in list(tensors.items()):
            tensors[name.replace(".weight", ".bias")] = (Role.VECTOR, (outputs,))
    return tensors


KIND = LayerKind(
    letter="-",
    name="MLP",
    key="mlp",
    fields=("intermediate_size",),
    tensors=mlp_tensors,
    build=MLP,
    writers={"down_proj.weight": "ffn_act"},
    multipliers={"down_proj.weight": lambda config: config.multipliers.mlp_out},
    # "act" is what down_proj reads: after the activation, and the gate where there is one.
    scores={"ffn": ScoreSource({"pre": "ffn", "act": "ffn_act"}, option="ffn_source")},
    initial=dict.fromkeys(("up_proj.bias", "down_proj.bias", "gate_proj.bias"), zeros),
    ranks={"intermediate_size": Sharing.EQUAL},
    aligned=(("intermediate_size",),),
    size_label=lambda config: f"F{config.intermediate_size}",
)
