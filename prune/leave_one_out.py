"""What the logits lose without a unit: the model runs without each in turn, from the unit's layer on.

The residual stream before a layer is the same whichever of its units is gone: it is run once, and units that fit side
by side share every layer that follows, which is read once for all of them.
Shapes: [B, T] tokens, [N] counted tokens, [H] hidden, [U] units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models import processes
from ..models.axes import Axis, axis_sizes
from ..models.offload import Layer, Layers
from .depth_metrics import Reading, SquaredError
from .runs import Runs

if TYPE_CHECKING:
    from .importance import TokenBatch


@torch.no_grad()
def leave_one_out(
    source: Layers, batches: Sequence[tuple[TokenBatch, Tensor]], kind: str, stream_bytes: int
) -> dict[Axis, Tensor]:
    """Scores [U] of the units of an axis kind in each layer that has it: the mean squared error of the logits of the
    model without the unit (`LayerKind.without`) against the model's own, over the positions of batches that `counted`
    [B, T] beside them says. `stream_bytes` bounds the streams that are held. Of many processes each has batches of its
    own."""
    run = Without(source, batches)
    config, sizes = source.config, axis_sizes(source.config)
    sums: dict[Axis, Tensor] = {}
    with processes.together():
        finals = run.head_inputs(run.after(run.embedded(), range(config.num_layers)))
        streams = run.embedded()
        held = sum(stream.numel() * stream.element_size() for stream in streams)
        at_once = max(1, stream_bytes // max(held, 1) - 2)
        for layer in source.in_turn(range(config.num_layers)):
            axis = Axis(kind, layer.number)
            if axis in sizes:
                costs: list[Tensor] = []
                for start in range(0, sizes[axis], at_once):
                    units = range(start, min(start + at_once, sizes[axis]))
                    costs += run.costs(layer, kind, units, streams, finals)
                sums[axis] = torch.stack(costs)
            streams = run.advanced(layer, streams)
    tokens = processes.all_sum(torch.tensor(float(run.tokens), dtype=torch.float64))
    terms = float(tokens) * config.vocab_size
    return {axis: processes.all_sum(values).cpu() / terms for axis, values in sums.items()}


class Without(Runs):
    """Runs batches through the layers of a model, and of it without single units."""

    def __init__(self, source: Layers, batches: Sequence[tuple[TokenBatch, Tensor]]) -> None:
        super().__init__(source, [batch for batch, _ in batches], [counted for _, counted in batches])
        self.metric = SquaredError(source)

    def costs(
        self, layer: Layer, kind: str, units: Sequence[int], streams: Sequence[Tensor], finals: Sequence[Tensor]
    ) -> list[Tensor]:
        """The squared errors without each of the units, summed over tokens and vocabulary."""
        block = layer.model.layers[layer.index]
        record, mixer = self.source.config.kinds[layer.number], block.get_submodule("mixer")
        candidates = []
        for unit in units:
            with record.without[kind](mixer, unit):
                candidates.append(self.advanced(layer, streams))
        for later in self.source.in_turn(range(layer.number + 1, self.source.config.num_layers)):
            for place, own in enumerate(candidates):
                candidates[place] = self.advanced(later, own)
        costs = []
        for own in candidates:
            pairs = zip(finals, self.head_inputs(own), strict=True)
            readings = [Reading(final, torch.empty(0), [smaller]) for final, smaller in pairs]
            none = torch.zeros((), dtype=torch.float64, device=self.source.device)  # some processes have no rows
            costs.append(sum((cost[0] for cost in self.metric.costs(readings)), none))
        return costs
