"""The experts' operator against the token-by-token truth in float64: values, every gradient, memory, order."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from limbeck.kernels.moe import expert_mlp, grouped_gradient, grouped_product, routing_of
from limbeck.kernels.moe_torch import segment_gradient, takes_torch_grouped, torch_gradient
from limbeck.kernels.reference import expert_mlp_reference
from limbeck.tests.helpers import Largest, assert_close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


def draw_inputs(seed: int) -> tuple[Tensor, list[Tensor]]:
    """Choices [n, k], and x, weights, up, down and (every second time) gate; most experts are chosen, some by none."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tokens, experts, width, neurons = (draw.choice(sizes) for sizes in ((1, 2, 7, 40), (1, 3, 8), (5, 12), (3, 16)))
    chosen = draw.randint(1, experts)
    likely = torch.rand(experts, generator=generator) ** 4
    scores = torch.rand(tokens, experts, generator=generator) + 2 * likely
    shapes: list[Any] = [(tokens, width), (tokens, chosen), (experts, neurons, width), (experts, width, neurons)]
    shapes += [(experts, neurons, width)] if seed % 2 else []
    return scores.topk(chosen).indices, [torch.randn(shape, generator=generator) for shape in shapes]


def values_and_gradients(experts: Any, indices: Tensor, inputs: list[Tensor], **more: Any) -> list[Tensor]:
    x, weights, *matrices = inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    y = experts(x, indices, weights, *matrices, **more)
    along = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * along).sum(), inputs)]


def keeper(seen: dict[str, Tensor]) -> Any:
    def note(name: str, tensor: Tensor) -> Tensor:
        seen[name] = tensor
        return tensor

    return note


@pytest.mark.parametrize("seed", range(16))
def test_values_and_gradients(seed: int) -> None:
    indices, inputs = draw_inputs(seed)
    expected = values_and_gradients(expert_mlp_reference, indices, [tensor.double() for tensor in inputs])
    single = values_and_gradients(expert_mlp, indices, inputs)
    double = values_and_gradients(expert_mlp, indices, [tensor.double() for tensor in inputs])
    seen: dict[str, Tensor] = {}
    noted = values_and_gradients(expert_mlp, indices, [tensor.double() for tensor in inputs], note=keeper(seen))
    for number, truth in enumerate(expected):
        assert_close(f"float32 {number}", truth, single[number], 1e-4 if number else 1e-5)
        assert_close(f"float64 {number}", truth, double[number], 1e-11)
        assert_close(f"noted {number}", truth, noted[number], 1e-11)
    assert_close("sum of outputs", expected[0], seen["expert_out"].sum(1), 1e-11)
    with torch.no_grad():
        x, weights, *matrices = inputs
        assert torch.equal(single[0], expert_mlp(x, indices, weights, *matrices))


def test_what_is_noted_is_each_choice() -> None:
    indices, (x, weights, up, down) = draw_inputs(2)
    seen: dict[str, Tensor] = {}
    expert_mlp(x, indices, weights, up, down, note=keeper(seen))
    for t, experts in enumerate(indices.tolist()):
        for k, expert in enumerate(experts):
            hidden = up[expert] @ x[t]
            assert_close("ffn", hidden, seen["expert_ffn"][t, :, k], 1e-5)
            active = weights[t, k] * hidden.relu().square()
            assert_close("act", active, seen["expert_ffn_act"][t, :, k], 1e-5)
            assert_close("out", down[expert] @ active, seen["expert_out"][t, k], 1e-5)


def test_rows_are_in_the_order_of_experts() -> None:
    indices = torch.tensor([[3, 0], [0, 1], [3, 1]])
    routing = routing_of(indices, 5)
    assert routing.tokens.tolist() == [0, 1, 1, 2, 0, 2] and routing.ends.tolist() == [2, 4, 4, 6, 6]
    rows = indices.flatten().index_select(0, routing.order)
    assert rows.tolist() == [0, 0, 1, 1, 3, 3] and torch.equal(routing.gathered(rows[:, None])[..., 0], indices)


def test_memory_grows_with_the_rows_chosen() -> None:
    """64 experts: nothing has a number for each of them and each token."""
    tokens, experts, width, neurons, chosen = 512, 64, 32, 16, 2
    indices = torch.rand(tokens, experts).topk(chosen).indices
    inputs = [torch.randn(shape) for shape in ((tokens, width), (tokens, chosen))]
    inputs += [torch.randn(experts, neurons, width), torch.randn(experts, width, neurons)]
    with Largest() as largest:
        values_and_gradients(expert_mlp, indices, inputs)
    assert largest.numel == max(tokens * chosen * width, experts * neurons * width)
    x, weights, up, down = (tensor.requires_grad_() for tensor in inputs)
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.numel() * (tensor.data_ptr() not in {other.data_ptr() for other in inputs})
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        expert_mlp(x, indices, weights, up, down)
    assert saved <= tokens * chosen * (neurons + 3) + experts  # what `up` gave; a weight and two places a row; ends


def test_an_expert_that_no_token_chose_is_not_read() -> None:
    indices, inputs = torch.tensor([[1, 2]]), draw_inputs(0)[1]
    x, up, down = torch.randn(1, 4), torch.randn(4, 3, 4), torch.randn(4, 4, 3)
    up[0], down[3] = torch.nan, torch.nan
    assert expert_mlp(x, indices, torch.ones(1, 2), up, down).isfinite().all() and len(inputs) == 4
    gradient = grouped_gradient(torch.ones(2, 3), torch.ones(2, 4), torch.tensor([0, 1, 2, 2], dtype=torch.int32))
    assert gradient.sum((1, 2)).tolist() == [0, 12, 12, 0]


def test_gradients_of_groups_without_rows_are_zero_whatever_torch_leaves_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's grouped product does on compute capability 10.0 (pytorch#172439)."""
    y, x, ends = torch.randn(7, 3), torch.randn(7, 4), torch.tensor([0, 2, 2, 7, 7], dtype=torch.int32)
    expected = segment_gradient(y, x, ends)

    def leaving(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
        assert torch.equal(left, y.mT) and torch.equal(right, x)
        found = expected.clone()
        found[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return found

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", leaving, raising=False)
    assert torch.equal(torch_gradient(y, x, ends), expected) and not expected[[0, 2, 4]].any()


def test_torchs_product_is_taken_where_it_does_not_look_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", None, raising=False)
    with FakeTensorMode():
        rows, narrow = (torch.empty(5, width, dtype=torch.bfloat16, device="cuda") for width in (16, 12))
        stack = torch.empty(3, 8, 16, dtype=torch.bfloat16, device="cuda")
        for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
            assert takes_torch_grouped(rows, stack) == (capability in ((9, 0), (10, 0))), capability
            assert not takes_torch_grouped(narrow, stack) and not takes_torch_grouped(rows.float(), stack)
        assert not takes_torch_grouped(rows.to("cpu"), stack)


def test_shapes_are_known_without_values() -> None:
    with FakeTensorMode():
        x, weights = torch.empty(6, 4, requires_grad=True), torch.empty(6, 2, requires_grad=True)
        up, down = torch.empty(8, 3, 4, requires_grad=True), torch.empty(8, 4, 3, requires_grad=True)
        y = expert_mlp(x, torch.zeros(6, 2, dtype=torch.int64), weights, up, down)
        gradients = torch.autograd.grad(y.sum(), (x, weights, up, down))
        assert [g.shape for g in gradients] == [x.shape, weights.shape, up.shape, down.shape]
        assert grouped_product(x, up, torch.zeros(8, dtype=torch.int32)).shape == (6, 3)


@pytest.mark.parametrize(
    "wrong",
    ({"indices": torch.zeros(3, 2, dtype=torch.int64)}, {"up": torch.zeros(2, 3, 5)}, {"gate": torch.zeros(2, 4, 4)}),
)
def test_shapes_that_disagree_are_refused(wrong: dict[str, Tensor]) -> None:
    right = {"x": torch.zeros(2, 4), "indices": torch.zeros(2, 1, dtype=torch.int64), "weights": torch.zeros(2, 1)}
    right |= {"up": torch.zeros(2, 3, 4), "down": torch.zeros(2, 4, 3)}
    with pytest.raises(ValueError, match="expert_mlp"):
        expert_mlp(**(right | wrong))


SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes a block may have (CUDA guide)


@pytest.mark.slow
def test_compiled_for_gpus_that_are_not_here() -> None:
    """Everything fits in shared memory and in registers."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "limbeck.tests.offline_moe"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-4000:]
    compiled = json.loads(found.stdout.splitlines()[-1])
    assert len(compiled) == 4 * 18
    for name, capability, shared, registers, spills in compiled:
        assert shared <= SHARED_LIMIT[capability] and registers <= 255 and spills == 0, (name, capability, spills)
