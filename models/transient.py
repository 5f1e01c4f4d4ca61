"""What of a generating model's memory comes and goes: the tensors of a prefill chunk and of a decoding step."""

from __future__ import annotations

import dataclasses

from .errors import InputError


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a model runs: "cuda" or "cpu", its multiprocessors (a CPU's threads), a GPU's compute capability."""

    device: str = "cuda"
    processors: int = 132
    capability: str = "9.0"


def check_load(context: int, batch: int, chunk: int) -> None:
    if context < 1 or batch < 1 or chunk < 1:
        raise InputError(f"memory: context ({context}), batch ({batch}) and chunk ({chunk}) must be at least 1")


def round_up(size: int, place: Place) -> int:
    """Bytes that an allocation of `size` takes: torch's CUDA allocator gives multiples of 512."""
    return -(-size // 512) * 512 if place.device == "cuda" else size


def blas_workspace(place: Place) -> int:
    return 0
