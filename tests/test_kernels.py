"""The fast operators against the token-by-token truth in float64: values to 1e-5, every gradient to 1e-4."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from limbeck.benchmarks import operator_peers
from limbeck.kernels.activation import relu2, swiglu
from limbeck.kernels.attention import attention, decode_attention
from limbeck.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from limbeck.kernels.linear import linear
from limbeck.kernels.moe import expert_mlp
from limbeck.kernels.norm import gated_rms_norm, rms_norm
from limbeck.kernels.reference import (
    causal_conv1d_reference,
    gated_rms_norm_reference,
    relu2_reference,
    rms_norm_reference,
    rotary_reference,
    ssd_scan_reference,
    swiglu_reference,
)
from limbeck.kernels.rotary import rotary, rotary_angles
from limbeck.kernels.ssd import ssd_scan
from limbeck.kernels.state_update import state_update
from limbeck.tests.helpers import Largest, assert_close
from torch import Tensor

VALUES, GRADIENTS = 1e-5, 1e-4


class Case:
    """One drawn scan: inputs in float32, some of them views with odd strides."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        groups = draw.choice((1, 2, 4, 8))
        heads = groups * draw.choice((1, 2, 3))
        head_dim = draw.choice((16, 48, 64, 80)) if heads <= 8 else 16
        self.chunk = draw.choice((4, 8, 16))
        self.tokens = draw.randint(1, 2 * self.chunk + 1)
        batch, state = draw.randint(1, 3), draw.choice((8, 16, 32))
        self.strided = draw.random() < 0.5
        self.x = self.normal(batch, self.tokens, heads, head_dim)
        self.B = self.normal(batch, self.tokens, groups, state)
        self.C = self.normal(batch, self.tokens, groups, state)
        # Steps from tiny to large, rates from slow to fast: extremes beside each other in one sequence.
        self.dt = torch.randn(batch, self.tokens, heads, generator=self.generator) * draw.choice((0.5, 4.0))
        self.A = -torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(16), generator=self.generator))
        self.D, self.dt_bias = self.normal(heads), self.normal(heads) - draw.choice((0, 4))
        self.initial = self.normal(batch, heads, head_dim, state) if draw.random() < 0.5 else None
        self.limit = draw.choice(((0.0, math.inf), (0.001, 0.5)))
        self.seq_idx = None
        if draw.random() < 0.5:  # documents of one to three tokens and longer
            starts = torch.rand(batch, self.tokens, generator=self.generator) < draw.choice((0.05, 0.5))
            self.seq_idx = starts.cumsum(1).to(torch.int32)

    def normal(self, *shape: int) -> Tensor:
        if len(shape) == 4 and self.strided:  # a slice of a wider tensor
            wide = torch.randn(*shape[:-1], shape[-1] + 5, generator=self.generator)
            return wide[..., 2 : 2 + shape[-1]]
        return torch.randn(shape, generator=self.generator)

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor | None]:
        named = {"x": self.x, "dt": self.dt, "A": self.A, "B": self.B, "C": self.C, "D": self.D}
        named |= {"dt_bias": self.dt_bias, "initial_state": self.initial}
        return {k: None if v is None else v.to(dtype).requires_grad_() for k, v in named.items()}

    def run(self, scan: Any, dtype: torch.dtype, **extra: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values and gradients, with the gradient arriving in a transposed layout where the case is strided."""
        inputs = self.inputs(dtype)
        positional = [inputs.pop(name) for name in ("x", "dt", "A", "B", "C")]
        y, state = scan(*positional, **inputs, dt_softplus=True, dt_limit=self.limit, seq_idx=self.seq_idx, **extra)
        generator = torch.Generator().manual_seed(7)
        dy = torch.randn(y.shape, generator=generator)
        dstate = torch.randn(state.shape, generator=generator)
        if self.strided:
            dy = dy.transpose(0, 3).contiguous().transpose(0, 3)
        torch.autograd.backward((y, state), (dy.to(dtype), dstate.to(dtype)))
        names = ("x", "dt", "A", "B", "C", *inputs)
        leaves = dict(zip(names, [*positional, *inputs.values()], strict=True))
        return {"y": y, "state": state}, {k: v.grad for k, v in leaves.items() if v is not None}


def check_scan(
    seed: int, dtype: torch.dtype = torch.float32, value: float = VALUES, gradient: float = GRADIENTS
) -> None:
    case = Case(seed)
    expected, expected_gradients = case.run(ssd_scan_reference, torch.float64)
    found, gradients = case.run(ssd_scan, dtype, chunk_size=case.chunk, return_final_state=True)
    for name in expected:
        assert_close(name, expected[name], found[name], value)
    for name in expected_gradients:
        assert_close("d" + name, expected_gradients[name], gradients[name], gradient)


@pytest.mark.parametrize("seed", range(40))
def test_scan(seed: int) -> None:
    check_scan(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40, 300))
def test_scan_many(seed: int) -> None:
    check_scan(seed)


@pytest.mark.parametrize("seed", range(12))
def test_scan_formula_in_float64(seed: int) -> None:
    check_scan(seed, torch.float64, 1e-12, 1e-10)


def test_scan_goes_on_from_a_state_and_steps_equal_it() -> None:
    case = Case(3)
    inputs = {k: v for k, v in case.inputs(torch.float64).items() if k != "initial_state"}
    with torch.no_grad():
        args = [inputs.pop(name) for name in ("x", "dt", "A", "B", "C")]
        whole, last = ssd_scan(*args, **inputs, dt_softplus=True, return_final_state=True)
        for cut in range(1, case.tokens):
            first = [a if a is args[2] else a[:, :cut] for a in args]
            second = [a if a is args[2] else a[:, cut:] for a in args]
            y1, state = ssd_scan(*first, **inputs, dt_softplus=True, return_final_state=True, chunk_size=3)
            y2, end = ssd_scan(
                *second, **inputs, dt_softplus=True, return_final_state=True, chunk_size=5, initial_state=state
            )
            assert_close("y", whole, torch.cat((y1, y2), 1), 1e-12)
            assert_close("state", last, end, 1e-12)
        state = torch.zeros_like(last)
        x, dt, A, B, C = args
        for t in range(case.tokens):
            y = state_update(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], **inputs, dt_softplus=True)
            assert_close("step", whole[:, t], y, 1e-12)
        assert_close("state", last, state, 1e-12)


def test_packed_documents_equal_separate_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 1, 17, 2, 9)
    x, dt = torch.randn(1, 32, 4, 8, generator=generator), torch.randn(1, 32, 4, generator=generator)
    B, C = (torch.randn(1, 32, 2, 8, generator=generator) for _ in range(2))
    A = -torch.rand(4, generator=generator)
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    packed = ssd_scan(x, dt, A, B, C, dt_softplus=True, chunk_size=8, seq_idx=seq_idx)
    start = 0
    for length in lengths:
        part = [values[:, start : start + length] for values in (x, dt)]
        alone = ssd_scan(*part, A, B[:, start : start + length], C[:, start : start + length], dt_softplus=True)
        assert_close("document", alone, packed[:, start : start + length], 1e-6)
        start += length


def test_groups_are_never_expanded_to_heads() -> None:
    """With a wide state, B repeated for all heads would be the largest tensor by far."""
    tokens, heads, state = 64, 16, 256
    x = torch.randn(1, tokens, heads, 4, requires_grad=True)
    B, C = (torch.randn(1, tokens, 1, state, requires_grad=True) for _ in range(2))
    with Largest() as largest:
        y = ssd_scan(x, torch.rand(1, tokens, heads), -torch.rand(heads), B, C, chunk_size=16)
        y.sum().backward()
    rows = heads * 4 + 2 * state  # the gradients of x, B and C, side by side
    assert largest.numel <= max(tokens * rows, heads * 4 * state, heads * 16 * 16) < tokens * heads * state
    assert largest.numel < 16 * heads * state


@pytest.mark.parametrize("seed", range(24))
def test_conv(seed: int) -> None:
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, tokens, channels, width = draw.randint(1, 3), draw.randint(1, 20), 7, draw.choice((2, 3, 4))
    wide = torch.randn(batch, tokens, channels + 4, generator=generator)
    named = {
        "x": wide[..., 1 : 1 + channels],
        "weight": torch.randn(channels, width, generator=generator),
        "bias": torch.randn(channels, generator=generator) if draw.random() < 0.7 else None,
        "initial_state": torch.randn(batch, channels, width - 1, generator=generator) if draw.random() < 0.5 else None,
    }
    starts = torch.rand(batch, tokens, generator=generator) < 0.3
    options: dict[str, Any] = {"activation": draw.choice(("silu", None))}
    options["seq_idx"] = starts.cumsum(1) if draw.random() < 0.6 else None
    outputs = []
    for conv, dtype, extra in (
        (causal_conv1d_reference, torch.float64, {}),
        (causal_conv1d, torch.float32, {"return_final_state": True}),
    ):
        inputs = {k: None if v is None else v.to(dtype).requires_grad_() for k, v in named.items()}
        y, state = conv(inputs["x"], inputs["weight"], inputs["bias"], initial_state=inputs["initial_state"],
                        **options, **extra)  # fmt: skip
        weights = torch.Generator().manual_seed(1)
        dy = torch.randn(channels, tokens, batch, generator=weights).transpose(0, 2).to(dtype)
        (y * dy).sum().add((state * torch.randn(state.shape, generator=weights).to(dtype)).sum()).backward()
        outputs.append(({"y": y, "state": state}, {k: v.grad for k, v in inputs.items() if v is not None}))
    (expected, expected_gradients), (found, gradients) = outputs
    for name in expected:
        assert_close(name, expected[name], found[name], VALUES)
    for name in expected_gradients:
        assert_close("d" + name, expected_gradients[name], gradients[name], GRADIENTS)


def test_conv_over_blocks_in_parts_and_by_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 600, 5, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(5, 4, generator=generator, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    whole, last = causal_conv1d(x, weight, bias, return_final_state=True)
    assert_close("truth", causal_conv1d_reference(x, weight, bias)[0], whole, 1e-12)
    first, state = causal_conv1d(x[:, :257], weight, bias, return_final_state=True)
    second, end = causal_conv1d(x[:, 257:], weight, bias, initial_state=state, return_final_state=True)
    assert_close("parts", whole, torch.cat((first, second), 1), 1e-12)
    assert_close("state", last, end, 0)
    state = torch.zeros(2, 5, 3, dtype=torch.float64)
    for t in range(9):
        assert_close("step", whole[:, t], causal_conv1d_step(state, x[:, t], weight, bias), 1e-12)


@pytest.mark.parametrize("groups", (1, 4))
@pytest.mark.parametrize("no_grad", (False, True))
def test_norms(groups: int, no_grad: bool) -> None:
    generator = torch.Generator().manual_seed(groups)
    x, z, weight = (torch.randn(s, generator=generator) for s in ((3, 5, 24), (3, 5, 24), (24,)))
    dy = torch.randn(24, 5, 3, generator=generator).transpose(0, 2)
    cases: dict[str, tuple[Any, Any, list[Tensor]]] = {
        "plain": (lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_reference(x, w, 1e-5), [x, weight]),
        "in groups": (
            lambda x, w: rms_norm(x, w, 1e-5, groups),
            lambda x, w: rms_norm_reference(x, w, 1e-5, groups),
            [x, weight],
        ),
        "gated": (
            lambda x, z, w: gated_rms_norm(x, z, w, 1e-5, groups),
            lambda x, z, w: gated_rms_norm_reference(x, z, w, 1e-5, groups),
            [x, z, weight],
        ),
        "relu2": (relu2, relu2_reference, [x]),
        "swiglu": (swiglu, swiglu_reference, [x, z]),
    }
    for name, (fast, truth, inputs) in cases.items():
        exact = [tensor.double().requires_grad_() for tensor in inputs]
        expected = truth(*exact)
        if no_grad:
            with torch.no_grad():
                assert_close(name, expected, fast(*inputs), VALUES)
            continue
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        found = fast(*leaves)
        assert_close(name, expected, found, VALUES)
        expected.backward(dy.double())
        found.backward(dy)
        for number, (a, b) in enumerate(zip(exact, leaves, strict=True)):
            assert a.grad is not None and b.grad is not None
            assert_close(f"{name} gradient {number}", a.grad, b.grad, GRADIENTS)


@pytest.mark.parametrize("seed", range(12))
def test_rotary(seed: int) -> None:
    """Values and gradients; strided inputs, positions that restart, one table for all rows or one for each."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, tokens, heads = draw.randint(1, 3), draw.randint(1, 20), draw.choice((1, 3))
    head_dim = draw.choice((2, 8, 14))
    positions = torch.randint(100, (draw.choice((1, batch)), tokens), generator=generator)
    theta = draw.choice((1e4, 1e6))
    wide = torch.randn(batch, tokens, heads, head_dim + 4, generator=generator)
    dy = torch.randn(head_dim, heads, tokens, batch, generator=generator).transpose(0, 3).transpose(1, 2)
    exact = wide.double()[..., 1:-3].requires_grad_()
    leaf = wide[..., 1:-3].requires_grad_()
    expected = rotary_reference(exact, positions, theta)
    expected.backward(dy.double())
    angles = rotary_angles(positions, head_dim, theta, torch.float32)
    found = rotary(leaf, *angles)
    found.backward(dy)
    assert_close("rotary", expected, found, VALUES)
    assert exact.grad is not None and leaf.grad is not None
    assert_close("gradient", exact.grad, leaf.grad, GRADIENTS)
    with torch.no_grad():
        assert torch.equal(rotary(leaf, *angles), found)
        precise = rotary_angles(positions, head_dim, theta, torch.float64)
        assert_close("float64", expected, rotary(exact, *precise), 1e-12)
        half = rotary(leaf.bfloat16(), *angles)
        assert half.dtype == torch.bfloat16
        assert_close("bfloat16", expected, half, 1e-2)


def test_rotary_refuses_wrong_shapes() -> None:
    cos, sin = rotary_angles(torch.arange(5)[None], 8, 1e4, torch.float32)
    for shape in ((2, 5, 3, 6), (2, 4, 3, 8)):
        with pytest.raises(ValueError, match="do not fit"):
            rotary(torch.zeros(shape), cos, sin)
    with pytest.raises(ValueError, match="even"):
        rotary_angles(torch.arange(5)[None], 7, 1e4, torch.float32)


@pytest.mark.parametrize(
    "change",
    (
        {"dt": (2, 5, 3)},
        {"A": (3,)},
        {"B": (2, 5, 3, 4)},
        {"C": (2, 5, 2, 5)},
        {"D": (5,)},
        {"initial_state": (2, 4, 6, 5)},
    ),
)
def test_scan_refuses_wrong_shapes(change: dict[str, tuple[int, ...]]) -> None:
    shapes = {"x": (2, 5, 4, 6), "dt": (2, 5, 4), "A": (4,), "B": (2, 5, 2, 4), "C": (2, 5, 2, 4)}
    tensors = {name: torch.zeros(shape) for name, shape in (shapes | change).items()}
    with pytest.raises(ValueError, match=r"expected|divisible"):
        ssd_scan(**tensors)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 17, 64])
@pytest.mark.parametrize("shape", [(48, 20), (7, 33), (1, 8)])
def test_linear_is_torchs(rows: int, shape: tuple[int, int]) -> None:
    """Whatever way a number of rows takes; with leading dimensions, strided rows and weights, other dtypes."""
    weight = torch.randn(shape)
    wide = torch.randn(rows, 3 * shape[1])
    for x in (wide[:, : shape[1]], wide[:, shape[1] : 2 * shape[1]].contiguous(), wide[None, :, -shape[1] :]):
        expected = torch.nn.functional.linear(x.double(), weight.double())
        with torch.no_grad():
            found = linear(x, weight)
            assert found.shape == expected.shape
            assert_close("rows", expected, found, 1e-6)
            assert_close("strided weight", expected, linear(x, weight.T.contiguous().T), 1e-6)
            assert_close("float64", expected, linear(x.double(), weight.double()), 1e-12)
        leaf = weight.clone().requires_grad_()
        linear(x, leaf).sum().backward()
        assert leaf.grad is not None and leaf.grad.shape == weight.shape


def test_transformers_says_the_same() -> None:
    """The peers of benchmarks/operator_peers.py, on the torch path."""
    lines = list(operator_peers.compared(2, ("transformers", "torch")))
    assert {line["operator"] for line in lines} == {"ssd_scan", "state_update", "gated_rms_norm", "causal_conv1d"}
    for line in lines:
        for value, gradient in line["differences"]:
            assert 0 < value < 1e-5 and gradient < 1e-4, line


def test_a_vector_and_nothing_at_all() -> None:
    """Norms of one row without a batch, attention over an empty batch."""
    for norm in (lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: gated_rms_norm(x, x, w, 1e-5, 2)):
        x, weight = torch.randn(24, requires_grad=True), torch.randn(24, requires_grad=True)
        rows, same = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
        norm(x, weight).sum().backward()
        norm(rows[None], same).sum().backward()
        assert x.grad is not None and rows.grad is not None and weight.grad is not None and same.grad is not None
        assert torch.equal(x.grad, rows.grad) and torch.equal(weight.grad, same.grad)
    with torch.no_grad():
        q, k = torch.randn(0, 4, 1, 8), torch.randn(0, 2, 1, 8)
        assert attention(q, k, k).shape == q.shape
        assert decode_attention(torch.randn(0, 4, 8), k, k).shape == (0, 4, 8)


@torch.no_grad()
def test_an_expert_that_is_not_there_is_refused() -> None:
    x, up = torch.randn(3, 8), torch.randn(2, 5, 8)
    for indices in ([[0], [1], [2]], [[9], [9], [9]]):
        with pytest.raises(ValueError, match=r"groups 0\.\.1 have"):
            expert_mlp(x, torch.tensor(indices), torch.ones(3, 1), up, up.mT)
