"""nemotron_h_puzzle: layers of experts with widths and choices of their own are read, run, cut and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models.axes import HIDDEN, Axis, axis_sizes, tensor_table
from limbeck.models.checkpoint import load_model, open_checkpoint, save_model
from limbeck.models.config import HybridConfig
from limbeck.models.cost.hardware import Place
from limbeck.models.cost.inference import memory
from limbeck.models.cost.parameters import count_active, count_parameters
from limbeck.models.cost.simulate import simulate
from limbeck.models.cost.speed import flops_per_token
from limbeck.models.cost.training import Training, train_memory
from limbeck.models.errors import InputError
from limbeck.models.families.family import stored_tensors
from limbeck.models.generate.cache import Cache
from limbeck.prune.choose import select
from limbeck.prune.depth import random_layers, score_layers
from limbeck.prune.importance import score_widths
from limbeck.prune.repair import Repair, repair_model
from limbeck.prune.slice import Selection, slice_model
from limbeck.prune.target import Target
from limbeck.tests.helpers import assert_close, moe_config, random_model
from limbeck.tests.pruning_helpers import draw_rows
from limbeck.tests.puzzle_config import WIDTHS, puzzle


@pytest.fixture(scope="module")
def config() -> HybridConfig:
    return HybridConfig.from_hf(puzzle())


def test_a_config_is_read_and_written(config: HybridConfig) -> None:
    assert config.pattern == "Ma*bac" and config.variants == (("a", 12, 2), ("b", 8, 3), ("c", 20, 1))
    written = config.to_hf()
    assert written["block_configs"] == puzzle()["block_configs"] and written["model_type"] == "nemotron_h_puzzle"
    assert written["layers_block_type"] == ["mamba", "moe", "attention", "moe", "moe", "moe"]
    assert written["architectures"] == ["NemotronHPuzzleForCausalLM"] and "moe_intermediate_size" not in written
    assert HybridConfig.from_hf(written) == config
    assert config.extra == HybridConfig.from_hf(written).extra
    ahead = [{"block_type": "attention"}, {**puzzle()["block_configs"][1], "moe_intermediate_size": 28}]
    drafting = HybridConfig.from_hf(puzzle(num_nextn_predict_layers=1, mtp_block_configs=ahead))
    assert drafting.mtp_pattern == "*d" and drafting.variants[3] == ("d", 28, 2)
    assert HybridConfig.from_hf(drafting.to_hf()) == drafting and drafting.to_hf()["mtp_block_configs"] == ahead
    same = [block | {"moe_intermediate_size": 8, "num_experts_per_tok": 1} if len(block) > 1 else block
            for block in puzzle()["block_configs"]]  # fmt: skip
    uniform = HybridConfig.from_hf(puzzle(block_configs=same))
    assert uniform.pattern == "ME*EEE" and uniform.variants == () and uniform.to_hf()["block_configs"] == same


@pytest.mark.parametrize("steps", ({}, {"num_nextn_predict_layers": 0}, {"num_nextn_predict_layers": None}))
def test_blocks_of_steps_that_are_not_there(steps: dict[str, Any], config: HybridConfig) -> None:
    """Widths of their own are no variants of the model's."""
    ahead = [{"block_type": "attention"}, {**puzzle()["block_configs"][1], "moe_intermediate_size": 28}]
    found = HybridConfig.from_hf(puzzle(mtp_block_configs=ahead, **steps))
    assert found == config and found.mtp_steps == 0
    assert "mtp_block_configs" not in found.to_hf()
    with pytest.raises(InputError, match="mtp_block_configs is no list"):
        HybridConfig.from_hf(puzzle(mtp_block_configs=[{}], **steps))


def test_the_least_number_of_layers_of_experts_holds(config: HybridConfig) -> None:
    left = {"moe": 3}
    for seed in range(8):
        gone = random_layers(config, remove=3, seed=seed, min_layers=left).order
        assert sum(kind.key == "moe" for layer, kind in enumerate(config.kinds) if layer not in gone) >= 3
    with pytest.raises(InputError, match="at most 3"):
        random_layers(config, remove=4, seed=0, min_layers=left)


def test_tensors_and_counts_by_hand(config: HybridConfig) -> None:
    stored = stored_tensors(config)
    assert stored["backbone.layers.3.mixer.experts.5.up_proj.weight"].shape == (8, 16)
    assert stored["backbone.layers.5.mixer.experts.0.down_proj.weight"].shape == (16, 20)
    # Beside it a model whose experts are all of width 12: three widths less or more, of six experts each.
    alike = config.replace(pattern="ME*EEE", variants=(), moe_intermediate_size=12, num_experts_per_tok=2)
    assert count_parameters(config) - count_parameters(alike) == 6 * 2 * 16 * (8 - 12 + 20 - 12)
    unused = 2 * 16 * (4 * 12 + 3 * 8 + 4 * 12 + 5 * 20)
    assert count_parameters(config) - count_active(config) == unused
    assert flops_per_token(config, 7) - flops_per_token(alike, 7) == 2 * 2 * 16 * (3 * 8 + 20 - 4 * 12)
    assert not any(axis.kind in ("expert_ffn", "top_k") for axis in axis_sizes(config))


@torch.no_grad()
def test_it_runs_as_layers_of_each_kind_do(config: HybridConfig) -> None:
    """Each layer gives what it does in a model of experts that are all like its own."""
    model = random_model(config)
    stream = torch.randn(2, 9, 32, dtype=torch.float64)
    for layer, pair in enumerate((None, *WIDTHS)):
        if pair is not None:
            alone = random_model(
                config.replace(pattern="E", variants=(), moe_intermediate_size=pair[0], num_experts_per_tok=pair[1])
            )
            alone.layers[0].load_state_dict(model.layers[layer].state_dict())
            expected = alone.forward_layers(stream, 0, 1)
            assert torch.equal(expected, model.forward_layers(stream, layer, layer + 1))
    ids = torch.randint(97, (2, 12))
    cache = Cache(config, 2, 12, dtype=torch.float64, ssm_dtype=torch.float64)
    parts = [model(part, cache=cache) for part in ids.split((5, 1, 6), 1)]
    assert_close("decoding", model(ids), torch.cat(parts, 1), 1e-9)


def test_folders_cuts_and_repair(config: HybridConfig, tmp_path: Path) -> None:
    model, batch = random_model(config), draw_rows(97, 8)
    save_model(model, tmp_path / "model", dtype=torch.float64)
    again = load_model(tmp_path / "model", torch.float64)
    assert again.config == config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    scores = score_widths(model, [batch])
    assert not any(axis.kind in ("expert_ffn", "top_k") for axis in scores)
    order = score_layers(model, [batch], remove=2).order
    target = Target(layers=4, hidden_size=24, n_routed_experts=4, moe_shared_expert_intermediate_size=12)
    selection = select(config, scores, order, target)
    smaller = repair_model(model, selection, [batch], Repair(rotate=True, norms="measured", least_squares=True))
    assert smaller.config.pattern == "".join(config.pattern[layer] for layer in selection.layers)
    shapes = {name: tuple(tensor.shape) for name, tensor in smaller.state_dict().items()}
    assert shapes == {name: spec.shape for name, spec in tensor_table(smaller.config).items()}
    save_model(smaller, tmp_path / "smaller")
    ids = torch.randint(97, (1, 6))
    with torch.no_grad():
        opened = load_model(tmp_path / "smaller", torch.float64)
        assert_close("logits", smaller(ids), opened(ids), 1e-6)
    assert open_checkpoint(tmp_path / "smaller").config.n_routed_experts == 4
    kept = slice_model(model, Selection((0, 3), {HIDDEN: tuple(range(20)), Axis("experts", 3): (5, 1, 2)}))
    assert kept.config.pattern == "Mb" and kept.config.hidden_size == 20
    with pytest.raises(InputError, match=r"num_experts_per_tok .3. is more than the experts to choose from .2 of"):
        slice_model(model, Selection((0, 3), {Axis("experts", 3): (5, 1)}))
    with pytest.raises(InputError, match="moe_intermediate_size is 4, but no layer"):
        select(config, scores, (), Target(moe_intermediate_size=4))


def test_memory_is_estimated(config: HybridConfig) -> None:
    place = Place("cuda", 80, "8.6")
    report, found = memory(config, 300, 2, chunk=64, place=place), simulate(config, 300, 2, chunk=64, place=place)
    assert report.transient + report.workspace == pytest.approx(found.transient, rel=0.01)
    assert train_memory(config, config, Training(2, 64, device="cpu")).total > 16 * count_parameters(config)


def changed(number: int, **changes: Any) -> dict[str, Any]:
    blocks = [dict(block) for block in puzzle()["block_configs"]]
    blocks[number] |= changes
    return {"block_configs": blocks}


@pytest.mark.parametrize(
    ("change", "says"),
    (
        ({"block_configs": None}, "block_configs is missing"),
        ({"block_configs": [7]}, "expected an object"),
        (changed(0, block_type=["mamba"]), "no list of blocks"),
        (changed(1, n_routed_experts=[6]), "several values of n_routed_experts"),
        (changed(1, n_routed_experts=8), "several values of n_routed_experts"),
        (changed(3, moe_intermediate_size=0), "moe_intermediate_size of a block is 0"),
        (changed(3, num_experts_per_tok=7), "num_experts_per_tok .7. is more than the experts"),
        (changed(0, block_type="window"), "'window', which is not supported"),
    ),
)
def test_wrong_configs_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        HybridConfig.from_hf(puzzle(**change))
    assert "\n" not in str(caught.value)


def test_a_letter_without_a_pair_is_unknown() -> None:
    with pytest.raises(InputError, match="unknown letter 'q'"):
        moe_config(pattern="Mq")
