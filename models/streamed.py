"""A model whose layers are read when their turn comes, for logits of folders that main memory may not hold.

Embedding, final norm and head are in memory, and of the layers the one that runs: every pass reads the others anew.
What it gives is what the model in memory gives, to the bit. (Scoring takes all batches through a layer before the next
is read: offload.py.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .axes import tensor_table
from .checkpoint import open_checkpoint
from .config import HybridConfig
from .hybrid import HybridLM, set_tensor
from .layer import Context


class StreamedLM(HybridLM):
    """A model of `config`, in evaluation mode and without multi-token prediction, whose tensors `get_tensor` gives by
    name, in the dtype and on the device where it works."""

    def __init__(self, config: HybridConfig, get_tensor: Callable[[str], Tensor]) -> None:
        super().__init__(config.replace(mtp_steps=0), device="meta")
        self.get_tensor = get_tensor
        for name, spec in tensor_table(self.config).items():
            if spec.layer is None:
                set_tensor(self, name, get_tensor(name), trained=False)
        self.eval()

    def run_layers(self, hidden: Tensor, start: int, stop: int, context: Context) -> Tensor:
        for number in range(start, stop):
            block = self.layers[number]
            empty = dict(block.state_dict())
            for name in empty:
                set_tensor(block, name, self.get_tensor(f"layers.{number}.{name}"), trained=False)
            hidden = super().run_layers(hidden, number, number + 1, context)
            for name, nothing in empty.items():
                set_tensor(block, name, nothing, trained=False)
        return hidden


def open_streamed(
    path: Path | str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    rounded: torch.dtype | None = None,
    config: HybridConfig | None = None,
) -> StreamedLM:
    """`load_model`, streamed; with weights that are first rounded to a dtype, or by another config than the folder's.
    Raises InputError."""
    checkpoint = open_checkpoint(path)
    table = tensor_table(checkpoint.config)

    def get_tensor(name: str) -> Tensor:
        return checkpoint.loaded(name, rounded or dtype, device).to(table[name].dtype(dtype))

    return StreamedLM(config or checkpoint.config, get_tensor)
