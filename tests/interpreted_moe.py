"""The Triton kernels of products over groups of rows in Triton's interpreter, against float64.

Run by tests/test_moe_kernels.py in a process of its own: the interpreter is chosen when Triton is first imported.
"""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
from limbeck.benchmarks import gpu
from limbeck.kernels import moe_launch
from limbeck.kernels.moe import expert_mlp, grouped_gradient, grouped_product
from limbeck.kernels.moe_torch import segment_gradient, segment_product
from limbeck.kernels.reference import expert_mlp_reference
from limbeck.tests.helpers import assert_close
from torch import Tensor


def draw_groups(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows x [m, K] and y [m, N] (every second one a slice of wider rows), a stack [E, N, K], and where groups end."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, groups = draw.choice((1, 3, 40, 130)), draw.choice((1, 3, 9))
    outputs, inputs = draw.choice((5, 64, 130)), draw.choice((3, 32, 75))
    marks = sorted(draw.choice((draw.randint(0, rows), 0)) for _ in range(groups - 1))
    ends = torch.tensor([*marks, rows], dtype=torch.int32)
    x, y = (torch.randn(rows, size + 4, generator=generator)[:, 2 : 2 + size] for size in (inputs, outputs))
    x, y = (part.contiguous() if seed % 2 else part for part in (x, y))
    stack = torch.randn(groups, outputs, inputs, generator=generator)
    return x.to(dtype), y.to(dtype), stack.to(dtype), ends


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("seed", range(6))
def test_products(seed: int, dtype: torch.dtype) -> None:
    x, y, stack, ends = draw_groups(seed, dtype)
    ratio = 1e-5 if dtype == torch.float32 else 1e-3
    exact = [tensor.double() for tensor in (x, y, stack)]
    assert_close("product", segment_product(exact[0], exact[2], ends, False), grouped_product(x, stack, ends), ratio)
    turned = grouped_product(y, stack, ends, turned=True)
    assert_close("turned", segment_product(exact[1], exact[2], ends, True), turned, ratio)
    assert_close("gradient", segment_gradient(exact[1], exact[0], ends), grouped_gradient(y, x, ends), ratio)


def test_few_rows_take_small_tiles() -> None:
    x = torch.zeros(48, 8, dtype=torch.float16)
    assert moe_launch.tiles_of(x, 3) == moe_launch.FEW_ROWS and moe_launch.tiles_of(x, 2) == moe_launch.NARROW
    assert moe_launch.tiles_of(x.float(), 3) == moe_launch.SINGLE


@pytest.mark.parametrize("gated", (False, True))
def test_experts(gated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 12), (9, 2), (5, 7, 12), (5, 12, 7), *([(5, 7, 12)] if gated else [])]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    indices = torch.rand(9, 5, generator=generator).topk(2).indices
    exact, leaves = ([tensor.to(dtype).requires_grad_() for tensor in inputs] for dtype in (torch.double, torch.float))
    expected = expert_mlp_reference(exact[0], indices, *exact[1:])
    found = expert_mlp(leaves[0], indices, *leaves[1:])
    assert_close("values", expected, found, 1e-5)
    along = torch.randn(expected.shape, generator=generator)
    expected.backward(along.double())
    found.backward(along)
    for number, (a, b) in enumerate(zip(exact, leaves, strict=True)):
        assert a.grad is not None and b.grad is not None
        assert_close(f"gradient {number}", a.grad, b.grad, 1e-4)
    with torch.no_grad():
        assert torch.equal(found, expert_mlp(leaves[0], indices, *leaves[1:]))
    assert expert_mlp(leaves[0][:0], indices[:0], leaves[1][:0], *leaves[2:]).shape == (0, 12)


def test_the_benchmark_checks_them(tmp_path: Path) -> None:
    """What benchmarks/gpu.py does where there is no GPU, with both of its ways."""
    names = ["expert_mlp", "expert_mlp, served", "grouped_product, Triton", "grouped_gradient, Triton"]
    assert gpu.main(["--interpret", "--json", str(tmp_path / "gpu.json"), "--only", *names]) == 0
    checks = json.loads((tmp_path / "gpu.json").read_text())["rows"][1:]
    assert [row["op"] for row in checks] == names and all(row["right"] and row["repeats"] for row in checks)
    for name in names:
        op = gpu.operators()[name]
        inputs = op.make(1, 6, True)
        for peer, way in op.peers.items():
            if peer in ("transformers", "vllm") and importlib.util.find_spec(peer) is None:
                continue
            assert_close(f"{name}, {peer}", op.truth(**inputs), way(**inputs), 1e-5)
