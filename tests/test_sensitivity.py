"""What rounding a layer costs, against a model with that layer alone rounded; which layers stay, and how readers see
it; and what the card and memory-fit say of quantised weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from limbeck.models.axes import tensor_table
from limbeck.models.checkpoint import load_model, open_checkpoint, save_model
from limbeck.models.cost import fit as fits
from limbeck.models.cost.hardware import Hardware
from limbeck.models.cost.parameters import weight_bytes
from limbeck.models.cost.stored_weights import of_checkpoint, of_format, summed_weights
from limbeck.models.errors import InputError
from limbeck.models.export import divergence
from limbeck.models.named import model_weights
from limbeck.models.offload import open_layers
from limbeck.models.quantise import layer_of, module_pattern, rounded, rounded_names
from limbeck.models.rounding import ROUNDINGS
from limbeck.prune.sensitivity import Sensitivity, layers_in, most_sensitive
from limbeck.tests.gguf_helpers import gguf_config, write_tokenizer
from limbeck.tests.helpers import EXPERTS, TEXT, assert_close, limbeck, random_model
from safetensors.torch import load_file

pytest.importorskip("compressed_tensors")
MIXTURE = EXPERTS | {"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64, "mtp_steps": 1,
                     "mtp_pattern": "*E"}  # fmt: skip


class Rows:
    def __init__(self, seed: int, size: int) -> None:
        self.input_ids = torch.randint(size, (2, 40), generator=torch.Generator().manual_seed(seed))
        self.labels, self.seq_idx = torch.ones_like(self.input_ids), torch.zeros_like(self.input_ids)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sensitivity")
    size = write_tokenizer(root / "words", "gpt-2")
    (root / "text").mkdir()
    for number in range(40):
        (root / "text" / f"{number}.txt").write_text(f"# file {number}\n" + TEXT[number * 60 : number * 60 + 900])
    for name, changes in {"qwen3": {"tie_word_embeddings": True}, "experts": MIXTURE}.items():
        config = gguf_config("nemotron_h" if name == "experts" else name, size, **changes)
        save_model(random_model(config, 1, torch.float32).bfloat16(), root / name, tokenizer_from=root / "words")
    return root


@pytest.mark.parametrize("name", ("qwen3", "experts"))
def test_a_layer_alone(name: str, root: Path) -> None:
    """In memory and read from the disk, a layer at a time; blocks of layers go together."""
    checkpoint, rounding = open_checkpoint(root / name), ROUNDINGS["w8a8"]
    config = checkpoint.config
    names, rows = rounded_names(config, rounding), [Rows(seed, config.vocab_size) for seed in range(2)]
    work = Sensitivity(open_layers(root / name, torch.float32, torch.device("cpu")), names, rounding, rows)
    steps: list[tuple[int, int]] = []
    (found,) = work.losses(on_step=lambda *step: steps.append(step))
    assert list(found) == ([0, 1, 2] if name == "qwen3" else [0, 1, 3, 4, 5])
    assert steps[-1][0] == steps[-1][1] and len(steps) == config.num_layers
    source, table = load_model(root / name), tensor_table(config)
    with torch.no_grad():
        expected = [source(each.input_ids) for each in rows]
        for layer, kl in found.items():
            model = load_model(root / name)
            for tensor, weight in model.named_parameters():
                spec = table[tensor]
                own = spec.layer is not None and spec.layer // config.block_size == layer
                if own and any(p.ours == tensor for n in names for p in work_pieces(config, n)):
                    flat = weight.data.flatten(0, -2)
                    flat.copy_(rounded(flat, rounding, flat.shape[1]).bfloat16())
            alone = [divergence(one, model(each.input_ids)) for one, each in zip(expected, rows, strict=True)]
            assert kl == pytest.approx(sum(alone) / 2, rel=1e-3)
    disk = open_layers(root / name, torch.float32, torch.device("cpu"), offload="disk")
    parts = list(Sensitivity(disk, names, rounding, rows).losses([next(iter(found))], stream_bytes=1))
    assert len(parts) == len(found) - 1
    for part in parts:
        for layer, kl in part.items():
            assert kl == pytest.approx(found[layer], rel=1e-6)


def work_pieces(config, name):  # type: ignore[no-untyped-def]
    from limbeck.models.families.family import stored_tensors

    return stored_tensors(config)[name].pieces


def test_which_layers_stay() -> None:
    losses = {0: 0.3, 2: 0.1, 3: 0.3, 5: 0.9}
    assert most_sensitive(losses, 1) == [5] and most_sensitive(losses, 2) == [0, 5]
    with pytest.raises(InputError, match="leaves nothing"):
        most_sensitive(losses, 4)
    assert layers_in(gguf_config("llama", 400), [1]) == {2, 3}
    assert module_pattern("model.layers.1.mlp.up_proj.weight") == r"re:.*\.layers\.1\.mlp\.up_proj$"
    experts = module_pattern("backbone.layers.12.mixer.experts.7.up_proj.weight")
    assert experts == r"re:.*\.layers\.12\.mixer\.experts\.\d+\.up_proj$"


def export(root: Path, name: str, *options: str) -> tuple[Path, str]:
    out = root / f"{name}-{len(list(root.iterdir()))}"
    code, text, err = limbeck(
        "export", f"model={root / name}", f"output={out}", "check_tokens=16", "seq_len=40", *options
    )
    assert code == 0, err
    return out, text


def test_the_most_sensitive_stay(root: Path) -> None:
    data = (f"data={root / 'text'}", "sensitivity_tokens=160", "calibration_tokens=0")
    out, text = export(root, "experts", "format=w8a8", *data, "keep_layers=2")
    content = json.loads((out / "export.json").read_text())
    rows = {row["layer"]: row for row in content["sensitivity"]}
    assert list(rows) == [0, 1, 3, 4, 5] and rows[3]["matrices"] == ["down_proj", "up_proj"]
    assert (
        rows[0]["pattern"] == "M" and rows[0]["parameters"] == 200 * 64 + 64 * 64 and content["sensitivity_tokens"] > 80
    )
    kept = content["keep_layers"]
    assert kept == sorted(sorted(rows, key=lambda layer: -rows[layer]["kl"])[:2])
    assert "What rounding one layer alone costs" in text and "stay in bfloat16" in (out / "README.md").read_text()
    checkpoint, before = open_checkpoint(out), open_checkpoint(root / "experts")
    for name in rounded_names(checkpoint.config, ROUNDINGS["w8a8"]):
        layer = layer_of(checkpoint.config, name)
        for ours in {piece.ours for piece in work_pieces(checkpoint.config, name)}:
            places = checkpoint.stored[ours].places.values()
            assert all(place.quantised is None for place in places) == (layer in kept)
            assert layer not in kept or torch.equal(checkpoint.tensor(ours), before.tensor(ours))


def test_transformers_leaves_them_alone(root: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out, _ = export(root, "qwen3", "format=w4a16", "keep_layers=[1]")
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert r"re:.*\.layers\.1\.mlp\.up_proj$" in ignored and r"re:.*\.up_proj$" not in ignored
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert_close("logits", theirs(ids, use_cache=False).logits, load_model(out)(ids), 0.02)


@pytest.mark.parametrize("form", [pytest.param(n, marks=[pytest.mark.slow] if n == "fp8" else []) for n in ROUNDINGS])
def test_what_the_files_hold(form: str, root: Path, tmp_path: Path) -> None:
    """By the headers as by the config, the bytes of all tensors, which memory-fit counts."""
    kept = "keep_layers=[1]"
    out, _ = export(root, "experts", f"format={form}", kept)
    held = of_checkpoint(open_checkpoint(out), torch.bfloat16)
    config = open_checkpoint(out).config
    assert held is not None and held == of_format(config, ROUNDINGS[form], torch.bfloat16, {1})
    stored = load_file(out / "model.safetensors")
    assert held.total == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert held.without(0).total == held.total - held.layers[0].all and held.ahead > 0
    assert of_checkpoint(open_checkpoint(root / "experts"), torch.bfloat16) is None
    plain = summed_weights(config, torch.bfloat16, lambda name, stored: None)
    assert plain.total == weight_bytes(config, torch.bfloat16) > held.total
    assert model_weights(str(out), torch.bfloat16) == held and model_weights("zoo", torch.bfloat16) is None

    options = ("hardware=custom", "hardware.usable_gib=1", "context=128")
    code, text, err = limbeck("memory-fit", f"model={out}", *options, f"output={tmp_path / 'fit'}")
    assert code == 0 and "quantised weights" in text, err
    content = json.loads((tmp_path / "fit" / "result.json").read_text())["memory"]
    assert content["weights"] == held.total
    code, _, err = limbeck("memory-fit", f"model={out}", *options, "method=simulation")
    assert code == 2 and "quantised" in err and err.count("\n") == 1


@pytest.mark.slow
def test_vllm_and_speed_count_what_is_held() -> None:
    """More blocks are left, a step reads less, and a layer fewer takes its own bytes with it."""
    config = gguf_config("nemotron_h", 400, **MIXTURE)
    held = of_format(config, ROUNDINGS["fp8"], torch.bfloat16)
    fit = fits.Fit(context=64, framework_share=0.0)
    card = Hardware("card", 1.0, 0.01, 100, 10, device="cpu")
    plain, less = fit.estimate(config, card), fit.estimate(config, card, held)
    assert plain.memory.weights - less.memory.weights == weight_bytes(config, torch.bfloat16) - held.total > 0
    assert less.memory.vllm.blocks > plain.memory.vllm.blocks and less.memory.kv == plain.memory.kv
    assert less.verdict.largest_batch > plain.verdict.largest_batch
    one, other = plain.throughput(), less.throughput()
    assert one is not None and other is not None
    small = Hardware("card", 1.0, (less.memory.peak - 1) / 2**30, 100, 10, device="cpu")
    change = next(each for each in fit.estimate(config, small, held).changes() if " fewer (" in each.name)
    assert change.fits and change.saved > 0
    # Of all experts a step of one token reads the chosen: 2 of 6 of their bytes.
    experts = sum(layer.experts for layer in held.layers)
    whole = held.read(config, 10**6, 0)
    assert experts > 0 and held.read(config, 1, 0) == pytest.approx(whole - experts * 4 / 6)
    assert whole == held.total - held.ahead


def test_a_card_without_bfloat16() -> None:
    words = ("memory-fit", "model=zoo", "hardware=t4", "context=256")
    code, text, _ = limbeck(*words)
    assert (
        code == 0 and "t4 has no bfloat16 products" in text and "fit.weight_dtype=float16, fit.kv_dtype=float16" in text
    )
    code, text, _ = limbeck(*words, "fit.weight_dtype=float16")
    assert code == 0 and "give fit.kv_dtype=float16" in text
    code, text, _ = limbeck(*words, "fit.weight_dtype=float16", "fit.kv_dtype=float16")
    assert code == 0 and "bfloat16 products" not in text and "--dtype float16" in text
