"""What limbeck does with a model of experts: scores, rotation, repair, training, folders, memory and speed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill.average import write_trained
from limbeck.distill.losses import DistillLoss, distillation_loss
from limbeck.distill.options import TrainOptions
from limbeck.distill.parallel import prepare
from limbeck.distill.state import load_state, states
from limbeck.distill.trainer import make_optimizers, train
from limbeck.models.axes import Axis
from limbeck.models.checkpoint import load_model, save_model
from limbeck.models.hybrid import HybridLM
from limbeck.models.offload import open_layers
from limbeck.prune.choose import select
from limbeck.prune.importance import score_widths
from limbeck.prune.repair import Repair, repair_model
from limbeck.prune.scores import width_score_shapes
from limbeck.prune.slice import Selection, filled, slice_model
from limbeck.prune.target import Target
from limbeck.prune.width_metrics import ActivationScores, MagnitudeScores, RandomScores, TaylorScores
from limbeck.tests.helpers import assert_close, moe_config, random_model
from limbeck.tests.pruning_helpers import draw_rows, turned
from limbeck.tests.training_helpers import draw_batch

BIAS = "e_score_correction_bias"


@pytest.fixture(scope="module", params=("plain", "latent"))
def model(request: pytest.FixtureRequest) -> HybridLM:
    return random_model(moe_config(moe_latent_size=8 if request.param == "latent" else 0))


def test_every_metric_scores_the_axes_of_experts(model: HybridLM, tmp_path: Path) -> None:
    config, batches = model.config, [draw_rows(97, 4), draw_rows(97, 4)]
    found = {
        "activation": score_widths(model, batches),
        "times output": score_widths(model, batches, ActivationScores(ffn_source="act", times_output=True)),
        "taylor": score_widths(model, batches, TaylorScores()),
        "magnitude": score_widths(model, (), MagnitudeScores()),
        "random": score_widths(model, (), RandomScores(0)),
    }
    for name, scores in found.items():
        assert {axis: tuple(values.shape) for axis, values in scores.items()} == width_score_shapes(config), name
        assert all(float(values.min()) >= 0 and float(values.max()) > 0 for values in scores.values()), name
    stacks = [model.get_parameter(f"layers.1.mixer.experts.{end}_proj") for end in ("up", "down")]
    gate = model.get_parameter("layers.1.mixer.gate.weight")
    whole = sum(stack.detach().square().sum((1, 2)) for stack in stacks) + gate.detach().square().sum(1)
    assert_close("magnitude", whole.sqrt(), found["magnitude"][Axis("experts", 1)], 1e-6)
    readers = stacks[1].detach().square().sum((1, 2)).sqrt()
    assert_close("readers", found["activation"][Axis("experts", 1)] * readers,
                 found["times output"][Axis("experts", 1)], 1e-6)  # fmt: skip
    save_model(model, tmp_path / "model", dtype=torch.float32)
    layers = open_layers(tmp_path / "model", torch.float32, torch.device("cpu"), offload="disk")
    streamed = score_widths(layers, batches, TaylorScores())
    resident = score_widths(load_model(tmp_path / "model"), batches, TaylorScores())
    assert all(torch.equal(streamed[axis], resident[axis]) for axis in resident)


def test_taylor_is_the_slope_of_the_loss_along_each_unit(model: HybridLM) -> None:
    """A unit turned down by a small share changes each sample's loss by the score times that share."""
    batch, share = draw_rows(97, 1), 1e-6
    scores = score_widths(model, [batch], TaylorScores())

    def loss() -> float:
        with torch.no_grad():
            logits = model(batch.input_ids, seq_idx=batch.seq_idx)
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()))

    experts = model.layers[3].mixer.experts.down_proj
    before = loss()
    for axis, unit in ((Axis("experts", 3), 4), (Axis("expert_ffn", 3), 7)):
        own: Any = experts[unit] if axis.kind == "experts" else experts[:, :, unit]
        with torch.no_grad():
            kept = own.clone()
            own.mul_(1 - share)
            slope = (before - loss()) / share
            own.copy_(kept)
        assert abs(slope) == pytest.approx(float(scores[axis][unit]), rel=1e-3, abs=1e-8)


@torch.no_grad()
def test_units_that_give_nothing_go_unnoticed(model: HybridLM) -> None:
    without = filled(model.config, model.state_dict().items(), model)
    for layer in (1, 3, 5):
        mixer: Any = without.layers[layer].mixer
        mixer.experts.down_proj[:, :, [0, 5, 7]] = 0
        mixer.shared_experts.down_proj.weight[:, [1, 2, 3, 19]] = 0
        mixer.gate.e_score_correction_bias[[2, 5]] = -9
    batch = draw_rows(97, 4)
    for metric in (ActivationScores(ffn_source="act", times_output=True), TaylorScores()):
        scores = score_widths(without, [batch], metric)
        assert scores[Axis("experts", 3)].nonzero().flatten().tolist() == [0, 1, 3, 4]
        target = Target(n_routed_experts=4, moe_intermediate_size=9, moe_shared_expert_intermediate_size=16)
        smaller = slice_model(without, select(model.config, scores, (), target))
        expected = without(batch.input_ids, seq_idx=batch.seq_idx)
        assert_close("logits", expected, smaller(batch.input_ids, seq_idx=batch.seq_idx), 1e-9)


def test_rotation_leaves_the_function(model: HybridLM) -> None:
    exact = random_model(model.config.replace(norm_eps=1e-12))
    ids = torch.randint(97, (2, 9))
    with torch.no_grad():
        assert_close("logits", exact(ids), turned(exact)(ids), 1e-9)


def test_repair_comes_nearer_than_slicing(model: HybridLM) -> None:
    batch = draw_rows(97, 16)
    scores = score_widths(model, [batch], ActivationScores(ffn_source="act"))
    target = Target(hidden_size=24, moe_shared_expert_intermediate_size=12, n_routed_experts=5)
    selection = select(model.config, scores, (), target)
    with torch.no_grad():
        logits = model(batch.input_ids, seq_idx=batch.seq_idx)
        plain, fitted, local = (
            (smaller(batch.input_ids, seq_idx=batch.seq_idx) - logits).square().mean().item()
            for fit in (Repair(rotate=True, norms="measured", least_squares=True),)
            for repair in (Repair(norms="none"), fit, dataclasses.replace(fit, local_steps=40))
            for smaller in (repair_model(model, selection, [batch], repair),)
        )
    assert fitted < 0.8 * plain and local < 0.99 * fitted
    everything = select(model.config, scores, (), Target())
    same = repair_model(model, everything, [batch], Repair(norms="measured", least_squares=True, local_steps=2))
    for name, tensor in model.state_dict().items():
        assert_close(name, tensor, same.state_dict()[name], 1e-6)


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_it_trains_and_carries_the_bias(optimizer: str, dtype: torch.dtype, tmp_path: Path) -> None:
    teacher = random_model(moe_config(), dtype=torch.float32)
    save_model(slice_model(teacher, Selection((0, 1, 2, 3))), tmp_path / "model")
    trained = prepare(load_model(tmp_path / "model").train(), None if dtype == torch.float32 else dtype)
    student = trained.model
    dtypes = {name: weight.dtype for name, weight in student.named_parameters()}
    assert dtypes["layers.1.mixer.gate.weight"] == torch.float32 and dtypes["layers.1.mixer.experts.up_proj"] == dtype
    before = {weight.name: weight.local.detach().clone() for weight in trained.weights}
    options = TrainOptions(steps=2, learning_rate=3e-4, optimizer=optimizer, log_every=1, activation_checkpointing=True)

    def batches(start: int) -> Iterator[Any]:
        return iter([draw_batch(0, 2, 12, 97)] * (2 - start))

    loss = distillation_loss(teacher, DistillLoss(ce_weight=0.2))
    assert train(trained, loss, batches, options, tmp_path / "training") == 2
    moved = {weight.name for weight in trained.weights if not torch.equal(weight.local, before[weight.name])}
    assert moved == before.keys() and not any(BIAS in name for name in moved)
    groups = make_optimizers(trained, options)[optimizer].param_groups
    assert any(weight.local is moving for weight in trained.weights if weight.name == "layers.1.mixer.experts.up_proj"
               for group in groups for moving in group["params"])  # fmt: skip
    # A state has the bias, brings it back, and hands it on to the folder.
    bias = teacher.get_buffer(f"layers.3.mixer.gate.{BIAS}")
    again = prepare(load_model(tmp_path / "model").train())
    with torch.no_grad():
        again.model.get_buffer(f"layers.3.mixer.gate.{BIAS}").zero_()
    assert states(tmp_path / "training") and load_state(
        again, make_optimizers(again, options), {}, tmp_path / "training"
    )
    assert torch.equal(again.model.get_buffer(f"layers.3.mixer.gate.{BIAS}"), bias)
    (tmp_path / "out").mkdir()
    write_trained(tmp_path / "out", tmp_path / "training", options, student.config, dtype, tmp_path / "model")
    out = load_model(tmp_path / "out")
    assert torch.equal(out.get_buffer(f"layers.3.mixer.gate.{BIAS}"), bias)
    lines = (tmp_path / "training" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[1] < losses[0] or dtype == torch.bfloat16  # whose rounding is more than so small a step
