"""The sizes of the scan's Triton kernels that are fastest on the card at hand, found by timing them, and right.

Each candidate of the forward pass, of the walk and of the gradients is a case: its values and gradients against
float64, then its milliseconds at both loads. The best right one of each kernel is checked once more, with the others'
best, on a row of documents of odd length, and written to the table that the package reads (kernels/scan_sizes.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import scan_sizes
from ..kernels.launch import capability, triton_module
from ..kernels.scan_sizes import KernelSizes, ScanSizes
from ..kernels.ssd import GRADIENT_TOKENS, scan_backward_op, scan_op
from . import gpu_peers
from .gpu_cases import DRAWN, scan_inputs
from .gpu_measures import error, milliseconds, right, timed_pass, worst
from .guarded import Case

PEER = "mamba_ssm"
SHORT = 5  # candidates of a kernel in a short run
Timer = Callable[[Callable[[], Any]], float]


class Sweep(NamedTuple):
    """Where candidates are checked and timed: (batch, tokens) of each; the dtype of the inputs, and whether widths are
    tiny ones."""

    checked: tuple[int, int] = (1, 2048)
    odd: tuple[int, int] = (2, 509)
    loads: tuple[tuple[int, int], ...] = ((1, 8192), (8, 8192))
    dtype: torch.dtype = torch.bfloat16
    tiny: bool = False

    def inputs(self, batch: int, tokens: int, documents: bool = False) -> tuple[Any, ...]:
        """What `scan_op` takes, with an initial state and documents or without."""
        torch.manual_seed(0)
        before = DRAWN["dtype"]
        DRAWN["dtype"] = self.dtype
        try:
            drawn = scan_inputs(batch, tokens, self.tiny)
        finally:
            DRAWN["dtype"] = before
        x, state = drawn["x"], drawn["B"].shape[-1]
        first = torch.randn(batch, *x.shape[2:], state, device=x.device) if documents else None
        seq_idx = (torch.arange(tokens, device=x.device) * 7 // tokens).expand(batch, -1) if documents else None
        return (*drawn.values(), first, seq_idx, True, 0.0, math.inf, 128)

    def shape(self) -> tuple[int, int, int]:
        """Bytes of a number in the states that are kept, head_dim and state."""
        drawn = scan_inputs(1, 1, self.tiny)
        return 2 if self.dtype == torch.bfloat16 else 4, drawn["x"].shape[-1], drawn["B"].shape[-1]


FULL = Sweep()


def default_sizes(sweep: Sweep) -> KernelSizes:
    return scan_sizes.SIZES[capability(torch.device(DRAWN["device"])), sweep.shape()[0]]


def candidates(default: KernelSizes, itemsize: int, capability: int, short: bool) -> dict[str, list[ScanSizes]]:
    """By kernel, the default first and then by how likely they are the best. The backward's tokens are fixed, since
    memory is predicted from them; on Blackwell loops of more than one stage give wrong numbers."""
    forward = [
        (64, 64, 4, 1), (32, 64, 4, 1, True), (64, 64, 8, 1), (32, 64, 4, 1), (64, 64, 4, 2), (64, 32, 4, 1),
        (64, 64, 8, 2), (32, 64, 4, 2, True), (64, 16, 4, 1), (64, 64, 4, 1, True), (32, 64, 8, 1), (32, 32, 4, 2),
        (64, 32, 2, 1), (32, 64, 2, 1, True), (32, 64, 8, 3), (16, 64, 4, 1),
    ]  # fmt: skip
    tokens = GRADIENT_TOKENS[itemsize]
    loops = [(4, 2), (2, 3), (4, 3), (2, 2), (4, 1), (8, 2), (2, 4), (1, 3), (4, 4), (8, 3), (2, 1), (1, 2)]
    lists = {
        "forward": [ScanSizes(*sizes) for sizes in forward],  # type: ignore[arg-type]
        "walk": [ScanSizes(tokens, default[1].width, *rest) for rest in loops],
        "gradients": [ScanSizes(tokens, default[2].width, *rest) for rest in
                      [(4, 1), (8, 1), (2, 1), (4, 2), (8, 2), (2, 2), (4, 3), (8, 3)]],
    }  # fmt: skip
    found = {}
    for kernel, first in default._asdict().items():
        allowed = [one for one in lists[kernel] if one.stages == 1 or capability < scan_sizes.BLACKWELL]
        found[kernel] = list(dict.fromkeys([first, *allowed]))[: SHORT if short else None]
    return found


def outputs(inputs: tuple[Any, ...]) -> list[Tensor]:
    """y, the last state, and the gradients for fixed random ones of both."""
    y, state = scan_op(*inputs)
    generator = torch.Generator().manual_seed(1)
    dy, dstate = (torch.randn(one.shape, generator=generator).to(inputs[0].device) for one in (y, state))
    return [y, state, *scan_backward_op(dy.to(y.dtype), dstate.to(state.dtype), *inputs)]


@functools.lru_cache(maxsize=2)
def truth(sweep: Sweep, batch: int, tokens: int, documents: bool) -> list[Tensor]:
    """In float64, which no Triton kernel takes."""
    inputs = sweep.inputs(batch, tokens, documents)
    exact = [each.double() if isinstance(each, Tensor) and each.is_floating_point() else each for each in inputs]
    return outputs(tuple(exact))


def verdict(sweep: Sweep, sizes: KernelSizes, batch: int, tokens: int, documents: bool) -> Case:
    with scan_sizes.tried(sizes):
        found = outputs(sweep.inputs(batch, tokens, documents))
    errors = [error(a, b) for a, b in zip(truth(sweep, batch, tokens, documents), found, strict=True) if b.numel()]
    value, gradient = worst(errors[:2]), worst(errors[2:])
    return {"value": value, "gradient": gradient, "right": right(sweep.dtype, value, gradient)}


def load_name(load: tuple[int, int]) -> str:
    return f"{load[0]} x {load[1]}"


def at_loads(sweep: Sweep, timer: Timer, work_of: Callable[..., Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds at each load that there is memory for, of what `work_of` makes of its inputs."""
    found: dict[str, float] = {}
    for load in sweep.loads:
        try:
            found[load_name(load)] = timer(work_of(sweep.inputs(*load)))
        except torch.OutOfMemoryError:
            if not found:
                raise
    return found


def times(sweep: Sweep, sizes: KernelSizes, forward: bool, timer: Timer) -> dict[str, float]:
    """Milliseconds of the whole pass."""
    launch = triton_module("ssd_launch")

    def work_of(inputs: tuple[Any, ...]) -> Callable[[], Any]:
        scan = launch.Scan(*inputs)
        dy = torch.ones_like(scan.x)
        return (lambda: launch.scan(scan)) if forward else (lambda: launch.scan_backward(scan, dy, None))

    with scan_sizes.tried(sizes):
        return at_loads(sweep, timer, work_of)


def peer_times(sweep: Sweep, forward: bool, timer: Timer) -> dict[str, float]:
    def work_of(inputs: tuple[Any, ...]) -> Callable[[], Any]:
        named = dict(zip(("x", "dt", "A", "B", "C", "D", "dt_bias"), inputs, strict=False))
        return timed_pass(gpu_peers.mamba_ssm_scan, named, forward)

    return at_loads(sweep, timer, work_of)


def sweep_case(case: Case, sweep: Sweep = FULL, timer: Timer = milliseconds) -> Case:
    """One kernel with one candidate's sizes, the others with their defaults; or the peer's pass."""
    if case.get("way") == PEER:
        return {"ms": peer_times(sweep, case["kernel"] == "forward", timer)}
    sizes = default_sizes(sweep)._replace(**{case["kernel"]: ScanSizes(*case["sizes"])})
    found = verdict(sweep, sizes, *sweep.checked, documents=False)
    return found | ({"ms": times(sweep, sizes, case["kernel"] == "forward", timer)} if found["right"] else {})


def sweep_cases(short: bool, sweep: Sweep, capability: int, rows: list[Case], with_peer: bool) -> Iterator[Case]:
    """All candidates, the peer beside each pass, and at last what was best of the rows by then."""
    itemsize = sweep.shape()[0]
    default = scan_sizes.SIZES[capability, itemsize]
    lists = candidates(default, itemsize, capability, short)
    if with_peer:
        yield from ({"kind": "sweep", "kernel": kernel, "way": PEER} for kernel in ("forward", "backward"))
    for number in range(max(map(len, lists.values()))):  # side by side, so that a budget cuts all three alike
        for kernel, sizes in lists.items():
            if number < len(sizes):
                yield {"kind": "sweep", "kernel": kernel, "sizes": list(sizes[number])}
    yield {"kind": "adopt", "sizes": [list(sizes) for sizes in best_sizes(default, rows)]}


def best_sizes(default: KernelSizes, rows: list[Case]) -> KernelSizes:
    """Of each kernel the right candidate with the least mean ratio to the default's times; the default where that was
    not timed, or nothing is faster."""
    chosen = default
    for kernel, first in default._asdict().items():
        timed = {
            ScanSizes(*row["sizes"]): row["ms"]
            for row in rows
            if row["kind"] == "sweep" and row["kernel"] == kernel and row.get("right") and {"sizes", "ms"} <= set(row)
        }
        base = timed.get(first, {})
        ratios = {sizes: mean_ratio(ms, base) for sizes, ms in timed.items() if base and set(ms) == set(base)}
        if ratios:
            chosen = chosen._replace(**{kernel: min(ratios.items(), key=lambda item: item[1])[0]})
    return chosen


def mean_ratio(ms: dict[str, float], base: dict[str, float]) -> float:
    return sum(ms[load] / base[load] for load in base) / len(base)


def adopt_case(case: Case, sweep: Sweep = FULL, timer: Timer = milliseconds) -> Case:
    """Checks the best sizes together, times both passes beside the default's, and writes to the table those that are
    right and not slower, be they the default's: the card is not swept again."""
    default, chosen = default_sizes(sweep), KernelSizes(*(ScanSizes(*each) for each in case["sizes"]))
    checks = [verdict(sweep, chosen, *sweep.checked, False), verdict(sweep, chosen, *sweep.odd, True)]
    found: Case = {name: worst([one[name] for one in checks]) for name in ("value", "gradient")}
    found |= {"right": all(one["right"] for one in checks), "table": None}
    if not found["right"]:
        return found
    for name, kernels in (("forward", ("forward",)), ("backward", ("walk", "gradients"))):
        ms, base = (times(sweep, sizes, name == "forward", timer) for sizes in (chosen, default))
        found[name] = {"ms": ms, "default_ms": base}
        if mean_ratio(ms, base) > 1:
            chosen = chosen._replace(**{kernel: getattr(default, kernel) for kernel in kernels})
    path = scan_sizes.table_path()
    if path is not None:
        card = scan_sizes.card_name(torch.device(DRAWN["device"]))
        scan_sizes.write_table(path, card, scan_sizes.shape_name(*sweep.shape()), chosen)
    return found | {"adopted": [list(each) for each in chosen], "table": None if path is None else str(path)}
