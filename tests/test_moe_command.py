"""Commands on models of experts: wrong input is one line and exit 2, right input runs, alone and on two processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from limbeck.distill.average import write_trained
from limbeck.distill.losses import DistillLoss, distillation_loss
from limbeck.distill.options import TrainOptions
from limbeck.distill.parallel import load_frozen, load_trained
from limbeck.distill.text.packing import Batch
from limbeck.distill.trainer import train
from limbeck.models import processes
from limbeck.models.checkpoint import load_config, load_model, save_model
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.generate.cache import Cache
from limbeck.models.generate.decode import Decoder
from limbeck.prune.scores import LayerScores, Scores, save_scores
from limbeck.prune.width_metrics import RandomScores
from limbeck.tests.family_draws import granite_config
from limbeck.tests.helpers import assert_close, limbeck, moe_config, random_model
from limbeck.tests.processes_helpers import run_workers
from limbeck.tests.training_helpers import draw_batch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of experts, in one group and in three, with scores of each."""
    root = tmp_path_factory.mktemp("experts")
    for name, changes in {"one": {}, "three": {"n_group": 3, "topk_group": 2, "n_routed_experts": 12}}.items():
        config = moe_config(pattern="ME*E", **changes)
        save_model(random_model(config, dtype=torch.float32), root / name)
        save_scores(root / f"scores-{name}", Scores(RandomScores(0).scores(config), LayerScores()))
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97,
             "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8}  # fmt: skip
    granite = granite_config(1, experts=True, pattern="ME*E", attention_bias=False, **sizes)
    save_model(random_model(granite, dtype=torch.float32), root / "granite")
    save_scores(root / "scores-granite", Scores(RandomScores(0).scores(granite), LayerScores()))
    return root


@pytest.mark.parametrize(
    ("name", "target", "says"),
    (
        ("one", "n_routed_experts=1", "num_experts_per_tok (2) is more than the experts to choose from (1 of"),
        ("one", "n_routed_experts=7", "n_routed_experts is 7; expected a whole number of 1..6"),
        ("three", "n_routed_experts=7", "n_routed_experts is 7; expected a multiple of n_group (3)"),
        ("three", "n_routed_experts=3", "expected at least 2, whose sum ranks a group"),
        ("one", "moe_intermediate_size=0", "moe_intermediate_size is 0; expected a whole number of 1..12"),
        ("one", "moe_shared_expert_intermediate_size=21", "expected a whole number of 1..20"),
        ("one", "intermediate_size=8", "no layer of the pruned model has that width"),
        ("granite", "num_attention_heads=2", "give hidden_size=16 num_attention_heads=2 or hidden_size=32 num"),
        ("granite", "num_key_value_heads=1", "give hidden_size=8 num_attention_heads=1 or hidden_size=16 num"),
        ("granite", "hidden_size=24", "give hidden_size=16 num_attention_heads=2 or hidden_size=32 num"),
        ("granite", "mamba_num_heads=6", "no multiple of hidden_size 32, which readers of granitemoehybrid ask for"),
        ("granite", "mamba_num_heads=6", "give mamba_num_heads=4 or 8"),
        ("granite", "hidden_size=40", "hidden_size is 40; expected a whole number of 1..32, the source's width"),
    ),
)
def test_targets_that_cannot_be(name: str, target: str, says: str, workplace: Path, tmp_path: Path) -> None:
    words = [f"model={workplace / name}", f"scores={workplace / f'scores-{name}'}", f"output={tmp_path / 'out'}"]
    code, out, err = limbeck("prune", *words, f"target.{target}")
    assert code == 2 and says in err and err.count("\n") == 1, err
    assert "Traceback" not in err + out and not (tmp_path / "out").exists()


def test_heads_of_granite_go_with_a_hidden_size(workplace: Path, tmp_path: Path) -> None:
    words = [f"model={workplace / 'granite'}", f"scores={workplace / 'scores-granite'}", f"output={tmp_path / 'out'}"]
    code, out, err = limbeck("prune", *words, "target.hidden_size=16")
    assert code == 0 and "Mamba heads" in out, err
    config = load_config(tmp_path / "out")
    assert (config.hidden_size, config.num_attention_heads, config.mamba_num_heads) == (16, 2, 4)


@pytest.mark.parametrize(
    ("change", "says"),
    (
        ({"num_experts_per_tok": 9}, "num_experts_per_tok (9) is more than the experts"),
        ({"n_group": 4}, "n_routed_experts (6) is not divisible by n_group (4)"),
        ({"n_shared_experts": 2}, "n_shared_experts is 2; expected 1"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; experts of nemotron_h have 'sigmoid' alone"),
        ({"moe_router_score_function": "hash"}, "moe_router_score_function is 'hash'"),
        ({"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "?"}, "unknown letter '?'"),
    ),
)
def test_folders_that_cannot_be(change: dict[str, object], says: str, workplace: Path, tmp_path: Path) -> None:
    content = json.loads((workplace / "one" / "config.json").read_text())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(content | change))
    (tmp_path / "model" / "model.safetensors").write_bytes((workplace / "one" / "model.safetensors").read_bytes())
    code, out, err = limbeck("memory-fit", f"model={tmp_path / 'model'}", f"output={tmp_path / 'out'}")
    assert code == 2 and says in err and err.count("\n") == 1, err
    assert "Traceback" not in err + out and not (tmp_path / "out").exists()


def test_a_cut_of_every_width(workplace: Path, tmp_path: Path) -> None:
    words = [f"model={workplace / 'three'}", f"scores={workplace / 'scores-three'}", f"output={tmp_path / 'out'}"]
    target = {"n_routed_experts": 9, "moe_intermediate_size": 8, "moe_shared_expert_intermediate_size": 12,
              "hidden_size": 24}  # fmt: skip
    code, out, err = limbeck("prune", *words, *(f"target.{name}={value}" for name, value in target.items()))
    assert code == 0, err
    assert "active parameters" in out
    config = load_config(tmp_path / "out")
    assert all(getattr(config, name) == value for name, value in target.items())
    assert sum(weight.numel() for weight in load_model(tmp_path / "out").parameters()) == count_parameters(config)


@pytest.mark.parametrize("pack", (False, True))
@torch.no_grad()
def test_many_sequences_are_decoded_together(pack: bool, workplace: Path) -> None:
    """Rows of unequal lengths, a step at a time, as the engine does it; whatever each of them chooses."""
    model = load_model(workplace / "three")
    lengths, ids = (7, 1, 4), torch.randint(97, (3, 12))
    cache = Cache(model.config, 4, 16)
    for row, length in enumerate(lengths):
        model(ids[row : row + 1, :length], cache=cache.rows(row, 1))
        cache.lengths[row] = length
    decoder, whole = Decoder(model, cache, pack=pack), model(ids)
    for step in range(5):
        logits = decoder.step([int(ids[row, length + step]) for row, length in enumerate(lengths)])
        expected = torch.stack([whole[row, length + step] for row, length in enumerate(lengths)])
        assert_close(f"step {step}", expected, logits, 1e-5)


def distilled(folder: str | Path, out: str) -> None:
    """Two steps of distillation, in as many processes as there are."""
    folder, cpu = Path(folder), torch.device("cpu")
    teacher = load_frozen(folder / "teacher", torch.float32, cpu, split=True)
    student = load_trained(folder / "student", torch.float32, cpu, split=True)
    options = TrainOptions(steps=2, learning_rate=1e-3, log_every=1)

    def batches(start: int) -> Iterator[Batch]:
        return iter([draw_batch(seed, 4, 12, 97) for seed in range(start, 2)])

    train(student, distillation_loss(teacher, DistillLoss(ce_weight=0.5)), batches, options, folder / f"training-{out}")
    if processes.rank() == 0:
        (folder / out).mkdir()
    write_trained(folder / out, folder / f"training-{out}", options, student.model.config, torch.float32,
                  folder / "student")  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """Stacks of experts are split by experts, routers and multi-token prediction are whole; both come back whole."""
    config = moe_config(pattern="ME*E", mtp_steps=1, mtp_pattern="*E", n_routed_experts=5)
    for seed, name in enumerate(("teacher", "student")):
        save_model(random_model(config, seed, torch.float32), tmp_path / name)
    run_workers(distilled, tmp_path, "two")
    distilled(tmp_path, "one")
    start, one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("student", "one", "two"))
    assert start.keys() == one.keys() == two.keys()
    for name, tensor in one.items():
        assert_close(name, tensor - start[name], two[name] - start[name], 1e-2)
    assert not torch.equal(one["backbone.layers.1.mixer.gate.weight"], start["backbone.layers.1.mixer.gate.weight"])
    assert all(torch.equal(start[name], two[name]) for name in start if "mtp" in name or "e_score" in name)
