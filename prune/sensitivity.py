"""What rounding a layer costs: KL(model || model with that layer alone rounded) on held-out text, for each in turn.

Layers are counted as the config's num_hidden_layers counts them: where a family has blocks of several layers, a block
is rounded at once. Rounding is to the nearest, so that the table needs no calibration; activations are not rounded.
The stream before a layer is the unrounded model's; the streams of the layers that have been rounded move on side by
side, so that weights are read once for all that `stream_bytes` holds.
Shapes: [B, T] tokens, [N] counted tokens, [H] hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..models.axes import TensorSpec
from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.families.family import pieces_of, stored_tensors, tensor_table_of
from ..models.offload import STREAM_BYTES, Layer, Layers
from ..models.quantise import group_of, layer_of, rounded
from ..models.rounding import Rounding
from .depth_metrics import Divergence, Reading
from .importance import IGNORED_LABEL, TokenBatch
from .runs import Runs


class Sensitivity(Runs):
    """Runs batches through a model whose layers are rounded one at a time. `names`: the stored tensors that a format
    rounds. Raises InputError where the data has no counted token."""

    def __init__(self, source: Layers, names: set[str], rounding: Rounding, batches: Sequence[TokenBatch]) -> None:
        super().__init__(source, batches, [(batch.labels != IGNORED_LABEL).to(source.device) for batch in batches])
        self.config, self.names, self.rounding = source.config, names, rounding
        self.group = group_of(self.config, names) if rounding.grouped else 0
        if not self.tokens:
            raise InputError("sensitivity: the data has no counted token; expected at least one sample of two tokens")
        self.layers = sorted({block_of(self.config, name) for name in names})

    @torch.no_grad()
    def losses(
        self,
        finished: Sequence[int] = (),
        stream_bytes: int = STREAM_BYTES,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Iterator[dict[int, float]]:
        """KL in nats a token by the layer's number, of as many layers at a time as memory holds, in order; those that
        are `finished` are left out. `on_step(done, total)` counts layers that are run."""
        streams, count, size = self.embedded(), self.config.num_layers, self.config.block_size
        held = sum(stream.numel() * stream.element_size() for stream in streams)
        at_once = max(1, stream_bytes // max(held, 1) - 2)
        left = [layer for layer in self.layers if layer not in finished]
        chunks = [left[start : start + at_once] for start in range(0, len(left), at_once)]
        if not chunks:
            return
        finals = self.head_inputs(self.after(streams, range(count)))
        starts = [0, *((chunk[-1] + 1) * size for chunk in chunks[:-1])]
        done, total = count, count + sum(count - start for start in starts)
        for chunk, start in zip(chunks, starts, strict=True):
            candidates: dict[int, list[Tensor]] = {}
            for layer in self.source.in_turn(range(start, count)):
                own = layer.number // size
                for other in candidates:
                    if other != own:
                        candidates[other] = self.advanced(layer, candidates[other])
                if own in chunk:
                    with self.rounded_layer(layer):
                        candidates[own] = self.advanced(layer, candidates.get(own, streams))
                if own <= chunk[-1]:
                    streams = self.advanced(layer, streams)
                done += 1
                if on_step is not None:
                    on_step(done, total)
            yield self.divergences(candidates, finals)

    def divergences(self, candidates: dict[int, list[Tensor]], finals: Sequence[Tensor]) -> dict[int, float]:
        ends = {layer: self.head_inputs(streams) for layer, streams in candidates.items()}
        readings = [
            Reading(final, torch.empty(0), [end[number] for end in ends.values()])
            for number, final in enumerate(finals)
        ]
        sums = torch.stack(Divergence(self.source).costs(readings)).sum(0)
        return {layer: float(total) / self.tokens for layer, total in zip(ends, sums, strict=True)}

    @contextlib.contextmanager
    def rounded_layer(self, layer: Layer) -> Iterator[None]:
        """The layer has rounded weights meanwhile."""
        block, own = layer.model.layers[layer.index], dict[str, Tensor]()
        ours = {piece.ours for name in self.names for piece in stored_tensors(self.config)[name].pieces}
        for spec in tensor_table_of(self.config).values():
            if spec.layer == layer.number and spec.name in ours:
                weight = block.get_parameter(spec.part)
                own[spec.part] = weight.data
                weight.data = self.rounded_tensor(spec, weight.data)
        try:
            yield
        finally:
            for part, tensor in own.items():
                block.get_parameter(part).data = tensor

    def rounded_tensor(self, spec: TensorSpec, weight: Tensor) -> Tensor:
        """A tensor of ours as a reader of the rounded folder has it."""
        flat = weight.flatten(0, -2).clone()
        for piece in pieces_of(self.config)[spec.name]:
            rows = slice(piece.start, piece.start + piece.rows)
            stored = flat[rows].float() / piece.scale
            values = rounded(stored, self.rounding, self.group or stored.shape[1])
            flat[rows] = (values.bfloat16() * piece.scale).to(flat)
        return flat.view_as(weight)


def block_of(config: HybridConfig, name: str) -> int:
    """The number of a stored tensor's layer, as the config's num_hidden_layers counts them."""
    layer = layer_of(config, name)
    assert layer is not None
    return layer // config.block_size


def layers_in(config: HybridConfig, numbers: Sequence[int]) -> set[int]:
    """Our layers of those numbers (`block_of`). Raises InputError where the model has none of a number."""
    size, count = config.block_size, config.num_layers // config.block_size
    for number in numbers:
        if not 0 <= number < count:
            raise InputError(f"keep_layers: the model has no layer {number}; expected numbers from 0 to {count - 1}")
    return {layer for number in numbers for layer in range(number * size, (number + 1) * size)}


def most_sensitive(losses: dict[int, float], count: int) -> list[int]:
    """The numbers of the layers whose rounding costs most, in order of their numbers. Raises InputError where that
    leaves none to round."""
    if count >= len(losses):
        raise InputError(
            f"keep_layers={count} leaves nothing to round: {len(losses)} layers have matrices that the format rounds"
        )
    return sorted(sorted(losses, key=lambda layer: (-losses[layer], layer))[:count])
