"""The scan's kernels at the 9B's shapes on cards that are not at hand: cycles of their machine code, simulated.

    python -m limbeck.benchmarks.scan_cycles [CAPABILITY ...]

Prints a table: of each kernel its sizes, registers spilled, programs on a multiprocessor, cycles of a turn of its loop
(of a program without one) with one program there and with all, and milliseconds of a layer at 1 and 8 x 8,192 and
1 x 131,072 tokens: the cycles', or the time in which each tensor passes the memory once where that is longer.
sass_cycles.py says what is and is not modelled.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch

from ..kernels import ssd_launch
from ..kernels.launch import Launch
from ..kernels.ssd_launch import Scan
from .sass_cycles import CARDS, MOST_PROGRAMS, Card, Cycles, Machine, compiled, simulated

HEADS, HEAD_DIM, GROUPS, STATE = 128, 80, 8, 128  # Nemotron-Nano-9B-v2
LOADS = {(1, 8192): "(1, 8k)", (8, 8192): "(8, 8k)", (1, 131072): "(1, 128k)"}  # sequences and tokens of each


class Kernel(NamedTuple):
    """A launch, how often its longest loop runs (0: it has none), the loop within that, and the tokens of a chunk."""

    launch: Launch
    turns: int
    trips: int
    tokens: int


def scan_inputs(batch: int, tokens: int) -> Scan:
    """As the model calls it, in bfloat16: x, B and C slices of one tensor, dt one of another. Without memory."""
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    sizes = (HEADS * HEAD_DIM, GROUPS * STATE, GROUPS * STATE)
    x, B, C = torch.empty(batch, tokens, sum(sizes), **half).split(sizes, -1)
    dt = torch.empty(batch, tokens, sizes[0] + sum(sizes) + HEADS, **half).narrow(2, sizes[0] + sum(sizes), HEADS)
    A, D, bias = torch.empty(HEADS, device="meta"), torch.empty(HEADS, **half), torch.empty(HEADS, **half)
    first = torch.empty(batch, HEADS, HEAD_DIM, STATE, device="meta")
    B, C = (tensor.unflatten(-1, (GROUPS, STATE)) for tensor in (B, C))
    x = x.unflatten(-1, (HEADS, HEAD_DIM))
    return Scan(x, dt, A, B, C, D, bias, first, None, True, 0.0, math.inf, 128)


def forward(capability: int, batch: int, tokens: int) -> list[Kernel]:
    scan = scan_inputs(batch, tokens)
    y, last = torch.empty_like(scan.x), torch.empty(batch, HEADS, HEAD_DIM, STATE, device="meta")
    steps = scan.empty_steps(capability, backward=False)
    chunks, size = steps.shape[1], steps.shape[-1]
    launch = ssd_launch.forward_launch(scan, steps, y, last, capability)
    return [Kernel(ssd_launch.steps_launch(scan, steps), 0, 1, size), Kernel(launch, chunks, 1, size)]


def backward(capability: int, batch: int, tokens: int) -> list[Kernel]:
    scan = scan_inputs(batch, tokens)
    y, last = torch.empty_like(scan.x), torch.empty(batch, HEADS, HEAD_DIM, STATE, device="meta")
    steps = scan.empty_steps(capability, backward=True)
    chunks, size = steps.shape[1], steps.shape[-1]
    states = torch.empty(batch, chunks, *last.shape[1:], dtype=scan.kept, device="meta")
    there = ssd_launch.walk_launch(scan, steps, scan.x, scan.B, scan.initial_state, states, None, capability, False)
    back = ssd_launch.walk_launch(scan, steps, y, scan.C, last, states, last, capability, True)
    into = {"dx": y, "ddt": torch.empty_like(scan.dt)}
    into |= {name: torch.empty(1, *scan.B.shape, dtype=torch.bfloat16, device="meta") for name in ("dB", "dC")}
    into["sums"] = torch.empty(3, batch, chunks, HEADS, device="meta")
    launch = ssd_launch.gradients_launch(scan, steps, y, states, states, into, capability)
    gradients = Kernel(launch, HEADS // GROUPS, -(-HEAD_DIM // launch.arguments["BLOCK_P"]), size)
    walks = [Kernel(walk, chunks, 1, size) for walk in (there, back)]
    return [Kernel(ssd_launch.steps_launch(scan, steps), 0, 1, size), *walks, gradients]


def milliseconds(kernel: Kernel, cycles: dict[int, Cycles], fit: int, card: Card) -> float:
    """Rounds of as many programs as fit on a multiprocessor, or the memory's time for every tensor once."""
    left = -(-math.prod(kernel.launch.grid) // card.multiprocessors)
    total = 0.0
    while left > 0:
        now = min(left, fit)
        one = cycles[min(cycles, key=lambda count: abs(count - now))]
        total += one.first + one.further * max(0, kernel.turns - 1)
        left -= now
    tensors = [value for value in kernel.launch.arguments.values() if isinstance(value, torch.Tensor)]
    moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return max(total / card.ghz, moved / card.memory) / 1e6


def rows(pass_name: str, capability: int, loads: list[list[Kernel]]) -> list[list[str]]:
    """Of one pass: its kernels' lines, and what they take together; `loads` are those kernels at each load."""
    card, lines, sums = CARDS[capability], [], [0.0] * len(loads)
    for kernels in zip(*loads, strict=True):
        first = kernels[0]
        machine: Machine = compiled(first.launch, capability)
        fit = min(MOST_PROGRAMS, machine.resident(card, first.launch.warps))
        cycles = simulated(machine, card, first.launch.warps, first.trips)
        times = [milliseconds(kernel, cycles, fit, card) for kernel in kernels]
        sums = [total + time for total, time in zip(sums, times, strict=True)]
        sizes = f"{first.tokens} tokens, {first.launch.warps} warps, {first.launch.stages} stages"
        shown = " / ".join(f"{one.further or one.first:,.0f}" for one in cycles.values())
        name = first.launch.kernel.__name__
        lines.append([name, sizes, str(machine.spilled), str(fit), shown, *(f"{time:.2f}" for time in times)])
    return [*lines, [f"{pass_name}, all", "", "", "", "", *(f"{total:.2f}" for total in sums)]]


def main(capabilities: list[int]) -> None:
    import triton

    print(f"simulated, triton {triton.__version__}; cycles with one program a multiprocessor / with all")
    heads = (
        "card",
        "kernel",
        "sizes",
        "spilled bytes",
        "programs",
        "cycles",
        *(f"ms {load}" for load in LOADS.values()),
    )
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    for capability in capabilities:
        for name, made in (("forward", forward), ("backward", backward)):
            for line in rows(name, capability, [made(capability, *load) for load in LOADS]):
                print("| " + " | ".join([f"sm_{capability}", *line]) + " |", flush=True)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or sorted(CARDS))
