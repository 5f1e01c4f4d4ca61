"""Multi-token prediction: read, cut along the stream, left alone or trained, and written with the model."""

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
from limbeck.distill.parallel import load_frozen, load_trained
from limbeck.distill.trainer import train
from limbeck.models.axes import HIDDEN, Axis, Role, tensor_table
from limbeck.models.checkpoint import load_config, load_model, save_model
from limbeck.models.config import HybridConfig
from limbeck.models.cost.parameters import count_active, count_parameters, num_tensors
from limbeck.models.errors import InputError
from limbeck.models.families.family import stored_tensors
from limbeck.models.hybrid import HybridLM
from limbeck.models.named import model_config, read_hardware
from limbeck.prune.choose import select
from limbeck.prune.importance import score_widths
from limbeck.prune.patterns import Rules
from limbeck.prune.repair import Repair, repair_model
from limbeck.prune.scores import LayerScores, Scores, save_scores
from limbeck.prune.search import Budget, Space, find_candidates, find_depths
from limbeck.prune.slice import Selection, slice_config, slice_model
from limbeck.prune.target import Target
from limbeck.prune.width_metrics import RandomScores
from limbeck.tests.helpers import assert_close, limbeck, moe_config, random_model, wide
from limbeck.tests.pruning_helpers import draw_rows, turned
from limbeck.tests.training_helpers import draw_batch
from safetensors.torch import load_file
from torch import Tensor

AHEAD = {"mtp_steps": 1, "mtp_pattern": "*E"}


def ahead_config(**changes: Any) -> HybridConfig:
    return moe_config(**(AHEAD | {"pattern": "ME*-"} | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mtp") / "model"
    save_model(random_model(ahead_config(), dtype=torch.float32), path)
    return path


def test_published_counts() -> None:
    """Super with its step, and Lightning, which is Nano with one: parameters and tensors."""
    nano, large = (model_config(name) for name in ("nemotron-3-nano-30b-a3b", "nemotron-3-super-120b-a12b"))
    assert count_parameters(large.replace(**AHEAD)) == 123_611_012_096
    lightning = nano.replace(**AHEAD)
    assert count_parameters(lightning) - count_parameters(nano) == 1_335_325_824
    assert num_tensors(lightning) - num_tensors(nano) == 270
    assert count_active(lightning) == count_active(nano)
    stored = stored_tensors(lightning)
    assert stored["mtp.layers.0.eh_proj.weight"].shape == (2688, 5376)
    assert stored["mtp.layers.1.mixer.experts.127.up_proj.weight"].shape == (1856, 2688)
    assert {"mtp.layers.0.enorm.weight", "mtp.layers.0.hnorm.weight", "mtp.layers.1.final_layernorm.weight"} <= set(
        stored
    )
    assert "mtp.layers.1.enorm.weight" not in stored and "mtp.layers.0.final_layernorm.weight" not in stored


def test_folders_go_both_ways(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    assert model.config == ahead_config()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {name: spec.shape for name, spec in tensor_table(model.config).items()}
    save_model(model, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    written = json.loads((folder / "config.json").read_text())
    assert written["num_nextn_predict_layers"] == 1 and written["mtp_hybrid_override_pattern"] == "*E"
    without = load_model(folder, ahead=False)
    assert not without.config.mtp_steps and not any(name.startswith("mtp") for name in without.state_dict())
    ids = torch.randint(97, (1, 9))
    assert torch.equal(model(ids), without(ids))


def test_every_spelling_is_read() -> None:
    hf = {key: value for key, value in ahead_config().to_hf().items() if key != "mtp_hybrid_override_pattern"}
    for kinds in (["attention", "moe"], ["full_attention", "moe"]):
        assert HybridConfig.from_hf(hf | {"mtp_layers_block_type": kinds}) == ahead_config()
    assert HybridConfig.from_hf(hf) == ahead_config()  # transformers' default
    none = HybridConfig.from_hf(hf | {"num_nextn_predict_layers": 0, "mtp_layers_block_type": ["attention", "moe"]})
    assert none == ahead_config(mtp_steps=0, mtp_pattern="")
    assert none.to_hf()["mtp_layers_block_type"] == ["attention", "moe"]


def test_transformers_drops_it_and_the_folder_is_read_without(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    ours = load_model(tmp_path / "theirs")
    assert ours.config.mtp_steps == 0
    ids = torch.randint(97, (1, 9))
    assert torch.equal(ours(ids), load_model(folder)(ids))


@pytest.mark.parametrize("steps", (1, 2))
@torch.no_grad()
def test_the_forward_pass_by_hand(steps: int) -> None:
    """Step by step, from the layers' own forward passes; what comes later in the row does not matter."""
    model = random_model(ahead_config(mtp_steps=steps))
    ids = torch.randint(97, (2, 11))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt() * weight

    hidden = model.hidden_states(ids)
    states = model.ahead_states(model.embed(ids), hidden)
    layers: Any = model.mtp.layers
    alone = HybridLM(model.config.mtp_layers, dtype=torch.float64)  # type: ignore[arg-type]
    alone.layers.load_state_dict({k: v for k, v in layers.state_dict().items() if k.split(".")[1] in ("norm", "mixer")})
    for step, found in enumerate(states):
        first, last = layers[2 * step], layers[2 * step + 1]
        read = norm(model.embed(ids)[:, 1 + step :], first.enorm.weight)
        x = torch.cat([read, norm(hidden[:, : 10 - step], first.hnorm.weight)], -1) @ first.eh_proj.weight.T
        hidden = norm(alone.forward_layers(x, 2 * step, 2 * step + 2), last.final_layernorm.weight)
        assert_close(f"step {step}", hidden, found, 1e-9)
    seq_idx = (torch.arange(11) > 4).int().expand(2, 11)
    packed = model.ahead_states(model.embed(ids), model.hidden_states(ids, seq_idx=seq_idx), seq_idx)[0]
    single = model.ahead_states(model.embed(ids[:, :5]), model.hidden_states(ids[:, :5]))[0]
    assert_close("first document", single, packed[:, :4], 1e-9)
    second = model.ahead_states(model.embed(ids[:, 5:]), model.hidden_states(ids[:, 5:]))[0]
    assert_close("second document", second, packed[:, 5:], 1e-9)


def test_the_stream_is_cut_through_it() -> None:
    """Channels that hold nothing go unnoticed, in multi-token prediction as well."""
    model = random_model(ahead_config(norm_eps=1e-24))
    gone, kept = [3, 17, 30], [channel for channel in range(32) if channel not in (3, 17, 30)]
    with torch.no_grad():
        for name, spec in tensor_table(model.config).items():
            if spec.writes_stream or spec.role.value == "table":
                tensor = model.get_parameter(name)
                tensor.movedim(-1 if spec.role.value == "table" else -2, 0)[gone] = 0
        smaller = slice_model(model, Selection(tuple(range(4)), {HIDDEN: tuple(kept)}))
        ids = torch.randint(97, (2, 9))
        before = model.ahead_states(model.embed(ids), model.hidden_states(ids))[0]
        after = smaller.ahead_states(smaller.embed(ids), smaller.hidden_states(ids))[0]
        assert_close("logits", before @ model.head_weight.T, after @ smaller.head_weight.T, 1e-9)


def test_repair_cuts_it_and_scores_do_not_see_it() -> None:
    model, batch = random_model(ahead_config()), draw_rows(97, 8)
    scores = score_widths(model, [batch])
    without = slice_model(model, Selection(tuple(range(4)), ahead=False))
    assert without.config == ahead_config(mtp_steps=0)
    assert all(torch.equal(values, scores[axis]) for axis, values in score_widths(without, [batch]).items())
    selection = select(model.config, scores, (), Target(hidden_size=24))
    plain, fitted = (
        slice_model(model, selection),
        repair_model(model, selection, [batch], Repair(norms="measured", least_squares=True)),
    )
    assert fitted.config == plain.config and fitted.config.mtp_steps == 1
    for name, tensor in plain.state_dict().items():
        if name.startswith("mtp."):
            assert torch.equal(tensor, fitted.state_dict()[name]), name


@pytest.mark.parametrize("tied", (False, True))
@torch.no_grad()
def test_rotation_turns_it(tied: bool) -> None:
    """Exactly where the norms before the head are alike in all channels, and nearly where they are nearly so."""
    model = random_model(ahead_config(mtp_steps=2, tie_word_embeddings=tied, norm_eps=1e-24))
    ids = torch.randint(97, (2, 9))
    tensors = model.state_dict()
    finals = [name for name in tensors if name.endswith("final_layernorm.weight")]

    def logits(model: HybridLM) -> list[Tensor]:
        states = model.ahead_states(model.embed(ids), model.hidden_states(ids))
        return [state @ model.head_weight.T for state in states]

    for name in finals:
        tensors[name].fill_(1.3)
    tensors["norm_f.weight"].fill_(1 if tied else 0.7)
    final, scale = tensors["norm_f.weight"], 1 if tied else 0.7
    for spread in (0, 0.1):
        for name in (*finals, *(() if tied else ("norm_f.weight",))):
            tensors[name].mul_(torch.empty_like(final).uniform_(1 - spread, 1 + spread))
        for before, after in zip(logits(model), logits(turned(model, scale)), strict=True):
            assert (after - before).norm() < (3 * spread or 1e-9) * before.norm()


@torch.no_grad()
def test_repair_rotates_it() -> None:
    """A stream that lies in 24 directions of 32 is cut to 28 without loss, in multi-token prediction as well."""
    model, batch = random_model(ahead_config(norm_eps=1e-24)), draw_rows(97, 8)
    basis = torch.linalg.qr(torch.randn(32, 24, dtype=torch.float64)).Q
    for name, spec in tensor_table(model.config).items():
        tensor = model.state_dict()[name]
        if spec.role is Role.TABLE:
            tensor.copy_(tensor @ basis @ basis.T)
        elif spec.writes_stream:
            tensor.copy_(basis @ (basis.T @ tensor))
        elif name.endswith(("norm_f.weight", "final_layernorm.weight")):
            tensor.fill_(0.7)
    selection = select(model.config, score_widths(model, [batch]), (), Target(hidden_size=28))
    plain, fitted = (repair_model(model, selection, [batch], repair) for repair in (Repair(), Repair(rotate=True)))
    assert fitted.config == plain.config and fitted.config.mtp_steps == 1

    def error(smaller: HybridLM) -> Tensor:
        found, expected = (
            one.ahead_states(one.embed(batch.input_ids), one.hidden_states(batch.input_ids))[0] @ one.head_weight.T
            for one in (smaller, model)
        )
        return (found - expected).norm() / expected.norm()

    assert error(fitted) < 1e-6 and error(plain) > 0.1


def test_its_loss_counts_labels_by_their_weights() -> None:
    """A label of weight 2 counts as two of weight 1, one of weight 0 as none: as in the loss of the next token."""
    teacher, student = (random_model(ahead_config(), seed, torch.float32) for seed in (1, 2))
    rows = draw_batch(0, 2, 12, 97)

    def ahead(weights: Tensor | None, labels: Tensor) -> float:
        given = dataclasses.replace(rows, weights=weights, labels=labels)
        with_ahead, without = (
            distillation_loss(teacher, DistillLoss(mtp_weight=weight))(student, given, 1.0).item()
            for weight in (1.0, 0.0)
        )
        return with_ahead - without

    labels, half = rows.labels, torch.arange(12).expand(2, 12) >= 6
    first, last = ahead(None, labels.masked_fill(half, -100)), ahead(None, labels.masked_fill(~half, -100))
    weighted = ahead(torch.where(half, 2.0, 0.5), labels)
    assert weighted == pytest.approx(0.5 * first + 2 * last, rel=1e-4) and first > 0 < last


def test_other_widths_are_refused(folder: Path, tmp_path: Path) -> None:
    kept = {Axis("experts", 1): (0, 1, 2)}
    with pytest.raises(InputError, match=r"n_routed_experts becomes 3, but multi-token prediction keeps .* 6"):
        slice_config(ahead_config(), Selection(tuple(range(4)), kept))
    assert slice_config(ahead_config(), Selection(tuple(range(4)), kept, ahead=False)).n_routed_experts == 3
    # Layers whose kind multi-token prediction has not may be cut.
    assert slice_config(ahead_config(), Selection(tuple(range(4)), {Axis("ffn", 3): (0, 5)})).mtp_steps == 1
    config = load_config(folder)
    save_scores(tmp_path / "scores", Scores(RandomScores(0).scores(config), LayerScores()))
    prune = ["prune", f"model={folder}", f"scores={tmp_path / 'scores'}", f"output={tmp_path / 'pruned'}"]
    code, _, err = limbeck(*prune, "target.num_attention_heads=2")
    assert code == 2 and "num_attention_heads becomes 2, but multi-token prediction" in err and "Trace" not in err
    assert not (tmp_path / "pruned").exists()
    assert limbeck(*prune, "target.num_attention_heads=2", "target.drop_mtp=true")[0] == 0
    assert load_config(tmp_path / "pruned").mtp_steps == 0
    assert limbeck(*prune[:-1], f"output={tmp_path / 'narrow'}", "target.hidden_size=24")[0] == 0
    assert load_model(tmp_path / "narrow").mtp.layers[0].eh_proj.weight.shape == (24, 48)  # type: ignore[union-attr]


def test_without_experts_it_is_written_too(tmp_path: Path) -> None:
    config = ahead_config(pattern="M-*", mtp_pattern="*-")
    save_model(random_model(config, dtype=torch.float32), tmp_path / "model")
    read = load_config(tmp_path / "model")
    assert (read.pattern, read.mtp_steps, read.mtp_pattern) == ("M-*", 1, "*-")
    assert load_model(tmp_path / "model").mtp is not None


def test_a_search_offers_what_prune_takes() -> None:
    """No widths other than those that multi-token prediction keeps."""
    config = ahead_config()
    space = Space(align=1, n_routed_experts=(3, 6))
    found = find_candidates(
        config, space, find_depths(config, space, Rules(), None), Budget(2**40, 64), read_hardware("a10g")
    )
    assert [each.config.n_routed_experts for each in found.candidates] == [6]


def test_a_share_counts_what_is_left_out() -> None:
    """With drop_mtp its layers are no part of the size that is aimed at; the share is of all of the source."""
    config = wide(pattern="M-*M", mtp_steps=1, mtp_pattern="*-")
    scores = RandomScores(0).scores(config)
    goal = 0.7 * count_parameters(config)
    small = slice_config(config, select(config, scores, (), Target(parameters=0.7, drop_mtp=True)))
    assert small.mtp_steps == 0 and 0.97 * goal < count_parameters(small) <= goal


@pytest.mark.parametrize(
    ("change", "says"),
    (
        ({"mtp_hybrid_override_pattern": "*X"}, "unknown letter 'X'"),
        ({"mtp_hybrid_override_pattern": 7}, "mtp_hybrid_override_pattern is 7"),
        ({"mtp_layers_block_type": ["moe"]}, "disagree on the layers of multi-token"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1"),
    ),
)
def test_wrong_configs_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        HybridConfig.from_hf(ahead_config().to_hf() | change)


def test_a_step_of_another_width_is_refused(folder: Path, tmp_path: Path) -> None:
    from limbeck.models.tensors import save_tensors

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = load_file(folder / "model.safetensors")
    name = "mtp.layers.1.mixer.experts.2.up_proj.weight"
    save_tensors(tmp_path / "model" / "model.safetensors", weights | {name: weights[name][:9]})
    with pytest.raises(InputError, match=rf"tensor {name} has shape \[9, 32\], expected \[12, 32\]"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("weight", (0.0, 1.0), ids=("frozen", "trained"))
def test_distilling(weight: float, folder: Path, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    teacher = load_frozen(folder, torch.float32, cpu, False)
    assert teacher.config.mtp_steps == 0
    trained = load_trained(folder, torch.float32, cpu, False, ahead=weight > 0)
    names = {one.name for one in trained.weights}
    assert any(name.startswith("mtp.") for name in names) == (weight > 0)
    options = TrainOptions(steps=3, learning_rate=1e-3, log_every=1)
    loss = distillation_loss(teacher, DistillLoss(ce_weight=0.1, mtp_weight=weight))

    def batches(start: int) -> Iterator[Any]:
        return iter([draw_batch(0, 2, 12, 97)] * (3 - start))

    assert train(trained, loss, batches, options, tmp_path / "training") == 3
    (tmp_path / "out").mkdir()
    write_trained(tmp_path / "out", tmp_path / "training", options, trained.model.config, torch.float32, folder)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        same = torch.equal(tensor, after[name])
        if ".experts." in name and (weight or not name.startswith("mtp.")):
            continue  # whoever is not chosen stays
        assert same == ("e_score" in name or (name.startswith("mtp.") and not weight)), name


def test_its_loss_trains_nothing_else(folder: Path) -> None:
    teacher, student = load_model(folder, ahead=False), load_model(folder)
    rows = draw_batch(0, 2, 12, 97)
    loss = distillation_loss(teacher, DistillLoss(mtp_weight=0.5))
    (loss(student, rows, 7.0) - distillation_loss(teacher, DistillLoss())(student, rows, 7.0)).backward()
    moved = {
        name
        for name, weight in student.named_parameters()
        if weight.grad is not None and weight.grad.abs().max() > 1e-7
    }
    assert moved and all(name.startswith("mtp.") for name in moved)
    # Of labels that a document's end takes away nothing counts.
    rows.labels[:] = -100
    assert loss(student, rows, 7.0).item() == 0


def test_a_loss_without_it_is_refused(folder: Path) -> None:
    model = load_model(folder, ahead=False)
    with pytest.raises(InputError, match="student has no multi-token prediction"):
        distillation_loss(model, DistillLoss(mtp_weight=1.0))(model, draw_batch(0, 1, 4, 97), 1.0)
    with pytest.raises(InputError, match="mtp_weight is -1"):
        DistillLoss(mtp_weight=-1)
