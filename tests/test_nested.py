"""Sizes within each other: their order, what trains of them at a step, and that prune cuts out what was trained."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill import trainer
from limbeck.distill.losses import DistillLoss, distillation_loss
from limbeck.distill.nested import Nest, open_nest
from limbeck.distill.nested_options import NestedSize, NestedSizes
from limbeck.distill.parallel import Trained
from limbeck.distill.stop import Stopper
from limbeck.distill.teaching import held_out_figures
from limbeck.distill.trainer import TrainingRun, train
from limbeck.models import processes
from limbeck.models.axes import AXES, Axis, Role, tensor_table
from limbeck.models.config import HybridConfig
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.hybrid import HybridLM
from limbeck.prune.nested import importance_order, nested_cut, next_size
from limbeck.prune.slice import Selection, slice_config, slice_model, slice_tensors
from limbeck.tests.helpers import (
    assert_close,
    dense_config,
    moe_config,
    random_config,
    random_model,
    tiny_config,
)
from limbeck.tests.nested_helpers import EXPERT_TARGETS, TARGETS, scores_of
from limbeck.tests.processes_helpers import run_workers
from limbeck.tests.training_helpers import batches_from, draw_batch, options, records
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIGS: dict[str, tuple[HybridConfig, list[dict[str, Any]]]] = {
    "hybrid": (tiny_config(), TARGETS),
    "experts": (moe_config(), EXPERT_TARGETS),
    "experts in groups": (moe_config(n_routed_experts=8, n_group=2, topk_group=1), [{}, {"n_routed_experts": 6}]),
    "gated experts": (moe_config(gated_mlp=True, activation="silu"), EXPERT_TARGETS),
    "side by side": (tiny_config(pattern="PP-", rope_theta=1e4), TARGETS),
    "key-value heads": (
        tiny_config(num_key_value_heads=4, num_attention_heads=8),
        [{}, {"num_key_value_heads": 3}, {"num_key_value_heads": 2, "num_attention_heads": 2}],
    ),
    "tied head": (tiny_config(tie_word_embeddings=True), TARGETS),
}


def sizes_of(targets: list[dict[str, Any]], teacher: str = "teacher", shares: tuple[float, ...] = ()) -> NestedSizes:
    told = zip(targets, shares or [1.0] * len(targets), strict=True)
    named = (NestedSize(target, share, f"size {number}") for number, (target, share) in enumerate(told))
    return NestedSizes(tuple(named), teacher)


def nested(
    config: HybridConfig, targets: list[dict[str, Any]], dtype: torch.dtype = torch.float32, **how: Any
) -> tuple[Trained, Nest]:
    """A drawn model, its units in order, ready to be trained in `dtype`."""
    cut = nested_cut(config, scores_of(config), targets)
    largest = slice_model(random_model(config, 1, torch.float32), cut.largest)
    sizes = [(slice_config(largest.config, size), size.kept) for size in cut.sizes]
    return open_nest(sizes_of(targets, **how), largest, sizes, count_parameters(config), dtype)


def teach(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    return distillation_loss(random_model(tiny_config(), seed, dtype), DistillLoss())


def step_of(nest: Nest, number: int, seed: int = 0) -> int:
    """The first step that trains a size."""
    return next(step for step in range(100) if nest.drawn(seed, step) is nest.sizes[number])


@pytest.mark.parametrize("name", CONFIGS)
def test_putting_in_order_leaves_the_logits(name: str) -> None:
    config, _ = CONFIGS[name]
    model, ids = random_model(config), torch.randint(3, 97, (2, 19))
    order = importance_order(config, scores_of(config))
    assert all(sorted(kept) == list(range(len(kept))) for kept in order.kept.values())
    assert any(kept != tuple(range(len(kept))) for kept in order.kept.values())
    assert_close(name, model(ids), slice_model(model, order)(ids), 1e-12)


@pytest.mark.parametrize("seed", [*range(6), 50, 51, 52, 53])
def test_order_of_drawn_configs(seed: int) -> None:
    config = random_config(seed) if seed < 50 else dense_config(seed)
    model, ids = random_model(config), torch.randint(3, 20, (2, 13))
    ordered = slice_model(model, importance_order(config, scores_of(config)))
    assert_close("logits", model(ids), ordered(ids), 1e-10)


def test_order_is_that_of_the_scores() -> None:
    """By hand: heads inside their group, a key-value head by what its query heads are worth."""
    config = tiny_config(pattern="*M", num_attention_heads=4, num_key_value_heads=2, mamba_num_heads=4)
    scores = scores_of(config)
    scores[Axis("attn_heads", 0)] = torch.tensor([1.0, 2.0, 0.0, 5.0], dtype=torch.float64)
    scores[Axis("mamba_heads", 1)] = torch.ones(4, 8, dtype=torch.float64) * torch.tensor([[3.0], [4.0], [1.0], [2.0]])
    kept = importance_order(config, scores).kept
    assert kept[Axis("kv_groups", 0)] == (1, 0) and kept[Axis("attn_heads", 0)] == (3, 2, 1, 0)
    assert kept[Axis("mamba_heads", 1)] == (1, 0, 3, 2)
    hidden = scores[Axis("hidden")].sum(0)
    assert kept[Axis("hidden")] == tuple(hidden.argsort(descending=True).tolist())


def test_sizes_lie_within_each_other() -> None:
    """Of the whole model, each size keeps a part of what the one before it keeps; all by their scores."""
    config, targets = CONFIGS["experts"]
    cut = nested_cut(config, scores_of(config), [{"hidden_size": 28}, *targets[1:]])
    assert slice_config(config, cut.largest).hidden_size == 28
    for larger, smaller in zip(cut.sizes, cut.sizes[1:], strict=False):
        for axis, units in smaller.kept.items():
            assert set(units) <= set(larger.kept.get(axis, units)), axis
    best = scores_of(config)[Axis("hidden")].sum(0).argsort(descending=True).tolist()
    kept = [cut.largest.kept[Axis("hidden")][unit] for unit in cut.sizes[2].kept[Axis("hidden")]]
    assert kept == best[:16]


def test_shares_of_parameters_are_of_the_student() -> None:
    config = random_config(3).replace(hidden_size=256, intermediate_size=512, pattern="M-M-")
    sizes = [config]
    for share in (0.9, 0.75, 0.6):
        sizes.append(next_size(config, sizes[-1], {"parameters": share}))
        assert 0.99 * share < count_parameters(sizes[-1]) / count_parameters(config) <= share
        assert all(getattr(sizes[-1], row.width) <= getattr(sizes[-2], row.width) for row in AXES.values())


@pytest.mark.parametrize("shares", [(1, 1, 1), (5, 3, 2), (0.1, 2.5, 0.4)])
def test_sizes_are_drawn_by_their_shares(shares: tuple[float, ...]) -> None:
    _, nest = nested(*CONFIGS["hybrid"], shares=shares)
    for seed in range(3):
        drawn = [nest.sizes.index(nest.drawn(seed, step)) for step in range(1000)]
        for number, share in enumerate(shares):
            for steps in (10, 100, 1000):
                assert abs(drawn[:steps].count(number) - steps * share / sum(shares)) <= 3
    assert [nest.drawn(0, step).name for step in range(50)] != [nest.drawn(1, step).name for step in range(50)]


def spread(pruned: HybridLM, student: HybridLM, selection: Selection) -> dict[str, Tensor]:
    """The gradients of a pruned model's weights, in their places among those of the student, of which the others are 0.
    Prune multiplies the weight of a norm over fewer channels, which multiplies the gradient that the slice gets."""
    table, whole = tensor_table(student.config), student.state_dict()
    places = {name: torch.arange(weight.numel(), dtype=torch.float64).view(weight.shape)
              for name, weight in whole.items()}  # fmt: skip
    kept = dict(slice_tensors(places.__getitem__, student.config, selection, rescale_norms=False))
    found = {}
    for name, weight in pruned.named_parameters():
        factor = math.sqrt(whole[name].numel() / weight.numel()) if table[name].role is Role.NORM else 1.0
        gradient = torch.zeros(whole[name].numel())
        assert weight.grad is not None
        gradient[kept[name].long().flatten()] = factor * weight.grad.flatten()
        found[name] = gradient.view(whole[name].shape)
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_trains_the_size_that_prune_cuts_out(name: str, checkpointing: bool) -> None:
    """Its loss, and the gradient of every weight, are those of the pruned model; all other weights have zero."""
    config, targets = CONFIGS[name]
    student, nest = nested(config, targets)
    trainer.set_layers(student.model, recompute=checkpointing, compiled=False)
    loss, rows = nest.loss(teach(), 0), draw_batch(2)
    for number, selection in enumerate(nested_cut(config, scores_of(config), targets).sizes):
        pruned = slice_model(student.model, selection).requires_grad_(True).train()
        expected = teach()(pruned, rows, 7.0)
        expected.backward()
        loss.at(step_of(nest, number))
        assert loss.figures() == {"size_parameters": count_parameters(pruned.config)}
        found = loss(student.model, rows, 7.0)
        found.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        gradients = spread(pruned, student.model, selection)
        assert gradients.keys() == {weight.name for weight in student.weights}
        for weight in student.weights:
            assert weight.local.grad is not None
            outside = gradients[weight.name] == 0
            assert int(outside.sum()) >= weight.local.numel() - pruned.get_parameter(weight.name).numel()
            assert not weight.local.grad[outside].any(), weight.name
            assert_close(weight.name, gradients[weight.name], weight.local.grad, 1e-5)
        student.zero_grad()


def test_bfloat16_weights_are_sliced_as_they_are_used() -> None:
    """The gradient of a size reaches the float32 weights that the optimizer moves, and those of no other unit."""
    config, targets = CONFIGS["hybrid"]
    student, nest = nested(config, targets, torch.bfloat16)
    loss, rows = nest.loss(teach(dtype=torch.bfloat16), 0), draw_batch(2)
    loss.at(step_of(nest, 2))
    loss(student.model, rows, 7.0).backward()
    small = nest.sizes[2].of(student.model)
    assert small.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    by_name = {weight.name: weight.local for weight in student.weights}
    embedding = by_name["embeddings.weight"]
    assert embedding.dtype == embedding.grad.dtype == torch.float32  # type: ignore[union-attr]
    assert embedding.grad[:, :16].any() and not embedding.grad[:, 16:].any()  # type: ignore[index]


def gradients(folder: Path, parts: int = 1, **how: Any) -> dict[str, Tensor]:
    """The whole gradients of a batch with a size of experts, the loss, and the held-out figures of all sizes."""
    student, nest = nested(*CONFIGS["experts"])
    loss, told = nest.loss(teach(), 0), options(context_parallel=parts, **how)
    loss.at(step_of(nest, 1))
    run = TrainingRun(student, loss, told, folder / "run", Stopper(), None, None, None)
    found = {"loss": torch.tensor(run.gradients(draw_batch(7))[0])}
    found |= {weight.name: weight.local.grad.clone() for weight in student.weights if weight.local.grad is not None}
    figures = nest.figures(random_model(tiny_config(), 0, torch.float32), student.model, [draw_batch(3)], parts)
    return found | {name: torch.tensor(value) for name, value in figures.items()}


def gradients_in_parts(folder: str) -> None:
    """What a worker does: rows dealt out, and rows split."""
    for parts in (1, 2):
        found = gradients(Path(folder), parts)
        if processes.rank() == 0:
            save_file(
                {name: tensor.contiguous() for name, tensor in found.items()}, Path(folder) / f"{parts}.safetensors"
            )


@pytest.mark.slow
def test_micro_batches_and_processes_share_one_size(tmp_path: Path) -> None:
    whole = gradients(tmp_path)
    run_workers(gradients_in_parts, tmp_path)
    ways = {f"{parts} parts": load_file(tmp_path / f"{parts}.safetensors") for parts in (1, 2)}
    for way, found in ({"micro-batches": gradients(tmp_path, micro_batch=1)} | ways).items():
        assert found.keys() == whole.keys()
        for name, expected in whole.items():
            assert_close(f"{way}: {name}", expected, found[name], 1e-5)


def test_figures_are_those_of_the_pruned_models_by_their_shares() -> None:
    config, targets = CONFIGS["hybrid"]
    student, nest = nested(config, targets, shares=(3, 2, 5))
    teacher, sample = random_model(tiny_config(), 0, torch.float32), [draw_batch(3)]
    figures = nest.figures(teacher, student.model, sample)
    each = [
        held_out_figures(teacher, slice_model(student.model, selection), sample)
        for selection in nested_cut(config, scores_of(config), targets).sizes
    ]
    for name in ("validation_loss", "validation_bits_per_byte", "validation_kl", "validation_agreement"):
        assert figures[name] == pytest.approx(sum(s * f[name] for s, f in zip((0.3, 0.2, 0.5), each, strict=True)))
    for number, own in enumerate(each):
        assert figures[f"validation_kl_size {number}"] == pytest.approx(own["validation_kl"], rel=1e-6)


def test_the_largest_teaches_the_others() -> None:
    """As it stands, and without a gradient of its own; itself it learns from the teacher."""
    config, targets = CONFIGS["hybrid"]
    student, nest = nested(config, targets, teacher="largest")
    loss, rows = nest.loss(teach(), 0), draw_batch(2)
    loss.at(step_of(nest, 0))
    assert loss(student.model, rows, 7.0).item() == teach()(student.model, rows, 7.0).item()
    loss.at(step_of(nest, 2))
    found = loss(student.model, rows, 7.0)
    found.backward()
    frozen = copy.deepcopy(student.model)
    gradients = {weight.name: weight.local.grad for weight in student.weights}
    student.zero_grad()
    alone, own = nest.sizes[2].of(student.model), distillation_loss(frozen, DistillLoss())
    expected = own(alone, rows, 7.0)
    expected.backward()
    assert found.item() == expected.item() and all(weight.parameter.requires_grad for weight in student.weights)
    for weight in student.weights:
        assert torch.equal(gradients[weight.name], weight.local.grad), weight.name  # type: ignore[arg-type]


@pytest.mark.parametrize("how", [{"optimizer": "muon"}, {"ema_decay": 0.5}, {"activation_checkpointing": True}])
@pytest.mark.parametrize("teacher", ["teacher", "largest"])
def test_every_size_learns(how: dict[str, Any], teacher: str, tmp_path: Path) -> None:
    """With either optimizer and its average; what a size has not got is moved by momentum alone."""
    config, targets = CONFIGS["experts"]
    student, nest = nested(config, targets, teacher=teacher)
    model, sample = random_model(tiny_config(), 0, torch.float32), [draw_batch(number) for number in range(4)]
    before = nest.figures(model, student.model, sample)
    train(
        student, nest.loss(teach(), 0), batches_from, options(steps=24, evaluate_every=24, learning_rate=0.02, **how),
        tmp_path, evaluate=lambda student: nest.figures(model, student, sample),
    )  # fmt: skip
    last = records(tmp_path)[-1]
    for size in nest.sizes:
        assert last[f"validation_kl_{size.name}"] < 0.95 * before[f"validation_kl_{size.name}"]
    drawn = [record["size_parameters"] for record in records(tmp_path)]
    assert drawn == [count_parameters(nest.drawn(0, step).config) for step in range(24)] and len(set(drawn)) == 3


def test_weights_without_a_part_in_a_step_move_by_momentum(tmp_path: Path) -> None:
    """Their gradient is zero, and not none: after a step of the least size the others' moments have decayed."""
    student, nest = nested(*CONFIGS["hybrid"])
    loss = nest.loss(teach(), 0)
    steps = {nest.sizes.index(nest.drawn(0, step)): step for step in reversed(range(20))}
    run = TrainingRun(student, loss, options(save_every=100), tmp_path, Stopper(), None, None, None)
    moments = []
    for number in (0, 2):
        loss.at(steps[number])
        _, norm, _ = run.gradients(draw_batch(number))
        run.move(norm)
        student.zero_grad()
        weight = next(weight.local for weight in student.weights if weight.name == "embeddings.weight")
        moments.append(run.optimizers["adamw"].state[weight]["exp_avg"].clone())
    assert torch.allclose(moments[1][:, 16:], 0.9 * moments[0][:, 16:]) and moments[0][:, 16:].any()
    assert not torch.allclose(moments[1][:, :16], 0.9 * moments[0][:, :16])
