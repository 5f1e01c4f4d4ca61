"""What a batch of sequences carries from token to token: the states of its layers (keys and values, SSM states, the
convolution's last inputs), as each kind of layer makes them.

A row is a sequence's slot. Rows know their lengths, are emptied, moved and viewed alone; the rows in use are the first
ones, so that a decoding step takes a plain view of them, with neither padding nor a gather.
"""

from __future__ import annotations

import torch

from ..config import HybridConfig
from ..errors import InputError
from ..layer import LayerState


class Cache:
    """The state of `batch` sequences, empty at first; the model advances it in place. `lengths` says how many tokens
    each has seen, `layers` are the states by layer (None where a layer keeps nothing)."""

    def __init__(
        self,
        config: HybridConfig,
        batch: int,
        max_length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        ssm_dtype: torch.dtype = torch.float32,
    ) -> None:
        if batch < 1 or max_length < 1:
            raise InputError(f"cache: batch {batch} and length {max_length} must be at least 1")
        self.max_length = max_length
        self.lengths = [0] * batch
        self.layers: list[LayerState | None] = [
            None
            if kind.new_state is None
            else kind.new_state(config, batch, max_length, dtype=dtype, device=device, ssm_dtype=ssm_dtype)
            for kind in config.kinds
        ]

    @property
    def length(self) -> int:
        """The length that all rows share; a batch of unequal lengths goes through `decode.Decoder`."""
        assert len(set(self.lengths)) == 1, f"rows of unequal lengths: {self.lengths}"
        return self.lengths[0]

    @length.setter
    def length(self, length: int) -> None:
        self.lengths = [length] * len(self.lengths)

    def rows(self, start: int, count: int) -> Cache:
        """A view of some rows, for the model to read and write. What it adds to the view's `lengths` is for the caller
        to note in its own."""
        view = Cache.__new__(Cache)
        view.max_length = self.max_length
        view.lengths = self.lengths[start : start + count]
        view.layers = [None if layer is None else layer.rows(start, count) for layer in self.layers]
        return view

    def clear(self, row: int) -> None:
        """Empties a row."""
        self.lengths[row] = 0
        for layer in self.layers:
            if layer is not None:
                layer.clear(row)

    def move(self, source: int, target: int) -> None:
        """Puts a row's state, bit for bit, in another row's place."""
        length = self.lengths[target] = self.lengths[source]
        for layer in self.layers:
            if layer is not None:
                layer.move(source, target, length)
