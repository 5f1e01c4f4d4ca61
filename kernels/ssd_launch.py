"""The sizes, buffers and launches of the SSD scan's Triton kernels; shapes and letters as in `ssd`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .launch import Launch, capability, placed, power_of_two, strides
from .scan_sizes import KernelSizes, sizes_for
from .ssd import STEP_PLANES, TILE_ELEMENTS, shares_of_heads
from .ssd_steps_triton import scan_steps
from .ssd_triton import scan_forward, scan_gradients, scan_walk

FORWARD_ELEMENTS = 8192  # of [tokens, state] in a tile of the forward pass
STATE_ELEMENTS = 10240  # of the float32 state that one program keeps in registers: 80 x 128
STEP_HEADS = 32  # in a tile of the pass before: 64 bytes side by side in bfloat16


class Scan(NamedTuple):
    """One scan's inputs and options."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    seq_idx: Tensor | None
    dt_softplus: bool
    limit_low: float
    limit_high: float
    chunk_size: int

    def placed(self) -> Scan:
        """The same as the kernels read it: x, dt, B and C where they lie, the small rest contiguous."""
        ready: dict[str, Any] = {name: placed(getattr(self, name)) for name in ("x", "dt", "B", "C")}
        for name in ("A", "D", "dt_bias", "initial_state", "seq_idx"):
            tensor = getattr(self, name)
            ready[name] = None if tensor is None else tensor.contiguous()
        return self._replace(**ready)

    @property
    def dot(self) -> Any:
        """The dtype of the matrix products' factors: the inputs', float32 where they differ."""
        kinds = {self.x.dtype, self.B.dtype, self.C.dtype}
        known = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
        return known.get(kinds.pop(), tl.float32) if len(kinds) == 1 else tl.float32

    @property
    def kept(self) -> torch.dtype:
        """The dtype of the states that the backward keeps for a while. bfloat16 loses nothing there, since they are
        factors of matrix products; float16 might overflow."""
        return torch.bfloat16 if self.dot is tl.bfloat16 else torch.float32

    def sizes(self, device: int) -> KernelSizes:
        return sizes_for(self.x.device, device, self.kept.itemsize, self.x.shape[3], self.B.shape[3])

    def tile_tokens(self, most: int, elements: int = TILE_ELEMENTS) -> int:
        """The tokens of a tile: a power of two of at least 16, which `chunk_size` and the state bound as well."""
        fitting = min(most, self.chunk_size, power_of_two(self.x.shape[1]), elements // self.B.shape[3])
        return max(16, power_of_two(fitting + 1) // 2)

    def forward_tokens(self, device: int) -> int:
        return self.tile_tokens(self.sizes(device)[0].tokens, FORWARD_ELEMENTS)

    def gradient_tokens(self, device: int) -> int:
        """The chunk that walk and gradients share."""
        return self.tile_tokens(min(sizes.tokens for sizes in self.sizes(device)[1:]))

    def empty_steps(self, device: int, *, backward: bool) -> Tensor:
        """What `scan_steps` fills, [B, chunks, H, planes, Q]: its last two sizes say for which kernels."""
        tokens = self.gradient_tokens(device) if backward else self.forward_tokens(device)
        batch, length, heads = self.dt.shape
        shape = (batch, -(-length // tokens), heads, STEP_PLANES[backward], tokens)
        return self.x.new_empty(shape, dtype=torch.float32)

    def tile_width(self, most: int) -> int:
        """The slice of head_dim in a tile: where 16 divides head_dim nothing is wasted, 80 is 5 x 16."""
        return min(most, max(16, self.x.shape[3] & -self.x.shape[3]))

    def common(self, steps: Tensor) -> dict[str, Any]:
        """The arguments that forward, walk and gradients take."""
        _, tokens, heads, head_dim = self.x.shape
        groups, state = self.B.shape[2:]
        return {
            "p_steps": steps, "tokens": tokens, "HEADS": heads, "PER_GROUP": heads // groups, "P": head_dim, "N": state,
            "PLANES": steps.shape[3], "Q": steps.shape[4], "BLOCK_N": max(16, power_of_two(state)),
            "DOT": self.dot, "PRECISION": "ieee",
        }  # fmt: skip

    def inputs(self) -> dict[str, Any]:
        """The arguments of the kernels that read x, B, C and D."""
        return {
            "p_x": self.x, "p_B": self.B, "p_C": self.C, "p_D": self.D,
            **strides("x", "bthp", self.x), **strides("B", "btgn", self.B), **strides("C", "btgn", self.C),
        }  # fmt: skip


def slices(head_dim: int, state: int, width: int) -> tuple[int, int, int]:
    """How the forward pass cuts head_dim: (slices, MAIN, TAIL), each slice MAIN + TAIL wide; 80 is one of 64 + 16."""
    most = max(16, STATE_ELEMENTS // max(16, power_of_two(state)))
    main = max(16, power_of_two(min(width, most, head_dim) + 1) // 2)
    tail = max(16, power_of_two(head_dim - main)) if head_dim > main else 0
    if tail < main and main + tail <= most:
        return 1, main, tail
    return -(-head_dim // main), main, 0


def steps_launch(scan: Scan, steps: Tensor) -> Launch:
    """What the other kernels read of dt, A, dt_bias, seq_idx and the limits."""
    batch, tokens, heads = scan.dt.shape
    arguments: dict[str, Any] = {
        "p_dt": scan.dt, "p_A": scan.A, "p_bias": scan.dt_bias, "p_seq": scan.seq_idx, "p_steps": steps,
        "tokens": tokens, "limit_low": scan.limit_low, "limit_high": scan.limit_high, **strides("dt", "bth", scan.dt),
        "HEADS": heads, "SOFTPLUS": scan.dt_softplus, "PLANES": steps.shape[3], "Q": steps.shape[4],
        "BLOCK_H": min(STEP_HEADS, power_of_two(heads)),
    }  # fmt: skip
    return Launch(scan_steps, (steps.shape[1], -(-heads // arguments["BLOCK_H"]), batch), arguments, 4, 1)


def forward_launch(scan: Scan, steps: Tensor, y: Tensor, last: Tensor, device: int) -> Launch:
    """y [B, T, H, P] and the last state [B, H, P, N]."""
    sizes = scan.sizes(device)[0]
    batch, _, heads, head_dim = scan.x.shape
    number, main, tail = slices(head_dim, scan.B.shape[3], sizes.width)
    arguments = scan.common(steps) | scan.inputs()
    arguments |= {"p_first": scan.initial_state, "p_y": y, "p_last": last}
    arguments |= {"MAIN": main, "TAIL": tail, "TURNED": sizes.turned}
    return Launch(scan_forward, (number, heads, batch), arguments, sizes.warps, sizes.stages)


def walk_launch(
    scan: Scan, steps: Tensor, u: Tensor, v: Tensor, first: Tensor | None, states: Tensor, last: Tensor | None,
    device: int, reverse: bool,
) -> Launch:  # fmt: skip
    """The states at the chunks' starts (u, v: x, B), or in reverse their gradients at the chunks' ends (dy, C)."""
    sizes = scan.sizes(device)[1]
    width = scan.tile_width(sizes.width)
    arguments = scan.common(steps) | strides("u", "bthp", u) | strides("v", "btgn", v)
    arguments |= {"p_u": u, "p_v": v, "p_first": first, "p_states": states, "p_last": last}
    arguments |= {"REVERSE": reverse, "BLOCK_P": width}
    grid = (-(-scan.x.shape[3] // width), scan.x.shape[2], scan.x.shape[0])
    return Launch(scan_walk, grid, arguments, sizes.warps, sizes.stages)


def gradients_launch(
    scan: Scan, steps: Tensor, dy: Tensor, states: Tensor, dstates: Tensor, into: dict[str, Tensor], device: int
) -> Launch:
    """dx, ddt, dB and dC [shares, B, T, G, N], and the sums [3, B, chunks, H]."""
    sizes = scan.sizes(device)[2]
    shares, chunks = into["dB"].shape[0], into["sums"].shape[2]
    arguments = scan.common(steps) | scan.inputs() | strides("dy", "bthp", dy)
    arguments |= {"p_A": scan.A, "p_dy": dy, "p_states": states, "p_dstates": dstates}
    arguments |= {f"p_{name}": tensor for name, tensor in into.items()}
    arguments |= {"SHARES": shares, "BLOCK_P": scan.tile_width(sizes.width)}
    grid = (chunks, scan.B.shape[2] * shares, scan.x.shape[0])
    return Launch(scan_gradients, grid, arguments, sizes.warps, sizes.stages)


def scan(given: Scan) -> tuple[Tensor, Tensor]:
    """y [B, T, H, P] in the dtype of x, and the last state [B, H, P, N] in float32."""
    scan, device = given.placed(), capability(given.x.device)
    y = torch.empty(scan.x.shape, dtype=scan.x.dtype, device=scan.x.device)
    batch, _, heads, head_dim = scan.x.shape
    last = y.new_empty((batch, heads, head_dim, scan.B.shape[3]), dtype=torch.float32)
    steps = scan.empty_steps(device, backward=False)
    steps_launch(scan, steps).enqueue(y)
    forward_launch(scan, steps, y, last, device).enqueue(y)
    return y, last


def scan_backward(given: Scan, dy: Tensor, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, dt_bias and initial_state, None for what is not there."""
    scan, dy = given.placed(), placed(dy)
    x, device = scan.x, capability(given.x.device)
    batch, _, heads, head_dim = x.shape
    steps = scan.empty_steps(device, backward=True)
    steps_launch(scan, steps).enqueue(x)
    chunks = steps.shape[1]
    shape = (batch, chunks, heads, head_dim, scan.B.shape[3])
    states, dstates = (x.new_empty(shape, dtype=scan.kept) for _ in range(2))
    dfirst = None if scan.initial_state is None else torch.empty_like(scan.initial_state)
    walk_launch(scan, steps, x, scan.B, scan.initial_state, states, None, device, False).enqueue(x)
    dlast = None if dlast is None else dlast.contiguous()
    walk_launch(scan, steps, dy, scan.C, dlast, dstates, dfirst, device, True).enqueue(x)
    groups = scan.B.shape[2]
    shares = shares_of_heads(batch, chunks, groups, heads // groups)
    summed = {"dB": scan.B, "dC": scan.C}
    into = {
        name: x.new_empty((shares, *tensor.shape), dtype=tensor.dtype if shares == 1 else torch.float32)
        for name, tensor in summed.items()
    }
    into |= {"dx": x.new_empty(x.shape), "ddt": scan.dt.new_empty(scan.dt.shape)}
    into["sums"] = x.new_empty((3, batch, chunks, heads), dtype=torch.float32)
    gradients_launch(scan, steps, dy, states, dstates, into, device).enqueue(x)
    dA, dbias, dD = (sums.sum((0, 1)) for sums in into["sums"])
    dB, dC = (into[name][0] if shares == 1 else into[name].sum(0) for name in ("dB", "dC"))
    return (
        into["dx"],
        into["ddt"],
        dA.to(scan.A.dtype),
        dB.to(scan.B.dtype),
        dC.to(scan.C.dtype),
        None if scan.D is None else dD.to(scan.D.dtype),
        None if scan.dt_bias is None else dbias.to(scan.dt_bias.dtype),
        dfirst,
    )
