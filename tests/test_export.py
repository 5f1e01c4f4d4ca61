"""Export: what is written is what was read, and a folder that fails a check never appears."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models import export
from limbeck.models.cautions import cautions
from limbeck.models.checkpoint import load_config, load_model, open_checkpoint, save_model
from limbeck.models.errors import InputError
from limbeck.models.hybrid import HybridLM
from limbeck.models.tokenizer import train_tokenizer
from limbeck.prune import rounding_plan
from limbeck.scripts import export as command
from limbeck.tests.helpers import limbeck, random_model, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, a chat template and steps dt on both sides of transformers' clamp of 0.001."""
    root = tmp_path_factory.mktemp("export")
    (root / "words").mkdir()
    tokenizer = train_tokenizer(["def f(x):\n    return x\n" * 30], 300, root / "words")
    (root / "words" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    model = random_model(tiny_config(vocab_size=tokenizer.vocab_size, pad_token_id=0), 0, torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("dt_bias"):
                weight.uniform_(-12, -2)
    save_model(model, root / "model", tokenizer_from=root / "words")
    return root / "model"


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_weights_are_the_sources_rounded(dtype: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert limbeck("export", f"model={source}", f"output={out}", f"dtype={dtype}", "max_shard_bytes=9000")[0] == 0
    shards = sorted(out.glob("model-*-of-*.safetensors"))
    largest = max(weight.numel() * weight.element_size() for shard in shards for weight in load_file(shard).values())
    assert len(shards) > 2 and all(shard.stat().st_size < max(9000, largest) + 4096 for shard in shards)
    before, after = open_checkpoint(source), open_checkpoint(out)
    for name in before.names():
        kind = getattr(torch, dtype)
        assert after.stored[name].dtype == kind and torch.equal(after.tensor(name), before.tensor(name).to(kind)), name
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    settings, own = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (out, source))
    assert settings == own | {"model_max_length": 131072}
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == dtype and config["architectures"] == ["NemotronHForCausalLM"]
    card = (out / "README.md").read_text()
    assert card.startswith("---\n") and dtype in card and "M-M*-M" in card and "@@" not in card
    ids = torch.arange(40)[None] % 300
    with torch.no_grad():
        assert torch.equal(load_model(out)(ids), load_model(source, getattr(torch, dtype)).float()(ids))


def test_transformers_is_compared_under_its_own_clamp(source: Path, tmp_path: Path) -> None:
    """Steps below 0.001 make transformers differ; with its clamp in both the two agree, and both figures are told."""
    pytest.importorskip("transformers")
    out = tmp_path / "out"
    code, text, _ = limbeck("export", f"model={source}", f"output={out}", "check_tokens=64")
    found = json.loads((out / "export.json").read_text())["transformers"]
    assert code == 0 and found["class"] == "NemotronHForCausalLM"
    assert (found["dt_floor"], found["dt_floor_transformers"]) == (0.0, 0.001)
    assert found["relative_rms"] < 1e-5 and found["relative_rms_own_clamps"] > 1e-4
    assert "dt >= 0.001" in text and "time_step_min" in (out / "README.md").read_text()


def test_a_failed_check_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def refused(says: str, **options: Any) -> None:
        code, _, err = limbeck("export", f"model={source}", f"output={out}", *(f"{k}={v}" for k, v in options.items()))
        assert code == 3 and says in err and err.count("\n") == 1, (code, err)
        assert list(tmp_path.iterdir()) == []

    honest = export.stream_rows

    def careless(checkpoint: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in honest(checkpoint):
            yield name, tensor * 1.01 if name == "layers.2.mixer.out_proj.weight" else tensor

    with monkeypatch.context() as patch:
        patch.setattr(export, "stream_rows", careless)
        refused("differ from the source's by up to")
    with monkeypatch.context() as patch:
        patch.setattr(export, "relative_rms", lambda ours, theirs: 2e-4)
        refused("0.0002 relative RMS")
    with monkeypatch.context() as patch:
        patch.setattr(export, "relative_rms", lambda ours, theirs: float("nan"))
        refused("transformers' logits differ")
    assert limbeck("export", f"model={source}", f"output={out}")[0] == 0


def test_wrong_input(source: Path, tmp_path: Path) -> None:
    loud = tmp_path / "loud"
    model: HybridLM = load_model(source)
    save_model(model, loud, tokenizer_from=source)
    weights = load_file(loud / "model.safetensors")
    weights["backbone.norm_f.weight"][3] = 70000.0  # beyond float16
    save_file(weights, loud / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    for model_, option, says in (
        (loud, "dtype=float16", "beyond float16"),
        (source, "dtype=int8", "int8"),
        (source, "max_shard_bytes=0", "max_shard_bytes"),
        (source, "check_tokens=0", "check_tokens"),
        (tmp_path / "none", "seed=0", "none"),
    ):
        code, _, err = limbeck("export", f"model={model_}", f"output={out}", option)
        assert code == 2 and says in err and err.count("\n") == 1, (code, err)
        assert [path.name for path in tmp_path.iterdir()] == ["loud"]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    assert limbeck("export", f"model={source}", f"output={tmp_path / 'taken'}")[0] == 2
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine"]


def test_a_dense_model_says_nothing_of_experts(source: Path, tmp_path: Path) -> None:
    """transformers writes them into every config.json, and other readers take the model for one with experts."""
    shutil.copytree(source, tmp_path / "model")
    content = json.loads((source / "config.json").read_text())
    others = {"num_experts_per_tok": 2, "n_routed_experts": 8, "num_nextn_predict_layers": 0, "expand": 2,
              "mtp_layers_block_type": ["full_attention", "moe"]}  # fmt: skip
    (tmp_path / "model" / "config.json").write_text(json.dumps(content | others))
    settings = tmp_path / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 10**30}))
    out = tmp_path / "out"
    assert limbeck("export", f"model={tmp_path / 'model'}", f"output={out}", "check_tokens=16")[0] == 0
    found = json.loads((out / "config.json").read_text())
    assert found == content | {"expand": 2, "torch_dtype": "bfloat16"} and found["model_type"] == "nemotron_h"
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 131072


def test_what_others_will_not_do_is_said(source: Path, tmp_path: Path) -> None:
    """No attention layer left, and rows of in_proj that are no multiple of 8: at the export, and in its card."""
    config = tiny_config(vocab_size=load_config(source).vocab_size, pattern="M-M", mamba_head_dim=4, mamba_num_heads=6)
    assert cautions(load_config(source)) == [] and len(cautions(config)) == 2
    save_model(random_model(config, 0, torch.float32), tmp_path / "model", tokenizer_from=source)
    out = tmp_path / "out"
    code, text, _ = limbeck("export", f"model={tmp_path / 'model'}", f"output={out}", "check_tokens=16")
    card = (out / "README.md").read_text()
    assert code == 0 and "in_proj has 118 rows" in card and "use_cache=False" in card and "What to know" in card
    assert text.count("caution: ") == 2
    assert "What to know" not in exported_card(source, tmp_path / "other")


def exported_card(source: Path, out: Path) -> str:
    assert limbeck("export", f"model={source}", f"output={out}", "check_tokens=16")[0] == 0
    return (out / "README.md").read_text()


def test_without_transformers(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "out"
    code, text, _ = limbeck("export", f"model={source}", f"output={out}")
    assert code == 0 and "transformers is not installed" in text
    assert "Not compared with transformers" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("file", "change"),
    (
        ("generation_config.json", {"max_new_tokens": 0}),
        ("generation_config.json", [1]),
        ("config.json", {"time_step_min": None}),
        ("config.json", {"id2label": [1]}),
    ),
    ids=("length", "list", "null", "labels"),
)
def test_files_that_transformers_does_not_take(
    file: str, change: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line before the first weight is written, with the file and the version of transformers."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(export, "write_checkpoint", lambda *given, **more: pytest.fail("weights were written"))
    model = tmp_path / "model"
    shutil.copytree(source, model)
    known = json.loads((model / file).read_text()) if (model / file).exists() else {}
    (model / file).write_text(json.dumps(known | change if isinstance(change, dict) else change))
    code, _, err = limbeck("export", f"model={model}", f"output={tmp_path / 'out'}")
    assert code == 2 and f"{file}: transformers {transformers.__version__}" in err and err.count("\n") == 1, err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("form", ("fp8", "w8a8", "w4a16"))
@pytest.mark.parametrize("file", ("config.json", "generation_config.json"))
def test_rounded_exports_look_at_the_same_files(
    form: str, file: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is calibrated."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    model = tmp_path / "model"
    shutil.copytree(source, model)
    known = json.loads((model / file).read_text()) if (model / file).exists() else {}
    (model / file).write_text(json.dumps(known | {"id2label": [1], "max_new_tokens": 0}))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("def f(x):\n    return x\n" * 30)
    given = ("export", f"model={model}", f"output={tmp_path / 'out'}", f"format={form}")
    monkeypatch.setattr(rounding_plan, "calibrate", lambda *given, **more: pytest.fail("calibration began"))
    for words in ((), (f"data={tmp_path / 'text'}", "seq_len=32", "evaluate_tokens=0")):
        code, _, err = limbeck(*given, *words)
        assert code == 2 and f"{model / file}: transformers {transformers.__version__}" in err, err
        assert err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ("hf", "gguf", "fp8"))
def test_a_broken_tokenizer_is_named_before_weights_are_written(form: str, source: Path, tmp_path: Path) -> None:
    """The source's own, and not a copy that goes with the error."""
    if form != "hf":
        pytest.importorskip({"gguf": "gguf", "fp8": "compressed_tensors"}[form])
    shutil.copytree(source, tmp_path / "source", ignore=shutil.ignore_patterns("limbeck.json"))
    broken = tmp_path / "source" / "tokenizer.json"
    broken.write_text('{"model": 5}')
    code, _, err = limbeck("export", f"model={tmp_path / 'source'}", f"output={tmp_path / 'out'}", f"format={form}")
    assert code == 2 and err.count("\n") == 1 and f"limbeck: {broken} is no tokenizer" in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_error_of_transformers_is_one_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")

    def fails(*given: Any, **more: Any) -> None:
        raise KeyError("a\nb")

    monkeypatch.setattr(transformers.NemotronHForCausalLM, "forward", fails)
    code, _, err = limbeck("export", f"model={source}", f"output={tmp_path / 'out'}")
    assert code == 3 and transformers.__version__ in err and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []


def test_held_out_text_is_read_before_calibration(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors")

    def read(data: Any, split: str, *given: Any, **more: Any) -> Any:
        raise InputError(f"no {split} text") if split == "validation" else AssertionError("calibration began")

    monkeypatch.setattr(command, "sample", read)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("def f(x):\n    return x\n" * 30)
    given = ("export", f"model={source}", f"data={tmp_path / 'text'}", f"output={tmp_path / 'out'}")
    code, _, err = limbeck(*given, "format=w8a8", "seq_len=32")
    assert code == 2 and "no validation text" in err and err.count("\n") == 1, err
