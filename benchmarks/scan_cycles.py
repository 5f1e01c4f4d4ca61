"""The scan's kernels at the 9B's shapes on cards that are not at hand: cycles of their loops, simulated.

    python -m limbeck.benchmarks.scan_cycles [CAPABILITY ...]

Prints a table: of each kernel its sizes, registers spilled, programs on a multiprocessor, cycles of a chunk and, for
those that walk the chunks of a sequence, milliseconds of a layer at 1 and 8 x 8,192 tokens. sass_cycles.py says what
is and is not modelled.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import torch

from ..kernels import ssd_launch
from ..kernels.launch import Launch
from ..kernels.ssd_launch import Scan
from .sass_cycles import CARDS, MOST_PROGRAMS, Card, Machine, compiled, loop_cycles

HEADS, HEAD_DIM, GROUPS, STATE, TOKENS = 128, 80, 8, 128, 8192  # Nemotron-Nano-9B-v2
BATCHES = (1, 8)


def scan_inputs() -> Scan:
    """As the model calls it, in bfloat16: x, B and C slices of one tensor, dt one of another. Without memory."""
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    sizes = (HEADS * HEAD_DIM, GROUPS * STATE, GROUPS * STATE)
    x, B, C = torch.empty(1, TOKENS, sum(sizes), **half).split(sizes, -1)
    dt = torch.empty(1, TOKENS, sizes[0] + sum(sizes) + HEADS, **half).narrow(2, sizes[0] + sum(sizes), HEADS)
    A, D, bias = torch.empty(HEADS, device="meta"), torch.empty(HEADS, **half), torch.empty(HEADS, **half)
    first = torch.empty(1, HEADS, HEAD_DIM, STATE, device="meta")
    B, C = (tensor.unflatten(-1, (GROUPS, STATE)) for tensor in (B, C))
    x = x.unflatten(-1, (HEADS, HEAD_DIM))
    return Scan(x, dt, A, B, C, D, bias, first, None, True, 0.0, math.inf, 128)


def launches(capability: int) -> Iterator[tuple[Launch, int]]:
    """The kernels of forward and backward, with the tokens of a chunk."""
    scan = scan_inputs()
    y, last = torch.empty_like(scan.x), torch.empty(1, HEADS, HEAD_DIM, STATE, device="meta")
    steps = scan.empty_steps(capability, backward=False)
    yield ssd_launch.steps_launch(scan, steps), steps.shape[-1]
    yield ssd_launch.forward_launch(scan, steps, y, last, capability), steps.shape[-1]
    steps = scan.empty_steps(capability, backward=True)
    chunks, tokens = steps.shape[1], steps.shape[-1]
    yield ssd_launch.steps_launch(scan, steps), tokens
    states = torch.empty(1, chunks, *last.shape[1:], dtype=scan.kept, device="meta")
    yield (
        ssd_launch.walk_launch(scan, steps, scan.x, scan.B, scan.initial_state, states, None, capability, False),
        tokens,
    )
    into = {"dx": y, "ddt": torch.empty(1, TOKENS, HEADS, dtype=torch.bfloat16, device="meta")}
    into |= {name: torch.empty(1, *scan.B.shape, dtype=torch.bfloat16, device="meta") for name in ("dB", "dC")}
    into["sums"] = torch.empty(3, 1, chunks, HEADS, device="meta")
    yield ssd_launch.gradients_launch(scan, steps, y, states, states, into, capability), tokens


def milliseconds(launch: Launch, tokens: int, batch: int, cycles: dict[int, float], fit: int, card: Card) -> float:
    """Of a kernel whose programs walk all chunks: rounds of as many programs as fit on a multiprocessor."""
    left = -(-launch.grid[0] * launch.grid[1] * batch // card.multiprocessors)
    total = 0.0
    while left > 0:
        now = min(left, fit)
        total += cycles[min(cycles, key=lambda count: abs(count - now))] * TOKENS / tokens
        left -= now
    return total / card.ghz / 1e6


def row(launch: Launch, tokens: int, machine: Machine, card: Card) -> list[str]:
    fit = min(MOST_PROGRAMS, machine.resident(card, launch.warps))
    cycles = loop_cycles(machine, card, launch.warps)
    found = [launch.kernel.__name__, f"{tokens} tokens, {launch.warps} warps, {launch.stages} stages"]
    found += [str(machine.spilled), str(fit), " / ".join(f"{count:,.0f}" for count in cycles.values())]
    if launch.kernel.__name__ == "scan_gradients":
        return [*found, "-", "-"]
    return [*found, *(f"{milliseconds(launch, tokens, batch, cycles, fit, card):.2f}" for batch in BATCHES)]


def main(capabilities: list[int]) -> None:
    import triton

    print(f"simulated, triton {triton.__version__}; cycles of a chunk with one program a multiprocessor / with all")
    print("| card | kernel | sizes | spilled bytes | programs | cycles | ms (1, 8k) | ms (8, 8k) |")
    print("|---|---|---|---|---|---|---|---|")
    for capability in capabilities:
        for launch, tokens in launches(capability):
            found = row(launch, tokens, compiled(launch, capability), CARDS[capability])
            print("| " + " | ".join([f"sm_{capability}", *found]) + " |", flush=True)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or sorted(CARDS))
