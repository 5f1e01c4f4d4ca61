"""What a batch of sequences carries from token to token: keys and values, SSM states, the convolution's last inputs.

A row is a sequence's slot. Rows know their lengths, are emptied, moved and viewed alone; the rows in use are the first
ones, so that a decoding step takes a plain view of them, with neither padding nor a gather.
Shapes: [B] batch, [L] tokens, [K] key-value heads, [D] head_dim, [H] heads, [P] head_dim, [N] state, [C] channels.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..config import HybridConfig
from ..errors import InputError


@dataclasses.dataclass
class KeyValues:
    """One attention layer's keys and values [B, K, L max, D]; the first `length` tokens are there."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds k and v [B, K, T, D], and gives all that there are [B, K, length, D]."""
        stop = self.length + k.shape[2]
        if stop > self.keys.shape[2]:
            raise InputError(f"the cache holds {self.keys.shape[2]} tokens, and {stop} were asked for")
        self.keys[:, :, self.length : stop] = k
        self.values[:, :, self.length : stop] = v
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def rows(self, start: int, count: int) -> KeyValues:
        """A view of some rows; its length is that of what it is a view of."""
        return KeyValues(self.keys.narrow(0, start, count), self.values.narrow(0, start, count), self.length)


@dataclasses.dataclass
class MambaState:
    """One Mamba layer's SSM state [B, H, P, N] and last convolution inputs [B, C, conv_kernel - 1], channels
    last in memory."""

    ssm: Tensor
    conv: Tensor

    def rows(self, start: int, count: int) -> MambaState:
        """A view of some rows."""
        return MambaState(self.ssm.narrow(0, start, count), self.conv.narrow(0, start, count))


class Cache:
    """The state of `batch` sequences, empty at first; the model moves it on in place. `lengths` says how many tokens
    each has seen."""

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
        self.config, self.max_length = config, max_length
        self.lengths = [0] * batch
        self.layers: list[KeyValues | MambaState | None] = []
        for letter in config.pattern:
            if letter == "*":
                shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
                keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
                self.layers.append(KeyValues(keys, values))
            elif letter == "M":
                ssm = (batch, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
                conv = (batch, config.conv_kernel - 1, config.conv_dim)
                self.layers.append(
                    MambaState(
                        torch.zeros(ssm, dtype=ssm_dtype, device=device),
                        torch.zeros(conv, dtype=dtype, device=device).mT,
                    )
                )
            else:
                self.layers.append(None)

    @property
    def length(self) -> int:
        """The length that all rows share; a batch of unequal lengths goes through `decode.Decoder`."""
        assert len(set(self.lengths)) == 1, f"rows of unequal lengths: {self.lengths}"
        return self.lengths[0]

    @length.setter
    def length(self, length: int) -> None:
        self.lengths = [length] * len(self.lengths)

    def row(self, number: int) -> Cache:
        """A view of one row, for the model to write a prompt into. How far it comes is for
        the caller to note in `lengths`."""
        view = Cache.__new__(Cache)
        view.config, view.max_length = self.config, self.max_length
        view.lengths = [self.lengths[number]]
        view.layers = [None if layer is None else layer.rows(number, 1) for layer in self.layers]
        for layer in view.layers:
            if isinstance(layer, KeyValues):
                layer.length = self.lengths[number]
        return view

    def clear(self, number: int) -> None:
        """Empties a row. Keys and values stay where they are: nothing reads beyond a row's length."""
        self.lengths[number] = 0
        for layer in self.layers:
            if isinstance(layer, MambaState):
                layer.ssm.narrow(0, number, 1).zero_()
                layer.conv.narrow(0, number, 1).zero_()

    def move(self, source: int, target: int) -> None:
        """Puts a row's state, bit for bit, in another row's place."""
        length = self.lengths[target] = self.lengths[source]
        for layer in self.layers:
            if isinstance(layer, MambaState):
                tensors = (layer.ssm, layer.conv)
            elif isinstance(layer, KeyValues):
                tensors = (layer.keys.narrow(2, 0, length), layer.values.narrow(2, 0, length))
            else:
                continue
            for tensor in tensors:
                tensor.narrow(0, target, 1).copy_(tensor.narrow(0, source, 1))
