"""The proof of the design: what limbeck does with a model is done with a fifth kind of layer (proof_kind.py)."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill.losses import DistillLoss, distillation_loss
from limbeck.distill.options import TrainOptions
from limbeck.distill.report.card import TRANSFORMERS, Licence, Published, write_card
from limbeck.distill.report.report import write_page
from limbeck.distill.trainer import make_optimizers, train
from limbeck.models.axes import AXES, Axis, axis_sizes, tensor_table
from limbeck.models.checkpoint import load_model, open_checkpoint, save_model, stream_rows
from limbeck.models.cost.hardware import Hardware, Place
from limbeck.models.cost.inference import memory, verdict
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.cost.simulate import simulate
from limbeck.models.cost.speed import throughput
from limbeck.models.cost.training import Training, train_memory
from limbeck.models.errors import InputError
from limbeck.models.export import write_export
from limbeck.models.families.family import stored_tensors
from limbeck.models.families.known import FAMILIES
from limbeck.models.generate.cache import Cache
from limbeck.models.generate.decode import Decoder
from limbeck.models.hybrid import HybridLM
from limbeck.models.kinds import KINDS
from limbeck.models.offload import open_layers
from limbeck.prune.choose import select
from limbeck.prune.depth import random_layers, score_layers
from limbeck.prune.importance import score_widths
from limbeck.prune.kept import importance_kept
from limbeck.prune.patterns import Rules, count_patterns, patterns
from limbeck.prune.repair import Repair, repair_model
from limbeck.prune.scores import LayerScores, Scores, load_scores, save_scores, width_score_shapes
from limbeck.prune.search import Budget, Requests, Space, find_candidates, find_depths, with_importance
from limbeck.prune.slice import Selection, filled, slice_config, slice_model, slice_rows
from limbeck.prune.target import Target
from limbeck.prune.width_metrics import ActivationScores, MagnitudeScores, RandomScores, TaylorScores
from limbeck.scripts.prune import kept_units, print_sizes
from limbeck.scripts.run.compose import build
from limbeck.tests.helpers import assert_close, random_model
from limbeck.tests.page_content import facts, gap_of
from limbeck.tests.proof_kind import CONV, PROOF, ROW, ProofConfig, proof_config
from limbeck.tests.pruning_helpers import draw_rows, draw_selection, turned
from limbeck.tests.training_helpers import draw_batch
from safetensors import safe_open
from torch import Tensor


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """All that makes the kind, the axis and the family known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, CONV.letter, CONV)
        patch.setitem(AXES, ROW.name, ROW)
        patch.setitem(FAMILIES, "proof", PROOF)
        yield


@pytest.fixture(scope="module")
def model(registered: None) -> HybridLM:
    return random_model(proof_config())


@pytest.fixture(scope="module")
def folder(model: HybridLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("proof") / "model"
    save_model(model, path, dtype=torch.float32)
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_folder_is_read_and_written(folder: Path, model: HybridLM, tmp_path: Path) -> None:
    again = load_model(folder)
    assert again.config == model.config and type(again.config) is ProofConfig
    save_model(again, tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(folder)
    save_model(again, tmp_path / "shards", max_shard_bytes=4000)
    assert len(files_of(tmp_path / "shards")) > 5
    own = again.state_dict()
    for name, tensor in stream_rows(open_checkpoint(tmp_path / "shards")):
        assert torch.equal(tensor, own[name]), name
    with safe_open(folder / "model.safetensors", "pt") as stored:
        assert set(stored.keys()) == set(stored_tensors(model.config))
        fused = torch.cat([own["layers.1.mixer.gate_proj.weight"], own["layers.1.mixer.up_proj.weight"]])
        assert torch.equal(stored.get_tensor("model.blocks.0.mlp.gate_up.weight"), fused)
        for unit, values in enumerate(own["layers.4.mixer.in_proj.weight"]):
            assert torch.equal(stored.get_tensor(f"model.blocks.2.conv.in_proj.{unit}.weight"), values)
        assert torch.equal(4 * stored.get_tensor("model.embed.weight"), own["embeddings.weight"])
    with pytest.raises(InputError, match="whole blocks"):
        model.config.replace(pattern="C*-").to_hf()
    with pytest.raises(InputError, match="conv_channels"):
        proof_config(conv_channels=0)


def test_parameters_are_the_models(model: HybridLM) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert shapes == {name: spec.shape for name, spec in tensor_table(model.config).items()}
    assert count_parameters(model.config) == sum(weight.numel() for weight in model.parameters())


def test_every_metric_scores_its_axis(model: HybridLM, folder: Path) -> None:
    config, batches = model.config, [draw_rows(61, 4), draw_rows(61, 4)]
    found = {
        "activation": score_widths(model, batches),
        "times output": score_widths(model, batches, ActivationScores(times_output=True)),
        "taylor": score_widths(model, batches, TaylorScores()),
        "magnitude": score_widths(model, (), MagnitudeScores()),
        "random": score_widths(model, (), RandomScores(0)),
    }
    for name, scores in found.items():
        assert {axis: tuple(values.shape) for axis, values in scores.items()} == width_score_shapes(config), name
        assert all(float(values.min()) >= 0 and float(values.max()) > 0 for values in scores.values()), name
    stack = model.get_parameter("layers.0.mixer.in_proj.weight").detach()
    whole = stack.square().sum((0, 2)) + model.get_parameter("layers.0.mixer.conv.weight").detach().square().sum(1)
    out = model.get_parameter("layers.0.mixer.out_proj.weight").detach().square().sum(0)
    axis = Axis("conv_channels", 0)
    assert_close("magnitude", (whole + out).sqrt(), found["magnitude"][axis], 1e-6)
    assert_close("times output", found["activation"][axis] * out.sqrt(), found["times output"][axis], 1e-6)
    # Read layer by layer from a folder it is the same.
    layers = open_layers(folder, torch.float32, torch.device("cpu"), offload="disk")
    streamed = score_widths(layers, batches, TaylorScores())
    resident = score_widths(load_model(folder), batches, TaylorScores())
    assert all(torch.equal(streamed[axis], resident[axis]) for axis in resident)


@torch.no_grad()
def test_units_that_give_nothing_go_unnoticed(model: HybridLM) -> None:
    """They score zero, and without them the logits are the same: in each group equally many."""
    without, gone = filled(model.config, model.state_dict().items(), model), [1, 4, 6, 11]
    for layer in (0, 4):
        for name in ("conv.weight", "norm.weight"):
            without.get_parameter(f"layers.{layer}.mixer.{name}")[gone] = 0
        without.get_parameter(f"layers.{layer}.mixer.out_proj.weight")[:, gone] = 0
    batch = draw_rows(61, 4)
    for metric in (ActivationScores(), TaylorScores()):
        scores = score_widths(without, [batch], metric)
        assert scores[Axis("conv_channels", 0)].nonzero().flatten().tolist() == [0, 2, 3, 5, 7, 8, 9, 10]
        selection = select(model.config, scores, (), Target(conv_channels=8))
        smaller = slice_model(without, selection)
        expected = without(batch.input_ids, seq_idx=batch.seq_idx)
        assert_close("logits", expected, smaller(batch.input_ids, seq_idx=batch.seq_idx), 1e-9)
    with pytest.raises(InputError, match="conv_groups"):
        select(model.config, scores, (), Target(conv_channels=7))


KINDS_OF_AXES = ("hidden", "ffn", "attn_heads", "conv_channels")


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS_OF_AXES), KINDS_OF_AXES])
def test_slicing_keeps_its_laws(model: HybridLM, folder: Path, kinds: tuple[str, ...], tmp_path: Path) -> None:
    config, draw = model.config, random.Random(len(kinds))
    everything = Selection(tuple(range(6)), {axis: tuple(range(size)) for axis, size in axis_sizes(config).items()})
    same = slice_model(model, everything).state_dict()
    assert slice_config(config, everything) == config
    assert all(torch.equal(tensor, same[name]) for name, tensor in model.state_dict().items())
    selection = draw_selection(config, kinds, draw)
    layers = (0, 1, 4, 5) if len(kinds) > 1 else tuple(range(6))
    selection = Selection(layers, {a: kept for a, kept in selection.kept.items() if a.layer in (None, *layers)})
    smaller = slice_model(model, selection)
    table = tensor_table(smaller.config)
    assert {name: tuple(w.shape) for name, w in smaller.named_parameters()} == {n: s.shape for n, s in table.items()}
    save_model(smaller, tmp_path / "smaller", dtype=torch.float32)
    # The same out of the folder, rows by rows.
    source = open_checkpoint(folder)
    rows: dict[str, list[Tensor]] = {}
    dtypes = dict.fromkeys(source.stored, torch.float32)
    for name, part in slice_rows(source.rows, config, selection, dtypes=dtypes):
        rows.setdefault(name, []).append(part)
    stored = open_checkpoint(tmp_path / "smaller")
    for name, parts in rows.items():
        assert_close(name, stored.tensor(name), torch.cat(parts), 1e-6)
    assert rows.keys() == table.keys()


def test_depth_goes_by_whole_blocks(model: HybridLM) -> None:
    batches = [draw_rows(61, 2)]
    for metric in ("mse", "block_influence"):
        order = score_layers(model, batches, remove=4, metric=metric).order
        assert [sorted(order[at : at + 2])[0] % 2 for at in (0, 2)] == [0, 0] and len(set(order)) == 4
    assert score_layers(model, batches, remove=2, min_layers={"conv": 2}).order == (2, 3)
    assert random_layers(model.config, remove=2, seed=0, min_layers={"conv": 2}).order == (2, 3)
    with pytest.raises(InputError, match=r"remove is 1\.5"):  # blocks count as layers do elsewhere
        score_layers(model, batches, remove=3)
    with pytest.raises(InputError, match="at most 1"):
        score_layers(model, batches, remove=4, min_layers={"conv": 2})


def test_rotation_leaves_the_function(model: HybridLM) -> None:
    ids = torch.randint(61, (2, 9))
    with torch.no_grad():
        assert_close("logits", model(ids), turned(model)(ids), 1e-9)


def test_repair_comes_nearer_than_slicing(model: HybridLM) -> None:
    batch = draw_rows(61, 16)
    scores = score_widths(model, [batch])
    target = Target(hidden_size=12, intermediate_size=16, num_attention_heads=2, conv_channels=8)
    selection = select(model.config, scores, (4, 5), target.replace(layers=2))
    assert selection.layers == (0, 1, 2, 3)
    distances = {}
    with torch.no_grad():
        logits = model(batch.input_ids, seq_idx=batch.seq_idx)
        for repair in (
            Repair(norms="none"), Repair(norms="measured"), Repair(rotate=True, norms="measured"),
            Repair(norms="measured", least_squares=True), Repair(rotate=True, norms="measured", least_squares=True),
            Repair(rotate=True, least_squares=True, local_steps=40),
        ):  # fmt: skip
            smaller = repair_model(model, selection, [batch], repair)
            assert smaller.config == slice_config(model.config, selection)
            distances[repair] = (smaller(batch.input_ids, seq_idx=batch.seq_idx) - logits).square().mean().item()
    plain, *_, fitted, both, local = distances.values()
    assert fitted < 0.7 * plain and both < 0.7 * plain and local < 0.99 * both, distances
    # Where nothing is cut there is nothing to repair.
    everything = Selection(tuple(range(6)))
    same = repair_model(model, everything, [batch], Repair(norms="measured", least_squares=True, local_steps=2))
    for name, tensor in model.state_dict().items():
        assert_close(name, tensor, same.state_dict()[name], 1e-6)


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_it_trains(folder: Path, optimizer: str, tmp_path: Path) -> None:
    teacher, student = load_model(folder), load_model(folder)
    student = slice_model(student, Selection((0, 1, 2, 3))).train()
    before = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    options = TrainOptions(steps=2, learning_rate=0.01, optimizer=optimizer, log_every=1, activation_checkpointing=True)
    loss = distillation_loss(teacher, DistillLoss(ce_weight=0.2))

    def batches(start: int) -> Iterator[Any]:
        return iter([draw_batch(0, 2, 12, 61)] * (2 - start))

    assert train(student, loss, batches, options, tmp_path) == 2
    moved = {name for name, weight in student.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == before.keys()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[1] < losses[0]
    # What decays and what Muon moves is told by the role: the stack, but not the convolution of two dimensions.
    optimizers = make_optimizers(student, options)
    names = {id(weight): name for name, weight in student.named_parameters()}
    groups = {key: [names[id(w)] for w in each.param_groups[0]["params"]] for key, each in optimizers.items()}
    assert "layers.0.mixer.in_proj.weight" in groups[optimizer]
    assert not any("layers.0.mixer.conv.weight" in group for group in groups.values())


@torch.no_grad()
def test_decoding_is_prefill(model: HybridLM) -> None:
    lengths, ids = (7, 1, 4), torch.randint(61, (3, 12))
    cache = Cache(model.config, 4, 16, dtype=torch.float64)
    for row, length in enumerate(lengths):
        view = cache.rows(row, 1)
        model(ids[row : row + 1, :length], cache=view)
        cache.lengths[row] = length
    decoder = Decoder(model, cache)
    whole = model(ids)
    for step in range(5):
        tokens = [int(ids[row, length + step]) for row, length in enumerate(lengths)]
        logits = decoder.step(tokens)
        expected = torch.stack([whole[row, length + step] for row, length in enumerate(lengths)])
        assert_close(f"step {step}", expected, logits, 1e-9)
    # In chunks; a row moved to another place; a row used anew.
    chunked = Cache(model.config, 1, 16, dtype=torch.float64)
    parts = [model(part, cache=chunked) for part in ids[:1].split((1, 5, 2, 4), 1)]
    assert_close("chunks", whole[:1], torch.cat(parts, 1), 1e-9)
    cache.move(0, 3)
    cache.clear(0)
    view = cache.rows(0, 1)
    assert_close("cleared", whole[:1, :3], model(ids[:1, :3], cache=view), 1e-9)
    moved = cache.rows(3, 1)
    moved.length = 12
    longer = torch.cat([ids[:1], ids[:1, :1]], 1)
    assert_close("moved", model(longer)[:, -1:], model(longer[:, -1:], cache=moved), 1e-9)
    # Documents side by side do not see each other.
    seq_idx = (torch.arange(12) > 4).int()[None]
    packed = model(ids[:1], seq_idx=seq_idx)
    assert_close("documents", torch.cat([model(ids[:1, :5]), model(ids[:1, 5:])], 1), packed, 1e-9)


@pytest.mark.parametrize("place", (Place("cpu", 1), Place("cuda", 80, "8.6")), ids=lambda place: place.device)
def test_memory_is_the_simulations(place: Place) -> None:
    config = proof_config(pattern="C-*-C-C-", hidden_size=64, intermediate_size=128, conv_channels=96, vocab_size=256)
    for context, batch, chunk in ((300, 2, 64), (70, 1, 512)):
        report = memory(config, context, batch, chunk=chunk, place=place)
        simulation = simulate(config, context, batch, chunk=chunk, place=place)
        # The allocator rounds every tensor up, which matters in so small a model: without what is rounded so.
        assert abs(report.transient + report.workspace - simulation.transient) <= 0.01 * simulation.transient
        assert report.total <= simulation.weights + simulation.caches <= 1.15 * report.total
    assert report.conv == 3 * 96 * 2 * 2 and report.ssm == 0 and report.kv == 70 * 2 * 2 * 4 * 2


def test_training_memory_and_speed_are_estimated(model: HybridLM) -> None:
    for optimizer in ("adamw", "muon"):
        found = train_memory(model.config, model.config, Training(2, 64, optimizer=optimizer, device="cpu"))
        assert found.total > 16 * count_parameters(model.config) if optimizer == "adamw" else found.total > 0
        assert any("(C)" in moment for moment in found.moments)
    card = Hardware("testcard", 2.0, 1.0, 600.0, 70.0)
    speed = throughput(model.config, card, budget=2**30, input_tokens=16, output_tokens=16, batch=1)
    assert speed.tokens_per_second > 0


def test_rules_and_spaces_know_it(model: HybridLM) -> None:
    config, rules = model.config, Rules(min_layers={"conv": 1})
    assert count_patterns("C-*-C-", 4, rules) == len(list(patterns("C-*-C-", 4, rules)))
    assert all("C" in pattern for pattern in patterns("C-*-C-", 2, rules))
    with pytest.raises(InputError, match=r"known: .*, conv"):
        Rules(min_layers={"experts": 1})
    assert build(Target, {"conv_channels": 8}) == Target(conv_channels=8)
    space = build(Space, {"layers": [2, 3], "conv_channels": [6, 8, 12], "align": 4})
    scores = score_widths(model, (), RandomScores(0))
    order = LayerScores(order=(2, 3))
    depths = find_depths(config, space, rules, order)
    card = Hardware("testcard", 2.0, 1.0, 600.0, 70.0)
    found = find_candidates(config, space, depths, Budget(2**30, 64), card, Requests(8, 8))
    assert found.combinations == 6 and found.aligned == 4  # 6 is no multiple of 4
    names = [candidate.name for candidate in found.candidates]
    assert len(set(names)) == 4 and sum("C8" in name for name in names) == 2
    whole = with_importance(config, scores, found.candidates)
    for candidate in whole:
        selection = candidate.selection(config, scores)
        assert candidate.importance == pytest.approx(importance_kept(config, scores, selection))
        assert candidate.words() == [f"target.{name}={value}" for name, value in candidate.target.options().items()]
    assert max(candidate.importance or 0 for candidate in whole) == pytest.approx(1)
    # Widths for a number of parameters: hidden and FFN shrink, the channels stay.
    smaller = slice_config(config, select(config, scores, (), Target(parameters=0.7)))
    assert smaller.conv_channels == 12 and count_parameters(smaller) <= 0.7 * count_parameters(config)  # type: ignore[attr-defined]


def test_it_is_exported_and_drawn(
    folder: Path, model: HybridLM, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # transformers, which takes seconds to import
    (tmp_path / "export").mkdir()
    parity = write_export(tmp_path / "export", folder, torch.bfloat16, max_shard_bytes=2**20, check_tokens=16, seed=0)
    assert parity.relative_rms is None
    published = Published("bfloat16", TRANSFORMERS, parity.sentence())
    write_card(tmp_path / "export", model.config, published, Licence({}, ()))
    assert "2 gated convolution" in (tmp_path / "export" / "README.md").read_text()

    config, batch = model.config, draw_rows(61, 4)
    layers = score_layers(model, [batch], remove=2)
    scores = Scores(score_widths(model, [batch]), layers, {"pattern": config.pattern})
    save_scores(tmp_path / "scores", scores)
    again = load_scores(tmp_path / "scores")
    assert all(torch.equal(values, again.widths[axis]) for axis, values in scores.widths.items())
    selection = select(config, again.widths, again.layers.order, Target(layers=2, conv_channels=8, hidden_size=12))
    card = Hardware("testcard", 2.0, 1.0, 600.0, 70.0)
    report = memory(config, 64, 1)
    held = dataclasses.asdict(report) | {"total": report.total}
    answer = dataclasses.asdict(verdict(config, report, 2**30))
    fit = {"memory": held, "verdict": answer, "hardware": dataclasses.asdict(card)}
    page = write_page(
        tmp_path, "report.html", title="Proof", gap=gap_of("pruned"), provenance={"scores": facts()},
        scores=tmp_path / "scores", memory={"pruned": fit}, selection=kept_units(selection, config, Repair()),
    )  # fmt: skip
    assert (tmp_path / "plots" / "importance-conv-channels.png").is_file()
    text = page.read_text()
    assert "onvolution channels" in text and "gated convolution)" in text
    print_sizes(config, slice_config(config, selection))
    assert "convolution channels" in capsys.readouterr().out
