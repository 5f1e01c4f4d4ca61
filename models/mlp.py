"""The MLP mixer: down(relu^2(up x)), or the gated form down(silu(gate x) * up x)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..kernels.activation import relu2, swiglu
from ..kernels.linear import linear
from ..kernels.linear_step import prepared_linear
from .config import HybridConfig
from .errors import InputError
from .mamba2 import Stored, as_it_is

Observe = Callable[[str, int, Tensor], None]


class MLP(nn.Module):
    def __init__(self, config: HybridConfig, layer: int, **place: Any) -> None:
        super().__init__()
        if config.gated_mlp != (config.activation == "silu"):
            raise InputError(
                f"config: activation {config.activation!r} with gated_mlp={config.gated_mlp} is not supported;"
                " known: relu2 without a gate, silu with one"
            )
        self.layer = layer
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False, **place)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False, **place)
        if config.gated_mlp:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False, **place)
        self.gated = config.gated_mlp

    def forward(self, u: Tensor, observe: Observe | None = None) -> Tensor:
        """[..., hidden] -> [..., hidden]; with a gate, "ffn" shows the up projection without it."""
        up = linear(u, self.up_proj.weight)
        active = swiglu(linear(u, self.gate_proj.weight), up) if self.gated else relu2(up)
        if observe is not None:
            observe("ffn", self.layer, up)
            observe("ffn_act", self.layer, active)
        return linear(active, self.down_proj.weight)


class MLPStep:
    """The MLP of one token a sequence; `stored` as in `MambaStep`."""

    def __init__(self, mixer: MLP, batch: int, stored: Stored = as_it_is) -> None:
        self.up, self.down = (prepared_linear(stored(p.weight), batch) for p in (mixer.up_proj, mixer.down_proj))
        self.gate = prepared_linear(stored(mixer.gate_proj.weight), batch) if mixer.gated else None

    def __call__(self, u: Tensor) -> Tensor:
        """[B, hidden] -> [B, hidden]"""
        up = self.up(u)
        return self.down(relu2(up) if self.gate is None else swiglu(self.gate(u), up))
