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
    own = [(table, name, found) for table in tables for name, found in table.items()
           if found is not None and not is_on(found, device)]  # fmt: skip
    there: dict[int, torch.Tensor] = {}  # tied tensors come once
    try:
        for table, name, found in own:
            if id(found) not in there:
                moved = found.detach().to(device)
                there[id(found)] = torch.nn.Parameter(moved, False) if isinstance(found, torch.nn.Parameter) else moved
            table[name] = there[id(found)]
        yield model
    finally:
        for table, name, found in own:
            table[name] = found


def is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether a tensor is on a device; one without an index stands for any of its kind."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def let_go() -> None:
    """Gives back what is allocated and no longer used; while an error is handled, its frames still use theirs."""
    gc.collect()
    torch.cuda.empty_cache()
