"""`limbeck memory-fit`: verdicts, what would help, vLLM's blocks and flags, the plot, and wrong input."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.benchmarks import guarded, inference
from limbeck.models.checkpoint import save_model
from limbeck.models.cost.fit import Fit
from limbeck.models.cost.hardware import GIB, Hardware
from limbeck.models.cost.inference import MOST_SEQUENCES, changes, memory, verdict
from limbeck.models.cost.serving import serving_cautions, serving_rows
from limbeck.models.cost.vllm import VllmReport, flags, largest_sequences
from limbeck.models.errors import InputError
from limbeck.models.named import SHIPPED, read_hardware
from limbeck.scripts.run.resolve import model_config
from limbeck.tests.gguf_helpers import gguf_config, write_tokenizer
from limbeck.tests.helpers import any_config, limbeck, random_model, tiny_config
from safetensors.torch import load_file, save_file

LARGE, SMALL, DENSE = (model_config(name) for name in ("nemotron-nano-12b-v2", "nemotron-nano-9b-v2", "qwen3-8b"))
A10G = Hardware("a10g", 22.49, 22.06, 600, 70, "8.6", 80)
BUDGET = A10G.budget(0.05, 1.3, 0)


def test_the_promise() -> None:
    """arXiv 2508.14444: at 131,072 tokens the 9B fits 19.66 GiB, activations and all, and the 12B does not."""
    small, large = (memory(config, 131072, place=A10G.place) for config in (SMALL, LARGE))
    assert round(BUDGET / GIB, 2) == 19.66 and small.peak <= BUDGET < large.total
    assert small.peak == small.total + small.prompt + small.activations + small.workspace
    assert small.activations > small.decode + small.logits
    assert 18.7 < small.peak / GIB < 18.9


def test_chunk_none_counts_weights_and_caches_alone() -> None:
    report = memory(SMALL, 4096, 2, chunk=None)
    assert report.peak == report.total == memory(SMALL, 4096, 2).total and report.load is None


@pytest.mark.parametrize("seed", [*range(3), 50, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4, 5, 51, 52))])
def test_largest_context_and_batch(seed: int) -> None:
    """What a verdict names fits, and one more does not."""
    config = any_config(seed)
    report = memory(config, 40, 3, chunk=16, place=A10G.place)
    found = verdict(config, report, 1.7 * report.peak)

    def peak(context: int, batch: int) -> int:
        return memory(config, context, batch, chunk=16, place=A10G.place).peak

    assert peak(40, found.largest_batch) <= found.budget < peak(40, found.largest_batch + 1)
    if "*" in config.pattern:
        assert peak(found.largest_context, 3) <= found.budget < peak(found.largest_context + 1, 3)
    else:
        assert found.largest_context == -1
    nothing = verdict(config, report, report.weights - 1)
    assert not nothing.fits and nothing.largest_batch == 0 and nothing.largest_context == 0


@pytest.mark.parametrize("config", [LARGE, DENSE], ids=["hybrid", "dense"])
def test_what_would_help_is_true(config: Any) -> None:
    report = memory(config, 32768, 2, place=A10G.place)
    found = {way.name: way for way in changes(config, report, BUDGET, place=A10G.place)}
    key = next(name for name in found if name.startswith("8-bit"))
    assert found[key].saved == report.kv // 2
    if config is LARGE:
        assert found["SSM states in bfloat16"].saved == report.ssm // 2
        assert found["all of these"].saved > found[key].saved + report.ssm // 2
    fewer = next(way for name, way in found.items() if "fewer" in name)
    assert fewer.fits and report.peak - fewer.saved <= BUDGET
    assert all(way.fits == (report.peak - way.saved <= BUDGET) for way in found.values())


def test_vllm_by_hand() -> None:
    """The 9B: blocks of 1312 tokens, 82 of 16, to hold a state of 5,316,608 bytes at 4096 bytes a token. Groups of 4
    layers: one of attention, seven of Mamba."""
    headroom = 10 * GIB
    for mode, states in (("none", 1), ("align", 3)):
        report = memory(SMALL, 131072, budget=headroom + 2 * 8888227328, mamba_cache_mode=mode).vllm
        needed = math.ceil(131072 / 1312) + 7 * states
        assert (report.block_size, report.blocks_per_request) == (1312, needed)
        assert report.bytes_per_block == 4 * 1312 * 4096 and report.bytes_per_request == needed * report.bytes_per_block
        assert report.blocks == report.largest_max_num_seqs == headroom // report.bytes_per_block
        free = headroom - report.bytes_per_block  # the null block
        assert report.max_num_seqs == free // report.bytes_per_request
        longest = report.largest_max_model_len
        again = [memory(SMALL, longest + more, mamba_cache_mode=mode).vllm.bytes_per_request for more in (0, 1)]
        assert again[0] <= free < again[1]
    with pytest.raises(InputError, match="align"):
        memory(SMALL, 1024, mamba_cache_mode="all")


def test_vllm_keeps_a_null_block() -> None:
    """As many blocks as a request needs are one too few: vLLM 0.32 refuses the 9B's 131,072 tokens with 107 blocks and
    estimates 129,888 for them."""
    block = 4 * 1312 * 4096
    reports = [memory(SMALL, 131072, budget=2 * 8888227328 + n * block).vllm for n in (107, 108)]
    assert [report.blocks_per_request for report in reports] == [107, 107]
    assert [report.max_num_seqs for report in reports] == [0, 1]
    assert [report.largest_max_model_len for report in reports] == [129888, 131200]
    mamba = memory(tiny_config(pattern="M-M"), 64, budget=1e6).vllm
    assert mamba.max_num_seqs == mamba.blocks - 1 == mamba.largest_max_num_seqs - 1


def test_vllm_flags() -> None:
    report = memory(SMALL, 131072, budget=BUDGET, mamba_cache_mode="align").vllm
    requested: dict[str, Any] = {"context": 131072, "utilization": 0.8915, "dtype": "bfloat16", "mamba": True}
    found = flags(report, A10G, ssm_dtype="float32", kv_dtype="float8_e4m3fn", **requested)
    assert found == [
        "--dtype bfloat16", "--max-model-len 131072", "--max-num-seqs 1", "--gpu-memory-utilization 0.891",
        "--enable-prefix-caching", "--kv-cache-dtype fp8", "--mamba-ssm-cache-dtype float32",
        "--mamba-cache-mode align",
    ]  # fmt: skip
    plain = memory(tiny_config(pattern="*-"), 64, budget=BUDGET).vllm
    assert "--no-enable-prefix-caching" in flags(
        plain, A10G, ssm_dtype="float32", kv_dtype="bfloat16", **requested | {"mamba": False}
    )


@pytest.mark.parametrize(
    ("card", "given"),
    (
        (A10G, True),
        (Hardware("a100-80g", 79.25, 79.0, 2039, 312, "8.0", 108), True),
        (Hardware("h100", 79.65, 79.0, 3350, 989, "9.0"), False),
    ),
    ids=lambda value: getattr(value, "name", value),
)
def test_a_block_longer_than_a_step_is_given(card: Hardware, given: bool) -> None:
    """Blocks of 2,608 tokens with 8-bit keys and values, where vLLM's default is 2,048 on small cards and A100s."""
    fit = Fit(context=131072, kv_dtype="float8_e4m3fn", mamba_cache_mode="align")
    estimate = fit.estimate(SMALL, card)
    assert estimate.memory.vllm.block_size == 2608
    assert ("--max-num-batched-tokens 2608" in estimate.vllm_flags()) == given


@pytest.mark.parametrize(
    ("mode", "block", "card", "most"),
    (
        ("none", 4096, "a10g", 2048),
        ("none", 16, "h100", 8192),
        ("align", 16, "b200", 16384),
        ("align", 4096, "l4", 4096),
    ),
)
def test_no_more_sequences_than_tokens_of_a_step(mode: str, block: int, card: str, most: int) -> None:
    """vLLM refuses --max-num-seqs beyond --max-num-batched-tokens, its default or what is given."""
    requested: dict[str, Any] = {"context": 64, "utilization": 0.9, "ssm_dtype": "float32", "kv_dtype": "bfloat16"}
    profile = read_hardware(card)
    for requests, largest in ((2368, 3000), (10**6, 10**6), (7, 9)):
        report = VllmReport(block, 1, requests, mode, largest_max_num_seqs=largest)
        found = flags(report, profile, dtype="bfloat16", mamba=True, **requested)
        assert f"--max-num-seqs {min(requests, most)}" in found and largest_sequences(report, profile, True) == min(
            largest, most
        )
        assert ("--max-num-batched-tokens 4096" in found) == (mode == "align" and card == "l4")
    dense = dataclasses.replace(report, mode="none", largest_max_num_seqs=0)
    assert largest_sequences(dense, profile, False) == {"l4": 2048}.get(card, most)


def test_commands_of_an_adapter_and_of_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter is exported first; a path of the home folder is written out, since a shell leaves quoted ones."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    size = write_tokenizer(tmp_path / "words", "llama-bpe")
    base, adapter = tmp_path / "the base", tmp_path / "adapter"
    save_model(random_model(gguf_config("llama", size), 0, torch.float32), base, tokenizer_from=tmp_path / "words")
    name = "model.layers.0.self_attn.q_proj"
    rows, columns = load_file(base / "model.safetensors")[f"{name}.weight"].shape
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": True}))
    factors = {f"base_model.model.{name}.lora_A.weight": torch.ones(2, columns),
               f"base_model.model.{name}.lora_B.weight": torch.ones(rows, 2)}  # fmt: skip
    save_file(factors, adapter / "adapter_model.safetensors")
    estimate = Fit(context=64).estimate(model_config(str(adapter)), read_hardware("h100"))
    found = dict(serving_rows(estimate, "~/adapter"))
    first = f"limbeck export model={adapter} output=merged && "
    assert found["vLLM"].startswith(first + "vllm serve merged --dtype")
    assert found["transformers"].startswith(first + "transformers serve merged ")
    assert found["llama.cpp"].startswith(f"limbeck export model={adapter} output=gguf format=gguf dtype=bfloat16 && ")
    found = dict(serving_rows(estimate, "~/the base"))
    assert found["vLLM"].startswith(f"vllm serve '{base}' ") and f"model='{base}' output=gguf" in found["llama.cpp"]
    (base / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in dict(serving_rows(estimate, "~/the base"))["llama.cpp"]


def test_commands_of_an_adapter_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what of it is in the hub's cache; a model that has an adapter beside it is served as it is."""
    files = {"adapter_config.json"}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file, revision: (
        str(tmp_path / file) if file in files else None))  # fmt: skip
    estimate = Fit(context=64).estimate(model_config("smollm2-135m"), read_hardware("h100"))
    found = dict(serving_rows(estimate, "hf:our/adapter@v1"))["vLLM"]
    assert found.startswith("limbeck export model=hf:our/adapter@v1 output=merged && vllm serve merged ")
    files.add("config.json")
    assert dict(serving_rows(estimate, "hf:our/adapter@v1"))["vLLM"].startswith("vllm serve our/adapter --revision v1 ")


def test_what_does_not_fit_is_not_measured() -> None:
    words = ("model=zoo", "hardware=custom", "hardware.usable_gib=0.01", "hardware.device=cpu", "context=64")
    code, out, err = limbeck("memory-fit", *words, "method=measurement")
    assert code == 3 and "not measured" in out, err


@pytest.mark.parametrize(
    ("ssm_dtype", "size", "given"),
    (
        ("float16", 2, "--mamba-ssm-cache-dtype float16"),
        ("float16_stochastic", 2, "--enable-mamba-cache-stochastic-rounding --mamba-backend flashinfer"),
        ("int8", 1, ""),
        ("int8_stochastic", 1, ""),
        ("float8_e4m3fn", 1, ""),
        ("float64", 8, ""),
    ),
)
def test_states_as_a_server_keeps_them(ssm_dtype: str, size: int, given: str) -> None:
    """The 9B's 27 Mamba layers of 10,240 channels with 128 numbers each, and a scale of four bytes a channel where a
    number has one; the flags that vLLM 0.32 has for it, and what it is known to cost."""
    estimate = Fit(context=8192, ssm_dtype=ssm_dtype).estimate(SMALL, A10G)
    channels = SMALL.pattern.count("M") * SMALL.d_inner
    assert estimate.memory.ssm == channels * (128 * size + (4 if size == 1 else 0))
    found, refusal = " ".join(estimate.vllm_flags()), estimate.vllm_refusal()
    assert given in found if given else not found and f"no SSM states in {ssm_dtype}" in refusal
    assert len(estimate.cautions()) == (ssm_dtype != "float64")
    assert estimate.memory.peak < memory(SMALL, 8192, ssm_dtype=torch.float64, place=A10G.place).peak + 1


@pytest.mark.slow
def test_stochastic_rounding_by_card() -> None:
    """Triton rounds so at compute capability 10.x, FlashInfer elsewhere, and nothing on a processor."""
    fit = Fit(context=8192, ssm_dtype="float16_stochastic")
    found = " ".join(fit.estimate(SMALL, read_hardware("b200")).vllm_flags())
    assert "stochastic-rounding" in found and "flashinfer" not in found
    here = Hardware("cpu", 64, 64, 100, 1, device="cpu")
    assert "NVIDIA" in fit.estimate(SMALL, here).vllm_refusal() and not fit.estimate(SMALL, here).vllm_flags()
    assert any("0.3%" in caution for caution in fit.estimate(SMALL, here).cautions())


@pytest.mark.slow
def test_commands_of_every_program() -> None:
    """With the model's path or name where there is one; a program that keeps caches otherwise says so instead."""
    card, wide = read_hardware("h100"), model_config("falcon-h1-0.5b")
    config = model_config("zoo")
    rows = dict(serving_rows(Fit(context=512, batch=2).estimate(config, card), "zoo"))
    assert rows["vLLM"].startswith(f"vllm serve {SHIPPED['zoo']} --dtype bfloat16 --max-model-len 512")
    given = "export model=zoo output=gguf format=gguf dtype=bfloat16 pre_tokenizer=gpt-2 && llama-server"
    assert given in rows["llama.cpp"] and "`gpt-2`" in "".join(serving_cautions(list(rows.items())))
    assert "--ctx-size 1024 --parallel 2" in rows["llama.cpp"] and "--cache-type-k bf16" in rows["llama.cpp"]
    assert rows["transformers"] == f"transformers serve {SHIPPED['zoo']} --dtype bfloat16 --device cuda"
    eight = Fit(context=512, kv_dtype="float8_e4m3fn").estimate(config, card)
    rows = dict(serving_rows(eight, "hf:some/model@v1"))
    assert rows["vLLM"].startswith("vllm serve some/model --revision v1 --dtype")
    assert "no keys and values" in rows["llama.cpp"] and "fit.kv_dtype" in rows["transformers"]
    short = Fit(context=512, ssm_dtype="float16").estimate(SMALL, card)
    rows = dict(serving_rows(short, "nemotron-nano-9b-v2"))
    assert rows["vLLM"].startswith("vllm serve MODEL ") and "SSM states in float32" in rows["llama.cpp"]
    assert (
        "format=gguf knows no falcon_h1" in dict(serving_rows(Fit(context=512).estimate(wide, card), "x"))["llama.cpp"]
    )
    assert dict(serving_rows(eight, "my models/9b"))["vLLM"].startswith("vllm serve 'my models/9b' ")


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "fit"
    code, text, _ = limbeck("memory-fit", "model=nemotron-nano-9b-v2", "fit.reserve_gib=1.3", f"output={out}")
    assert code == 0 and "18.69 GiB" in text and "19.66 GiB" in text and "--max-model-len 131072" in text
    found = json.loads((out / "result.json").read_text())
    assert found["memory"]["peak"] == memory(SMALL, 131072, place=A10G.place).peak and found["verdict"]["fits"]
    assert found["vllm_flags"][1] == "--max-model-len 131072" and found["simulation"] is found["measurement"] is None
    assert (out / "plots" / "memory.png").stat().st_size > 20000
    assert "budget 19.66 GiB" in (out / "plots" / "memory.svg").read_text()
    code, text, err = limbeck("memory-fit", "model=nemotron-nano-12b-v2", "fit.reserve_gib=1.3", "method=measurement",
                              "hardware.device=cpu")  # fmt: skip
    assert code == 3 and "does not fit" in err and "layers fewer" in text and "layers fewer" in err


def test_three_methods_on_the_shipped_model() -> None:
    code, text, _ = limbeck(
        "memory-fit", "model=zoo", "hardware=cpu", "hardware.usable_gib=1", "fit.weight_dtype=float32", "steps=2",
        "fit.kv_dtype=float32", "context=40", "batch=2", "method=all", "fit.chunk=32",
    )  # fmt: skip
    assert code == 0 and "Peak by method" in text and "measurement (cpu)" in text and "the simulated peak" in text


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("batch=0",), "batch"),
        (("fit.chunk=0",), "chunk"),
        (("context=131073",), "131,072"),
        (("hardware=a11g",), "a10g"),
        (("method=gut",), "formula"),
        (("steps=0",), "steps"),
        (("fit.kv_dtype=int4",), "float8_e4m3fn"),
        (("fit.kv_dtype=float8_e4m3fn", "method=simulation"), "fit.kv_dtype"),
        (("fit.ssm_dtype=int4",), "float16_stochastic"),
        (("fit.ssm_dtype=int8", "method=simulation"), "fit.ssm_dtype is int8"),
        (("fit.mamba_cache_mode=some",), "align"),
        (("hardware.device=tpu",), "cuda or cpu"),
        (("hardware.compute_capability=sm_86",), "compute_capability is 'sm_86'; expected CUDA's number, such as 8.6"),
        (("hardware.compute_capability=nan",), "compute_capability is 'nan'"),
    ],
)
def test_wrong_input(wrong: tuple[str, ...], said: str) -> None:
    code, _, err = limbeck("memory-fit", "model=nemotron-nano-9b-v2", *wrong)
    assert code == 2 and said in err and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_measurement_needs_the_card() -> None:
    code, _, err = limbeck("memory-fit", "model=nemotron-nano-9b-v2", "method=measurement")
    assert code == 2 and "sees none" in err


@pytest.mark.slow
def test_inference_benchmark_at_tiny_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All parts on the CPU's own path; with the kernels interpreted it takes a minute."""
    plan, path = inference.tiny_plan(), tmp_path / "figures.json"
    cases = functools.partial(inference.cases_of, plan, list(inference.PARTS), False)
    runner, budget = guarded.in_this_process(inference.working(plan)), guarded.Budget(math.inf, {})
    assert guarded.run_benchmark(path, {}, cases, runner, budget, inference.describe, inference.fails) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["kind"] for row in rows] == ["machine", "check", "decode", "memory", *["throughput"] * 2, "ratio"]
    assert "nothing was allocated" in capsys.readouterr().out and rows[-1]["ratio"] > 0
    if not torch.cuda.is_available():
        assert inference.main(["--json", str(tmp_path / "x.json")]) == 2


@pytest.mark.slow
def test_inference_benchmark_interpreted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "limbeck.benchmarks.inference", "--interpret", "--json", str(tmp_path / "x.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "x.json").read_text())
    found = next(row for row in figures["rows"] if row["kind"] == "memory")
    assert found["right"] and abs(found["off"]) < 0.02


@pytest.mark.parametrize("command", ("memory-fit", "train-fit", "bench"))
def test_an_output_that_exists_is_refused_before_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every command that writes its folder in the end."""
    module = f"limbeck.scripts.{command.replace('-', '_')}.model_config"
    monkeypatch.setattr(module, lambda name: pytest.fail("work began"))
    more = ["target.layers=11"] if command == "train-fit" else []
    code, _, err = limbeck(command, "model=zoo", f"output={tmp_path}", *more)
    assert code == 2 and "exists already" in err


def test_whole_blocks_are_what_fewer_layers_means() -> None:
    """So many as the config counts, and a pattern that the family has."""
    code, out, _ = limbeck(
        "memory-fit", "model=qwen3-8b", "hardware=t4", "fit.weight_dtype=float16", "fit.kv_dtype=float16",
        "context=16384",
    )  # fmt: skip
    found = re.search(r"(\d+) layers fewer \((\d+) \*, (\d+) -\)", " ".join(out.split()))
    assert code == 3 and found is not None and len({*found.groups()}) == 1
    config, hardware = model_config("qwen3-8b"), read_hardware("t4")
    estimate = Fit(context=16384, weight_dtype="float16", kv_dtype="float16").estimate(config, hardware)
    types = {"weight_dtype": torch.float16, "kv_dtype": torch.float16, "place": hardware.place}
    budget = estimate.memory.peak + estimate.verdict.margin
    peaks = [memory(config.replace(pattern=config.pattern[2 * gone :]), 16384, **types).peak
             for gone in (int(found[1]) - 1, int(found[1]))]  # fmt: skip
    assert peaks[1] <= budget < peaks[0]


def test_speed_is_of_a_batch_that_fits() -> None:
    config, hardware = model_config("zoo"), read_hardware("l4")
    estimate = Fit(context=4096).estimate(config, hardware)
    speed = estimate.throughput()
    assert speed is not None and speed.batch == estimate.verdict.largest_batch
    assert Fit(context=4096, batch=speed.batch).estimate(config, hardware).fits


def test_a_model_that_keeps_nothing_of_a_sequence() -> None:
    config = model_config("zoo").replace(pattern="-")
    estimate = Fit(context=128).estimate(config, read_hardware("l4"))
    assert 1 <= estimate.verdict.largest_batch <= MOST_SEQUENCES
