"""Falcon-H1 and Granite through all that limbeck does with a model: laws of slicing, scores, repair, offloading,
training with the fused loss, memory, decoding, the commands."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill.losses import DistillLoss, distillation_loss
from limbeck.distill.options import TrainOptions
from limbeck.distill.trainer import train
from limbeck.models.axes import Axis, axis_sizes, tensor_table
from limbeck.models.checkpoint import load_model, open_checkpoint, save_model
from limbeck.models.config import HybridConfig
from limbeck.models.cost.hardware import Place
from limbeck.models.cost.inference import memory
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.cost.simulate import simulate
from limbeck.models.generate.engine import Engine, Request
from limbeck.models.hybrid import HybridLM
from limbeck.models.offload import open_layers
from limbeck.prune.choose import select
from limbeck.prune.depth import score_layers
from limbeck.prune.importance import score_widths
from limbeck.prune.repair import Repair, repair_model
from limbeck.prune.slice import Selection, filled, slice_config, slice_model, slice_rows
from limbeck.prune.target import Target
from limbeck.prune.width_metrics import ActivationScores, MagnitudeScores, TaylorScores
from limbeck.tests.family_draws import falcon_config, granite_config
from limbeck.tests.helpers import assert_close, limbeck, make_workshop, random_model
from limbeck.tests.pruning_helpers import draw_rows, draw_selection, naive_mse, turned
from limbeck.tests.training_helpers import draw_batch
from torch.nn import functional as F

KINDS = ("hidden", "ffn", "attn_heads", "kv_groups", "mamba_heads", "mamba_head_dim", "ssm_state", "experts",
         "expert_ffn", "shared_ffn")  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "mamba_num_heads": 8, "mamba_head_dim": 4, "n_groups": 2, "ssm_state_size": 8, "norm_eps": 1e-12,
    "conv_bias": True, "chunk_size": 4, "conv_kernel": 4,
}  # fmt: skip
CONFIGS = {
    "falcon, no norm": falcon_config(0, pattern="P-P-P-", **SIZES),
    "falcon, norm before the gate": falcon_config(1, pattern="P-P-P-", **SIZES),
    "falcon, norm after the gate": falcon_config(2, pattern="P-P-P-", **SIZES | {"attention_bias": True}),
    "granite": granite_config(0, pattern="M-*-M-", **SIZES),
    "granite, experts": granite_config(
        0,
        True,
        pattern="ME*EME",
        **SIZES | {"intermediate_size": 0},
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        moe_shared_expert_intermediate_size=12,
    ),
    "granite, tied": granite_config(1, pattern="M-*-M-", tie_word_embeddings=True, **SIZES),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> HybridLM:
    return random_model(CONFIGS[request.param])


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS])
def test_slicing_keeps_its_laws(model: HybridLM, kinds: tuple[str, ...], tmp_path: Path) -> None:
    config, draw = model.config, random.Random(len(kinds))
    if not {axis.kind for axis in axis_sizes(config)} & {*kinds}:
        pytest.skip("the model has no such axis")
    everything = Selection(tuple(range(6)), {axis: tuple(range(size)) for axis, size in axis_sizes(config).items()})
    same = slice_model(model, everything).state_dict()
    assert slice_config(config, everything) == config
    assert all(torch.equal(tensor, same[name]) for name, tensor in model.state_dict().items())
    selection = draw_selection(config, kinds, draw)
    smaller = slice_model(model, selection)
    table = tensor_table(smaller.config)
    assert {name: tuple(w.shape) for name, w in smaller.named_parameters()} == {n: s.shape for n, s in table.items()}
    assert count_parameters(smaller.config) == sum(weight.numel() for weight in smaller.parameters())
    # Out of a folder, rows by rows, it is the same.
    save_model(model, tmp_path / "model")
    source = open_checkpoint(tmp_path / "model")
    rows: dict[str, list[torch.Tensor]] = {}
    for name, part in slice_rows(source.rows, config, selection, dtypes=dict.fromkeys(source.stored, torch.float64)):
        rows.setdefault(name, []).append(part)
    assert rows.keys() == table.keys()
    assert all(torch.equal(torch.cat(parts), smaller.state_dict()[name]) for name, parts in rows.items())


def parts_of(config: HybridConfig, mixer: str) -> list[str]:
    """Where the layers' mixers of a kind stand."""
    letters = {"mamba": {"M": "", "P": "mamba."}, "attention": {"*": "", "P": "attention."}, "mlp": {"-": ""},
               "experts": {"E": ""}}[mixer]  # fmt: skip
    return [f"layers.{i}.mixer.{letters[k]}" for i, k in enumerate(config.pattern) if k in letters]


def inner_of(config: HybridConfig, inner: int, expert: int, shared: int) -> dict[str, int]:
    """Widths of the MLP, or of the experts."""
    if "E" not in config.pattern:
        return {"intermediate_size": inner}
    return {"moe_intermediate_size": expert, "moe_shared_expert_intermediate_size": shared}


@torch.no_grad()
def test_units_that_give_nothing_go_unnoticed(model: HybridLM) -> None:
    """They score zero, and without them the logits are the same; where a norm counts them, as far as it rescales."""
    config = model.config
    without = filled(config, model.state_dict().items(), model)
    for prefix in parts_of(config, "mlp"):
        without.get_parameter(prefix + "up_proj.weight")[3:9] = 0
        if config.mlp_bias:
            without.get_parameter(prefix + "up_proj.bias")[3:9] = 0
    for prefix in parts_of(config, "experts"):
        without.get_parameter(prefix + "experts.up_proj")[:, 2:4] = 0
        without.get_parameter(prefix + "shared_experts.up_proj.weight")[3:9] = 0
    for prefix in parts_of(config, "attention"):
        without.get_parameter(prefix + "o_proj.weight")[:, [4, 5, 6, 7, 12, 13, 14, 15]] = 0
    inner = [channel for head in (1, 6) for channel in range(4 * head, 4 * head + 4)]
    for prefix in parts_of(config, "mamba"):
        without.get_parameter(prefix + "in_proj.weight")[[32 + channel for channel in inner]] = 0
        for name in ("conv1d.weight", "conv1d.bias"):
            without.get_parameter(prefix + name)[inner] = 0
    batch = draw_rows(61, 4)
    scores = score_widths(without, [batch], ActivationScores(mamba_source="out", ffn_source="act"))
    mamba = next(axis for axis in scores if axis.kind == "mamba_heads")
    assert scores[mamba].sum(1).nonzero().flatten().tolist() == [0, 2, 3, 4, 5, 7]
    taylor = score_widths(without, [batch], TaylorScores())
    for axis, left in {"ffn": 18, "expert_ffn": 6, "shared_ffn": 6}.items():
        assert all(values.nonzero().numel() == left for own, values in taylor.items() if own.kind == axis)
    times = score_widths(without, [batch], ActivationScores(times_output=True))
    heads = next(axis for axis in scores if axis.kind == "attn_heads")
    assert times[heads].nonzero().flatten().tolist() == [0, 2]
    merged = {**scores, **{axis: values for axis, values in times.items() if axis.kind == "attn_heads"}}
    target = Target(**inner_of(config, 18, 6, 6), num_attention_heads=2, mamba_num_heads=6)
    smaller = slice_model(without, select(config, merged, (), target))
    expected = without(batch.input_ids, seq_idx=batch.seq_idx)
    assert_close("logits", expected, smaller(batch.input_ids, seq_idx=batch.seq_idx), 1e-9)


def test_scores_are_the_same_out_of_a_folder(model: HybridLM, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model", dtype=torch.float32)
    batches = [draw_rows(61, 4), draw_rows(61, 3)]
    resident = load_model(tmp_path / "model")
    layers = open_layers(tmp_path / "model", torch.float32, torch.device("cpu"), offload="disk")
    for metric in (TaylorScores(), ActivationScores(), MagnitudeScores()):
        found, expected = (score_widths(source, batches, metric) for source in (layers, resident))
        assert all(torch.equal(found[axis], expected[axis]) for axis in expected)
        assert all(float(values.max()) > 0 for values in expected.values())
    one = score_layers(model, batches, remove=2)
    blocks = [(start, start + 1) for start in range(0, 6, 2)]
    costs = [naive_mse(model, batches, gone) for gone in blocks]
    assert sorted(one.order) == list(blocks[costs.index(min(costs))])


def test_the_loss_that_scores_see_is_the_models(model: HybridLM) -> None:
    """The gradient of the final norm's output, by finite differences of the loss from logits."""
    batch = draw_rows(61, 1)
    scores = score_widths(model, [batch], TaylorScores())[Axis("hidden")][-1]
    with torch.no_grad():
        seen: dict[int, torch.Tensor] = {}
        model.hidden_states(batch.input_ids, seq_idx=batch.seq_idx, observe=lambda name, layer, x: seen.update(
            {layer: x} if name == "hidden" else {}))  # fmt: skip
        normed = seen[model.config.num_layers]

        def loss(gate: torch.Tensor) -> float:
            logits = (normed * gate) @ model.head_weight.T * model.config.multipliers.logits
            return float(F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()))

        for channel in (0, 7):
            step = torch.zeros(16, dtype=torch.float64)
            step[channel] = 1e-5
            assert float(scores[channel]) == pytest.approx(abs(loss(1 + step) - loss(1 - step)) / 2e-5, rel=1e-4)


def test_rotation_leaves_the_function(model: HybridLM) -> None:
    if model.config.tie_word_embeddings:
        with torch.no_grad():
            model.norm_f.weight.fill_(0.7)  # what a rotation before a tied head asks for
    ids = torch.randint(61, (2, 9))
    with torch.no_grad():
        assert_close("logits", model(ids), turned(model)(ids), 1e-9)


def test_repair_comes_nearer_than_slicing(model: HybridLM) -> None:
    batch = draw_rows(61, 16)
    scores = score_widths(model, [batch])
    target = Target(hidden_size=12, num_attention_heads=2, mamba_num_heads=6, **inner_of(model.config, 16, 6, 8))
    selection = select(model.config, scores, (4, 5), target.replace(layers=2))
    distances = []
    with torch.no_grad():
        logits = model(batch.input_ids, seq_idx=batch.seq_idx)
        for repair in (Repair(norms="none"), Repair(norms="measured", least_squares=True)):
            smaller = repair_model(model, selection, [batch], repair)
            distances.append(float((smaller(batch.input_ids, seq_idx=batch.seq_idx) - logits).square().mean()))
        assert distances[1] < distances[0]
        # Uncut, the fit finds every weight where it was: each writer's multiplier is in it.
        same = repair_model(model, Selection(tuple(range(6))), [batch], Repair(norms="measured", least_squares=True))
        for name, tensor in model.state_dict().items():
            assert_close(name, tensor, same.state_dict()[name], 1e-6)


def test_the_fused_loss_is_that_of_the_logits(model: HybridLM, tmp_path: Path) -> None:
    """KL of teacher and student, whose logits' multipliers differ, and cross-entropy; then two steps of training."""
    own = model.config.multipliers
    sliced = slice_model(model, Selection((0, 1, 2, 3)))
    config = sliced.config.replace(multipliers=dataclasses.replace(own, head=own.head * 1.7))
    student = filled(config, sliced.state_dict().items(), sliced).train()
    batch = draw_batch(0, 2, 12, 61)
    loss = distillation_loss(model, DistillLoss(ce_weight=0.2))
    counted = batch.labels.flatten() != -100
    with torch.no_grad():
        ours, theirs = (m(batch.input_ids, seq_idx=batch.seq_idx).flatten(0, 1)[counted] for m in (student, model))
        kl = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
        entropy = F.cross_entropy(ours, batch.labels.flatten()[counted])
    found = float(loss(student, batch, float(counted.sum())).detach())
    assert found == pytest.approx(float(kl + 0.2 * entropy), rel=1e-6)

    def batches(start: int) -> Iterator[Any]:
        return iter([batch] * (3 - start))

    before = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    options = TrainOptions(steps=3, learning_rate=0.003, log_every=1, activation_checkpointing=True)
    assert train(student, loss, batches, options, tmp_path) == 3
    moved = {name for name, weight in student.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == before.keys()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


@torch.no_grad()
def test_an_engine_writes_what_the_model_does(model: HybridLM) -> None:
    single = filled(model.config, model.state_dict().items(), model).float()
    prompts = [torch.randint(61, (length,)).tolist() for length in (9, 3, 5)]
    engine = Engine(single, max_length=40, slots=2, prefill_chunk=4)
    for prompt, found in zip(prompts, engine.complete([Request(prompt, 8) for prompt in prompts]), strict=True):
        ids = torch.tensor([prompt])
        for _ in range(8):
            ids = torch.cat([ids, single(ids)[:, -1:].argmax(-1)], 1)
        expected = ids[0, len(prompt) :].tolist()
        assert found.tokens == (expected[: expected.index(2) + 1] if 2 in expected else expected)


@pytest.mark.parametrize("place", (Place("cpu", 1), Place("cuda", 80, "8.6")), ids=lambda place: place.device)
@pytest.mark.parametrize(
    "name", ("falcon, no norm", pytest.param("falcon, norm before the gate", marks=pytest.mark.slow), "granite")
)
def test_memory_is_the_simulations(name: str, place: Place) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 128, "mamba_num_heads": 16, "mamba_head_dim": 8, "vocab_size": 256}
    config = CONFIGS[name].replace(pattern=CONFIGS[name].pattern[:4], **wide, num_attention_heads=16)
    report = memory(config, 130, 2, chunk=96, place=place)
    simulation = simulate(config, 130, 2, chunk=96, place=place)
    assert abs(report.transient + report.workspace - simulation.transient) <= 0.01 * simulation.transient
    assert report.total <= simulation.weights + simulation.caches <= 1.15 * report.total


PRUNED = {
    "falcon, no norm": ("hidden_size=24", "intermediate_size=32", "num_attention_heads=2", "mamba_num_heads=6"),
    "falcon, norm after the gate": ("hidden_size=20", "mamba_head_dim=4", "layers=2"),
    "granite": ("hidden_size=16", "num_attention_heads=2", "mamba_num_heads=8", "intermediate_size=32"),
    "granite, experts": ("n_routed_experts=3", "moe_intermediate_size=6", "ssm_state_size=4",
                         "moe_shared_expert_intermediate_size=8"),
    "granite, tied": ("parameters=0.6", "mamba_head_dim=8"),
}  # fmt: skip


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("multiplied"))


@pytest.mark.parametrize("name", PRUNED)
def test_the_commands_prune_and_export(name: str, workshop: Path, tmp_path: Path) -> None:
    """Scored, pruned and repaired on text, exported; transformers' class opens what comes out, with the same logits."""
    transformers = pytest.importorskip("transformers")
    vocabulary = json.loads((workshop / "model" / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 32, "head_dim": 8, "mamba_head_dim": 8, "norm_eps": 1e-5}
    config = CONFIGS[name].replace(vocab_size=vocabulary, **sizes, **inner_of(CONFIGS[name], 48, 16, 16))
    save_model(random_model(config, dtype=torch.float32), tmp_path / "model", tokenizer_from=workshop / "words")
    model, data = f"model={tmp_path / 'model'}", f"data={workshop / 'text'}"
    tokens = ("importance.tokens=256", "importance.depth_tokens=128", "importance.remove_layers=1", "seq_len=32")
    dtype = "bfloat16" if "experts" in name else "float32"
    steps = [
        ("score", model, data, f"output={tmp_path / 'scores'}", *tokens),
        ("prune", model, data, f"scores={tmp_path / 'scores'}", f"output={tmp_path / 'pruned'}", "repair.tokens=256",
         "seq_len=32", *(f"target.{word}" for word in PRUNED[name])),
        ("export", f"model={tmp_path / 'pruned'}", f"output={tmp_path / 'exported'}", f"dtype={dtype}"),
    ]  # fmt: skip
    for step in steps:
        code, _, err = limbeck(*step)
        assert code == 0, err
    ours = load_model(tmp_path / "exported")
    alike = (
        {"experts_implementation": "eager"} if "E" in config.pattern else {}
    )  # widths that a grouped product refuses
    found = json.loads((tmp_path / "exported" / "export.json").read_text()).get("cautions", [])
    assert any("experts are 6 wide" in caution for caution in found) == bool(alike)
    assert count_parameters(ours.config) < count_parameters(config)
    assert ours.config.multipliers == config.multipliers
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", dtype=torch.float32, output_loading_info=True, **alike
    )
    assert type(theirs).__name__ == config.family_record.architecture
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids = torch.randint(1, vocabulary, (2, 21))
    with torch.no_grad():
        assert_close("logits", theirs(ids, use_cache=False).logits, ours(ids), 1e-5)
    if name == "granite":
        words = ("target.hidden_size=24", f"output={tmp_path / 'wrong'}")
        code, _, err = limbeck("prune", model, f"scores={tmp_path / 'scores'}", *words)
        assert code == 2 and "hidden_size=16 num_attention_heads=2" in err and len(err.splitlines()) == 1
        assert not (tmp_path / "wrong").exists()
