"""Rotary positions that are stretched, and biases of projections: beside transformers, and through pruning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models.axes import Role, tensor_table
from limbeck.models.checkpoint import load_config, load_model, save_model
from limbeck.models.config import HybridConfig
from limbeck.models.hybrid import HybridLM, initialize
from limbeck.models.rope import YarnRope
from limbeck.prune.choose import select
from limbeck.prune.importance import score_widths
from limbeck.prune.repair import Repair, repair_model
from limbeck.prune.rotation import Rotation, rotated
from limbeck.prune.slice import filled
from limbeck.prune.target import Target
from limbeck.tests.family_draws import falcon_config, stretched_config
from limbeck.tests.family_helpers import check_parity, some_slow
from limbeck.tests.gguf_helpers import gguf_config
from limbeck.tests.helpers import assert_close, dense_config, random_model
from limbeck.tests.pruning_helpers import draw_rows


@pytest.mark.parametrize("seed", some_slow(48, 16))
def test_transformers_computes_the_same(seed: int, tmp_path: Path) -> None:
    """24 configs a family: by turns llama and qwen3, and in pairs llama3 and yarn."""
    check_parity(stretched_config(seed), seed, tmp_path)


def test_public_spellings_are_kept() -> None:
    """The numbers of Llama 3.2 1B, and of DeepSeek-R1's distillation into Qwen3 8B, whose attn_factor transformers does
    not read."""
    llama3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
              "original_max_position_embeddings": 8192}  # fmt: skip
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
            "attn_factor": 0.8782488562869419}  # fmt: skip
    for family, scaling in (("llama", llama3), ("qwen3", yarn)):
        hf = dense_config(6, family).to_hf() | {"rope_theta": 500000.0, "rope_scaling": scaling}
        assert HybridConfig.from_hf(hf).to_hf() == hf
        newer = {key: value for key, value in hf.items() if key not in ("rope_theta", "rope_scaling")}
        newer["rope_parameters"] = {**scaling, "rope_theta": 500000.0}
        assert HybridConfig.from_hf(newer).to_hf() == hf
    without = {key: value for key, value in yarn.items() if key != "original_max_position_embeddings"}
    config = HybridConfig.from_hf(dense_config(6, "qwen3").to_hf() | {"rope_scaling": without})
    assert config.rope_scaling == YarnRope(4.0, config.max_position_embeddings)


@pytest.mark.parametrize("family", ("llama", "qwen3", "granitemoehybrid", "falcon_h1"))
@pytest.mark.parametrize("own", ({}, {"original_max_position_embeddings": 100}))
@pytest.mark.parametrize(
    "scaling",
    (
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
)
def test_a_length_beside_the_scaling_comes_first(
    family: str, own: dict[str, int], scaling: dict[str, Any], tmp_path: Path
) -> None:
    """As transformers reads it; what is written has it in one place."""
    transformers = pytest.importorskip("transformers")
    changes: dict[str, Any] = {"rope_theta": 1e4, "max_position_embeddings": 256}
    config = falcon_config(1, vocab_size=60, **changes) if family == "falcon_h1" else gguf_config(family, 60, **changes)
    save_model(random_model(config, 1, torch.float32), tmp_path / "model")
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    content |= {"rope_scaling": scaling | own, "original_max_position_embeddings": 16}
    (tmp_path / "model" / "config.json").write_text(json.dumps(content))
    model = load_model(tmp_path / "model")
    found = model.config.rope_scaling
    assert found is not None and found.original_max_position_embeddings == 16
    save_model(model, tmp_path / "again")
    assert "original_max_position_embeddings" not in json.loads((tmp_path / "again" / "config.json").read_text())
    ids = torch.arange(1, 49)[None]
    for folder in ("model", "again"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        with torch.no_grad():
            assert_close(folder, theirs(ids, use_cache=False).logits, model(ids), 1e-5)


def test_folders_keep_them(tmp_path: Path) -> None:
    for seed in (0, 2, 12, 15):
        config = stretched_config(seed)
        save_model(random_model(config), tmp_path / str(seed))
        assert load_config(tmp_path / str(seed)) == config
        assert json.loads((tmp_path / str(seed) / "config.json").read_text())["rope_scaling"]["factor"]


@pytest.fixture(scope="module")
def biased() -> HybridLM:
    config = dense_config(3, "llama").replace(
        attention_bias=True, mlp_bias=True, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
        intermediate_size=24, pattern="*-*-*-", tie_word_embeddings=False, norm_eps=1e-12,
    )  # fmt: skip
    return random_model(config)


def test_biases_begin_at_zero(biased: HybridLM) -> None:
    model = HybridLM(biased.config)
    initialize(model, torch.Generator().manual_seed(0))
    for name, weight in model.named_parameters():
        assert name.endswith(".bias") == (not weight.any()), name
    assert sum(spec.role is Role.VECTOR for spec in tensor_table(biased.config).values()) == 3 * 7


def test_rotation_turns_biases_too(biased: HybridLM) -> None:
    turn = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    get_tensor = rotated(biased.state_dict().__getitem__, biased.config, Rotation(turn, 0), "cpu")
    turned = filled(biased.config, ((name, get_tensor(name)) for name in tensor_table(biased.config)), biased)
    ids = torch.randint(biased.config.vocab_size, (2, 9))
    with torch.no_grad():
        assert_close("logits", biased(ids), turned(ids), 1e-9)


def test_repair_with_biases_comes_nearer_than_slicing(biased: HybridLM, tmp_path: Path) -> None:
    batch = draw_rows(biased.config.vocab_size, 16)
    target = Target(hidden_size=12, intermediate_size=16, num_attention_heads=2)
    selection = select(biased.config, score_widths(biased, [batch]), (), target)
    distances = []
    with torch.no_grad():
        logits = biased(batch.input_ids, seq_idx=batch.seq_idx)
        for repair in (Repair(), Repair(norms="measured", least_squares=True, rotate=True)):
            smaller = repair_model(biased, selection, [batch], repair)
            distances.append(float((smaller(batch.input_ids, seq_idx=batch.seq_idx) - logits).square().mean()))
    assert distances[1] < 0.6 * distances[0]
    # Uncut, the fit leaves everything where it was: biases are no part of what the matrices have to make up for.
    whole = select(biased.config, score_widths(biased, [batch]), (), Target())
    same = repair_model(biased, whole, [batch], Repair(norms="measured", least_squares=True))
    with torch.no_grad():
        assert_close("uncut", logits, same(batch.input_ids, seq_idx=batch.seq_idx), 1e-9)
    save_model(smaller, tmp_path / "smaller")
    again = load_model(tmp_path / "smaller", torch.float64)
    assert all(torch.equal(weight, again.get_parameter(name)) for name, weight in smaller.named_parameters())
