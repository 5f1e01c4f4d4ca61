"""The scan's, convolution's and decoding step's Triton kernels in Triton's interpreter, in a process of their own.

`test_ssm_triton` starts it with TRITON_INTERPRET=1, which has to be set before a kernel is defined. The interpreter
gets bfloat16 wrong without a word: float32 and float16 alone. Shapes are tiny, since it takes milliseconds a call.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from typing import Any

import pytest
import torch
from limbeck.kernels import launch, scan_sizes
from limbeck.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step, conv_op, final_inputs, step_op
from limbeck.kernels.reference import causal_conv1d_reference, ssd_scan_reference
from limbeck.kernels.ssd import scan_op, ssd_scan
from limbeck.kernels.state_update import state_update, update_op
from limbeck.tests.helpers import assert_close
from torch import Tensor

assert os.environ.get("TRITON_INTERPRET") == "1", "run by tests/test_ssm_triton.py"

VALUES, GRADIENTS = 1e-5, 1e-4
HALF = 3e-3  # float16 keeps 11 bits


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The operator with the signature of `ssd_scan`."""
    tensors = [options.get(name) for name in ("D", "dt_bias", "initial_state", "seq_idx")]
    return scan_op(x, dt, A, B, C, *tensors, options["dt_softplus"], *options["dt_limit"], options["chunk_size"])


class ScanCase:
    """One drawn scan; x, B and C are slices of one tensor as in the model, or views with odd strides."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        groups = draw.choice((1, 1, 2, 2, 4, 8))
        heads = groups * (draw.choice((1, 2, 3)) if groups < 4 else 1)
        head_dim = draw.choice((16, 48, 64, 80))
        self.chunk = draw.choice((16, 32)) if seed % 4 else 8
        self.tokens = draw.randint(1, 2 * max(self.chunk, 16) + 1)
        batch, state = 1 if heads > 3 else draw.randint(1, 2), draw.choice((8, 16, 24, 32))
        self.softplus = draw.random() < 0.8
        self.limit = draw.choice(((0.0, math.inf), (0.001, 0.5)))
        self.strided = draw.random() < 0.6
        normal = self.normal
        width = heads * head_dim + 2 * groups * state
        if self.strided:
            x, B, C = normal(batch, self.tokens, width + 3)[..., 3:].split(
                (heads * head_dim, groups * state, groups * state), -1
            )
            self.x, self.B, self.C = (
                x.unflatten(-1, (heads, head_dim)),
                B.unflatten(-1, (groups, state)),
                C.unflatten(-1, (groups, state)),
            )
        else:
            self.x = normal(heads, batch, head_dim, self.tokens).permute(1, 3, 0, 2)
            self.B, self.C = (normal(batch, self.tokens, groups, state) for _ in range(2))
        # Steps from tiny to large, rates from slow to fast: extremes beside each other in one sequence.
        self.dt = normal(batch, self.tokens, heads + 2)[..., 1:-1] * draw.choice((0.5, 4.0))
        self.A = -torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(16), generator=self.generator))
        self.D = normal(heads) if draw.random() < 0.8 else None
        self.dt_bias = normal(heads) - draw.choice((0, 4)) if draw.random() < 0.8 else None
        if not self.softplus:
            self.dt = self.dt.abs()
        self.initial = normal(batch, heads, head_dim, state) if draw.random() < 0.5 else None
        self.seq_idx = None
        if draw.random() < 0.6:  # documents of one to three tokens and longer
            starts = torch.rand(batch, self.tokens, generator=self.generator) < draw.choice((0.05, 0.5))
            self.seq_idx = starts.cumsum(1) % 2 if draw.random() < 0.5 else starts.cumsum(1).to(torch.int32)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def run(self, op: Any, dtype: torch.dtype, **extra: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values and gradients; the gradient of y arrives in a transposed layout where the case is strided."""
        named = {"x": self.x, "dt": self.dt, "A": self.A, "B": self.B, "C": self.C, "D": self.D}
        named |= {"dt_bias": self.dt_bias, "initial_state": self.initial}
        leaves = {k: None if v is None else v.detach().to(dtype).requires_grad_() for k, v in named.items()}
        inputs = dict(leaves)
        positional = [inputs.pop(name) for name in ("x", "dt", "A", "B", "C")]
        y, state = op(
            *positional, **inputs, dt_softplus=self.softplus, dt_limit=self.limit, seq_idx=self.seq_idx, **extra
        )
        generator = torch.Generator().manual_seed(7)
        dy, dstate = torch.randn(y.shape, generator=generator), torch.randn(state.shape, generator=generator)
        if self.strided:
            dy = dy.transpose(0, 3).contiguous().transpose(0, 3)
        torch.autograd.backward((y, state), (dy.to(y.dtype), dstate.to(state.dtype)))
        return {"y": y, "state": state}, {k: v.grad for k, v in leaves.items() if v is not None}


def check_scan(case: ScanCase, dtype: torch.dtype, value: float, gradient: float) -> None:
    expected, expected_gradients = case.run(ssd_scan_reference, torch.float64)
    found, gradients = case.run(scan, dtype, chunk_size=case.chunk)
    for name in expected:
        assert_close(name, expected[name], found[name], value)
    for name in expected_gradients:
        assert_close("d" + name, expected_gradients[name], gradients[name], gradient)


@pytest.fixture
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the cases take the tiles of 2-byte inputs, 64 + 16 wide, although float32 has its own: those of sm_90,
    and those of sm_80, which are turned."""
    seed = request.getfixturevalue("seed")
    if seed % 2:
        monkeypatch.setitem(scan_sizes.SIZES, (90, 4), scan_sizes.SIZES[90 if seed % 4 == 1 else 80, 2])


FAST = (2, 4, 5, 7, 15)


@pytest.mark.parametrize("seed", FAST)
def test_scan(seed: int, sizes: None) -> None:
    check_scan(ScanCase(seed), torch.float32, VALUES, GRADIENTS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [seed for seed in range(220) if seed not in FAST])
def test_scan_many(seed: int, sizes: None) -> None:
    check_scan(ScanCase(seed), torch.float32, VALUES, GRADIENTS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1020))
def test_scan_in_float16(seed: int) -> None:
    """Inputs of few bits, so that the truth is that of the rounded inputs; sums must not be float16."""
    case = ScanCase(seed)
    for name in ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial"):
        value = getattr(case, name)
        setattr(case, name, None if value is None else value.half().float())
    check_scan(case, torch.float16, HALF, 4 * HALF)


def test_one_large_step_does_not_blur_the_small_ones() -> None:
    """A step of dt A = -3000 in a chunk; in float32 sums the decays after it would be off by 1e-4."""
    generator = torch.Generator().manual_seed(0)
    x, B, C = (torch.randn(1, 16, 1, n, generator=generator) for n in (16, 8, 8))
    dt = torch.full((1, 16, 1), 1e-3)
    dt[0, 4] = 300.0
    x[0, :5] = 0
    options: dict[str, Any] = {"dt_softplus": False, "dt_limit": (0.0, math.inf)}
    A = torch.tensor([-10.0])
    exact = ssd_scan_reference(*(v.double() for v in (x, dt, A, B, C)), **options)
    found = scan(x, dt, A, B, C, **options, chunk_size=64)
    assert_close("y", exact[0], found[0], 5e-7)
    assert_close("state", exact[1], found[1], 5e-7)


@pytest.mark.parametrize("large", (20.0, 1e5, 1e37))
def test_decays_hold_beside_large_steps(large: float) -> None:
    """Steps from 1e-6 to 1e-2 between large ones, documents among them. What large steps write is left out by x = 0,
    so that the decays of the small ones are all that counts."""
    generator = torch.Generator().manual_seed(1)
    tokens, heads = 50, 2
    x, B, C = (torch.randn(1, tokens, k, n, generator=generator) for k, n in ((heads, 16), (1, 8), (1, 8)))
    is_large = torch.rand(1, tokens, heads, generator=generator) < 0.25
    small = 10 ** (-6 + 4 * torch.rand(1, tokens, heads, generator=generator))
    x[is_large] = 0
    dt = torch.where(is_large, torch.full_like(small, large), small)
    A = torch.tensor([-16.0, -1.0])
    seq_idx = (torch.rand(1, tokens, generator=generator) < 0.1).cumsum(1)
    dy = torch.randn(1, tokens, heads, 16, generator=generator)
    options: dict[str, Any] = {"dt_softplus": False, "dt_limit": (0.0, math.inf), "seq_idx": seq_idx}
    outputs = []
    for dtype, op, extra in ((torch.float64, ssd_scan_reference, {}), (torch.float32, scan, {"chunk_size": 64})):
        leaves = [v.to(dtype).requires_grad_() for v in (x, dt, A, B, C)]
        y, last = op(*leaves, **options, **extra)
        gradients = torch.autograd.grad(y, leaves, dy.to(dtype))
        for gradient, hidden in zip(gradients, (is_large[..., None], is_large), strict=False):
            gradient.masked_fill_(hidden, 0)
        outputs.append([y, last, *gradients])
    for name, expected, found in zip(("y", "last", "dx", "ddt", "dA", "dB", "dC"), *outputs, strict=True):
        assert_close(name, expected, found, 1e-6)


def check_conv(seed: int) -> None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, tokens, channels = draw.randint(1, 2), draw.randint(1, 12), draw.choice((5, 7, 16))
    width = draw.choice((2, 3, 4))
    if seed % 8 == 0:
        tokens, batch = draw.randint(127, 132), 1  # the backward's segments are of 128 tokens
    wide = torch.randn(batch, tokens, channels + 4, generator=generator)
    named = {
        "x": wide[..., 1 : 1 + channels],
        "weight": torch.randn(channels, 1, width, generator=generator)[:, 0],
        "bias": torch.randn(channels, generator=generator) if draw.random() < 0.7 else None,
        "initial_state": torch.randn(batch, width - 1, channels, generator=generator).mT
        if draw.random() < 0.5
        else None,
    }
    silu = draw.random() < 0.7
    starts = torch.rand(batch, tokens, generator=generator) < draw.choice((0.1, 0.4))
    seq_idx = starts.cumsum(1) % 2 if draw.random() < 0.6 else None
    dy = torch.randn(channels, tokens, batch, generator=generator).transpose(0, 2)
    outputs = []
    for dtype in (torch.float64, torch.float32):
        leaves = {k: None if v is None else v.to(dtype).requires_grad_() for k, v in named.items()}
        inputs = list(leaves.values())
        if dtype == torch.float64:
            y, state = causal_conv1d_reference(
                *inputs[:3], activation="silu" if silu else None, seq_idx=seq_idx, initial_state=inputs[3]
            )
        else:
            y = conv_op(*inputs, seq_idx, silu)
            state = final_inputs(inputs[0], width - 1, seq_idx, inputs[3])
        dstate = torch.randn(state.shape, generator=torch.Generator().manual_seed(1))
        torch.autograd.backward((y, state), (dy.to(dtype), dstate.to(dtype)))
        outputs.append(({"y": y, "state": state}, {k: v.grad for k, v in leaves.items() if v is not None}))
    (expected, expected_gradients), (found, gradients) = outputs
    for name in expected:
        assert_close(name, expected[name], found[name], VALUES)
    for name in expected_gradients:
        assert_close("d" + name, expected_gradients[name], gradients[name], GRADIENTS)


@pytest.mark.parametrize("seed", range(1, 8))
def test_conv(seed: int) -> None:
    check_conv(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 220))
def test_conv_many(seed: int) -> None:
    check_conv(seed)


@pytest.mark.parametrize("seed", range(3))
def test_conv_steps(seed: int) -> None:
    """Steps equal the CPU's, in a slice of a wider state whose other rows stay as they are."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    width, channels = draw.choice((2, 3, 4)), 6
    weight, bias = torch.randn(channels, width, generator=generator), torch.randn(channels, generator=generator)
    pool = torch.randn(5, width - 1, channels, generator=generator).mT
    other = pool.clone()
    for _ in range(3):
        x = torch.randn(2, channels + 2, generator=generator)[:, 1:-1]
        y = step_op(pool[2:4], x, weight, bias, True)
        assert_close("y", causal_conv1d_step(other[2:4], x, weight, bias), y, VALUES)
    assert torch.equal(pool, other)
    alone = pool[:2].clone()
    y = step_op(alone, x, weight, None, False)
    expected = causal_conv1d(x[:, None], weight, initial_state=pool[:2], activation=None)[:, 0]
    assert_close("no bias", expected, y, VALUES)


def check_update(seed: int) -> None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    groups = draw.choice((1, 2, 4))
    heads, head_dim, width = groups * draw.choice((1, 2)), draw.choice((8, 16, 48, 80)), draw.choice((8, 24, 32))
    batch = 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    state = normal(batch, heads, head_dim, width).to(draw.choice((torch.float32, torch.half)))
    x, B, C = normal(batch, heads, head_dim + 2)[..., 1:-1], normal(batch, groups, width), normal(batch, groups, width)
    dt, A = normal(batch, heads) * draw.choice((1, 5)), -torch.rand(heads, generator=generator)
    D, bias = (normal(heads) if draw.random() < 0.7 else None for _ in range(2))
    softplus, limit = draw.random() < 0.7, draw.choice(((0.0, math.inf), (0.01, 0.5)))
    exact = state.double()
    expected = state_update(
        exact, *(v.double() for v in (x, dt, A, B, C)), D=None if D is None else D.double(),
        dt_bias=None if bias is None else bias.double(), dt_softplus=softplus, dt_limit=limit,
    )  # fmt: skip
    y = update_op(state, x, dt, A, B, C, D, bias, softplus, *limit)
    assert_close("y", expected, y, VALUES)
    assert_close("state", exact, state, VALUES if state.dtype == torch.float32 else HALF)


@pytest.mark.parametrize("seed", range(6))
def test_update(seed: int) -> None:
    check_update(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 100))
def test_update_many(seed: int) -> None:
    check_update(seed)


def test_opcheck() -> None:
    """Schema, fake tensors and autograd of the operators with the Triton kernels in them."""
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.use_deterministic_algorithms(False)  # opcheck compares with memory that it leaves unwritten
    x = torch.randn(1, 5, 2, 16, requires_grad=True)
    dt, A = torch.rand(1, 5, 2, requires_grad=True), (-torch.rand(2)).requires_grad_()
    B, C = (torch.randn(1, 5, 1, 8, requires_grad=True) for _ in range(2))
    torch.library.opcheck(
        scan_op, (x, dt, A, B, C, None, None, None, None, True, 0.0, math.inf, 16), test_utils=utilities
    )
    conv = (torch.randn(1, 5, 6, requires_grad=True), torch.randn(6, 4), torch.randn(6), torch.randn(1, 6, 3), None)
    torch.library.opcheck(conv_op, (*conv, True), test_utils=utilities)
    step = (torch.randn(2, 6, 3), torch.randn(2, 6), torch.randn(6, 4), None, True)
    torch.library.opcheck(step_op, step, test_utils=utilities)
    update = (torch.randn(2, 2, 16, 8), x.detach()[0, :2], dt.detach()[0, :2], A.detach(), torch.randn(2, 1, 8))
    torch.library.opcheck(
        update_op, (*update, torch.randn(2, 1, 8), None, None, True, 0.0, math.inf), test_utils=utilities
    )


def test_what_the_model_calls_is_what_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter the public functions launch Triton kernels, as on a GPU, and not the torch path."""
    launched: list[Any] = []
    run = launch.Launch.enqueue
    monkeypatch.setattr(launch.Launch, "enqueue", lambda self, on: (launched.append(self.kernel), run(self, on)))
    case, calls = ScanCase(4), []
    x = case.x.detach().requires_grad_()
    y = ssd_scan(x, case.dt, case.A, case.B, case.C, dt_softplus=True)
    calls.append(len(launched))
    y.sum().backward()
    calls.append(len(launched))
    width = torch.randn(6, 4)
    causal_conv1d(torch.randn(1, 5, 6), width)
    calls.append(len(launched))
    causal_conv1d_step(torch.zeros(1, 6, 3), torch.randn(1, 6), width)
    calls.append(len(launched))
    heads, size, state = 2, 16, 8
    rates = -torch.rand(heads)
    B, C = torch.randn(1, 1, state), torch.randn(1, 1, state)
    state_update(torch.zeros(1, heads, size, state), torch.randn(1, heads, size), torch.rand(1, heads), rates, B, C)
    calls.append(len(launched))
    assert calls[0] > 0 and all(later > earlier for earlier, later in itertools.pairwise(calls)), calls
