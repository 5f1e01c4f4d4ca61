"""Batches that are run through a model's layers, from streams that were changed on the way.

Shapes: [B, T] tokens, [N] counted tokens, [H] hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..kernels.norm import rms_norm
from ..models.multipliers import scaled
from ..models.offload import Layer, Layers

if TYPE_CHECKING:
    from .importance import TokenBatch


class Runs:
    """Batches of a model whose layers come one at a time; `counted` [B, T] beside each says which positions count."""

    def __init__(self, source: Layers, batches: Sequence[TokenBatch], counted: Sequence[Tensor]) -> None:
        self.source, self.counted = source, counted
        self.ids = [batch.input_ids for batch in batches]
        self.seq_idx = [batch.seq_idx.to(source.device) for batch in batches]
        self.norm = source.tensor("norm_f.weight")
        self.tokens = sum(int(mask.sum()) for mask in counted)

    def embedded(self) -> list[Tensor]:
        """The streams before the first layer, [B, T, H] a batch."""
        return self.source.embed(self.ids)

    def advanced(self, layer: Layer, streams: Sequence[Tensor]) -> list[Tensor]:
        return [layer.forward(stream, own) for stream, own in zip(streams, self.seq_idx, strict=True)]

    def after(self, streams: list[Tensor], numbers: range) -> list[Tensor]:
        for layer in self.source.in_turn(numbers):
            streams = self.advanced(layer, streams)
        return streams

    def head_inputs(self, streams: Sequence[Tensor]) -> list[Tensor]:
        """What the head reads at the counted tokens, [N, H] a batch."""
        config, pairs = self.source.config, zip(streams, self.counted, strict=True)
        normed = (rms_norm(stream[mask], self.norm, config.norm_eps) for stream, mask in pairs)
        return [scaled(own, config.multipliers.logits) for own in normed]
