"""Batches made ahead by a thread of their own, and a watch over it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import Any

from ...models import processes
from ...models.errors import InputError
from ...models.tensors import Silence, ahead

AHEAD = 2  # batches that wait for their step


def feed(batches: Iterator[Any], first: int, timeout: float) -> Generator[Any, None, None]:
    """The same batches, made by a thread that is `AHEAD` of them before; `first` is the number of the first.

    Raises InputError where `timeout` seconds bring none, and what `batches` raises.
    """
    number = first
    with (
        processes.computing_beside() as keep_threads,
        contextlib.closing(ahead(made_alone(batches), AHEAD, timeout)) as source,
    ):
        try:
            for batch in source:
                if number == first:
                    keep_threads()
                yield batch
                number += 1
        except Silence:
            raise InputError(
                f"data: waited {timeout:g} seconds for batch {number}, and its worker gives no sign; look at the"
                " disk or the network that data= is read from, or raise data_timeout (seconds)"
            ) from None


def made_alone(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches, by whichever thread takes them, without threads of its own."""
    processes.compute_alone()
    yield from batches
