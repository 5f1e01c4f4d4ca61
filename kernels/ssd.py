"""The state-space dual (SSD) scan of Mamba-2 in chunks: prefill and training. Source: arXiv 2405.21060, sections 6-7.

The recurrence of head h in group g, with a_t = dt_t A:

    S_t = exp(a_t) S_{t-1} + dt_t x_t (outer) B_t          y_t = S_t C_t + D x_t

is walked chunk by chunk: on the CPU by `ssd_torch`, on a GPU by `ssd_triton`.
Shapes: [B] batch, [T] tokens, [H] heads, [P] head_dim, [G] groups, [N] state.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .launch import power_of_two, takes_operator, takes_triton, triton_module
from .ssd_torch import TorchScan, document_numbers, torch_scan, torch_scan_backward

__all__ = ["document_numbers", "ssd_scan"]


# Of the Triton backward: the chunk's most tokens by the bytes of the states that it keeps for a while, the elements of
# [tokens, state] in one program, and the programs that a launch should have, so that the larger cards are full.
GRADIENT_TOKENS = {2: 32, 4: 16}
TILE_ELEMENTS, PROGRAMS = 4096, 256
# Of the pass before the Triton kernels: float32 numbers that it notes for each token and head, forward and backward,
# and the most tokens of a chunk, up to a multiple of which they are.
STEP_PLANES, STEP_TOKENS = (3, 4), 64


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int = 128,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Any:
    """y [B, T, H, P] of x [B, T, H, P], dt [B, T, H], A [H] (negative), B and C [B, T, G, N].

    D [H] adds the skip D x; the step is clamp(softplus(dt + dt_bias), *dt_limit). Where `seq_idx` [B, T] changes
    between neighbours a new document begins with an empty state. `initial_state` [B, H, P, N] belongs to the
    document of token 0; with `return_final_state` the answer is (y, state [B, H, P, N]) after the last token.
    State and sums are float32 (float64 for float64 inputs), y has the dtype of x. A chunk bounds the memory of the
    CPU's path; on a GPU it bounds a tile's tokens (16 at least) and changes rounding alone.

    Raises ValueError where shapes disagree.
    """
    check_shapes(x, B, dt=dt, A=A, C=C, D=D, dt_bias=dt_bias, seq_idx=seq_idx, initial_state=initial_state)
    if chunk_size < 1:
        raise ValueError(f"ssd_scan: chunk_size is {chunk_size}, expected at least 1")
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state, seq_idx)
    if takes_operator(x):
        y, state = scan_op(*inputs, dt_softplus, *dt_limit, chunk_size)
    elif not torch.is_grad_enabled():  # no state at a chunk's start is kept, whatever the weights ask for
        y, state, _ = torch_scan(*inputs, dt_softplus, dt_limit, chunk_size, keep_starts=False)
    else:
        y, state = TorchScan.apply(*inputs, dt_softplus, dt_limit, chunk_size)
    return (y, state) if return_final_state else y


def check_shapes(x: Tensor, B: Tensor, **others: Tensor | None) -> None:
    if x.dim() != 4 or B.dim() != 4:
        raise ValueError(
            f"ssd_scan: expected x [B, T, H, P] and B [B, T, G, N], got {tuple(x.shape)} and {tuple(B.shape)}"
        )
    batch, tokens, heads, head_dim = x.shape
    groups, state = B.shape[2:]
    if groups < 1 or heads % groups:
        raise ValueError(f"ssd_scan: {heads} heads are not divisible by {groups} groups")
    if tokens < 1:
        raise ValueError(f"ssd_scan: x has no tokens, shape {tuple(x.shape)}")
    expected = {
        "dt": (batch, tokens, heads), "A": (heads,), "C": (batch, tokens, groups, state), "D": (heads,),
        "dt_bias": (heads,), "seq_idx": (batch, tokens), "initial_state": (batch, heads, head_dim, state),
    }  # fmt: skip
    for name, tensor, shape in (("B", B, expected["C"]), *((name, others[name], expected[name]) for name in expected)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"ssd_scan: {name} has shape {tuple(tensor.shape)}, expected {shape}")


@torch.library.custom_op("limbeck::ssd_scan", mutates_args=())
def scan_op(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, seq_idx: Tensor | None, dt_softplus: bool, limit_low: float, limit_high: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, last state). CPU tensors go through the Triton kernels in Triton's interpreter, else through torch's."""
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state, seq_idx)
    if takes_triton(x):
        launch = triton_module("ssd_launch")
        return launch.scan(launch.Scan(*inputs, dt_softplus, limit_low, limit_high, chunk_size))
    return torch_scan(*inputs, dt_softplus, (limit_low, limit_high), chunk_size, keep_starts=False)[:2]


@torch.library.custom_op("limbeck::ssd_scan_backward", mutates_args=())
def scan_backward_op(
    dy: Tensor, dlast: Tensor | None,
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, seq_idx: Tensor | None, dt_softplus: bool, limit_low: float, limit_high: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, dt_bias and initial_state; empty for what is not there."""
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state, seq_idx)
    if takes_triton(x):
        launch = triton_module("ssd_launch")
        scan = launch.Scan(*inputs, dt_softplus, limit_low, limit_high, chunk_size)
        gradients = launch.scan_backward(scan, dy, dlast)
    else:
        options = (dt_softplus, (limit_low, limit_high), chunk_size)
        _, last, starts = torch_scan(*inputs, *options, keep_starts=True)
        dlast = torch.zeros_like(last) if dlast is None else dlast
        found = torch_scan_backward(dy, dlast, starts, *inputs, *options)
        # Those of x, B and C share a storage, which an operator's answers may not.
        gradients = tuple(None if gradient is None else gradient.clone() for gradient in found)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)  # type: ignore[return-value]


def forward_workspace(x: Tensor) -> tuple[int]:
    """Bytes that the Triton forward holds beside its answer: what is noted of the steps."""
    batch, tokens, heads, _ = x.shape
    return (4 * STEP_PLANES[0] * batch * heads * STEP_TOKENS * -(-tokens // STEP_TOKENS),)


def backward_workspace(x: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> tuple[int, ...]:
    """Bytes of what the Triton backward holds beside its answer (`ssd_launch.scan_backward`): what is noted of the
    steps, the states at the chunks' starts and their gradients, sums by chunk, and parts of the gradients of B and C
    where a group's heads are shared out."""
    (batch, tokens, heads, head_dim), (groups, state) = x.shape, B.shape[2:]
    size = 2 if {x.dtype, B.dtype, C.dtype} == {torch.bfloat16} else 4
    fitting = min(GRADIENT_TOKENS[size], chunk_size, power_of_two(tokens), TILE_ELEMENTS // state)
    chunk = max(16, power_of_two(fitting + 1) // 2)
    chunks = -(-tokens // chunk)
    steps = 4 * STEP_PLANES[1] * batch * heads * chunks * chunk
    states = size * batch * chunks * heads * head_dim * state
    shares = shares_of_heads(batch, chunks, groups, heads // groups)
    parts = 4 * shares * B.numel() if shares > 1 else 0
    return steps, states, states, 12 * batch * chunks * heads, parts, parts


def shares_of_heads(batch: int, chunks: int, groups: int, per_group: int) -> int:
    """Among how many programs the heads of a group are shared out."""
    wanted = min(per_group, -(-PROGRAMS // (batch * chunks * groups)))
    return next(shares for shares in range(wanted, per_group + 1) if per_group % shares == 0)


@scan_op.register_fake
def _(x, dt, A, B, C, D, dt_bias, initial_state, seq_idx, dt_softplus, limit_low, limit_high, chunk_size):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    last = x.new_empty((x.shape[0], x.shape[2], x.shape[3], B.shape[3]), dtype=dtype)
    return x.new_empty(x.shape), last


@scan_backward_op.register_fake
def _(dy, dlast, x, dt, A, B, C, D, dt_bias, initial_state, *rest):
    return tuple(
        x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in (x, dt, A, B, C, D, dt_bias, initial_state)
    )


def keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]


def scan_gradient(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Any, ...]:
    inputs = ctx.saved_tensors
    dy = inputs[0].new_zeros(inputs[0].shape) if dy is None else dy
    gradients = scan_backward_op(dy, dlast, *inputs, *ctx.options)
    needed = [None if tensor is None else gradient for tensor, gradient in zip(inputs, gradients, strict=False)]
    return *needed, *[None] * 5


scan_op.register_autograd(scan_gradient, setup_context=keep_inputs)
