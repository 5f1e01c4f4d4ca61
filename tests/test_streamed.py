"""A model whose layers are read when their turn comes is the model in memory to the bit, and holds one layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from limbeck.models import export
from limbeck.models.axes import tensor_table
from limbeck.models.checkpoint import load_model, save_model
from limbeck.models.config import HybridConfig
from limbeck.models.served_inputs import load_served, served
from limbeck.models.streamed import open_streamed
from limbeck.tests.helpers import any_config, dense_config, moe_config, random_model, tiny_config

CONFIGS = {
    "hybrid": tiny_config(), "tied": dense_config(1, "qwen3").replace(tie_word_embeddings=True, pattern="*-" * 3),
    "experts": moe_config(), "ahead": moe_config(mtp_steps=1, mtp_pattern="*E"), "drawn": any_config(50),
}  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_is_the_model_in_memory(config: HybridConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    save_model(random_model(config, dtype=torch.float32), tmp_path / "model")
    ids, seq_idx = torch.randint(config.vocab_size, (2, 19)), (torch.arange(19) > 8).int().expand(2, -1)
    with torch.no_grad():
        for _ in range(2):  # each pass reads anew
            whole, streamed = load_model(tmp_path / "model", dtype), open_streamed(tmp_path / "model", dtype)
            assert torch.equal(whole(ids, seq_idx=seq_idx), streamed(ids, seq_idx=seq_idx))
        rounded = load_model(tmp_path / "model", torch.bfloat16).float()
        assert torch.equal(rounded(ids), open_streamed(tmp_path / "model", rounded=torch.bfloat16)(ids))
        assert torch.equal(whole.head_weight, streamed.head_weight)


def test_one_layer_is_in_memory(tmp_path: Path) -> None:
    config = tiny_config()
    save_model(random_model(config, dtype=torch.float32), tmp_path / "model")
    model, seen = open_streamed(tmp_path / "model"), []

    def observe(name: str, layer: int, _: torch.Tensor) -> None:
        if name == "hidden" and layer < config.num_layers:
            seen.append([number for number, block in enumerate(model.layers) if not block.norm.weight.is_meta])

    with torch.no_grad():
        model.hidden_states(torch.zeros(1, 5, dtype=torch.int64), observe=observe)
    assert seen == [[number] for number in range(config.num_layers)]
    held = {name for name, weight in model.state_dict().items() if not weight.is_meta}
    assert held == {name for name, spec in tensor_table(config).items() if spec.layer is None}


def test_inputs_are_rounded_as_in_memory(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from limbeck.models.quantise import write_quantised

    config = tiny_config(hidden_size=64, intermediate_size=96)
    save_model(random_model(config, dtype=torch.float32), tmp_path / "model")
    (tmp_path / "rounded").mkdir()
    write_quantised(tmp_path / "rounded", tmp_path / "model", "w8a8", check_tokens=8, seed=0)
    ids = torch.randint(config.vocab_size, (2, 19))
    with torch.no_grad():
        whole = load_served(tmp_path / "rounded", torch.float32, "cpu")
        assert torch.equal(whole(ids), served(open_streamed(tmp_path / "rounded"), tmp_path / "rounded")(ids))
        assert not torch.equal(whole(ids), open_streamed(tmp_path / "rounded")(ids))


def test_transformers_is_not_compared_where_it_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole model of float32 that would take the machine down is left out, which is said."""
    pytest.importorskip("transformers")
    config = tiny_config()
    save_model(random_model(config, dtype=torch.float32), tmp_path / "model")
    monkeypatch.setattr(export, "free_memory", lambda device: 1000)
    parity = export.transformers_parity(tmp_path / "model", torch.zeros(1, 4, dtype=torch.int64), config, torch.ones(1))
    assert parity.relative_rms is None and "memory" in str(parity.note) and "free" in parity.sentence()
    parity.check()
