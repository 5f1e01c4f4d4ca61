"""What kernels do otherwise while memory is traced on tensors without values (models/cost/trace.py)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


@dataclasses.dataclass
class Tracing:
    """Whether memory is traced, and whether tensors stand for a GPU's, which autograd takes of no device that is not
    there."""

    on: bool = False
    gpu: bool = False


STATE = Tracing()


@contextlib.contextmanager
def tracing(*, gpu: bool = False) -> Iterator[None]:
    """Memory is traced in the block."""
    before = STATE.on, STATE.gpu
    STATE.on, STATE.gpu = True, gpu
    try:
        yield
    finally:
        STATE.on, STATE.gpu = before


def iterations(items: Sequence[Item]) -> Sequence[Item]:
    """What a loop over pieces that are alike goes through: all; where memory is traced, the first two and the last, at
    which as much is live."""
    return [*items[:2], items[-1]] if STATE.on and len(items) > 3 else items
