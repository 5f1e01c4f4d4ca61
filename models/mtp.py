"""Multi-token prediction: layers after the last that guess one token further, for speculative decoding by others.

Step s reads, at each token, the embedding of the token 1 + s ahead and what the step before gave (at first what the
head reads), each through a norm of its own, and eh_proj makes one stream of both:

    x = eh_proj [enorm e, hnorm h];  x += mixer(norm x), layer after layer;  h' = final_layernorm x

The head reads h'. Source: vLLM's nemotron_h_mtp.py, DeepSeek-V3 (arXiv 2412.19437, section 2.2). Generation here does
without it; it is read, cut along the stream, trained or left as it is, and written with the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels.norm import rms_norm
from ..kernels.products import project
from .axes import HIDDEN, Dimension, Factor, Parts, Role, TensorSpec
from .layer import NormWeight

if TYPE_CHECKING:
    from .config import HybridConfig
    from .hybrid import Block
    from .layer import Context


class MultiTokenPrediction(nn.Module):
    """The layers of all steps, one after the other; the first of a step has enorm, hnorm and eh_proj, its last
    final_layernorm."""

    def __init__(self, config: HybridConfig, blocks: list[Block], **place: Any) -> None:
        super().__init__()
        hidden, self.steps, self.norm_eps = config.hidden_size, config.mtp_steps, config.norm_eps
        size = len(config.mtp_pattern)
        for first, last in zip(blocks[::size], blocks[size - 1 :: size], strict=True):
            first.enorm, first.hnorm = NormWeight(hidden, **place), NormWeight(hidden, **place)
            first.eh_proj = nn.Linear(2 * hidden, hidden, bias=False, **place)
            last.final_layernorm = NormWeight(hidden, **place)
        self.layers = nn.ModuleList(blocks)

    def forward(self, step: int, embedded: Tensor, hidden: Tensor, context: Context) -> Tensor:
        """What the head reads [B, T, hidden] of a step, of the embeddings and the stream that it reads, each so."""
        size = len(self.layers) // self.steps
        blocks: Any = self.layers[step * size : (step + 1) * size]
        read = rms_norm(embedded, blocks[0].enorm.weight, self.norm_eps)
        kept = rms_norm(hidden, blocks[0].hnorm.weight, self.norm_eps)
        x = project(torch.cat((read, kept), -1), blocks[0].eh_proj.weight)
        for block in blocks:
            x = x + block(x, context)
        return rms_norm(x, blocks[-1].final_layernorm.weight, self.norm_eps)


def mtp_table(config: HybridConfig, hidden: Dimension) -> list[TensorSpec]:
    """The tensors of multi-token prediction. The stream is their only axis: what is in a layer has the width that the
    config gives to all layers of its kind, and nothing here scores its units."""
    rows, layers, size = [], config.mtp_layers, len(config.mtp_pattern)
    for number, kind in enumerate(() if layers is None else layers.kinds):
        parts: Parts = {"norm.weight": (Role.NORM, (hidden,))}
        if number % size == 0:
            parts |= dict.fromkeys(("enorm.weight", "hnorm.weight"), (Role.NORM, (hidden,)))
            parts["eh_proj.weight"] = (Role.MATRIX, (hidden, hidden + hidden))
        for name, (role, dimensions) in kind.tensors(layers, number, hidden).items():  # type: ignore[arg-type]
            parts[f"mixer.{name}"] = (role, tuple(of_stream(dimension) for dimension in dimensions))
        if (number + 1) % size == 0:
            parts["final_layernorm.weight"] = (Role.NORM, (hidden,))
        for name, (role, dimensions) in parts.items():
            rows.append(TensorSpec(f"mtp.layers.{number}.{name}", dimensions, role, ahead=number))
    return rows


def of_stream(dimension: Dimension) -> Dimension:
    """A dimension whose only axis is the stream."""
    return tuple(
        tuple(factor if factor.axis == HIDDEN else Factor(None, factor.size) for factor in segment)
        for segment in dimension
    )
