"""The option matmul=: whether products of float32 weights go through bfloat16 on this processor (kernels/products.py).

"float32" leaves them as they are; it is the default, so that figures repeat whatever the processor has. "auto" takes
bfloat16 where the processor has units for it and a short measurement says that it pays. That is kept beside the cached
texts, so that equal commands choose equally; what was chosen is one of a stage's options (limbeck.json).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

from ..kernels.products import bfloat16_products, project
from .device import torch_device, torch_dtype
from .errors import InputError
from .fingerprint import digest
from .folder import cache_folder, write_json
from .foreign import read_object
from .provenance import cpu_name

UNITS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86 and of Arm, as /proc/cpuinfo spells them
PROCESSOR = Path("/proc/cpuinfo")
SHAPE = (1024, 512, 1024)  # rows, inputs and outputs of the product that is measured
ROUNDS = 7
MARGIN = 1.2  # times as fast that bfloat16 has to be


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiplied:
    """How a command multiplies, whichever stages it has."""

    matmul: Literal["float32", "bfloat16", "auto"] = "float32"


@contextlib.contextmanager
def multiplying(options: Any, notes: TextIO | None = None) -> Iterator[None]:
    """A command runs in the block with what its options choose, float32 where they have no matmul=; `notes` is told
    what that came to. Raises InputError where matmul= does not go with device or dtype."""

    def say(text: str) -> None:
        if notes is not None:
            print(f"note: {text}", file=notes)

    matmul = getattr(options, "matmul", "float32")
    narrow = matmul != "float32" and settled(
        matmul, getattr(options, "device", "cpu"), getattr(options, "dtype", "float32"), say
    )
    with bfloat16_products(narrow):
        yield


def settled(matmul: str, device: str, dtype: str, say: Callable[[str], None]) -> bool:
    """Whether "bfloat16" or "auto" comes to bfloat16. Raises InputError."""
    fits = torch_device(device).type == "cpu" and torch_dtype(dtype) == torch.float32
    if matmul == "bfloat16":
        if not fits:
            raise InputError(
                f"matmul=bfloat16 is of float32 weights on a CPU, not of dtype={dtype} with device={device}; leave it"
                " out, or give dtype=float32 device=cpu"
            )
        if not has_units():
            say("this processor has no units for bfloat16: matmul=bfloat16 will be slow, and auto would not be")
        return True
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise InputError(
            "matmul=auto measures a machine, and processes that share a run have to choose alike; give"
            " matmul=float32 or matmul=bfloat16"
        )
    if not (fits and has_units()):
        return False
    gain = known_gain()
    chosen = "bfloat16" if gain >= MARGIN else "float32"
    say(f"matmul=auto takes {chosen}: here products in bfloat16 are {gain:.1f} times as fast")
    return gain >= MARGIN


def has_units(processor: Path = PROCESSOR) -> bool:
    """Whether the system lists units for bfloat16; no, where it lists nothing."""
    try:
        lines = processor.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return any(not UNITS.isdisjoint(words) for words in flags)


def known_gain() -> float:
    """`measured_gain`, measured once for a processor, a torch and a number of threads."""
    facts = {"cpu": cpu_name(), "torch": torch.__version__, "threads": torch.get_num_threads(), "shape": SHAPE}
    kept = cache_folder() / "matmul" / f"{digest(facts)[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return float(read_object(kept)["gain"])
    gain = measured_gain()
    with contextlib.suppress(OSError):  # it is only measured again
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, facts | {"gain": gain})
    return gain


@torch.inference_mode()
def measured_gain() -> float:
    """How many times as fast a product in bfloat16 is as one in float32, the roundings included: the shortest of a few
    turns of each, since other processes only ever lengthen them."""
    rows, inputs, outputs = SHAPE
    x, weight = torch.full((rows, inputs), 0.5), torch.full((outputs, inputs), 0.5)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS + 1):
        for narrow, taken in seconds.items():
            with bfloat16_products(narrow):
                begun = time.perf_counter()
                project(x, weight)
                taken.append(time.perf_counter() - begun)
    return min(seconds[False][1:]) / min(seconds[True][1:])  # the first of each finds its kernels
