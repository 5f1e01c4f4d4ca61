"""A pass of the source alone over the calibration data, before a layer is repaired: the directions into which its
stream is turned, and the units that stay where the refit chooses them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from ..models.config import HybridConfig
from .importance import TokenBatch
from .reselect import Reselection
from .rotation import Directions, Rotation
from .slice import Selection
from .streams import GetTensor, Streams, one_layer


def source_pass(
    get_tensor: GetTensor,
    config: HybridConfig,
    batches: Sequence[TokenBatch],
    selection: Selection,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    rotate: bool,
    reselect: bool,
    on_layer: Callable[[int], None] | None = None,
) -> tuple[Rotation | None, Selection]:
    """The rotation with `rotate`, and the selection, of other units of the same number with `reselect`.
    `on_layer(done)` counts layers. Raises InputError where the data has no counted token."""
    streams = Streams(config, get_tensor, batches, device, dtype)
    directions = Directions(config, selection, device) if rotate else None
    choice = Reselection(config, get_tensor, selection) if reselect else None
    for layer in range(config.num_layers):
        if directions is not None:
            directions.see(layer, streams)
        one = one_layer(config, layer, get_tensor, device, dtype)
        streams.advance(one, None if choice is None else functools.partial(choice.see, layer))
        if choice is not None:
            choice.leave(layer)
        if on_layer is not None:
            on_layer(layer + 1)
    if directions is not None:
        directions.see(config.num_layers, streams)
    turn = None if directions is None else directions.rotation(get_tensor("norm_f.weight"))
    return turn, selection if choice is None else choice.result()
