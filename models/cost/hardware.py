"""Where a model runs: a card or a CPU, and what of its memory is left for the model."""

from __future__ import annotations

import dataclasses
import math
import re

import torch

from ..errors import InputError
from ..quantities import check_between

KIB, GIB = 2**10, 2**30

BFLOAT16_FROM = 8.0  # compute capability
MOST_GIB = 2**20  # of a card; more is a slip of the units


@dataclasses.dataclass(frozen=True)
class Place:
    """What of a device decides how much memory a run takes: "cuda" or "cpu", its multiprocessors (a CPU's threads), a
    GPU's compute capability."""

    device: str = "cuda"
    processors: int = 132
    capability: str = "9.0"


def check_load(context: int, batch: int, chunk: int) -> None:
    if context < 1 or batch < 1 or chunk < 1:
        raise InputError(f"memory: context ({context}), batch ({batch}) and chunk ({chunk}) must be at least 1")


def round_up(size: int, place: Place) -> int:
    """Bytes that an allocation of `size` takes: torch's CUDA allocator gives multiples of 512."""
    return -(-size // 512) * 512 if place.device == "cuda" else size


def libraries(place: Place, context: int) -> int:
    """Bytes that cuBLAS keeps of a run: a workspace for each stream, the prefill's, and those of a decoding step's
    warm-up and capture."""
    return blas_workspace(place) * (3 if context > 1 else 1)


def blas_workspace(place: Place) -> int:
    """Bytes that cuBLAS keeps for a stream, taken from torch's allocator: 32 MiB from Hopper on, else 2 x 4 MiB and 8 x
    16 KiB (pytorch, aten/src/ATen/cuda/CublasHandlePool.cpp)."""
    if place.device != "cuda":
        return 0
    return 32 * KIB**2 if float(place.capability or 9) >= 9 else (2 * 4096 + 8 * 16) * KIB


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A card: memory in GiB (`usable_gib` is what a process can have of it), GB/s, dense bf16 TFLOP/s (float16's where
    it has no bf16 products, see `has_bfloat16`), and GB/s between it and its like, both ways together, as data sheets
    count them (0: not known)."""

    name: str
    total_gib: float
    usable_gib: float
    bandwidth_gb_s: float
    bf16_tflops: float
    compute_capability: str = ""
    multiprocessors: int = 132
    device: str = "cuda"
    interconnect_gb_s: float = 0.0

    def __post_init__(self) -> None:
        # Of one's own card they may be left open, as 0.
        check_between(self, "hardware.", 0, math.inf, "total_gib", "usable_gib", "bandwidth_gb_s", "bf16_tflops")
        check_between(self, "hardware.", 0, math.inf, "interconnect_gb_s")
        check_between(self, "hardware.", 1, math.inf, "multiprocessors")
        if not re.fullmatch(r"([0-9]+(\.[0-9]+)?)?", self.compute_capability):
            raise InputError(
                f"hardware.compute_capability is {self.compute_capability!r}; expected CUDA's number, such as 8.6"
            )

    @property
    def place(self) -> Place:
        """Where a model runs on it; a CPU works with as many threads as torch has."""
        processors = self.multiprocessors if self.device == "cuda" else torch.get_num_threads()
        return Place(self.device, processors, self.compute_capability or Place().capability)

    @property
    def has_bfloat16(self) -> bool:
        """Whether it multiplies bfloat16: GPUs do from compute capability 8.0 on (CUDA's programming guide)."""
        return self.device != "cuda" or float(self.compute_capability or 9) >= BFLOAT16_FROM

    def missing_rates(self, several: int) -> list[str]:
        """The fields that are 0, of those by which one of them, or several together, are as fast as they are."""
        needed = ("bandwidth_gb_s", "bf16_tflops", *(("interconnect_gb_s",) if several > 1 else ()))
        return [f"hardware.{name}" for name in needed if getattr(self, name) <= 0]

    def check(self) -> None:
        """Raises InputError where there is no memory to speak of, or no such device."""
        if not 0 < self.usable_gib <= MOST_GIB:
            raise InputError(f"hardware.usable_gib is {self.usable_gib:g}; expected the card's memory in GiB")
        if self.device not in ("cuda", "cpu"):
            raise InputError(f"hardware.device is {self.device!r}; expected cuda or cpu")

    def budget(self, framework_share: float, reserve_gib: float, overhead_gib: float) -> float:
        """Bytes left for weights and caches: usable x (1 - share) - reserve - overhead."""
        return (self.usable_gib * (1 - framework_share) - reserve_gib - overhead_gib) * GIB


@dataclasses.dataclass(frozen=True)
class Reserve:
    """What of a card's usable memory is not the model's: a share for runtime context, kernels and fragmentation, GiB
    kept free for others, and GiB for whatever else."""

    framework_share: float = 0.05
    reserve_gib: float = 0.0
    overhead_gib: float = 0.0

    def __post_init__(self) -> None:
        kept = self.reserve_gib, self.overhead_gib
        if not (0 <= self.framework_share < 1 and all(0 <= gib < math.inf for gib in kept)):
            raise InputError(
                "framework_share must be in [0, 1), reserve_gib and overhead_gib at least 0; these are"
                f" {self.framework_share:g}, {self.reserve_gib:g}, {self.overhead_gib:g}"
            )

    def budget(self, hardware: Hardware) -> float:
        """Bytes that are left. Raises InputError where the card has no memory."""
        hardware.check()
        return hardware.budget(self.framework_share, self.reserve_gib, self.overhead_gib)
