"""What a batch of sequences carries from token to token: keys and values, SSM states, the convolution's last inputs.

Shapes: [B] batch, [L] tokens, [K] key-value heads, [D] head_dim, [H] heads, [P] head_dim, [N] state, [C] channels.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .config import HybridConfig
from .errors import InputError


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


@dataclasses.dataclass
class MambaState:
    """One Mamba layer's SSM state [B, H, P, N] and last convolution inputs [B, C, conv_kernel - 1], channels
    last in memory."""

    ssm: Tensor
    conv: Tensor


class Cache:
    """The state of `batch` sequences of equal length, empty at first; the model moves it on in place."""

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
        self.length = 0
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
