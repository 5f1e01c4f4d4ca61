"""The plan of a training step: beside allocations on a CPU, fake tensors in a GPU's place, and sums by hand."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.benchmarks.train_memory import measured, on_cpu, planned
from limbeck.kernels import causal_conv1d, fused_loss, ssd
from limbeck.models import mamba2
from limbeck.models.config import HybridConfig
from limbeck.models.cost import activations
from limbeck.models.cost.activations import Training, kept, kept_once, layer_input, norm_kept
from limbeck.models.cost.hardware import GIB
from limbeck.models.cost.live_bytes import LiveBytes
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.cost.training import LINES, TURNS, knobs, train_memory
from limbeck.models.errors import InputError
from limbeck.models.hybrid import HybridLM
from limbeck.scripts.run.resolve import model_config
from limbeck.tests.helpers import dense_config, limbeck, wide
from torch._subclasses.fake_tensor import FakeTensorMode

LARGE, SMALL = model_config("nemotron-nano-12b-v2"), model_config("nemotron-nano-9b-v2")


DENSE = {"family": "qwen3", "pattern": "*-*-", "gated_mlp": True, "activation": "silu", "qk_norm": True}
CASES = {
    "one micro-batch": (wide(), {"micro_batch": 2, "seq_len": 128}),
    "accumulation": (wide(), {"seq_len": 128, "batch": 2}),
    "bfloat16": (wide(), {"micro_batch": 2, "seq_len": 128, "dtype": torch.bfloat16, "teacher_dtype": torch.bfloat16}),
    "average": (wide(), {"micro_batch": 2, "seq_len": 128, "average": True}),
    "muon, checkpointing": (wide(), {"seq_len": 100, "batch": 2, "checkpointing": True, "optimizer": "muon"}),
    "no teacher": (wide(pattern="M", tie_word_embeddings=True), {"seq_len": 128, "teacher": "none"}),
    "Mamba, checkpointing": (wide(pattern="MM"), {"seq_len": 130, "checkpointing": True}),
    "dense": (wide(**DENSE, rope_theta=1e4), {"seq_len": 256}),
    "dense, checkpointing": (wide(**DENSE, rope_theta=1e4), {"seq_len": 256, "checkpointing": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_plan_beside_allocations(name: str) -> None:
    """Within 5% until the loss is known, from then on, and so in all."""
    config, setting = CASES[name]
    training = on_cpu(**setting)
    gc.collect()
    plan, found = planned(train_memory(config, config, training)), measured(config, config, training)
    for expected, seen in ((plan.forward, found.forward), (plan.rest, found.rest), (plan.total, found.total)):
        assert expected == pytest.approx(seen, rel=0.05)


@pytest.mark.parametrize(
    ("config", "dtype"),
    (
        (wide(), torch.bfloat16),
        (wide(pattern="MM"), torch.float32),
        (SMALL.replace(pattern="M-*"), torch.bfloat16),
        (dense_config(51, "qwen3"), torch.bfloat16),
    ),
)
def test_what_a_gpu_keeps(config: HybridConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops of the Triton kernels keep exactly what the plan says, by fake tensors; only attention is the CPU's."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(mamba2, "ssd_scan", scan_of_gpu)
    monkeypatch.setattr(mamba2, "causal_conv1d", conv_of_gpu)
    training = Training(micro_batch=2, seq_len=256, batch=2, packed=False, dtype=dtype, teacher="none", device="cuda")
    with FakeTensorMode():
        model = HybridLM(config, dtype=dtype)
        ids = torch.zeros(2, 256, dtype=torch.int64)
        with LiveBytes([*model.parameters(), ids]) as live:
            before = live.now
            hidden = model.hidden_states(ids)
            assert hidden.requires_grad
            alone = kept_once(config, training) + norm_kept(config, training) + layer_input(config, training)
            expected = sum(kept(letter, config, training) for letter in config.pattern) + alone
            assert live.now - before == pytest.approx(expected, rel=1e-3)


def scan_of_gpu(x: Any, dt: Any, A: Any, B: Any, C: Any, **options: Any) -> Any:
    """`ssd_scan` as it runs on a GPU."""
    small = (options["D"], options["dt_bias"], options["initial_state"], options["seq_idx"])
    return ssd.scan_op(x, dt, A, B, C, *small, True, *options["dt_limit"], options["chunk_size"])[0]


def conv_of_gpu(x: Any, weight: Any, bias: Any, **options: Any) -> Any:
    return causal_conv1d.conv_op(x, weight, bias, options["initial_state"], options["seq_idx"], True)


def test_constants_are_the_kernels() -> None:
    assert fused_loss.CACHED == activations.LOGITS
    assert causal_conv1d.Blocks.tokens == activations.CONV_TOKENS["cpu"]
    pytest.importorskip("triton")
    from limbeck.kernels import conv_triton, ssd_launch

    assert {sizes[1].tokens for sizes in conv_triton.SIZES.values()} == {activations.CONV_TOKENS["cuda"]}
    assert (ssd_launch.TILE_ELEMENTS, ssd_launch.PROGRAMS) == (activations.SCAN_TILE, activations.SCAN_PROGRAMS)
    for (_, width), sizes in ssd_launch.SIZES.items():
        assert min(found.tokens for found in sizes[1:]) == activations.SCAN_TOKENS[width]


def test_sizes_of_the_published_models_by_hand() -> None:
    """9B from 12B: 2 bytes in use, 4 that are moved, 4 of gradient, 8 of moments a weight, and 2 of the teacher's; of
    eight processes each holds an eighth of what is moved, and nothing narrow."""
    size, teacher = count_parameters(SMALL), 2 * count_parameters(LARGE)
    fixed = LINES[:6]
    one = train_memory(SMALL, LARGE, Training(average=True))
    assert sum(one.lines[line] for line in fixed) == (2 + 4 + 4 + 8 + 4) * size + teacher
    eight = train_memory(SMALL, LARGE, Training(average=True, processes=8))
    assert sum(eight.lines[line] for line in fixed) == pytest.approx((20 * size + teacher) / 8, abs=6)
    assert not one.lines["gathered layers"] and eight.lines["gathered layers"]
    full = train_memory(SMALL, LARGE, Training(dtype=torch.float32))
    assert sum(full.lines[line] for line in fixed) == (4 + 4 + 8) * size + teacher and not full.lines["master copies"]
    cached = train_memory(SMALL, None, Training(teacher="cached"))
    assert not cached.lines["teacher weights"] and not any("teacher" in moment for moment in cached.moments)
    muon = train_memory(SMALL, LARGE, Training(optimizer="muon")).lines["optimizer state"]
    outside = 2 * SMALL.vocab_size * SMALL.hidden_size
    assert muon == pytest.approx(4 * (size - outside) + 8 * outside, rel=1e-3)


def test_knobs() -> None:
    """Cheapest first, each with those above it; the number of GPUs is the least that fits and shares the batch."""
    training, budget = Training(micro_batch=4, batch=24), 70 * GIB
    found = knobs(SMALL, LARGE, training, budget)
    together = [knob.together for knob in found if knob.together is not None]
    assert together == sorted(together, reverse=True) and together[-1] <= budget
    assert found[0].name == "activation checkpointing" and found[1].name == "micro_batch 1"
    count = next(int(knob.name.split()[0]) for knob in found if knob.name.endswith("GPUs"))
    least = [
        train_memory(SMALL, None, Training(batch=24, checkpointing=True, teacher="cached", processes=each)).total
        <= budget
        for each in (1, 2, 3, 4, 6, 8, 12, 24)
    ]
    assert count == (1, 2, 3, 4, 6, 8, 12, 24)[least.index(True)] > 1
    assert len(found) <= len(TURNS) and all(knob.together is None for knob in knobs(SMALL, LARGE, training, 10**15))


def test_refusals() -> None:
    for wrong in ({"micro_batch": 0}, {"teacher": "offline"}, {"optimizer": "sgd"}, {"processes": 0}, {"batch": 0}):
        with pytest.raises(InputError, match="train: .*" + next(iter(wrong))):
            Training(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="teacher=cached"):
        train_memory(SMALL, None, Training())


def test_command_plans_the_published_recipe(tmp_path: Path) -> None:
    """Four stages on eight H100s: 262,144 tokens are what no knob but their number makes fit."""
    words = ["memory-fit", "mode=train", "recipe=nemotron-nano-9b-v2", "hardware=h100", "processes=8"]
    code, text, err = limbeck(*words, "distill.train.activation_checkpointing=true", f"output={tmp_path / 'plan'}")
    assert code == 3 and "2-width/3 does not fit" in err and "seq_len" in err.splitlines()[-1]
    plan = json.loads((tmp_path / "plan" / "result.json").read_text())
    assert [stage["training"]["seq_len"] for stage in plan["stages"]] == [8192, 8192, 49152, 262144]
    assert [stage["fits"] for stage in plan["stages"]] == [True, True, True, False]
    for stage in plan["stages"]:
        lines = stage["moments"][stage["fullest"]]
        assert stage["total"] == sum(lines.values()) and all(line in text for line, size in lines.items() if size)
    last = plan["stages"][-1]["knobs"][-1]
    assert last["name"] in err and last["fits"] and plan["stages"][0]["training"]["batch"] == 768


def test_command_of_two_models() -> None:
    """teacher= and student= take named configs and folders; the micro-batch is of a process's rows."""
    words = ["teacher=nemotron-nano-12b-v2", "student=nemotron-nano-9b-v2", "hardware=h100", "distill.batch=64"]
    code, text, _ = limbeck(
        "train-fit", *words, "processes=64", "distill.train.activation_checkpointing=true", "distill.seq_len=4096"
    )
    assert code == 0 and "1 x 4,096" in text and "64 processes" in text and "12,310,001,152" in text
    hardware = ("hardware=cpu", "hardware.usable_gib=4", "dtype=float32")
    assert limbeck("train-fit", "teacher=zoo", "student=zoo-small", *hardware)[0] == 0
    assert limbeck("train-fit", "teacher=zoo", "student=zoo-small", *hardware, "hardware.usable_gib=0.1")[0] == 3


@pytest.mark.parametrize(
    ("words", "says"),
    (
        ("train-fit", "model is missing"),
        ("train-fit recipe=tiny student=zoo", "student is given beside recipe"),
        ("train-fit teacher=zoo student=zoo training.teacher=off", "known: online, cached, none"),
        ("train-fit recipe=tiny processes=3", "a batch of 4 rows is not for 3 processes"),
        ("memory-fit mode=training model=zoo", "known: inference, train"),
    ),
)
def test_command_refuses(words: str, says: str) -> None:
    code, _, err = limbeck(*words.split())
    assert code == 2 and says in err and len(err.splitlines()) == 1
