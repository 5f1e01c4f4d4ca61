"""Attention and a Mamba-2 mixer side by side on one normalised input; what they give is added. Source: Falcon-H1
(arXiv 2507.22448, section 2); the mixers are those of attention.py and mamba2.py.

Names of tensors and fields of the two records, with `attention.` or `mamba.` before the former, make up this one.
Shapes: [B, T] batch and tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from . import attention, mamba2
from .attention import KeyValues
from .axes import Dimension, Parts
from .layer import Context, LayerKind, StateBytes
from .mamba2 import MambaState

if TYPE_CHECKING:
    from .config import HybridConfig

PARTS = {"mamba": mamba2.KIND, "attention": attention.KIND}
Value = TypeVar("Value")


class ParallelMixer(nn.Module):
    def __init__(self, config: HybridConfig, layer: int, **place: Any) -> None:
        super().__init__()
        self.layer = layer
        self.mamba = mamba2.KIND.build(config, layer, **place)
        self.attention = attention.KIND.build(config, layer, **place)

    def forward(self, u: Tensor, context: Context) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden]"""
        state: ParallelState | None = context.state(self.layer)
        if state is None:
            return self.mamba(u, context) + self.attention(u, context)
        y = self.mamba(u, dataclasses.replace(context, states={self.layer: state.mamba}))
        return y + self.attention(u, dataclasses.replace(context, states={self.layer: state.attention}))


@dataclasses.dataclass
class ParallelState:
    """What the two keep of each sequence."""

    mamba: MambaState
    attention: KeyValues

    def rows(self, start: int, count: int) -> ParallelState:
        return ParallelState(self.mamba.rows(start, count), self.attention.rows(start, count))

    def clear(self, row: int) -> None:
        self.mamba.clear(row)
        self.attention.clear(row)

    def move(self, source: int, target: int, length: int) -> None:
        self.mamba.move(source, target, length)
        self.attention.move(source, target, length)

    def recurrent(self) -> tuple[Tensor, ...]:
        return (*self.mamba.recurrent(), *self.attention.recurrent())


def new_parallel_state(config: HybridConfig, rows: int, max_length: int, **place: Any) -> ParallelState:
    return ParallelState(
        mamba2.new_mamba_state(config, rows, max_length, **place),
        attention.new_key_values(config, rows, max_length, **place),
    )


def share_parts(config: HybridConfig, context: Context, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
    """What the layers of each of the two kinds share, where these look for it."""
    for kind in PARTS.values():
        if kind.share is not None and kind.share not in context.shared:
            context.shared[kind.share] = kind.share(config, context, tokens, device, dtype)


def parallel_tensors(config: HybridConfig, layer: int, hidden: Dimension) -> Parts:
    return joined({part: kind.tensors(config, layer, hidden) for part, kind in PARTS.items()})


def joined(of_parts: Mapping[str, Mapping[str, Value]]) -> dict[str, Value]:
    """What the parts say of their tensors, by the tensors' names here."""
    return {f"{part}.{name}": value for part, own in of_parts.items() for name, value in own.items()}


def check_parts(config: HybridConfig) -> None:
    for kind in PARTS.values():
        kind.check(config)


def parallel_bytes(config: HybridConfig, kv: int, ssm: int, conv: int) -> StateBytes:
    own = [kind.state_bytes(config, kv, ssm, conv) for kind in PARTS.values()]
    return StateBytes(*(sum(sizes) for sizes in zip(*own, strict=True)))


KIND = LayerKind(
    letter="P",
    name="attention beside Mamba-2",
    key="parallel",
    fields=tuple(field for kind in PARTS.values() for field in kind.fields),
    check=check_parts,
    tensors=parallel_tensors,
    build=ParallelMixer,
    share=share_parts,
    new_state=new_parallel_state,
    state_bytes=parallel_bytes,
    ranks={field: sharing for kind in PARTS.values() for field, sharing in kind.ranks.items()},
    work=lambda config, context: sum(kind.work(config, context) for kind in PARTS.values()),
    writers=joined({part: kind.writers for part, kind in PARTS.items()}),
    multipliers=joined({part: kind.multipliers for part, kind in PARTS.items()}),
    scores={axis: source for kind in PARTS.values() for axis, source in kind.scores.items()},
    norms=joined({part: kind.norms for part, kind in PARTS.items()}),
    initial=joined({part: kind.initial for part, kind in PARTS.items()}),
    aligned=tuple(widths for kind in PARTS.values() for widths in kind.aligned),
    size_label=lambda config: "".join(kind.size_label(config) for kind in PARTS.values()),
)
