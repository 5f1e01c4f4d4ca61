"""Rounded weights in compressed-tensors' layout: read back, by the library, by transformers; and what cannot be so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from limbeck.models import quantise
from limbeck.models.cautions import format_cautions
from limbeck.models.checkpoint import load_model, open_checkpoint, save_model
from limbeck.models.config import HybridConfig
from limbeck.models.families.known import FAMILIES
from limbeck.models.hybrid import HybridLM
from limbeck.tests.family_draws import falcon_config
from limbeck.tests.gguf_helpers import gguf_config, write_tokenizer
from limbeck.tests.helpers import EXPERTS, assert_close, limbeck, random_model
from limbeck.tests.puzzle_config import puzzle
from safetensors.torch import load_file

pytest.importorskip("compressed_tensors")
NEAR = {"fp8": 0.06, "w8a8": 0.03, "w4a16": 0.3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quantise")
    size = write_tokenizer(root / "words", "gpt-2")
    for family, changes in {
        "llama": {},
        "qwen3": {"tie_word_embeddings": True},
        "nemotron_h": {},
        "experts": EXPERTS
        | {"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64, "mtp_steps": 1, "mtp_pattern": "*E"},
        "granitemoehybrid": {},
        "falcon_h1": {"hidden_size": 64, "intermediate_size": 96, "mamba_num_heads": 8, "mamba_head_dim": 8,
                      "vocab_size": size},
    }.items():  # fmt: skip
        if family == "falcon_h1":
            config = falcon_config(1, **changes)
        else:
            config = gguf_config("nemotron_h" if family == "experts" else family, size, **changes)
        save_model(model_of(config), root / family, tokenizer_from=root / "words")
    return root


def model_of(config: object) -> HybridLM:
    """In bfloat16, so that what stays is the same."""
    return random_model(config, 1, torch.float32).bfloat16()  # type: ignore[arg-type]


def exported(root: Path, name: str, form: str, *options: str) -> Path:
    out = root / "-".join((name, form, *options))
    words = (f"model={root / name}", f"output={out}", f"format={form}", "check_tokens=32")
    code, text, err = limbeck("export", *words, *options)
    assert code == 0 and "in bfloat16" in text, err
    return out


@pytest.mark.parametrize("form", quantise.ROUNDINGS)
@pytest.mark.parametrize("name", ("llama", "nemotron_h", "experts"))
def test_numbers_are_near_and_what_is_sensitive_stays(name: str, form: str, root: Path) -> None:
    out = exported(root, name, form)
    before, after = open_checkpoint(root / name), open_checkpoint(out)
    for tensor in before.names():
        stays = any(
            part in tensor for part in ("q_proj", "k_proj", "v_proj", "o_proj", "gate.", "norm", "embed", "head")
        )
        stays &= "out_proj" not in tensor
        goes = not stays and (tensor.endswith("_proj.weight") or ".experts." in tensor)
        goes &= not tensor.startswith("mtp.")
        goes &= form != "w4a16" or "in_proj" not in tensor  # 200 rows: 4-bit kernels take multiples of 32
        assert any(place.quantised for place in after.stored[tensor].places.values()) == goes, tensor
        if goes:
            assert_close(tensor, before.tensor(tensor), after.tensor(tensor), NEAR[form])
        else:
            assert torch.equal(after.tensor(tensor), before.tensor(tensor)), tensor
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors" and "lm_head" in settings["ignore"]
    assert r"re:.*\.q_proj$" in settings["ignore"] and r"re:.*\.up_proj$" not in settings["ignore"]
    card = (out / "README.md").read_text()
    assert f"parameters in {form}" in card and "with activations" in card
    found = json.loads((out / "export.json").read_text())["quantised"]
    assert found["bytes"] == (out / "model.safetensors").stat().st_size and found["kl"] >= 0


@pytest.mark.parametrize("form", quantise.ROUNDINGS)
def test_the_library_gives_the_same_numbers_back(form: str, root: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    out = root / f"llama-{form}" if (root / f"llama-{form}").exists() else exported(root, "llama", form)
    content = json.loads((out / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig(**content).config_groups["group_0"]
    stored, name = load_file(out / "model.safetensors"), "model.layers.1.mlp.down_proj."
    part = {key.removeprefix(name): tensor for key, tensor in stored.items() if key.startswith(name)}
    theirs = BaseCompressor.get_value_from_registry(content["format"]).decompress(part, scheme)["weight"]
    ours = open_checkpoint(out).tensor("layers.3.mixer.down_proj.weight")
    assert_close(form, theirs.float(), ours.float(), 1e-2 if form == "fp8" else 5e-3)


@pytest.mark.parametrize("form", quantise.ROUNDINGS)
def test_weights_in_several_files(form: str, root: Path) -> None:
    """The same tensors as in one file, each weight with its scales, in files of at most so many bytes."""
    limit, whole = 60_000, root / f"llama-{form}"
    whole = whole if whole.exists() else exported(root, "llama", form)
    out = root / f"shards-{form}"
    words = ("check_tokens=32", f"max_shard_bytes={limit}", f"format={form}")
    assert limbeck("export", f"model={root / 'llama'}", f"output={out}", *words)[0] == 0
    shards = {path.name: load_file(path) for path in out.glob("model-*-of-*.safetensors")}
    assert len(shards) > 2 and not (out / "model.safetensors").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(shards[index[name]][name], tensor), name
        module = name.rpartition(".")[0]
        assert len({index[key] for key in index if key.rpartition(".")[0] == module}) == 1
    for tensors in shards.values():
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        modules = {name.rpartition(".")[0] for name in tensors}
        assert size <= limit or len(modules) == 1
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(load_model(out)(ids), load_model(whole)(ids))


def test_what_kernels_do_not_take_is_said(root: Path) -> None:
    """Of 4 bits rows and columns by Marlin's tiles (gate and up are one matrix there), of 8 bits multiples of 16."""
    config = gguf_config("llama", 400)  # 64 wide, MLPs of 96
    (found,) = format_cautions(config, "w4a16")
    assert "down_proj of 64 x 96" in found and "up_proj of 192 x 64" in found and "Marlin" in found
    assert not format_cautions(config, "fp8") and not format_cautions(config, "w8a8")
    assert not format_cautions(config.replace(hidden_size=128, intermediate_size=192), "w4a16")
    assert "up_proj of 320 x 128" not in str(
        format_cautions(config.replace(hidden_size=128, intermediate_size=160), "w4a16")
    )
    hybrid = gguf_config("nemotron_h", 400)
    assert ["in_proj of 200 x 64" in each for each in format_cautions(hybrid, "fp8")] == [True]
    assert "Triton" in format_cautions(hybrid, "w8a8")[0]
    few = gguf_config("nemotron_h", 400, **EXPERTS | {"moe_intermediate_size": 32})
    assert any("experts read 64 numbers" in each for each in format_cautions(few, "w4a16"))
    out = root / "nemotron_h-fp8"
    out = out if out.exists() else exported(root, "nemotron_h", "fp8")
    assert "in_proj of 200 x 64" in (out / "README.md").read_text()
    assert json.loads((out / "export.json").read_text())["cautions"]


def test_transformers_opens_it(root: Path) -> None:
    """Weights alone are rounded in w4a16, so that its logits are ours."""
    transformers = pytest.importorskip("transformers")
    out = exported(root, "qwen3", "w4a16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert_close("logits", theirs(ids, use_cache=False).logits, load_model(out)(ids), 0.02)


@pytest.mark.parametrize(
    ("name", "form", "options"),
    (
        *((name, form, ()) for name in ("llama", "nemotron_h", "granitemoehybrid", "falcon_h1", "experts")
          for form in quantise.ROUNDINGS),
        *(("experts", form, ("keep_layers=[1]",)) for form in quantise.ROUNDINGS),
    ),
)  # fmt: skip
def test_the_card_names_a_program_that_reads_every_weight(
    name: str, form: str, options: tuple[str, ...], root: Path
) -> None:
    """transformers leaves experts at random values that are in whole numbers, or in bfloat16 beside packed ones."""
    transformers = pytest.importorskip("transformers")
    out = root / "-".join((name, form, *options))
    out = out if out.exists() else exported(root, name, form, *options)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    opens = name != "experts" or form == "fp8" or (form == "w4a16" and not options)
    assert (not info["missing_keys"]) == opens, info["missing_keys"]
    card, told = (out / "README.md").read_text(), json.loads((out / "export.json").read_text()).get("cautions", [])
    assert ("AutoModelForCausalLM" in card) == opens != ("from vllm import LLM" in card)
    assert any("at random values" in each for each in told) != opens and ("at random values" in card) != opens


def test_a_family_without_a_class_is_opened_by_vllm(root: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for family, record in FAMILIES.items():
        assert record.transformers == hasattr(transformers, record.architecture), family
    config = HybridConfig.from_hf(puzzle(vocab_size=400, pad_token_id=0))
    save_model(model_of(config), tmp_path / "model", tokenizer_from=root / "words")
    for form in ("hf", "fp8", "w8a8"):
        out = tmp_path / form
        code, _, err = limbeck("export", f"model={tmp_path / 'model'}", f"output={out}", f"format={form}",
                               "check_tokens=8")  # fmt: skip
        card = (out / "README.md").read_text()
        assert code == 0 and "from vllm import LLM" in card and "transformers" not in card.split("## ")[0], err
        assert "at random values" not in card


def test_what_cannot_be_rounded(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(says: str, *options: str, code: int = 2) -> None:
        found, _, err = limbeck("export", f"output={tmp_path / 'out'}", "check_tokens=8", *options)
        assert found == code and says in err and err.count("\n") == 1, (found, err)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))

    llama = f"model={root / 'llama'}"
    refused("leave dtype out", llama, "format=fp8", "dtype=float16")
    config = gguf_config("llama", 400, intermediate_size=80)
    save_model(model_of(config), tmp_path / "odd", tokenizer_from=root / "words")
    refused("a multiple of 32 numbers; one has 80", f"model={tmp_path / 'odd'}", "format=w4a16")
    honest = quantise.quantised_tensors
    with monkeypatch.context() as patch:
        patch.setattr(quantise, "quantised_tensors", lambda name, weight, *how: honest(name, weight * 1.2, *how))
        refused("is not the source's, rounded", llama, "format=w8a8", code=3)
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "compressed_tensors", None)
        refused("pip install 'limbeck[quantised]'", llama, "format=fp8")
