"""Batches made ahead by a thread of their own, and a watch over it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from ...models.errors import InputError
from ...models.tensors import Silence, ahead

AHEAD = 2  # batches that wait for their step


def feed(batches: Iterator[Any], first: int, timeout: float) -> Generator[Any, None, None]:
    """The same batches, made by a thread that is `AHEAD` of them before; `first` is the number of the first.

    Raises InputError where `timeout` seconds bring none, and what `batches` raises.
    """
    number = first
    with contextlib.closing(ahead(batches, AHEAD, timeout)) as source:
        try:
            for batch in source:
                yield batch
                number += 1
        except Silence:
            raise InputError(
                f"data: waited {timeout:g} seconds for batch {number}, and its worker gives no sign; look at the"
                " disk or the network that data= is read from, or raise data_timeout (seconds)"
            ) from None


def placed(rows: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    if device.type == "cpu" or not dataclasses.is_dataclass(rows) or isinstance(rows, type):
        return rows
    content = {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
    moved = {name: value.to(device) for name, value in content.items() if isinstance(value, Tensor)}
    return dataclasses.replace(rows, **moved)
