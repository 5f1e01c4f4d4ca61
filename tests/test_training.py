"""The gap against dense float64, the trainer against itself: resumed, split, and stopped by nonsense."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from limbeck.distill.average import check_average, final_weights
from limbeck.distill.gap.measure import measure_gap, summarise
from limbeck.distill.gap.sums import QUANTITIES, Sums
from limbeck.distill.losses import DistillLoss, cross_entropy_loss, distillation_loss
from limbeck.distill.muon import Muon, orthogonalize
from limbeck.distill.options import TrainOptions
from limbeck.distill.parallel import TrainedWeight
from limbeck.distill.trainer import make_optimizers, train
from limbeck.models.axes import Factor, Role, TensorSpec
from limbeck.models.errors import InputError
from limbeck.prune.depth import score_layers
from limbeck.prune.importance import score_widths
from limbeck.tests.helpers import assert_close
from limbeck.tests.training_helpers import batches_from, draw_batch, model_of, weights
from safetensors.torch import load_file
from torch.nn import functional as F


def test_gap_is_the_dense_float64_one() -> None:
    teacher, student = model_of(0), model_of(1, hidden_size=24)
    batches = [draw_batch(seed) for seed in range(3)]
    report = measure_gap(teacher, {"student": student, "itself": teacher}, batches)
    nats, kl, agree, count, text = 0.0, 0.0, 0, 0, 0
    for batch in batches:
        counted = batch.labels >= 0
        with torch.no_grad():
            p, q = (
                F.log_softmax(m.double()(batch.input_ids, seq_idx=batch.seq_idx)[counted], -1)
                for m in (teacher, student)
            )
        labels = batch.labels[counted][:, None]
        nats -= float(q.gather(1, labels).sum())
        kl += float((p.exp() * (p - q)).sum())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += int(counted.sum())
        text += int(batch.n_bytes.sum())
    found = report.models["student"]
    assert report.tokens == count and report.text_bytes == text
    assert found.cross_entropy.value == pytest.approx(nats / count, rel=1e-6)
    assert found.kl.value == pytest.approx(kl / count, rel=1e-6)
    assert found.agreement.value == agree / count
    assert found.bits_per_byte.value == pytest.approx(nats / math.log(2) / text, rel=1e-6)
    assert found.kl.low < found.kl.value < found.kl.high
    itself = report.models["itself"]
    assert abs(itself.kl.value) < 1e-7 and itself.agreement.value == 1
    assert itself.cross_entropy == report.models["teacher"].cross_entropy


def test_intervals_cover() -> None:
    """Documents of drawn lengths and losses: the 95% interval holds the true mean about 19 times in 20."""
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        sums, sizes = {"teacher": Sums()}, {}
        for document in range(60):
            tokens = int(generator.integers(5, 50))
            nats = float(generator.normal(2.0, 0.5, tokens).sum() + tokens * generator.normal(0, 0.3))
            sums["teacher"].documents[document] = np.pad([nats, 0.0, tokens], (0, len(QUANTITIES) - 3))
            sizes[document] = np.array([tokens, 4 * tokens], dtype=np.float64)
        found = summarise(sums, sizes, 16, 300, trial).models["teacher"].cross_entropy
        hits += found.low <= 2.0 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
@pytest.mark.parametrize("stop", (1, 3, 5, 6, 8))
def test_resumed_training_is_bit_identical(optimizer: str, stop: int, tmp_path: Path) -> None:
    options = TrainOptions(steps=9, learning_rate=0.01, optimizer=optimizer, warmup_steps=2, save_every=3, log_every=1)
    loss = distillation_loss(model_of(0), DistillLoss(ce_weight=0.2))
    calm, rough = model_of(1), model_of(1)
    assert train(calm, loss, batches_from, options, tmp_path / "calm") == 9
    train(rough, loss, batches_from, options, tmp_path / "rough", stop_after=stop)
    (tmp_path / "rough" / ".state-00000099.partial").mkdir()  # as a kill in the middle of saving leaves it
    with (tmp_path / "rough" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "lo')
    rough = model_of(1 if stop < 3 else 2)  # before the first state there is nothing to resume from
    train(rough, loss, batches_from, options, tmp_path / "rough")
    for name, weight in weights(calm).items():
        assert torch.equal(weight, weights(rough)[name]), name
    curves = [[json.loads(line) for line in (tmp_path / side / "metrics.jsonl").read_text().splitlines()]
              for side in ("calm", "rough")]  # fmt: skip
    assert [(r["step"], r["loss"]) for r in curves[0]] == [(r["step"], r["loss"]) for r in curves[1]]
    assert sorted(path.name for path in (tmp_path / "rough").iterdir() if path.is_dir()) == [
        "state-00000006", "state-00000009",
    ]  # fmt: skip


def test_every_weight_is_in_one_group_and_the_teacher_in_none() -> None:
    model, teacher = model_of(1), model_of(0)
    distillation_loss(teacher, DistillLoss())
    assert not any(weight.requires_grad for weight in teacher.parameters())
    for kind in ("adamw", "muon"):
        optimizers = make_optimizers(model, TrainOptions(steps=1, learning_rate=1.0, optimizer=kind))
        grouped = [id(p) for o in optimizers.values() for group in o.param_groups for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("shape", ((24, 40), (40, 24)))
def test_muon_is_torch_s_without_its_bfloat16(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    dimensions = tuple(((Factor(None, size),),) for size in shape)
    weight = TrainedWeight(TensorSpec("matrix", dimensions, Role.MATRIX), ours, ours)
    one = Muon([weight], 0.02, weight_decay=0.1)
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        one.step(), other.step()
    moved = (ours - 1).norm()
    assert (ours - theirs).norm() < 0.03 * moved and moved > 0.05  # bfloat16's three digits, through ten products
    left, _, right = torch.linalg.svd(ours.grad, full_matrices=False)
    turned = left.T @ orthogonalize(ours.grad) @ right.T
    assert ((turned.diagonal() > 0.5) & (turned.diagonal() < 1.3)).all()
    assert_close("what is off the diagonal", turned - turned.diagonal().diag() + 1, torch.ones_like(turned), 1e-5)


def test_distillation_learns_and_nonsense_stops(tmp_path: Path) -> None:
    teacher, student = model_of(0), model_of(1)
    loss = distillation_loss(teacher, DistillLoss())
    batch = draw_batch(3)
    options = TrainOptions(steps=30, learning_rate=0.01, log_every=1)
    train(student, loss, lambda start: iter([batch] * 30), options, tmp_path / "run")
    curve = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert curve[-1] < 0.5 * curve[0]
    with torch.no_grad():
        student.norm_f.weight[0] = float("nan")
    with pytest.raises(InputError, match="10 steps in a row were not finite"):
        train(student, cross_entropy_loss, batches_from, options, tmp_path / "broken")
    with pytest.raises(InputError, match="vocabulary"):
        loss(model_of(2, vocab_size=50), draw_batch(0, vocabulary=50), 1.0)


@pytest.mark.parametrize("wrong", ({"steps": 0}, {"schedule": "odd"}, {"optimizer": "sgd"}, {"learning_rate": 0.0}))
def test_wrong_training_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        TrainOptions(**({"steps": 1, "learning_rate": 0.1} | wrong))


def test_scores_do_not_depend_on_batches_or_order() -> None:
    model = model_of(0)
    batch = draw_batch(1, count=8)
    whole = score_widths(model, [batch])
    single = score_widths(model, [batch.rows(i, i + 1) for i in (5, 2, 7, 0, 1, 6, 3, 4)])
    for axis, value in whole.items():
        assert_close(str(axis), value, single[axis], 1e-5)


def test_score_finds_what_matters() -> None:
    """A neuron, a head and a channel made silent score zero, and a loud neuron comes first."""
    model = model_of(0)
    with torch.no_grad():
        model.layers[1].mixer.up_proj.weight[3] = 0
        model.layers[1].mixer.up_proj.weight[5] *= 50
        model.layers[0].mixer.in_proj.weight[64:72] = 0
    scores = {str(axis): value for axis, value in score_widths(model, [draw_batch(1)]).items()}
    assert scores["ffn(1)"][3] == 0 and int(scores["ffn(1)"].argmax()) == 5
    assert (scores["mamba_heads(0)"][0] == 0).all() and (scores["mamba_heads(0)"][1:] > 0).all()


def test_depth_finds_the_layer_that_does_nothing_and_agrees_with_plain_removal() -> None:
    model = model_of(0)
    with torch.no_grad():
        model.layers[2].mixer.out_proj.weight.zero_()
    batches = [draw_batch(1), draw_batch(2)]
    found = score_layers(model, batches, remove=3, table="all")
    assert found.order[0] == 2 and found.values[0] < 1e-10
    # The second step, plainly: every other layer away, logits against the original's.
    errors = {}
    for layer in (0, 1, 3, 4, 5):
        total = count = 0.0
        for batch in batches:
            with torch.no_grad():
                original = model(batch.input_ids, seq_idx=batch.seq_idx)
                hidden = model.embed(batch.input_ids)
                for other in range(6):
                    if other not in (2, layer):
                        hidden = model.forward_layers(hidden, other, other + 1, seq_idx=batch.seq_idx)
                scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + model.config.norm_eps)
                logits = hidden * scale * model.norm_f.weight @ model.head_weight.T
            counted = batch.labels >= 0
            total += float((logits - original)[counted].double().square().sum())
            count += int(counted.sum()) * 97
        errors[layer] = total / count
    assert found.order[1] == min(errors, key=lambda layer: errors[layer])
    assert found.candidates[1] == pytest.approx(errors, rel=1e-4)


def test_batches_have_rows() -> None:
    batch = draw_batch(0)
    columns = (getattr(batch.rows(1, 3), field.name) for field in dataclasses.fields(batch))
    assert all(column is None or column.shape[0] == 2 for column in columns)


def test_steps_that_were_skipped_last_are_said(tmp_path: Path) -> None:
    """Their number, since the weights are those of the step before."""
    student, said = model_of(1), list[str]()
    plain = distillation_loss(model_of(0), DistillLoss())

    def loss(model: Any, rows: Any, normalizer: float) -> Any:
        found = plain(model, rows, normalizer)
        return found * float("nan") if int(rows.input_ids[0, 0]) in late else found

    late = {int(draw_batch(number).input_ids[0, 0]) for number in (4, 5)}
    options = TrainOptions(steps=6, learning_rate=0.01, log_every=1)
    assert train(student, loss, batches_from, options, tmp_path / "run", say=said.append) == 6
    assert [line for line in said if "the last 2 steps were not finite" in line]


def test_an_average_that_is_added_on_resuming_begins_there(tmp_path: Path) -> None:
    loss, folder = distillation_loss(model_of(0), DistillLoss()), tmp_path / "run"
    options = TrainOptions(steps=4, learning_rate=0.1, log_every=1, save_every=2)
    train(model_of(1), loss, batches_from, options, folder, stop_after=2)
    student = model_of(1)
    train(student, loss, batches_from, dataclasses.replace(options, ema_decay=0.999), folder)
    found = dict(final_weights(folder, dataclasses.replace(options, ema_decay=0.999)).tensors())
    before = dict(final_weights(folder, options).tensors())
    begun = load_file(folder / "state-00000002" / "model.safetensors")
    for name, weight in found.items():
        # Two steps of 0.001 away from the state's weights, and not from those of a new model.
        assert (weight - begun[name]).norm() <= 0.003 * (before[name] - begun[name]).norm() + 1e-6, name


@pytest.mark.parametrize(
    ("decay", "steps", "says"),
    (
        (0.999, 300, "74% of the moving average are the weights that training began with; 0.983333 (1 - 5/steps)"),
        (0.99999, 100_000, "37% of the moving average are the weights that training began with; 0.99995 (1 - 5/steps)"),
        (0.9, 4, "66% of the moving average are the weights that training began with; leave it out"),
        (0.999, 10_000, ""),
        (0.0, 1, ""),
    ),
)
def test_an_average_of_the_first_weights_is_said(decay: float, steps: int, says: str) -> None:
    said = list[str]()
    check_average(TrainOptions(steps=steps, learning_rate=0.1, ema_decay=decay), said.append)
    assert len(said) == bool(says) and says in "".join(said)
