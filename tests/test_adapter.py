"""PEFT adapters as models: merged where weights are read, by the formula; followed by whatever takes a folder; and what
is not of low rank refused with how to merge it."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import limbeck as package
import pytest
import torch
from limbeck.models import checkpoint, hub
from limbeck.models.checkpoint import load_config, load_model, open_checkpoint, save_model, stream_rows
from limbeck.models.config import HybridConfig
from limbeck.models.errors import InputError
from limbeck.models.fingerprint import fingerprint_of
from limbeck.models.named import model_config, model_folder
from limbeck.tests.family_draws import falcon_config, granite_config
from limbeck.tests.gguf_helpers import gguf_config
from limbeck.tests.helpers import limbeck, make_workshop, random_model, tiny_config
from limbeck.tests.hub_server import serving
from safetensors.torch import load_file, save_file
from torch import Tensor

FIRST = "base_model.model."
CONFIGS = {
    "nemotron_h": tiny_config(),
    "falcon_h1": falcon_config(4, tie_word_embeddings=False),
    "granite": granite_config(3),
    "llama": gguf_config("llama", 90),
    "qwen3": gguf_config("qwen3", 90),
}


def write_adapter(folder: Path, base: Path | str, tensors: dict[str, Tensor], **settings: Any) -> Path:
    """An adapter as PEFT leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4, "lora_alpha": 6, "bias": "none",
               "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(content | settings))
    save_file({FIRST + name: tensor.contiguous() for name, tensor in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    return folder


def factors(name: str, weight: Tensor, rank: int, seed: int) -> dict[str, Tensor]:
    """A and B of a matrix of that name."""
    generator, module = torch.Generator().manual_seed(seed), name.removesuffix(".weight")
    a, b = (torch.randn(shape, generator=generator) for shape in ((rank, weight.shape[1]), (weight.shape[0], rank)))
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def read_weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def rewritten(base: Path, folder: Path, weights: dict[str, Tensor]) -> Path:
    """The base's folder with other weights."""
    shutil.copytree(base, folder, ignore=lambda _, names: [name for name in names if "safetensors" in name])
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_sum_is_the_formula_s(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every matrix of the layers, some with ranks and alphas of their own, in pieces and whole, bit for bit."""
    base = tmp_path / "base"
    save_model(random_model(CONFIGS[name], 2), base, dtype=dtype, max_shard_bytes=20000)
    weights, draw = read_weights(base), random.Random(name)
    chosen = [key for key, weight in sorted(weights.items())
              if weight.dim() == 2 and ".layers." in key and weight.shape[1] > 1]  # fmt: skip
    own = {key.removesuffix(".weight"): (draw.choice((2, 5)), draw.choice((3.0, 16.0))) for key in chosen[::3]}
    rslora, tensors, expected = draw.random() < 0.5, dict[str, Tensor](), dict(weights)
    for seed, key in enumerate(chosen):
        rank, alpha = own.get(key.removesuffix(".weight"), (4, 6.0))
        pair = factors(key, weights[key], rank, seed)
        a, b = (tensor.double() for tensor in pair.values())
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        expected[key] = (weights[key].double() + scale * (b @ a)).to(dtype)
        tensors |= pair
    adapter = write_adapter(
        tmp_path / "adapter", base, tensors, use_rslora=rslora,
        rank_pattern={key: rank for key, (rank, _) in own.items()},
        alpha_pattern={"^" + key.replace(".", "\\."): alpha for key, (_, alpha) in own.items()},
    )  # fmt: skip
    theirs = load_model(rewritten(base, tmp_path / "formula", expected), dtype)
    folder = model_folder(str(adapter))
    for key, tensor in load_model(folder, dtype).state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[key]), key
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 512)
    parts: dict[str, list[Tensor]] = {}
    for key, part in stream_rows(open_checkpoint(folder)):
        parts.setdefault(key, []).append(part)
    assert any(len(each) > 1 for each in parts.values())
    whole = open_checkpoint(tmp_path / "formula")
    assert all(torch.equal(torch.cat(each), whole.tensor(key)) for key, each in parts.items())


def test_tables_and_whole_tensors(tmp_path: Path) -> None:
    """Factors of the embeddings, which PEFT saves with the table itself, and a head and norms in the place of the
    base's."""
    base, generator = tmp_path / "base", torch.Generator().manual_seed(0)
    save_model(random_model(CONFIGS["llama"].replace(tie_word_embeddings=False), 1), base, dtype=torch.float32)
    weights = read_weights(base)
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    norms = [key for key in weights if key.endswith("norm.weight")]
    size, hidden = weights[table].shape
    a, b = torch.randn(4, size, generator=generator), torch.randn(hidden, 4, generator=generator)
    other = torch.randn(size, hidden, generator=generator)
    whole = {head: other + 1} | {key: weights[key] * 2 for key in norms}
    tensors = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b,
               "model.embed_tokens.base_layer.weight": other} | whole  # fmt: skip
    adapter = write_adapter(tmp_path / "adapter", base, tensors)
    found = load_model(model_folder(str(adapter))).state_dict()
    expected = weights | {table: (other.double() + 6 / 4 * (b.double() @ a.double()).T).float()} | whole
    theirs = load_model(rewritten(base, tmp_path / "formula", expected))
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in found.items())


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, and an adapter of it."""
    root = make_workshop(tmp_path_factory.mktemp("adapter"))
    write_adapter(root / "adapter", root / "model", of_projections(root / "model"))
    return root


def of_projections(base: Path) -> dict[str, Tensor]:
    keys = {key: weight for key, weight in read_weights(base).items() if key.endswith("out_proj.weight")}
    assert len(keys) > 1
    return {key: part * 0.1 for name, weight in keys.items() for key, part in factors(name, weight, 4, 7).items()}


def test_commands_take_it_as_a_model(workshop: Path, tmp_path: Path) -> None:
    adapter, out = workshop / "adapter", tmp_path / "out"
    code, _, err = limbeck("export", f"model={adapter}", f"output={out}", "check_tokens=16", "dtype=float32")
    assert code == 0, err
    merged = model_folder(str(adapter))
    assert json.loads((out / "limbeck.json").read_text())["inputs"]["model"] == fingerprint_of(merged)
    ours, theirs = load_model(out), package.load(adapter, device="cpu")
    assert theirs.tokenizer is not None and not (out / "limbeck-adapter").exists()
    assert all(torch.equal(one, other) for one, other in zip(ours.state_dict().values(), theirs.state_dict().values(),
                                                             strict=True))  # fmt: skip
    plain = load_model(workshop / "model").state_dict()
    assert not all(
        torch.equal(one, other) for one, other in zip(plain.values(), ours.state_dict().values(), strict=True)
    )
    code, _, err = limbeck("memory-fit", f"model={adapter}", "hardware=a10g", "context=64")
    assert code == 0, err


def test_it_depends_on_base_and_adapter(workshop: Path, tmp_path: Path) -> None:
    base, adapter = tmp_path / "model", tmp_path / "adapter"
    for folder in (base, adapter):
        shutil.copytree(workshop / folder.name, folder)
    write_adapter(adapter, "model", of_projections(base))  # beside the adapter's folder there is none of that name
    with pytest.raises(InputError, match="neither a folder here nor OWNER/NAME"):
        model_folder(str(adapter))
    write_adapter(adapter, "../model", of_projections(base))
    first = model_folder(str(adapter))
    assert model_folder(str(adapter)) == first and load_config(first) == load_config(base)
    sums = {fingerprint_of(first)}
    write_adapter(adapter, "../model", {key: 2 * part for key, part in of_projections(base).items()})
    sums.add(fingerprint_of(model_folder(str(adapter))))
    weights = read_weights(base)
    save_file(weights | {"backbone.norm_f.weight": weights["backbone.norm_f.weight"] + 1}, base / "model.safetensors")
    sums.add(fingerprint_of(model_folder(str(adapter))))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    words = json.loads((base / "tokenizer.json").read_text())
    (adapter / "tokenizer.json").write_text(json.dumps(words | {"post_processor": None}))
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))
    model = package.load(adapter, device="cpu")
    assert model.tokenizer is not None and not model.tokenizer.begin
    assert len(sums | {fingerprint_of(model_folder(str(adapter)))}) == 4


def test_of_the_hub(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter and its base, each fetched; for estimates the base's config is enough."""
    write_adapter(tmp_path / "small", "our/tiny", of_projections(workshop / "model"))
    with serving(tmp_path / "cache", monkeypatch) as server:
        server.models |= {"our/tiny": workshop / "model", "our/adapter": tmp_path / "small"}
        assert model_config("hf:our/adapter") == load_config(workshop / "model")
        assert "model.safetensors" not in server.fetched()
        folder = model_folder("hf:our/adapter")
        assert hub.origins({"model": folder}).keys() == {"model.base", "model.adapter"}
        expected = load_model(model_folder(str(workshop / "adapter"))).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in load_model(folder).state_dict().items())
        hub.hub_folder.cache_clear()
        monkeypatch.setattr(hub.log, "warning", lambda *given: None)
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert model_folder("hf:our/adapter") == folder


IN_PROJ = "backbone.layers.0.mixer.in_proj"
WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "kind": ({"peft_type": "IA3"}, {}, "only 'LORA' is merged"),
    "directions": ({"use_dora": True}, {}, "use_dora is set"),
    "biases": ({"bias": "all"}, {}, "only 'none' is merged"),
    "start": ({"init_lora_weights": "pissa"}, {}, "changes the base, too"),
    "pattern": ({"alpha_pattern": {".*_proj": 3}}, {}, "only names of modules are read"),
    "name": ({}, {"model.layers.0.lora_A.weight": torch.ones(4, 2)}, "is of no tensor that the base has"),
    "expert": ({}, {f"{IN_PROJ}.lora_A.default.weight": torch.ones(4, 2)}, "is of no tensor that the base has"),
    "shape": ({}, {f"{IN_PROJ}.lora_B.weight": torch.ones(3, 4)}, "do not make"),
    "place": ({}, {"backbone.norm_f.weight": torch.ones(3)}, "and the base has [32] there"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_merged_says_how(name: str, workshop: Path, tmp_path: Path) -> None:
    settings, tensors, says = WRONG[name]
    weights = read_weights(workshop / "model")
    both = factors(f"{IN_PROJ}.weight", weights[f"{IN_PROJ}.weight"], 4, 1) | tensors
    adapter = write_adapter(tmp_path / "adapter", workshop / "model", both, **settings)
    code, _, err = limbeck("generate", f"model={adapter}", "prompt=x")
    assert code == 2 and says in err and f"M.from_pretrained('{adapter}').merge_and_unload()" in err, err
    assert err.count("\n") == 1


def test_what_cannot_be_read_is_said(workshop: Path, tmp_path: Path) -> None:
    weights = read_weights(workshop / "model")
    pair = factors(f"{IN_PROJ}.weight", weights[f"{IN_PROJ}.weight"], 4, 1)
    one = dict(list(pair.items())[:1])
    nan = {key: part * math.nan for key, part in pair.items()}
    for settings, tensors, says in (
        ({}, one, "is alone; expected lora_A and lora_B"),
        ({"r": 3}, pair, "has rank 4, and adapter_config.json says 3"),
        ({}, {}, "has no tensor"),
        ({"lora_alpha": "much"}, pair, 'lora_alpha is "much"; expected a number'),
        ({"base_model_name_or_path": None}, pair, "base_model_name_or_path is null; expected a text"),
        ({"base_model_name_or_path": "a" * 300}, pair, "neither a folder here nor"),
        ({"base_model_name_or_path": str(workshop / "adapter")}, pair, "no weights of its own"),
        ({}, {key: part.int() for key, part in pair.items()}, "has dtype I32"),
        ({}, nan, "holds NaN"),
    ):
        adapter = write_adapter(tmp_path / "adapter", workshop / "model", tensors, **settings)
        with pytest.raises(InputError, match=re.escape(says)):
            load_model(model_folder(str(adapter)))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is missing"):
        model_folder(str(adapter))
    with pytest.raises(InputError, match="no weights of its own"):
        load_config(adapter)


def test_a_head_that_is_the_embeddings_is_left_to_peft(tmp_path: Path) -> None:
    config: HybridConfig = CONFIGS["llama"].replace(tie_word_embeddings=True)
    save_model(random_model(config, 1), tmp_path / "base", dtype=torch.float32)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weight = torch.ones(config.vocab_size, config.hidden_size)
        adapter = write_adapter(tmp_path / "adapter", tmp_path / "base", factors(name, weight, 4, 1))
        with pytest.raises(InputError, match="embeddings that are the head, too"):
            model_folder(str(adapter))
