"""Weights rounded on data: GPTQ's steps against their definition, less error than the nearest numbers for every kind of
matrix, equal bytes after an interruption, and what the export says and reads back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill.report import exported as exported_module
from limbeck.distill.text.resolve import sample
from limbeck.models.axes import Role
from limbeck.models.checkpoint import load_model, open_checkpoint, save_model
from limbeck.models.config import HybridConfig
from limbeck.models.families.family import stored_tensors, tensor_table_of
from limbeck.models.quantise import rounded_names, rounded_weight, scales_of, write_quantised
from limbeck.models.rounding import ROUNDINGS
from limbeck.prune import calibration
from limbeck.prune.calibration import calibrate, expert_moments, input_moments, inverse_factor, rounded_on
from limbeck.prune.streams import Streams, one_layer
from limbeck.tests.gguf_helpers import gguf_config, write_tokenizer
from limbeck.tests.helpers import EXPERTS, TEXT, assert_close, limbeck, random_model
from torch import Tensor

W4 = ROUNDINGS["w4a16"]
MIXTURE = EXPERTS | {
    "ssm_state_size": 6,  # in_proj with 160 rows, which 4 bits can have
    "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64, "n_routed_experts": 4,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("nemotron_h", MIXTURE),
    "granite": ("granitemoehybrid", {}),  # gate and up in one stored matrix, and multipliers
    "llama": ("llama", {}),
}


@dataclasses.dataclass
class Rows:
    input_ids: Tensor
    labels: Tensor
    seq_idx: Tensor


def correlated(config: HybridConfig, seed: int = 1) -> Any:
    """A model whose streams lie near a few directions, as those of trained models do."""
    model, generator = random_model(config, seed, torch.float32), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        few = torch.randn(config.vocab_size, 6, generator=generator) @ torch.randn(
            6, config.hidden_size, generator=generator
        )
        model.embeddings.weight.mul_(0.3).add_(few)
    return model


def rows_of(config: HybridConfig, count: int = 2, seed: int = 0) -> list[Rows]:
    generator, size = torch.Generator().manual_seed(seed), (4, 48)
    ids = [torch.randint(config.vocab_size, size, generator=generator) for _ in range(count)]
    labels = torch.ones(size, dtype=torch.long)
    labels[0, 30:] = -100
    return [Rows(each, labels, torch.arange(48).expand(size) // 24) for each in ids]


def moments(seed: int, size: int) -> Tensor:
    """Of inputs near a few directions."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(300, 12, generator=generator) @ torch.randn(12, size, generator=generator)
    x = (few + 0.5 * torch.randn(300, size, generator=generator)).double()
    return x.T @ x


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    whole = torch.stack([moments(seed, 40) for seed in range(2)])
    whole[1, 7], whole[1, :, 7] = 0, 0  # an input that never comes
    factor = inverse_factor(whole)
    assert torch.equal(factor, factor.triu())
    for own, found in zip(whole, factor, strict=True):
        diagonal = own.diagonal()
        damped = own + torch.diag(torch.where(diagonal > 0, 0.01 * diagonal.mean(), 1))
        assert_close("inverse", damped.inverse(), found.T @ found, 1e-9)


@pytest.mark.parametrize("form", ROUNDINGS)
def test_columns_are_rounded_as_defined(form: str) -> None:
    """By the inverse over the columns that are left, made anew for each of them: no factor, no blocks."""
    rounding, size = ROUNDINGS[form], 160
    group = 32 if rounding.grouped else size
    weight = torch.randn(1, 24, size, generator=torch.Generator().manual_seed(5))
    own = moments(0, size)
    found = rounded_on(weight, own[None], rounding, group)
    damped = own + 0.01 * own.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    left, same = weight[0].double(), 0
    for column in range(size):
        if column % group == 0:
            scale = scales_of(left[:, column : column + group].float(), rounding, group)[:, 0]
            assert torch.equal(scale, found.scale[0, :, column // group])
        number = calibration.nearest((left[:, column] / scale.double()).float(), rounding)
        same += int((number == found.numbers[0, :, column]).sum())
        # From here on with the numbers that were found: one tie that falls otherwise changes all that follows.
        inverse = damped[column:, column:].inverse()
        error = left[:, column] - found.numbers[0, :, column].double() * scale.double()
        left[:, column:] -= error[:, None] / inverse[0, 0] * inverse[0]
    assert same > 0.995 * weight.numel()


def test_inputs_that_never_come_leave_the_nearest_numbers() -> None:
    weight = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(2))
    found = rounded_on(weight, torch.zeros(2, 64, 64, dtype=torch.float64), W4, 32)
    for own, numbers, scale in zip(weight, *found, strict=True):
        nearest = rounded_weight(own, W4, 32)
        assert torch.equal(nearest.numbers, numbers) and torch.equal(nearest.scale, scale)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family, exported with calibration on a text."""
    pytest.importorskip("compressed_tensors")
    root = tmp_path_factory.mktemp("calibration")
    size = write_tokenizer(root / "words", "gpt-2")
    (root / "text").mkdir()
    for number in range(40):
        (root / "text" / f"{number}.txt").write_text(f"# file {number}\n" + TEXT[number * 60 : number * 60 + 900])
    for name, (family, changes) in FAMILIES.items():
        save_model(correlated(gguf_config(family, size, **changes)), root / name, tokenizer_from=root / "words")
    return root


def exported(root: Path, name: str, *options: str, form: str = "w4a16") -> tuple[Path, str]:
    out = root / f"{name}-{form}-{abs(hash(options))}"
    code, text, err = limbeck("export", f"model={root / name}", f"output={out}", f"format={form}", "check_tokens=16",
                              "seq_len=48", "batch=4", *options)  # fmt: skip
    assert code == 0, err
    return out, text


def errors(source: Path, out: Path, rows: list[Rows]) -> Iterator[tuple[str, float, float]]:
    """Of every rounded tensor of ours the squared error of its outputs on what it reads in the exported model: as it
    was calibrated, and of the nearest numbers."""
    before, after = open_checkpoint(source), open_checkpoint(out)
    config, group = before.config, 32
    names = rounded_names(config, W4)
    streams = Streams(config, after.tensor, rows, "cpu", torch.float32)
    for number in range(config.num_layers):
        layer = one_layer(config, number, after.tensor, "cpu", torch.float32)
        ours = {p.ours for name in names for p in stored_tensors(config)[name].pieces}
        for spec in tensor_table_of(config).values():
            if spec.layer != number or spec.name not in ours:
                continue
            if spec.role is Role.EXPERTS:
                inputs = expert_moments(layer, streams, spec.part, range(spec.shape[0]))
            else:
                inputs = input_moments(layer, streams, [spec.part])[spec.part]
            weight = before.tensor(spec.name).float().view(len(inputs), -1, spec.shape[-1])
            nearest = rounded_weight(weight.flatten(0, 1), W4, group).values().view_as(weight)

            def squared(found: Tensor, weight: Tensor = weight, inputs: Tensor = inputs) -> float:
                lost = (weight - found).double()
                return float(((lost @ inputs) * lost).sum())

            yield spec.part, squared(after.tensor(spec.name).float().view_as(weight)), squared(nearest)
        streams.advance(layer)


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_are_nearer_than_with_the_nearest_numbers(name: str, root: Path) -> None:
    """Of every matrix, on the very rows that it was calibrated on; and the logits as well."""
    rows = rows_of(open_checkpoint(root / name).config, 4)
    checkpoint, out = open_checkpoint(root / name), root / f"{name}-direct"
    names = rounded_names(checkpoint.config, W4)
    made = calibrate(checkpoint, names, W4, rows, root / f"{name}-layers")
    out.mkdir()
    write_quantised(out, root / name, "w4a16", check_tokens=16, seed=0, calibrated=made)
    seen = set()
    for part, own, nearest in errors(root / name, out, rows):
        assert own < 0.9 * nearest, (part, own, nearest)
        seen.add(part)
    expected = {"experts": 8, "granite": 4, "llama": 3}
    assert len(seen) == expected[name], seen
    plain = root / f"{name}-plain"
    plain.mkdir()
    write_quantised(plain, root / name, "w4a16", check_tokens=16, seed=0)
    with torch.no_grad():
        logits = [load_model(folder)(rows[0].input_ids) for folder in (root / name, out, plain)]
    lost = [float((logits[0] - other).square().mean()) for other in logits[1:]]
    assert lost[0] < lost[1], lost


def test_equal_work_gives_equal_bytes(root: Path, tmp_path: Path) -> None:
    """Twice, and once more after the last layers of an interrupted run are gone."""
    checkpoint = open_checkpoint(root / "experts")
    names, rows = rounded_names(checkpoint.config, W4), rows_of(checkpoint.config)
    done: list[int] = []
    for folder in ("one", "two"):
        calibrate(checkpoint, names, W4, rows, tmp_path / folder, on_layer=done.append)
    assert done == [1, 2, 3, 4, 5, 6] * 2
    files = sorted((tmp_path / "one").iterdir())
    expected = [file.read_bytes() for file in files]
    assert len(files) == 5  # attention stays
    for file in files[2:]:
        (tmp_path / "two" / file.name).unlink()
    calibrate(checkpoint, names, W4, rows, tmp_path / "two")
    assert [(tmp_path / "two" / file.name).read_bytes() for file in files] == expected
    calibrate(checkpoint, names, W4, [], tmp_path / "two")  # nothing is left to do: no data is read
    few = tmp_path / "few"
    calibration_bytes, calibration.SUM_BYTES = calibration.SUM_BYTES, 1  # an expert at a time
    try:
        calibrate(checkpoint, names, W4, rows, few)
    finally:
        calibration.SUM_BYTES = calibration_bytes
    assert [(few / file.name).read_bytes() for file in files] == expected


def test_the_command_calibrates(root: Path) -> None:
    data = (f"data={root / 'text'}", "calibration_tokens=400")
    out, text = exported(root, "llama", *data)
    content, card = json.loads((out / "export.json").read_text()), (out / "README.md").read_text()
    assert content["calibration_tokens"] == 380  # those that count, of 400: not the last of each row
    assert "GPTQ" in card and "with caches" in text
    figures = content["text"]
    assert figures["tokens"] > 0 and abs(figures["exported"]["value"] - figures["source"]["value"]) < 0.5
    assert f"{figures['exported']['value']:.4f} bits per byte" in card and "held-out tokens" in text
    assert not (out / "rounding").exists() and "data" in json.loads((out / "limbeck.json").read_text())["inputs"]
    first = (out / "model.safetensors").read_bytes()
    nearest, _ = exported(root, "llama")
    assert first != (nearest / "model.safetensors").read_bytes()
    zero, _ = exported(root, "llama", "keep_layers=[0]")
    assert zero != nearest
    needs = {row["format"]: row for row in content["needs"]}
    assert list(needs) == ["w4a16", "bfloat16", "fp8", "w8a8"]
    assert needs["w4a16"]["weights"] < needs["fp8"]["weights"] < needs["bfloat16"]["weights"]
    assert (
        needs["fp8"]["total"] - needs["fp8"]["weights"] == needs["bfloat16"]["total"] - needs["bfloat16"]["weights"] > 0
    )


def test_an_interrupted_export_resumes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the layers are rounded nothing of them is rounded again, and the bytes are those of a run at once."""
    data = (f"data={root / 'text'}", "calibration_tokens=200", "seq_len=48", "batch=4", "check_tokens=16")
    words = (f"model={root / 'llama'}", "format=w4a16", *data)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr(exported_module, "write_quantised", broken)
        with pytest.raises(RuntimeError, match="is gone"):
            limbeck("export", *words, f"output={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "rounded_on", broken)
        code, _, err = limbeck("export", *words, f"output={tmp_path / 'out'}")
        assert code == 0, err
    assert limbeck("export", *words, f"output={tmp_path / 'whole'}")[0] == 0
    for file in ("model.safetensors", "config.json", "export.json", "README.md"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert not (tmp_path / "out" / "rounding").exists()


def test_every_format_is_calibrated(root: Path) -> None:
    for form in ("fp8", "w8a8"):
        out, _ = exported(root, "llama", f"data={root / 'text'}", "calibration_tokens=200", form=form)
        name = "layers.1.mixer.down_proj.weight"
        near = {"fp8": 0.08, "w8a8": 0.05}[form]
        assert_close(
            form, open_checkpoint(root / "llama").tensor(name), open_checkpoint(out).tensor(name).float(), near
        )


@pytest.mark.parametrize("form", ("hf", "gguf"))
def test_formats_that_round_nothing_are_measured_too(form: str, root: Path) -> None:
    """In float32 an export keeps every bit per byte of its source, and these are the text's."""
    if form == "gguf":
        pytest.importorskip("gguf")
    pieces = (f"data={root / 'text'}", "evaluate_tokens=96", "dtype=float32")
    out, text = exported(root, "llama", *pieces, form=form)
    figures, source = json.loads((out / "export.json").read_text())["text"], root / "llama"
    assert figures["exported"]["value"] == pytest.approx(figures["source"]["value"], rel=1e-5)
    assert figures["kl"]["value"] < 1e-6 and figures["agreement"]["value"] == 1 and "of the source" in text
    rows = sample(str(root / "text"), "validation", source, tokens=96, seq_len=48, batch=4, seed=0)
    model = load_model(source)
    with torch.no_grad():
        nats = sum(cross_entropy(model(row.input_ids, seq_idx=row.seq_idx), row.labels) for row in rows)
    text_bytes = sum(int(row.n_bytes[row.labels >= 0].sum()) for row in rows)
    assert figures["source"]["value"] == pytest.approx(float(nats) / math.log(2) / text_bytes, rel=1e-5)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("format=hf", "data=TEXT", "calibration_tokens=9"), "format=hf rounds nothing"),
        (("format=hf", "evaluate_tokens=9"), "evaluate_tokens=9 needs data="),
        (("format=gguf", "keep_layers=[0]"), "format=gguf rounds nothing"),
        (("format=w4a16", "calibration_tokens=10"), "need data="),
        (("format=w4a16", "sensitivity=true"), "need data="),
        (("format=w4a16", "keep_layers=2"), "need data="),
        (("format=w4a16", "data=TEXT", "calibration_tokens=0", "evaluate_tokens=0"), "none is given"),
        (("format=w4a16", "keep_layers=[3]"), "no layer 3; expected numbers from 0 to 2"),
        (("format=w4a16", "keep_layers=[0,1,2]"), "leaves nothing to round"),
        (("format=w4a16", "data=TEXT", "keep_layers=3", "sensitivity_tokens=48"), "keep_layers=3 leaves nothing"),
        (("format=w4a16", "data=TEXT", "calibration_tokens=-1"), "calibration_tokens"),
    ],
)
def test_wrong_options(options: tuple[str, ...], said: str, root: Path, tmp_path: Path) -> None:
    if "format=gguf" in options:
        pytest.importorskip("gguf")
    words = [option.replace("TEXT", str(root / "text")) for option in options]
    code, _, err = limbeck("export", f"model={root / 'llama'}", f"output={tmp_path / 'out'}", "seq_len=48", *words)
    assert code == 2 and said in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()
