"""Where models wait and where they work: on a device together, or in main memory until their turn comes."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch

from .hybrid import HybridLM


@contextlib.contextmanager
def placed(model: HybridLM, device: torch.device | None) -> Iterator[HybridLM]:
    """The model with its tensors on `device` (None: where they are) while the block lasts; after it they are again
    where they were, without being copied back, so that what the block changes is lost."""
    if device is None:
        yield model
        return
    tables: list[dict[str, Any]] = [t for module in model.modules() for t in (module._parameters, module._buffers)]
    own = [(table, name, tensor) for table in tables for name, tensor in table.items()
           if tensor is not None and not is_on(tensor, device)]  # fmt: skip
    there: dict[int, torch.Tensor] = {}  # tied tensors come once
    try:
        for table, name, tensor in own:
            if id(tensor) not in there:
                moved = tensor.detach().to(device)
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                there[id(tensor)] = torch.nn.Parameter(moved, False) if is_parameter else moved
            table[name] = there[id(tensor)]
        yield model
    finally:
        for table, name, tensor in own:
            table[name] = tensor


def is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether a tensor is on a device; one without an index stands for any of its kind."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def release_memory() -> None:
    """Gives back what is allocated and no longer used; while an error is handled, its frames still use theirs."""
    gc.collect()
    torch.cuda.empty_cache()
