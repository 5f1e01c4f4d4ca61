"""The sizes of the SSD scan's Triton kernels: those that ship, and those that were measured on the card at hand.

`python -m limbeck.benchmarks.gpu` times sizes on a card and writes the best right ones to a small JSON file; where it
has none for this card, this triton and these widths, the sizes are those of SIZES. The file is $LIMBECK_SCAN_SIZES
(empty: none is read), else scan_sizes.json in $LIMBECK_CACHE, else in ~/.cache/limbeck.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .ssd import GRADIENT_TOKENS, STEP_TOKENS

FORMAT = 1


class ScanSizes(NamedTuple):
    """Of one kernel: the most tokens and the most of head_dim in a tile, warps, stages of loads; of the forward pass
    whether the state is [p, N] and y is made transposed."""

    tokens: int
    width: int
    warps: int
    stages: int
    turned: bool = False


class KernelSizes(NamedTuple):
    forward: ScanSizes
    walk: ScanSizes
    gradients: ScanSizes


# For each compute capability, and the bytes of a number in the states that the backward keeps (2 for bfloat16 inputs,
# else 4). Chosen by simulated cycles of the machine code (benchmarks/scan_cycles.py): a few spilled registers cost
# less than warps that wait for each other. Before Hopper warps share out a product's rows alone,
# of which a tile of 32 tokens has enough for two: the forward pass is turned there. On Blackwell (100, 120) loops of
# dependent products with more than one stage give wrong numbers (state-spaces/mamba#997, triton-lang/triton#9871).
SIZES = {
    (80, 2): KernelSizes(ScanSizes(32, 64, 4, 1, True), ScanSizes(32, 16, 4, 3), ScanSizes(32, 16, 4, 1)),
    (80, 4): KernelSizes(ScanSizes(16, 16, 8, 1), ScanSizes(16, 16, 4, 1), ScanSizes(16, 32, 8, 1)),
    (86, 2): KernelSizes(ScanSizes(32, 64, 4, 1, True), ScanSizes(32, 16, 4, 3), ScanSizes(32, 16, 4, 1)),
    (86, 4): KernelSizes(ScanSizes(16, 16, 8, 1), ScanSizes(16, 16, 4, 1), ScanSizes(16, 32, 8, 1)),
    (89, 2): KernelSizes(ScanSizes(32, 64, 4, 1, True), ScanSizes(32, 16, 4, 3), ScanSizes(32, 16, 4, 1)),
    (89, 4): KernelSizes(ScanSizes(16, 16, 8, 1), ScanSizes(16, 16, 4, 1), ScanSizes(16, 32, 8, 1)),
    (90, 2): KernelSizes(ScanSizes(64, 64, 4, 1), ScanSizes(32, 16, 4, 3), ScanSizes(32, 16, 4, 1)),
    (90, 4): KernelSizes(ScanSizes(16, 16, 8, 1), ScanSizes(16, 16, 4, 1), ScanSizes(16, 32, 8, 1)),
    (100, 2): KernelSizes(ScanSizes(64, 64, 4, 1), ScanSizes(32, 16, 4, 1), ScanSizes(32, 16, 4, 1)),
    (100, 4): KernelSizes(ScanSizes(16, 16, 8, 1), ScanSizes(16, 16, 4, 1), ScanSizes(16, 32, 8, 1)),
    (120, 2): KernelSizes(ScanSizes(32, 64, 4, 1), ScanSizes(32, 16, 4, 1), ScanSizes(32, 16, 4, 1)),
    (120, 4): KernelSizes(ScanSizes(16, 16, 8, 1), ScanSizes(16, 16, 4, 1), ScanSizes(16, 32, 8, 1)),
}
BLACKWELL = 100
TRIED: list[KernelSizes] = []  # what a sweep is at: goes before all others


def sizes_for(device: torch.device, capability: int, itemsize: int, head_dim: int, state: int) -> KernelSizes:
    """The sizes of a scan on a device, whose states are kept in numbers of so many bytes."""
    if TRIED:
        return TRIED[-1]
    found = measured_sizes(device, itemsize, head_dim, state) if device.type == "cuda" else None
    return found or SIZES[capability, itemsize]


@contextlib.contextmanager
def tried(sizes: KernelSizes) -> Iterator[None]:
    """While it lasts all scans of this process take these sizes."""
    TRIED.append(sizes)
    try:
        yield
    finally:
        TRIED.pop()


@functools.cache
def measured_sizes(device: torch.device, itemsize: int, head_dim: int, state: int) -> KernelSizes | None:
    """What the file has for a CUDA device; read once a process."""
    card = read_table(table_path()).get(card_name(device), {})
    return card.get(shape_name(itemsize, head_dim, state))


def card_name(device: torch.device) -> str:
    """Registers and shared memory of a size are those of a card's kind and of the compiler."""
    import triton

    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}, triton {triton.__version__}"


def shape_name(itemsize: int, head_dim: int, state: int) -> str:
    """The widths that sizes were measured at: others may not fit the same registers and shared memory."""
    return f"{8 * itemsize} bits, head_dim {head_dim}, state {state}"


def table_path() -> Path | None:
    given = os.environ.get("LIMBECK_SCAN_SIZES")
    if given is not None:
        return Path(os.path.expanduser(given)) if given else None
    cache = os.environ.get("LIMBECK_CACHE") or "~/.cache/limbeck"
    return Path(os.path.expanduser(cache)) / "scan_sizes.json"


def read_table(path: Path | None) -> dict[str, dict[str, KernelSizes]]:
    """Sizes by card and shape. A file that is damaged or no such table is left alone and said in one line."""
    try:
        return {} if path is None else table_of(path)
    except ValueError as error:
        print(f"limbeck: {error}; the default sizes are used", file=sys.stderr)
        return {}


def table_of(path: Path) -> dict[str, dict[str, KernelSizes]]:
    """As `read_table`. Raises ValueError where the file is there, and no table."""
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']!r}, expected {FORMAT}")
        return {
            card: {shape: checked(card, shape, kernels) for shape, kernels in shapes.items()}
            for card, shapes in content["cards"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{path} is no table of scan sizes ({said})") from None


def write_table(path: Path, card: str, shape: str, sizes: KernelSizes) -> None:
    """Adds the sizes of a card and shape to the file, or replaces them. Raises ValueError where they break a rule, or
    another file lies there."""
    content = table_of(path)
    named = {kernel: one._asdict() for kernel, one in sizes._asdict().items()}
    content.setdefault(card, {})[shape] = checked(card, shape, named)
    cards = {
        name: {of: {kernel: one._asdict() for kernel, one in each._asdict().items()} for of, each in shapes.items()}
        for name, shapes in content.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    temporary.write_text(json.dumps({"format": FORMAT, "cards": cards}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    measured_sizes.cache_clear()


def checked(card: str, shape: str, kernels: dict[str, dict[str, Any]]) -> KernelSizes:
    """The sizes of all kernels. Raises ValueError or KeyError where one is none that the kernels can take, or breaks
    what memory is predicted from: the chunk that walk and gradients share, and the most tokens of the forward pass."""
    if set(kernels) != set(KernelSizes._fields):
        raise ValueError(f"{card}, {shape}: kernels {sorted(kernels)}, expected {sorted(KernelSizes._fields)}")
    found = KernelSizes(*(checked_sizes(name, kernels[name], blackwell(card)) for name in KernelSizes._fields))
    wanted = GRADIENT_TOKENS[2 if shape.startswith("16 ") else 4]
    if found.forward.tokens > STEP_TOKENS or min(found.walk.tokens, found.gradients.tokens) != wanted:
        raise ValueError(
            f"{card}, {shape}: tokens {[one.tokens for one in found]}, expected at most {STEP_TOKENS} in the forward"
            f" pass and {wanted} in the backward"
        )
    return found


def checked_sizes(name: str, given: dict[str, Any], at_once: bool) -> ScanSizes:
    sizes = ScanSizes(**given)
    stages = (1,) if at_once else (1, 2, 3, 4, 5)
    allowed = {"tokens": (16, 32, 64, 128), "width": (16, 32, 64, 128), "warps": (1, 2, 4, 8, 16), "stages": stages,
               "turned": (False, True)}  # fmt: skip
    for field, values in allowed.items():
        value = getattr(sizes, field)
        if value not in values or type(value) is not type(values[0]):
            raise ValueError(f"{name}: {field} is {value!r}, expected one of {list(values)}")
    return sizes


def blackwell(card: str) -> bool:
    return int(card.partition("sm_")[2].partition(",")[0]) >= BLACKWELL
