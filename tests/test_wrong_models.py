"""What a folder says of itself and does not hold: ties, quantization, booleans; and scores of another model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models.checkpoint import (
    load_config,
    load_model,
    open_checkpoint,
    save_model,
    stream_rows,
    write_checkpoint,
)
from limbeck.models.errors import InputError
from limbeck.models.hybrid import HybridLM
from limbeck.tests.helpers import assert_close, dense_config, limbeck, random_model, tiny_config
from safetensors.torch import load_file, save_file

IDS = torch.arange(3, 19)[None]


def say(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))


@torch.no_grad()
def logits(model: HybridLM) -> torch.Tensor:
    return model(IDS).double()


@pytest.mark.parametrize("family", ("llama", "qwen3", "nemotron_h"))
def test_a_head_beside_tied_embeddings_is_kept(family: str, workshop: Path, tmp_path: Path) -> None:
    """In every reader and in what is written; one that is the embeddings is no head of its own."""
    config = tiny_config() if family == "nemotron_h" else dense_config(2, family)
    model = random_model(config.replace(tie_word_embeddings=False, vocab_size=320, pad_token_id=0)).float()
    save_model(model, tmp_path / "model", tokenizer_from=workshop / "words")
    say(tmp_path / "model", tie_word_embeddings=True)
    assert not load_config(tmp_path / "model").tie_word_embeddings
    assert_close("logits", logits(model), logits(load_model(tmp_path / "model")), 1e-6)
    if family != "llama":  # whose sizes drawn here transformers refuses
        code, _, err = limbeck("export", f"model={tmp_path / 'model'}", f"output={tmp_path / 'out'}", "dtype=float32")
        assert code == 0, err
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
        assert_close("exported", logits(model), logits(load_model(tmp_path / "out")), 1e-6)
    path = tmp_path / "model" / "model.safetensors"
    tensors, table = load_file(path), config.family_record.outer["embeddings.weight"]
    tensors["lm_head.weight"] = tensors[str(table)].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    assert load_config(tmp_path / "model").tie_word_embeddings == (family != "nemotron_h")


@pytest.mark.parametrize("shape", ((), (0,), (3,), (320, 0), (0, 32), (2, 3, 4)))
def test_a_head_of_another_shape_beside_tied_embeddings(shape: tuple[int, ...], tmp_path: Path) -> None:
    config = dense_config(2, "llama").replace(vocab_size=320, pad_token_id=0, tie_word_embeddings=True)
    save_model(random_model(config).float(), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file(load_file(path) | {"lm_head.weight": torch.ones(shape)}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=re.escape(f"lm_head.weight has shape {list(shape)}, expected [320, ")):
        open_checkpoint(tmp_path / "model")
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] = torch.ones(shape)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=re.escape(f"has shape {list(shape)}, expected [320, ")):
        open_checkpoint(tmp_path / "model")


def test_a_tied_hybrid_is_written_with_its_head(tmp_path: Path) -> None:
    """transformers' NemotronH ties nothing, and would draw a head at random; after a kill, too, once the embeddings'
    file is there."""
    model = random_model(tiny_config(tie_word_embeddings=True)).float()
    save_model(model, tmp_path / "model", max_shard_bytes=20_000)
    say(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert not checkpoint.config.tie_word_embeddings and "lm_head.weight" in checkpoint.stored
    assert_close("logits", logits(model), logits(load_model(tmp_path / "model")), 1e-6)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    table, head = index["backbone.embeddings.weight"], index["lm_head.weight"]
    assert table != head
    before = (tmp_path / "model" / head).read_bytes()
    (tmp_path / "model" / head).unlink()
    rows = [(name, part) for name, part in model.state_dict().items() if name != "embeddings.weight"]
    write_checkpoint(tmp_path / "model", model.config, rows, dtypes=torch.float32, max_shard_bytes=20_000)
    assert (tmp_path / "model" / head).read_bytes() == before
    assert dict(stream_rows(open_checkpoint(tmp_path / "model"))).keys() == checkpoint.stored.keys()


def test_a_tied_hybrid_without_a_head_is_read_with_one(workshop: Path, tmp_path: Path) -> None:
    """The embeddings once more, in every count and every format of an export, as the class that opens it has them."""
    model = random_model(tiny_config(tie_word_embeddings=False, vocab_size=320, pad_token_id=0)).float()
    model.requires_grad_(False).lm_head.weight.copy_(model.embeddings.weight)
    save_model(model, tmp_path / "model", tokenizer_from=workshop / "words")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="lm_head"):  # which config.json does not tie
        open_checkpoint(tmp_path / "model")
    say(tmp_path / "model", tie_word_embeddings=True)
    assert load_config(tmp_path / "model") == model.config
    assert_close("logits", logits(model), logits(load_model(tmp_path / "model")), 1e-6)
    for form in ("hf", "fp8"):
        out = tmp_path / form
        code, _, err = limbeck("export", f"model={tmp_path / 'model'}", f"output={out}", f"format={form}")
        assert code == 0, err
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
        assert "lm_head.weight" in load_file(out / "model.safetensors")


@pytest.mark.parametrize("value", ("false", "true", 1, [], None))
def test_booleans_are_no_texts(value: Any, tmp_path: Path) -> None:
    save_model(random_model(dense_config(1, "qwen3").replace(tie_word_embeddings=False)).float(), tmp_path / "model")
    say(tmp_path / "model", tie_word_embeddings=value)
    if value is None:
        assert not load_config(tmp_path / "model").tie_word_embeddings
        return
    with pytest.raises(InputError, match="tie_word_embeddings"):
        load_config(tmp_path / "model")


@pytest.mark.parametrize("family", ("qwen3", "nemotron_h"))
def test_plain_weights_carry_no_quantization(family: str, workshop: Path, tmp_path: Path) -> None:
    config = tiny_config() if family == "nemotron_h" else dense_config(2, family)
    model = random_model(config.replace(vocab_size=320, pad_token_id=0, tie_word_embeddings=False)).bfloat16()
    save_model(model, tmp_path / "model", tokenizer_from=workshop / "words")
    quantized = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    say(tmp_path / "model", quantization_config=quantized, compression_config={"quant_method": "x"})
    code, _, err = limbeck("export", f"model={tmp_path / 'model'}", f"output={tmp_path / 'out'}")
    assert code == 0, err
    assert (
        not {"quantization_config", "compression_config"}
        & json.loads((tmp_path / "out" / "config.json").read_text()).keys()
    )


def test_scores_of_another_model_of_the_same_shape(workshop: Path, tmp_path: Path) -> None:
    other = random_model(load_config(workshop / "model"), 9).float()
    save_model(other, tmp_path / "other", tokenizer_from=workshop / "words")
    places = [f"model={workshop / 'model'}", f"data={workshop / 'text'}", "seq_len=32", "batch=2"]
    code, _, err = limbeck("score", *places, f"output={tmp_path / 'scores'}", "importance.tokens=64",
                           "importance.depth_tokens=64")  # fmt: skip
    assert code == 0, err
    prune = ("prune", f"model={tmp_path / 'other'}", f"scores={tmp_path / 'scores'}", "target.hidden_size=24")
    for more in ([], [f"data={workshop / 'text'}", "repair=full", "repair.tokens=64", *places[2:]]):
        code, _, err = limbeck(*prune, f"output={tmp_path / 'out'}", *more)
        assert code == 2 and err.count("\n") == 1 and "are of another model than" in err, err
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()
    code, _, err = limbeck(*prune[:1], places[0], *prune[2:], f"output={tmp_path / 'out'}")
    assert code == 0, err
