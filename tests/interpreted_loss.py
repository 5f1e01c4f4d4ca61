"""The Triton kernels of norms, activations and loss in Triton's interpreter, against float64.

Run by tests/test_loss_kernels.py in a process of its own: the interpreter is chosen when Triton is first imported.
bfloat16 is silently wrong in it; float32 and float16 are not.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import limbeck.kernels.linear_kl as linear_kl_file
import pytest
import torch
from limbeck.benchmarks import gpu
from limbeck.kernels import fused_loss
from limbeck.kernels.activation import relu2, relu2_op, swiglu, swiglu_op
from limbeck.kernels.divergence import DIVERGENCES, Divergence
from limbeck.kernels.fused_loss import accumulate, product
from limbeck.kernels.linear_kl import linear_cross_entropy, linear_kl, linear_kl_op
from limbeck.kernels.norm import gated_rms_norm, norm_op, rms_norm
from limbeck.kernels.reference import (
    gated_rms_norm_reference,
    linear_kl_reference,
    relu2_reference,
    rms_norm_reference,
    swiglu_reference,
)
from limbeck.tests.helpers import assert_close
from limbeck.tests.loss_helpers import check_ignored
from torch import Tensor

VALUES, GRADIENTS = 1e-5, 1e-4


class Draw:
    """Random sizes and tensors; every second tensor is a slice of a wider one or transposed in memory."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        kind = self.choose.choice(("plain", "plain", "slice", "turned"))
        if kind == "slice":
            return torch.randn(*shape[:-1], shape[-1] + 5, generator=self.generator)[..., 2 : 2 + shape[-1]]
        if kind == "turned":
            return torch.randn(shape[::-1], generator=self.generator).permute(*range(len(shape) - 1, -1, -1))
        return torch.randn(shape, generator=self.generator)


def compare(
    fast: Any, truth: Any, inputs: list[Tensor], draw: Draw, dtype: torch.dtype = torch.float32, loose: float = 1.0
) -> None:
    """Values and gradients, for a random gradient of every output."""
    exact = [tensor.to(dtype).double().requires_grad_() for tensor in inputs]
    leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in inputs]
    expected, found = truth(*exact), fast(*leaves)
    if isinstance(expected, Tensor):
        expected, found = (expected,), (found,)
    gradients = [draw.normal(*output.shape).to(dtype) for output in expected]
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert b.dtype == dtype
        assert_close(f"output {number}", a, b, VALUES * loose)
    torch.autograd.backward(expected, [gradient.double() for gradient in gradients])
    torch.autograd.backward(found, gradients)
    for number, (a, b) in enumerate(zip(exact, leaves, strict=True)):
        assert a.grad is not None and b.grad is not None and b.grad.dtype == dtype
        assert_close(f"gradient {number}", a.grad, b.grad, GRADIENTS * loose)
    with torch.no_grad():
        again = fast(*leaves)
    for a, b in zip(found, (again,) if isinstance(again, Tensor) else again, strict=True):
        assert torch.equal(a, b)


def check_row_kernels(seed: int, dtype: torch.dtype = torch.float32, loose: float = 1.0) -> None:
    draw = Draw(seed)
    groups = draw.choose.choice((1, 2, 3, 8))
    size = groups * draw.choose.choice((3, 16, 41, 80))
    shape = (draw.choose.randint(1, 3), draw.choose.choice((1, 2, 5, 23)), size)
    x, z, weight = draw.normal(*shape), draw.normal(*shape), draw.normal(size)
    eps = draw.choose.choice((1e-5, 1e-6))
    for parts in {1, groups}:
        compare(lambda x, w: rms_norm(x, w, eps, parts), lambda x, w: rms_norm_reference(x, w, eps, parts),  # noqa: B023
                [x, weight], draw, dtype, loose)  # fmt: skip
    compare(
        lambda x, z, w: gated_rms_norm(x, z, w, eps, groups),
        lambda x, z, w: gated_rms_norm_reference(x, z, w, eps, groups),
        [x, 4 * z, weight], draw, dtype, loose,
    )  # fmt: skip
    compare(relu2, relu2_reference, [x], draw, dtype, loose)
    compare(swiglu, swiglu_reference, [4 * x, z], draw, dtype, loose)


@pytest.mark.parametrize("seed", range(4))
def test_norms_and_activations(seed: int) -> None:
    check_row_kernels(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 60))
def test_norms_and_activations_many(seed: int) -> None:
    check_row_kernels(seed)


@pytest.mark.parametrize("seed", range(1))
def test_norms_and_activations_in_float16(seed: int) -> None:
    check_row_kernels(seed, torch.float16, 100)


def test_wide_rows_and_no_rows() -> None:
    draw = Draw(0)
    wide, weight = torch.randn(3, 4480), torch.randn(4480)
    compare(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_reference(x, w, 1e-5), [wide, weight], draw)
    widest = torch.randn(2, 8195)  # keeps the torch path
    assert_close("widest", rms_norm_reference(widest, torch.ones(8195), 1e-5),
                 rms_norm(widest, torch.ones(8195), 1e-5), VALUES)  # fmt: skip
    empty, scale = torch.zeros(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    rms_norm(empty, scale, 1e-5).sum().backward()
    assert scale.grad is not None and not scale.grad.any()
    assert relu2(empty).shape == swiglu(empty, empty).shape == (0, 8)


def test_not_a_number_stays_one() -> None:
    x = torch.tensor([[1.0, float("nan"), -2.0]])
    assert relu2(x).isnan().tolist() == [[False, True, False]]
    assert rms_norm(x, torch.ones(3), 1e-5).isnan().all()
    head = torch.ones(5, 3)
    assert linear_kl(x, head, torch.ones(1, 3), head).loss.isnan()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about what is infinite
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_ignored_tokens_add_nothing_whatever_their_logits(divergence: str) -> None:
    check_ignored(divergence)


def check_loss(seed: int, dtype: torch.dtype = torch.float32, loose: float = 1.0) -> None:
    draw = Draw(seed)
    tokens, vocabulary = draw.choose.randint(1, 7), draw.choose.choice((31, 100, 256))
    widths = draw.choose.randint(2, 9), draw.choose.randint(2, 9)
    temperature = (1.0, 2.0, 0.5)[seed // 3 % 3]
    spread = 1.5 * temperature  # with distributions of one token each, gradients would be differences of equal numbers
    inputs = [draw.normal(tokens, widths[0]) * spread / widths[0] ** 0.5, draw.normal(vocabulary, widths[0])]
    inputs += [draw.normal(tokens, widths[1]) * spread / widths[1] ** 0.5, draw.normal(vocabulary, widths[1])]
    options: dict[str, Any] = {
        "temperature": temperature,
        "divergence": tuple(DIVERGENCES)[seed % len(DIVERGENCES)],
        "kl_weight": 0.7,
        "normalizer": draw.choose.choice((None, 3.5)),
    }
    if draw.choose.random() < 0.7:
        labels = torch.randint(vocabulary, (tokens,), generator=draw.generator)
        labels[1:][torch.rand(tokens - 1, generator=draw.generator) < 0.4] = -7
        options |= {"labels": labels, "ignore_index": -7, "ce_weight": draw.choose.choice((0.0, 0.5))}
    inputs = [tensor.to(dtype) for tensor in inputs]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    if draw.choose.random() < 0.3:
        leaves[seed % 2].requires_grad_(False)
    expected, expected_kl = linear_kl_reference(*exact, **options)
    found = linear_kl(*leaves, **options, chunk_tokens=draw.choose.choice((2, 4, None)))
    assert_close("loss", expected, found.loss, VALUES * loose)
    assert_close("kl", expected_kl, found.kl, VALUES * loose)
    (3 * expected).backward()
    (3 * found.loss).backward()
    for a, b in zip(exact[:2], leaves[:2], strict=True):
        if b.requires_grad:
            assert a.grad is not None and b.grad is not None
            assert_close("gradient", a.grad, b.grad, GRADIENTS * loose)
        else:
            assert b.grad is None
    assert leaves[2].grad is None and leaves[3].grad is None, "the teacher must not get a gradient"
    # The torch path, in float64, knows what the reference does not return.
    with torch.no_grad():
        other = linear_kl(*exact, **options)
        values = linear_kl(*inputs, **options)
    for name in ("loss", "kl", *(("cross_entropy", "teacher_cross_entropy") if "labels" in options else ())):
        assert_close(name, getattr(other, name), getattr(values, name), VALUES)
        assert_close(name, getattr(other, name), getattr(found, name), VALUES * loose)
    assert torch.equal(other.agreement, values.agreement)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tiny vocabularies take several steps too."""
    monkeypatch.setattr(linear_kl_file, "BLOCK", 128)
    monkeypatch.setattr(fused_loss, "VOCABULARY_BLOCK", 64)


@pytest.mark.parametrize("seed", range(6))
def test_linear_kl(seed: int) -> None:
    check_loss(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 90))
def test_linear_kl_many(seed: int) -> None:
    check_loss(seed)


@pytest.mark.parametrize("seed", (0, 2))
def test_linear_kl_in_float16(seed: int) -> None:
    check_loss(seed, torch.float16, 200)


def test_linear_cross_entropy() -> None:
    hidden, head = torch.randn(9, 4, requires_grad=True), torch.randn(30, 4, requires_grad=True)
    labels = torch.randint(30, (9,))
    labels[4] = -100
    found = linear_cross_entropy(hidden, head, labels, chunk_tokens=2)
    logits = hidden @ head.T
    expected = torch.nn.functional.cross_entropy(logits, labels)
    assert_close("loss", expected, found.loss, 1e-6)
    assert torch.equal(found.top1, (logits.argmax(1) == labels))
    for a, b in zip(torch.autograd.grad(expected, (hidden, head)), torch.autograd.grad(found.loss, (hidden, head)),
                    strict=True):  # fmt: skip
        assert_close("gradient", a, b, GRADIENTS)


def test_the_first_of_equal_logits_counts() -> None:
    """Ties are frequent in bfloat16; torch takes the first of them too."""
    hidden, head = torch.ones(1, 1), torch.zeros(300, 1)
    head[[140, 150, 290]] = 1.0
    for number in (140, 150):
        assert linear_cross_entropy(hidden, head, torch.tensor([number])).top1.item() == (number == 140)


def test_head_gradient_in_vocabulary_blocks() -> None:
    """The way of a torch whose addmm cannot add float16 products to float32."""
    total = torch.randn(150, 6)
    dlogits, hidden = torch.randn(5, 150).half(), torch.randn(5, 6).half()
    expected = total.double() + dlogits.double().T @ hidden.double()
    accumulate(total, dlogits, hidden)
    assert_close("sum", expected, total, 1e-6)
    assert product(dlogits, total.half(), full=True).dtype == torch.float32


def test_gradients_repeat_bit_for_bit() -> None:
    def gradients() -> list[Tensor]:
        draw = Draw(5)
        x, z, weight = (
            tensor.requires_grad_() for tensor in (torch.randn(40, 48), torch.randn(40, 48), torch.ones(48))
        )
        head = draw.normal(60, 48).detach().requires_grad_()
        y = relu2(gated_rms_norm(x, z, weight, 1e-5, 3))
        loss = linear_kl(y, head, draw.normal(40, 4), draw.normal(60, 4), chunk_tokens=16).loss
        return list(torch.autograd.grad(loss, (x, z, weight, head)))

    torch.manual_seed(1)
    first = gradients()
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_ops_keep_torchs_rules() -> None:
    """opcheck: schema, autograd, fake tensors, and the traced graph's values against the eager ones."""
    x, weight = torch.randn(3, 5, 12, requires_grad=True), torch.randn(12, requires_grad=True)
    torch.library.opcheck(norm_op, (x, None, weight, 1e-5, 1))
    check_loss_op(Divergence.FORWARD, True)


@pytest.mark.slow
def test_more_ops_keep_torchs_rules() -> None:
    x, weight = torch.randn(3, 5, 12, requires_grad=True), torch.randn(12, requires_grad=True)
    strided = torch.randn(12, 5, 3).transpose(0, 2).requires_grad_()
    torch.library.opcheck(norm_op, (x, strided, weight, 1e-5, 3))
    torch.library.opcheck(relu2_op, (strided,))
    torch.library.opcheck(swiglu_op, (x, strided))
    check_loss_op(Divergence.JSD, False)


def check_loss_op(divergence: Divergence, need_hidden: bool) -> None:
    hidden, head = torch.randn(5, 4, requires_grad=need_hidden), torch.randn(17, 4, requires_grad=True)
    teacher, labels = (torch.randn(5, 3), torch.randn(17, 3)), torch.randint(17, (5,))
    options = (2.0, divergence, 0.5, 0.5, 4, need_hidden, True)
    torch.library.opcheck(linear_kl_op, (hidden, head, *teacher, labels, torch.rand(5), torch.tensor(0.2), *options))


def test_the_benchmark_checks_kernels(tmp_path: Path) -> None:
    """What benchmarks/gpu.py does where there is no GPU; it fails where a kernel does."""
    arguments = ["--interpret", "--json", str(tmp_path / "gpu.json"), "--only", "relu2", "decode_attention"]
    assert gpu.main(arguments) == 0
    checks = json.loads((tmp_path / "gpu.json").read_text())["rows"][1:]
    assert [row["op"] for row in checks] == ["relu2", "decode_attention"]
    op = gpu.operators()["relu2"]
    assert not gpu.check(op._replace(fast=lambda x: 1.001 * relu2(x)), 1, 4, torch.float32)["right"]
