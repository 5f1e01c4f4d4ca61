"""Products in bfloat16: what they give, what their gradients are, and what stays float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill.losses import cross_entropy_loss
from limbeck.distill.muon import orthogonalize
from limbeck.distill.options import TrainOptions
from limbeck.distill.trainer import train
from limbeck.kernels import products
from limbeck.kernels.linear import linear
from limbeck.kernels.linear_kl import linear_cross_entropy, linear_kl
from limbeck.kernels.moe import expert_mlp
from limbeck.kernels.products import FEWEST, bfloat16_products, project
from limbeck.kernels.tracing import tracing
from limbeck.models.layer import Context
from limbeck.tests.helpers import assert_close, moe_config, random_model
from limbeck.tests.training_helpers import batches_from, model_of, records, weights
from torch import Tensor, nn

HALF_A_STEP = 2**-8  # between bfloat16 numbers, of eight bits


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(tensor: Tensor) -> Tensor:
    """As bfloat16 has it, in float64."""
    return tensor.to(torch.bfloat16).double()


def near(found: Tensor, exact: Tensor) -> None:
    """Whether float32 numbers are the exact ones after one rounding to bfloat16, but for the float32 sums before it."""
    assert found.dtype == torch.float32
    assert bool(((found.double() - exact).abs() <= 1.01 * HALF_A_STEP * exact.abs() + 1e-5 * exact.abs().max()).all())


@pytest.mark.parametrize("shape", ((2, 40, 24), (64, 24)))
def test_a_product_and_its_gradients_are_of_rounded_operands(shape: tuple[int, ...]) -> None:
    x, weight = drawn(*shape).requires_grad_(), drawn(56, 24, seed=1).requires_grad_()
    dy = drawn(*shape[:-1], 56, seed=2)
    with bfloat16_products():
        y = project(x, weight)
        with torch.no_grad():
            assert torch.equal(project(x, weight), y)
    y.backward(dy)  # after the block: as the product was
    rows, out = rounded(x.detach()).flatten(0, -2), rounded(dy).flatten(0, -2)
    assert y.shape == dy.shape and x.grad is not None and weight.grad is not None
    near(y.detach().flatten(0, -2), rows @ rounded(weight.detach()).T)
    near(x.grad.flatten(0, -2), out @ rounded(weight.detach()))
    near(weight.grad, out.T @ rows)
    assert not torch.equal(y, linear(x, weight))


def test_float32_is_what_it_was() -> None:
    x, weight = drawn(64, 24), drawn(56, 24, seed=1)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            assert torch.equal(project(x, weight), linear(x, weight))
            with bfloat16_products(), bfloat16_products(False):
                assert torch.equal(project(x, weight), linear(x, weight))
            with bfloat16_products():
                few = x[: FEWEST - 1]
                assert torch.equal(project(few, weight), linear(few, weight))
                assert torch.equal(project(x.double(), weight.double()), linear(x.double(), weight.double()))
                with tracing():
                    assert torch.equal(project(x, weight), linear(x, weight))
    assert not products.CHOSEN.narrow


def test_a_weight_that_has_moved_is_read_anew() -> None:
    x, layer = drawn(64, 24), nn.Linear(24, 16, bias=False)
    with bfloat16_products(), torch.no_grad():
        before = Context().project(layer, x)
        layer.weight.mul_(2)
        assert torch.equal(Context().project(layer, x), 2 * before)


def test_only_what_needs_a_gradient_is_kept_and_given() -> None:
    x, weight = drawn(64, 24).requires_grad_(), drawn(56, 24, seed=1)
    with bfloat16_products():
        y = project(x, weight)
    assert y.grad_fn is not None and y.grad_fn.saved_tensors[0] is None  # type: ignore[attr-defined]
    y.sum().backward()
    assert x.grad is not None and weight.grad is None


def experts_of(rows: int) -> tuple[Tensor, ...]:
    """x, choices (the first expert of nearly all rows, the second of few), weights, up, down, gate."""
    indices = torch.zeros(rows, 2, dtype=torch.int64)
    indices[:, 1] = 2
    indices[:5, 1] = 1
    up, down, gate = drawn(4, 24, 16, seed=3), drawn(4, 16, 24, seed=4), drawn(4, 24, 16, seed=5)
    return drawn(rows, 16), indices, drawn(rows, 2, seed=2).abs(), up, down, gate


def test_experts_and_their_gradients_are_near_float64s() -> None:
    """And an expert with few rows multiplies them in float32."""
    found: dict[str, list[Tensor]] = {}
    for name, dtype, narrow in (("exact", torch.float64, False), ("float32", torch.float32, False),
                                ("bfloat16", torch.float32, True)):  # fmt: skip
        x, indices, *others = experts_of(60)
        leaves = [each.to(dtype).requires_grad_() for each in (x, *others)]
        with bfloat16_products(narrow):
            y = expert_mlp(leaves[0], indices, *leaves[1:])
            y.square().sum().backward()
        found[name] = [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    for exact, single, half in zip(*found.values(), strict=True):
        assert half.dtype == torch.float32
        size = exact.norm()
        assert (single - exact).norm() < 1e-5 * size
        assert 1e-4 * size < (half - exact).norm() < 0.02 * size
    # Groups of which none has enough rows: the same bits.
    x, indices, *others = experts_of(FEWEST // 2)
    with torch.no_grad(), bfloat16_products():
        few = expert_mlp(x, indices, *others)
    with torch.no_grad():
        assert torch.equal(few, expert_mlp(x, indices, *others))


def test_the_loss_rounds_its_head_only_where_it_gives_gradients() -> None:
    hidden, head = drawn(48, 16), drawn(80, 16, seed=1)
    taught, labels = (drawn(48, 20, seed=2), drawn(80, 20, seed=3)), torch.arange(48)

    def values(**changes: Any) -> tuple[float, Tensor, Tensor]:
        ours, theirs = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        answer = linear_kl(ours, theirs, *taught, labels=labels, ce_weight=0.5, **changes)
        answer.loss.backward()
        assert ours.grad is not None and theirs.grad is not None
        return float(answer.loss.detach()), ours.grad, theirs.grad

    (single, *gradients), plain = values(), linear_kl(hidden, head, *taught, labels=labels, ce_weight=0.5)
    with bfloat16_products():
        half, *rough = values(chunk_tokens=20)
        assert torch.equal(linear_kl(hidden, head, *taught, labels=labels, ce_weight=0.5).kl, plain.kl)
        assert torch.equal(linear_cross_entropy(hidden, head, labels).cross_entropy, plain.cross_entropy)
    assert 0 < abs(half - single) < 0.02 * single
    for exact, found in zip(gradients, rough, strict=True):
        assert found.dtype == torch.float32
        assert 1e-5 * exact.norm() < (found - exact).norm() < 0.02 * exact.norm()


def test_a_models_logits_and_routing_stay_near() -> None:
    model = random_model(moe_config(), dtype=torch.float32)
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        single = model(ids)
        with bfloat16_products():
            half = model(ids)
    assert_close("logits", single.double(), half.double(), 0.05)
    assert not torch.equal(single, half)


def test_muon_orthogonalizes_by_the_same_products() -> None:
    matrix = drawn(48, 64)
    single = orthogonalize(matrix)
    with bfloat16_products():
        half = orthogonalize(matrix)
    assert half.dtype == torch.bfloat16 and bool((torch.linalg.svdvals(half.float()) < 1.3).all())
    assert (half.float() - single).norm() < 0.05 * single.norm()


def test_training_repeats_to_the_bit_and_stays_near_float32(tmp_path: Path) -> None:
    def trained(name: str, narrow: bool, *stops: int | None) -> tuple[dict[str, Tensor], list[float]]:
        options = TrainOptions(steps=6, learning_rate=3e-3, optimizer="muon", warmup_steps=0, save_every=3, log_every=1)
        for stop in stops or (None,):
            model = model_of(0)
            with bfloat16_products(narrow):
                train(model, cross_entropy_loss, batches_from, options, tmp_path / name, stop_after=stop)
        return weights(model), [record["loss"] for record in records(tmp_path / name)]

    once, losses = trained("once", True)
    resumed, _ = trained("resumed", True, 3, None)
    assert all(torch.equal(weight, resumed[name]) for name, weight in once.items())
    single, references = trained("single", False)
    assert any(not torch.equal(weight, once[name]) for name, weight in single.items())
    assert all(weight.dtype == torch.float32 for weight in once.values())
    assert losses == pytest.approx(references, rel=0.02)
