"""Quantised folders are read as the libraries that write them give the numbers back; what is not known is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models.checkpoint import load_model, open_checkpoint, save_model
from limbeck.models.errors import InputError
from limbeck.models.stored import unpacked
from limbeck.tests.helpers import assert_close, limbeck, make_workshop
from safetensors.torch import load_file, save_file
from torch import Tensor

Layout = Callable[[str, Tensor], dict[str, Tensor]]
F8 = torch.float8_e4m3fn


def blocks(size: int, ending: str = "_scale_inv") -> Layout:
    """DeepSeek's and transformers': a scale for each block, of which the last ones may be smaller."""

    def layout(name: str, weight: Tensor) -> dict[str, Tensor]:
        rows, columns = (-(-length // size) for length in weight.shape)
        scale = torch.empty(rows, columns)
        q = torch.empty_like(weight, dtype=F8)
        for i in range(rows):
            for j in range(columns):
                part = (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
                scale[i, j] = weight[part].abs().max() / 448
                q[part] = (weight[part] / scale[i, j]).to(F8)
        return {name: q, f"{name}{ending}": scale}

    return layout


def per_tensor(name: str, weight: Tensor) -> dict[str, Tensor]:
    """ModelOpt's FP8, with the scale of the activations beside it."""
    scale = weight.abs().max() / 448
    extra = {name.removesuffix("weight") + "input_scale": torch.tensor(0.5)}
    return {name: (weight / scale).to(F8), f"{name}_scale": scale} | extra


def per_row(name: str, weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {name: (weight / scale).round().to(torch.int8), f"{name}_scale": scale}


def packed(symmetric: bool) -> Layout:
    """compressed-tensors' W4A16 in groups of 16 columns."""

    def layout(name: str, weight: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape
        groups = weight.unflatten(1, (-1, 16))
        low, high = groups.amin(-1), groups.amax(-1)
        scale = torch.maximum(-low, high) / 7 if symmetric else (high - low) / 15
        zero = torch.zeros_like(scale) if symmetric else (-8 - low / scale).round().clamp(-8, 7)
        q = (groups / scale[..., None] + zero[..., None]).round().clamp(-8, 7).flatten(1).to(torch.int32) + 8
        found = {f"{name}_packed": words(q), f"{name}_scale": scale, f"{name}_shape": torch.tensor([rows, columns])}
        if not symmetric:
            found[f"{name}_zero_point"] = words((zero + 8).to(torch.int32).mT).mT.contiguous()
        return found

    return layout


def words(numbers: Tensor) -> Tensor:
    """4-bit numbers [N, K] as int32 [N, K / 8]."""
    padded = torch.nn.functional.pad(numbers.long(), (0, -numbers.shape[1] % 8)).unflatten(1, (-1, 8))
    whole = (padded << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32)


FP8_BLOCK = {  # as llm-compressor writes it, but for the size
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [24, 24]},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 24},
        }
    },
}
METHODS: dict[str, tuple[Layout, dict[str, Any], str, float]] = {
    "blocks": (blocks(24), {"quant_method": "fp8", "weight_block_size": [24, 24]}, "float8", 0.04),
    "blocks, compressed-tensors": (blocks(24, "_scale"), FP8_BLOCK, "float8", 0.04),
    "tensor": (per_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}, "float8", 0.04),
    "int8": (per_row, {"quant_method": "compressed-tensors", "format": "int-quantized"}, "int8", 0.02),
    "w4a16": (packed(True), {"quant_method": "compressed-tensors", "format": "pack-quantized"}, "int4, packed", 0.2),
    "w4a16, zero": (packed(False), {"quant_method": "compressed-tensors"}, "int4, packed", 0.2),
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("quantised"))


def quantise(source: Path, folder: Path, layout: Layout, settings: dict[str, Any]) -> dict[str, Tensor]:
    """A copy whose projections are quantised; gives its stored tensors."""
    save_model(load_model(source), folder, tokenizer_from=source)
    stored: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored |= layout(name, weight) if name.endswith("_proj.weight") else {name: weight.bfloat16()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(content | {"quantization_config": settings, "torch_dtype": "bfloat16"})
    )
    return stored


@pytest.mark.parametrize("method", METHODS)
def test_numbers_times_scales(method: str, workshop: Path, tmp_path: Path) -> None:
    """Near the weights that were quantised, rows by rows as at once, in the dtype that the model computes in."""
    layout, settings, kind, limit = METHODS[method]
    quantise(workshop / "model", tmp_path / "q", layout, settings)
    before, after = open_checkpoint(workshop / "model"), open_checkpoint(tmp_path / "q")
    assert list(after.formats()) == [kind]
    for name in after.names():
        ours, original = after.tensor(name), before.tensor(name)
        assert ours.dtype == after.stored[name].dtype == torch.bfloat16
        assert_close(name, original, ours, limit if name.endswith("_proj.weight") else 0.01)
        whole = torch.cat([after.rows(name, start, min(start + 7, len(ours))) for start in range(0, len(ours), 7)])
        assert torch.equal(whole, ours), name


def test_commands_leave_plain_weights(workshop: Path, tmp_path: Path) -> None:
    layout, settings, _, _ = METHODS["blocks"]
    quantise(workshop / "model", tmp_path / "q", layout, settings)
    code, out, err = limbeck("export", f"model={tmp_path / 'q'}", f"output={tmp_path / 'out'}", "check_tokens=16")
    assert code == 0 and "is quantised: 14 tensors of float8; they are read as bfloat16" in out, err
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "limbeck.json").read_text())["source_format"] == {"float8": 14}
    for name, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        assert weight.dtype == torch.bfloat16 and not name.endswith("scale_inv")


def test_every_command_says_what_it_reads(workshop: Path, tmp_path: Path) -> None:
    """In the terminal, once; in limbeck.json where there is one, of each model that is so."""
    layout, settings, _, _ = METHODS["blocks"]
    quantise(workshop / "model", tmp_path / "q", layout, settings)
    model, data, small = str(tmp_path / "q"), f"data={workshop / 'text'}", ["seq_len=32", "batch=2"]
    pair = [f"teacher={model}", data, *(f"distill.{each}" for each in (*small, "train.steps=1", "evaluate_tokens=0"))]
    measured = ["details.prompt_tokens=8", "details.new_tokens=4", "details.resamples=20", "split=all", "tokens=128"]
    scored = ["importance.tokens=64", "importance.depth_tokens=64", "importance.remove_layers=1"]
    commands: dict[str, tuple[list[str], set[str]]] = {
        "generate": ([f"model={model}", "prompt=x", "max_new_tokens=1"], set()),
        "score": ([f"model={model}", data, *small, *scored], {"source_format"}),
        "prune": ([f"model={model}", f"scores={tmp_path / 'score'}", "target.layers=5", "repair=plain"],
                  {"source_format"}),
        "cache-teacher": (pair, {"teacher_format"}),
        "distill": ([*pair, f"student={model}"], {"teacher_format", "student_format"}),
        "evaluate": ([f"teacher={model}", f"student.small={tmp_path / 'prune'}", data, *small, *measured],
                     {"teacher_format"}),
    }  # fmt: skip
    for command, (options, keys) in commands.items():
        written = [f"output={tmp_path / command}"] if keys else []
        code, out, err = limbeck(command, *options, *written)
        assert code == 0, (command, err)
        assert out.count(f"{model} is quantised: 14 tensors of float8; they are read as bfloat16") == 1, (command, out)
        if keys:
            made = json.loads((tmp_path / command / "limbeck.json").read_text())
            assert {key: made[key] for key in made if key.endswith("_format")} == {key: {"float8": 14} for key in keys}


def test_as_compressed_tensors_reads_it(tmp_path: Path) -> None:
    """Packed by the library itself, symmetric and not."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    q = torch.randint(-8, 8, (6, 40), dtype=torch.int8)
    assert torch.equal(unpacked(helpers.pack_to_int32(q, 4), 4, 40), q.int())
    zero = torch.randint(-8, 8, (11, 3), dtype=torch.int8)
    stored = helpers.pack_to_int32(zero, 4, packed_dim=0)
    assert torch.equal(unpacked(stored.mT, 4, 11).mT, zero.int())


def test_what_is_not_known(workshop: Path, tmp_path: Path) -> None:
    def refused(
        says: str, change: Callable[[dict[str, Tensor]], object], method: str = "blocks", name: str = "q"
    ) -> None:
        layout, settings, _, _ = METHODS[method]
        folder = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}"
        stored = quantise(workshop / "model", folder, layout, settings)
        change(stored)
        save_file({key: value.contiguous() for key, value in stored.items()}, folder / "model.safetensors")
        code, _, err = limbeck("generate", f"model={folder}", "prompt=x")
        assert code == 2 and says in err and err.count("\n") == 1, (code, err)

    first = "backbone.layers.0.mixer.in_proj.weight"
    refused("and no scale; expected", lambda stored: stored.pop(f"{first}_scale_inv"))
    refused("is no scale of a weight", lambda stored: stored.update({f"{first}_scale_inv": torch.ones(3, 5)}))
    refused("NaN", lambda stored: stored.update({f"{first}_scale_inv": stored[f"{first}_scale_inv"] * float("nan")}))
    refused("is packed in a way that is not known", lambda stored: stored.pop(f"{first}_shape"), "w4a16")
    refused(
        "columns in another order",
        lambda stored: stored.update({first.replace("weight", "weight_g_idx"): torch.arange(32)}), "w4a16",
    )  # fmt: skip
    refused("of the quantization 'fp8', which is not read",
            lambda stored: stored.update({first: torch.zeros_like(stored[first], dtype=torch.uint8)}))  # fmt: skip
    other = {first.replace("weight", "qweight"): torch.ones(3, dtype=torch.int32)}
    refused("whose quantization 'fp8' may not be read", lambda stored: stored.update(other))


FIRST = "backbone.layers.0.mixer.in_proj.weight"
ODD_SHAPES = ([], [0], [2], [1, 0], [7, 3], [1, 1, 2])
COMPANIONS: dict[str, tuple[str, list[Any], str]] = {
    "scale, dtype": ("_scale", [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.complex64,
                                torch.float8_e5m2], "is no scale that is read; expected one of"),
    "scale, shape": ("_scale", [*ODD_SHAPES[1:], [200, 0], [200, 1, 1], [200, 5]], "is no scale of a weight"),
    "scale, value": ("_scale", [-1.0, float("nan"), float("inf"), 0.0], "has a scale of"),
    "shape": ("_shape", [[], [0], [1], [3], [2, 2], torch.float32, torch.bool], "expected two whole numbers"),
    "shape, value": ("_shape", [-1.0, 0.0, 7.0], "which is no ["),
    "zero, dtype": ("_zero_point", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.complex64],
                    "beside a scale"),
    "zero, shape": ("_zero_point", [*ODD_SHAPES, [1, 8], [200, 0]], "beside a scale"),
}  # fmt: skip


def changed(tensor: Tensor, change: Any) -> Tensor:
    """Of another dtype, another shape, or filled with a number."""
    if isinstance(change, torch.dtype):
        return tensor.float().to(change)
    return torch.ones(change, dtype=tensor.dtype) if isinstance(change, list) else torch.full_like(tensor, change)


@pytest.mark.parametrize("case", COMPANIONS)
def test_a_companion_that_is_none_is_refused_in_one_line(case: str, workshop: Path, tmp_path: Path) -> None:
    """Whatever its dtype, shape and numbers; each beside every layout that has one of its kind."""
    ending, changes, says = COMPANIONS[case]
    layouts = {"w4a16, zero": "_packed"} | ({} if ending == "_shape" else {"int8": ""})
    for method, numbers in layouts.items():
        layout, settings, _, _ = METHODS[method]
        stored = quantise(workshop / "model", tmp_path / method, layout, settings)
        if (name := FIRST + ending) not in stored:
            stored[name] = torch.zeros_like(stored[f"{FIRST}_scale"], dtype=torch.int8)
        assert stored[f"{FIRST}_scale"].shape[0] == 200 and FIRST + numbers in stored
        for change in changes:
            save_file(stored | {name: changed(stored[name], change)}, tmp_path / method / "model.safetensors")
            with pytest.raises(InputError) as error:
                open_checkpoint(tmp_path / method).tensor(FIRST.removeprefix("backbone."))
            assert says in str(error.value) and FIRST in str(error.value) and "\n" not in str(error.value), change


def test_scales_of_powers_of_two_and_zeros(workshop: Path, tmp_path: Path) -> None:
    """Exponents are numbers where the dtype says so; a block of zeros may have the scale zero."""
    folder = tmp_path / "q"
    stored = quantise(workshop / "model", folder, per_row, {})
    power = torch.exp2(stored[f"{FIRST}_scale"].log2().ceil())
    save_file(stored | {f"{FIRST}_scale": power.to(torch.float8_e8m0fnu)}, folder / "model.safetensors")
    assert torch.equal(
        open_checkpoint(folder).tensor(FIRST.removeprefix("backbone.")), (stored[FIRST] * power).bfloat16()
    )
    zeros = {FIRST: torch.zeros_like(stored[FIRST]), f"{FIRST}_scale": torch.zeros_like(power)}
    save_file(stored | zeros, folder / "model.safetensors")
    assert not open_checkpoint(folder).tensor(FIRST.removeprefix("backbone.")).any()


@pytest.mark.parametrize(
    ("method", "more", "says"),
    [
        ("blocks", {f"{FIRST}_scale": torch.ones(6, 2)}, "F8_E4M3 and two scales; expected"),
        ("int8", {f"{FIRST}_shape": torch.tensor([3, 5])}, "says [3, 5]"),
        ("int8", {FIRST.replace("weight", "weight_g_idx"): torch.arange(32)}, "columns in another order"),
        *(
            ("int8", {f"backbone.norm_f.weight{ending}": torch.ones(1)}, "is beside backbone.norm_f.weight of dtype")
            for ending in ("_scale", "_scale_inv", "_shape", "_zero_point")
        ),
    ],
)
def test_companions_that_contradict_are_refused(
    method: str, more: dict[str, Tensor], says: str, workshop: Path, tmp_path: Path
) -> None:
    layout, settings, _, _ = METHODS[method]
    stored = quantise(workshop / "model", tmp_path / "q", layout, settings)
    save_file(stored | more, tmp_path / "q" / "model.safetensors")
    with pytest.raises(InputError, match=re.escape(says)):
        open_checkpoint(tmp_path / "q")


def test_weights_in_a_format_that_runs_code(workshop: Path, tmp_path: Path) -> None:
    """With what to do about it."""
    binary = tmp_path / "binary"
    binary.mkdir()
    shutil.copy(workshop / "model" / "config.json", binary)
    (binary / "pytorch_model.bin").write_bytes(b"x")
    code, _, err = limbeck("export", f"model={binary}", f"output={tmp_path / 'out'}")
    assert code == 2 and "safe_serialization" in err and err.count("\n") == 1, (code, err)
