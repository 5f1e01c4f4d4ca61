"""llama and qwen3 on the command line: scored, pruned, exported, refused, and held against a card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from limbeck.models.checkpoint import load_config, save_model
from limbeck.models.families.known import FAMILIES
from limbeck.models.tokenizer import train_tokenizer
from limbeck.tests.helpers import (
    dense_config,
    limbeck,
    random_model,
)

DENSE = ("llama", "qwen3")


@pytest.fixture(scope="module", params=DENSE)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with its tokenizer."""
    root = tmp_path_factory.mktemp(request.param)
    (root / "words").mkdir()
    tokenizer = train_tokenizer(["def f(x):\n    return x\n" * 30], 300, root / "words")
    config = dense_config(1, request.param).replace(
        pattern="*-" * 3, vocab_size=tokenizer.vocab_size, num_attention_heads=4, num_key_value_heads=2, hidden_size=32,
        max_position_embeddings=4096,
    )  # fmt: skip
    save_model(random_model(config, dtype=torch.float32), root / "model", tokenizer_from=root / "words")
    return root / "model"


def text_of(folder: Path) -> Path:
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"# {number}\n" + "def f(x):\n    return x + 1\n\n" * 20)
    return folder


def test_the_command_line_prunes_and_exports(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    data = text_of(tmp_path / "text")
    scores, small, out = tmp_path / "scores", tmp_path / "small", tmp_path / "out"
    options = [f"model={source}", f"data={data}", "seq_len=32", "importance.tokens=256", "importance.depth_tokens=128"]
    code, _, err = limbeck("score", *options, "importance.remove_layers=4", f"output={scores}")
    assert (
        code == 2
        and "remove is 4; expected a number of at most 2" in err
        and err.count("\n") == 1
        and not scores.exists()
    )
    assert limbeck("score", *options, f"output={scores}")[0] == 0  # a block in order
    prune = [f"model={source}", f"scores={scores}", f"output={small}"]
    code, _, err = limbeck("prune", *prune, "target.layers=4")
    assert code == 2 and "expected 1..3" in err and not small.exists()
    code, _, err = limbeck("prune", *prune, "target.hidden_size=30")
    if load_config(source).family == "llama":
        assert code == 2 and "no multiple of num_attention_heads" in err and not small.exists()
    else:
        assert code == 0
        small = tmp_path / "smaller"
    prune[-1] = f"output={small}"
    code, text, _ = limbeck("prune", *prune, "target.layers=2", "target.hidden_size=24", "target.intermediate_size=8")
    assert code == 0 and "*-*-" in text
    code, text, _ = limbeck("export", f"model={small}", f"output={out}", "check_tokens=64")
    assert code == 0 and "relative RMS" in text and "dt >=" not in text
    found = json.loads((out / "export.json").read_text())["transformers"]
    family = load_config(source).family
    assert found["class"] == FAMILIES[family].architecture and found["relative_rms"] < 1e-5
    card = (out / "README.md").read_text()
    assert f"\n- {family}\n" in card and "model of attention and MLP layers" in card
    assert "Mamba" not in card and "time_step_min" not in card
    code, text, _ = limbeck("generate", f"model={out}", "prompt=def", "max_new_tokens=4")
    assert code == 0 and text.startswith("def")


def test_compress_counts_blocks_at_once(source: Path, tmp_path: Path) -> None:
    data = text_of(tmp_path / "text")
    words = ("compress", f"model={source}", f"data={data}", f"output={tmp_path / 'out'}", "target.hidden_size=24")
    code, _, err = limbeck(*words, "importance.remove_layers=3")
    assert (
        code == 2
        and "expected a number of at most 2, which is what 3 layers" in err
        and not (tmp_path / "out").exists()
    )


def test_memory_fit_of_qwen3() -> None:
    code, text, _ = limbeck("memory-fit", "model=qwen3-8b", "context=24576", "hardware=a10g")
    assert code == 0 and "8,190,735,360" in text and "36 attention layers" in text
    code, _, err = limbeck("memory-fit", "model=qwen3-8b", "context=40960", "batch=2", "hardware=a10g")
    assert code == 3 and "does not fit" in err
    code, _, err = limbeck("memory-fit", "model=qwen3-8b", "context=131072", "hardware=a10g")
    assert code == 2 and "40,960" in err
