"""Folders of Falcon-H1 and Granite in bfloat16 come back bit for bit, and what is estimated of them holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from limbeck.models.checkpoint import load_model, open_checkpoint, save_model, stream_rows
from limbeck.models.config import HybridConfig
from limbeck.models.cost.hardware import Hardware
from limbeck.models.cost.parameters import count_active, count_parameters
from limbeck.models.cost.speed import flops_per_token, throughput
from limbeck.models.cost.training import Training, train_memory
from limbeck.models.named import model_config
from limbeck.prune.patterns import Rules
from limbeck.prune.scores import LayerScores
from limbeck.prune.search import Budget, Requests, Space, find_candidates, find_depths
from limbeck.scripts.run.compose import build
from limbeck.tests.family_draws import falcon_config, granite_config
from limbeck.tests.helpers import random_model

CONFIGS = {
    "falcon": falcon_config(4),
    "granite": granite_config(3),
    "granite, experts": granite_config(3, True),
}
CARD = Hardware("testcard", 2.0, 1.0, 600.0, 70.0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_in_bfloat16_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    """No multiplier is in a weight: neither reading nor writing rounds, and transformers' own folder is the same."""
    transformers = pytest.importorskip("transformers")
    model = random_model(CONFIGS[name], dtype=torch.float32)
    save_model(model, tmp_path / "first", dtype=torch.bfloat16)
    save_model(load_model(tmp_path / "first", torch.bfloat16), tmp_path / "again", dtype=torch.bfloat16)
    assert contents(tmp_path / "again") == contents(tmp_path / "first")
    save_model(model, tmp_path / "shards", dtype=torch.bfloat16, max_shard_bytes=3000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards", dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = model.state_dict()
    for folder in ("shards", "theirs"):
        rows: dict[str, list[torch.Tensor]] = {}
        for tensor, part in stream_rows(open_checkpoint(tmp_path / folder)):
            rows.setdefault(tensor, []).append(part)
        assert rows.keys() == expected.keys()
        for tensor, parts in rows.items():
            # Routers of ours are float32 whatever the rest is.
            dtype = torch.float32 if folder == "shards" and tensor.endswith("gate.weight") else torch.bfloat16
            assert torch.equal(torch.cat(parts), expected[tensor].to(dtype)), (folder, tensor)


@pytest.mark.parametrize("name", ("falcon-h1-0.5b", "granite-4.0-h-1b", "granite-4.0-h-tiny"))
def test_named_sizes_are_estimated(name: str) -> None:
    config = model_config(name)
    speed = throughput(config, Hardware("card", 80.0, 79.0, 2000.0, 900.0), budget=2**36, input_tokens=64,
                       output_tokens=16, batch=1)  # fmt: skip
    assert speed is not None and speed.tokens_per_second > 0
    # A multiply-add for every parameter that a token meets but norms and the look-up; scan and attention on top.
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert 1 < flops_per_token(config, 64) / (2 * (count_active(config) - table)) < 1.1


@pytest.mark.parametrize("name", CONFIGS)
def test_training_memory_is_estimated(name: str) -> None:
    config = CONFIGS[name]
    report = train_memory(config, config, Training(2, 32, device="cpu"))
    assert report.total > 16 * count_parameters(config)
    assert all(any(f"({letter})" in moment for moment in report.moments) for letter in set(config.pattern))


def test_a_search_keeps_to_what_readers_load() -> None:
    """Of hidden sizes and heads those that go together are candidates, and no others."""
    config: HybridConfig = granite_config(0, pattern="M-*-M-", hidden_size=32, num_attention_heads=4, head_dim=8,
                                          num_key_value_heads=2, mamba_num_heads=16, mamba_head_dim=4, n_groups=1,
                                          vocab_size=64, intermediate_size=24)  # fmt: skip
    words = {"hidden_size": [16, 24, 32], "num_attention_heads": [2, 4], "mamba_num_heads": [4, 8, 16], "align": 4}
    space = build(Space, words)
    depths = find_depths(config, space, Rules(), LayerScores(order=()))
    found = find_candidates(config, space, depths, Budget(2**30, 64), CARD, Requests(8, 8))
    sizes = {(c.config.hidden_size, c.config.num_attention_heads, c.config.mamba_num_heads) for c in found.candidates}
    assert sizes == {(32, 4, 8), (32, 4, 16), (16, 2, 4), (16, 2, 8), (16, 2, 16)}
