"""The benchmark that turns a GGUF file into a folder: names, the order of rows, the tokenizer, and the whole of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.benchmarks import smollm2
from limbeck.kernels.rotary import rotary, rotary_angles
from limbeck.models.checkpoint import load_model, open_checkpoint
from limbeck.models.hybrid import HybridLM
from limbeck.models.tokenizer import load_tokenizer
from limbeck.tests.helpers import assert_close, dense_config, random_model
from tokenizers import pre_tokenizers
from torch import Tensor

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["d e", "de f", "Ġ Ġ", "ĠĠ Ġ", "r e"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]


def fields_of(model: HybridLM) -> dict[str, Any]:
    """The metadata that llama.cpp would write for a model."""
    config = model.config
    return {
        "general.architecture": "llama",
        "general.license": "apache-2.0",
        "llama.block_count": config.num_layers // 2,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.rope.freq_base": config.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": float(torch.tensor(config.norm_eps)),
        "llama.vocab_size": config.vocab_size,
        "llama.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


def side_by_side(weight: Tensor, heads: int) -> Tensor:
    """The rows in llama.cpp's order, one by one: of each head 0, D/2, 1, D/2 + 1, ..."""
    head_dim = len(weight) // heads
    order = [
        head * head_dim + half * head_dim // 2 + pair
        for head in range(heads)
        for pair in range(head_dim // 2)
        for half in range(2)
    ]
    return weight[order]


def stored_of(model: HybridLM) -> dict[str, Tensor]:
    """A model's tensors under llama.cpp's names and in its order."""
    config, found = model.config, {}
    for name, weight in model.state_dict().items():
        if not name.startswith("layers."):
            found[smollm2.OUTER[name]] = weight
            continue
        _, layer, part = name.split(".", 2)
        if "q_proj" in part or "k_proj" in part:
            weight = side_by_side(
                weight, config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
            )
        found[f"blk.{int(layer) // 2}.{smollm2.INNER[config.pattern[int(layer)]][part]}"] = weight
    return found


def tiny_llama(seed: int) -> HybridLM:
    config = dense_config(seed, "llama").replace(
        vocab_size=len(TOKENS), bos_token_id=1, eos_token_id=2, pad_token_id=2, hidden_size=32, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
    )  # fmt: skip
    return random_model(config, seed, torch.float32)


@pytest.mark.parametrize("seed", range(4))
def test_tensors_and_config_cross_over(seed: int) -> None:
    model = tiny_llama(seed)
    stored = stored_of(model)
    assert smollm2.config_of(fields_of(model) | {"tensors": list(stored)}) == model.config
    found = dict(smollm2.tensors_of(model.config, stored.__getitem__))
    weights = model.state_dict()
    assert set(found) == set(weights)
    assert all(torch.equal(weight, weights[name]) for name, weight in found.items())


def test_neighbours_turned_are_halves_turned() -> None:
    """llama.cpp turns channels 2i and 2i + 1 of its rows; the scores are those of our rows in our order."""
    angles = rotary_angles(torch.arange(6)[None], 8, 1e4, torch.float64)
    u = torch.randn(1, 6, 5, dtype=torch.float64)
    scores = []
    for ours in (True, False):
        torch.manual_seed(3)
        turned = []
        for _ in range(2):
            stored = torch.randn(16, 5, dtype=torch.float64)
            if ours:
                turned.append(rotary((u @ smollm2.halves(stored, 2).T).unflatten(-1, (2, 8)), *angles))
            else:
                pairs = torch.view_as_complex((u @ stored.T).unflatten(-1, (2, 4, 2)).contiguous())
                turned.append(torch.view_as_real(pairs * torch.complex(*angles)).flatten(-2))
        scores.append(torch.einsum("bthd,bshd->bhts", *turned))
    assert_close("scores", scores[1], scores[0], 1e-12)


def test_tokenizer(tmp_path: Path) -> None:
    """Digits stand alone and are split off first; control tokens are special."""
    smollm2.write_tokenizer(tmp_path, fields_of(tiny_llama(0)))
    found = load_tokenizer(tmp_path)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id, found.vocab_size) == (1, 2, 2, len(TOKENS))
    text = "def f():\n   12 return é"
    ids = found.encode(text)
    assert found.decode(ids) == text
    assert "|".join(TOKENS[number] for number in ids[:13]) == "def|Ġ|f|(|)|:|Ċ|ĠĠĠ|1|2|Ġ|re|t"
    assert found.encode("<|im_end|>") == [2] and found.token_bytes[2] == 0


@pytest.mark.slow
def test_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A real, tiny GGUF file: the folder holds the model, and all three readers agree on it."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    monkeypatch.setattr(smollm2, "ROW", 24)
    model = tiny_llama(1)
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    types = gguf.GGUFValueType
    for name, value in fields_of(model).items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif name != "general.architecture":
            kind = {str: types.STRING, int: types.UINT32, float: types.FLOAT32}[type(value)]
            writer.add_key_value(name, value, kind)
    for name, weight in stored_of(model).items():
        writer.add_tensor(name, weight.numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    out = tmp_path / "out"
    assert smollm2.main([str(path), str(out), "--tokens", "40"]) == 0
    text = capsys.readouterr().out
    assert (
        "limbeck, the folder" in text and "LlamaForCausalLM, the GGUF file" in text and "48 tokens of 2 files" in text
    )
    again = load_model(out)
    assert again.config == model.config
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
    assert smollm2.main([str(path), str(tmp_path / "half"), "--tokens", "40", "--dtype", "bfloat16"]) == 0
    assert open_checkpoint(tmp_path / "half").dtype() == torch.bfloat16
    assert "GGUF" not in capsys.readouterr().out
    monkeypatch.setattr(smollm2, "logits_of_theirs", lambda theirs, ids: 1.01 * theirs(ids, use_cache=False).logits)
    assert smollm2.main([str(path), str(out), "--tokens", "40"]) == 1
