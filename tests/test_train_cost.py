"""The plan of a training step: beside allocations on a CPU, fake tensors in a GPU's place, and sums by hand."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from limbeck.benchmarks.train_memory import measured, on_cpu, planned
from limbeck.kernels import causal_conv1d, ssd
from limbeck.models.config import HybridConfig
from limbeck.models.cost.hardware import GIB
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.cost.trace_step import StepLoad, run_all, step_trace
from limbeck.models.cost.training import LINES, Training, train_memory
from limbeck.models.cost.turns import TURNS, knobs
from limbeck.models.errors import InputError
from limbeck.scripts.run.compose import compose_config
from limbeck.scripts.run.resolve import model_config
from limbeck.tests.helpers import dense_config, limbeck, wide

LARGE, SMALL = model_config("nemotron-nano-12b-v2"), model_config("nemotron-nano-9b-v2")


DENSE = {"family": "qwen3", "pattern": "*-*-", "gated_mlp": True, "activation": "silu", "qk_norm": True}
EXPERTS = {"pattern": "ME*E", "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
           "moe_shared_expert_intermediate_size": 128}  # fmt: skip
CASES = {
    "one micro-batch": (wide(), {"micro_batch": 2, "seq_len": 128}),
    "accumulation": (wide(), {"seq_len": 128, "batch": 2}),
    "bfloat16": (wide(), {"micro_batch": 2, "seq_len": 128, "dtype": torch.bfloat16, "teacher_dtype": torch.bfloat16}),
    "average": (wide(), {"micro_batch": 2, "seq_len": 128, "average": True}),
    "muon, checkpointing": (wide(), {"seq_len": 100, "batch": 2, "checkpointing": True, "optimizer": "muon"}),
    "no teacher": (wide(pattern="M", tie_word_embeddings=True), {"seq_len": 128, "teacher": "none"}),
    "Mamba, checkpointing": (wide(pattern="MM"), {"seq_len": 130, "checkpointing": True}),
    "experts": (wide(**EXPERTS), {"micro_batch": 2, "seq_len": 128}),
    "experts, bfloat16, checkpointing": (
        wide(**EXPERTS),
        {"micro_batch": 2, "seq_len": 128, "checkpointing": True, "dtype": torch.bfloat16},
    ),
    "dense": (wide(**DENSE, rope_theta=1e4), {"seq_len": 256}),
    "dense, checkpointing": (wide(**DENSE, rope_theta=1e4), {"seq_len": 256, "checkpointing": True}),
}


QUICK = ("one micro-batch", "bfloat16", "muon, checkpointing", "experts, bfloat16, checkpointing", "dense")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in CASES])
def test_plan_beside_allocations(name: str) -> None:
    """Within 5% until the loss is known, from then on, and so in all."""
    config, setting = CASES[name]
    training = on_cpu(**setting)
    gc.collect()
    plan, found = planned(train_memory(config, config, training)), measured(config, config, training)
    for expected, seen in ((plan.forward, found.forward), (plan.rest, found.rest), (plan.total, found.total)):
        assert expected == pytest.approx(seen, rel=0.05)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("config", (wide(), SMALL, dense_config(51, "qwen3")), ids=("small", "9B", "dense"))
def test_what_a_gpu_keeps_by_hand(config: HybridConfig, dtype: torch.dtype) -> None:
    """n tokens, b bytes a number, 4 of sums. Every layer keeps its input, what its norm gives, and the sums of squares;
    a Mamba layer what in_proj, the convolution, the scan and the gated norm give; attention queries, keys, values,
    answer, and a sum a head; an MLP both sides of its activation."""
    n, b, c = 512, dtype.itemsize, config
    heads, keys = c.num_attention_heads, c.num_key_value_heads
    inner = 2 * c.d_inner + c.d_inner + c.conv_dim + c.mamba_num_heads + c.conv_dim
    normed = n * (heads + keys) * (b * c.head_dim + 4) if c.qk_norm else 0
    mixers = {
        "M": n * b * inner + 4 * n * c.n_groups,
        "*": n * b * 2 * (heads + keys) * c.head_dim + 4 * n * heads + normed,
        "-": n * b * (2 + c.gated_mlp) * c.intermediate_size,
    }
    kept = step_trace(config, StepLoad(2, 256, False, dtype, True)).kept
    assert set(kept) == set(config.pattern)
    for kind, size in kept.items():
        assert size == pytest.approx(n * b * 2 * c.hidden_size + 4 * n + mixers[kind], rel=1e-4, abs=1024)


@pytest.mark.parametrize("on_gpu", (True, False), ids=("gpu", "cpu"))
@pytest.mark.parametrize("checkpointing", (True, False), ids=("again", "kept"))
@pytest.mark.parametrize("gradients", ("new", "added"))
def test_few_layers_tell_of_all(on_gpu: bool, checkpointing: bool, gradients: str) -> None:
    """A step of every layer on tensors without memory has the highest moments that the plan puts together."""
    config = wide(**EXPERTS | {"pattern": "*-MEM*-E-M-"}, rope_theta=1e4)
    load = StepLoad(2, 128, True, torch.bfloat16, on_gpu, checkpointing, gradients, "online", 96)
    training = Training(
        micro_batch=2, seq_len=128, batch=2 if gradients == "new" else 4, device="cuda" if on_gpu else "cpu",
        checkpointing=checkpointing,
    )  # fmt: skip
    teacher = config.replace(hidden_size=96)
    assert training.load(teacher) == load
    moments = train_memory(config, teacher, training).moments
    marks, before = run_all(config, load)
    for part, peak in marks.peaks.items():
        if part in ("embedding", config.num_layers - 1):  # what is shared is held; the last norm's backward is in it
            continue
        names = {"loss": "loss", "head": "loss backward"}
        name = names.get(part) or f"layer {part} ({config.pattern[part]}) backward"  # type: ignore[index, call-overload]
        passing = {line: size for line, size in moments[name].items() if line in LINES[6:]}
        new = moments[name]["gradients"] if gradients == "new" else 0
        # A GPU's allocator rounds the gradients of small vectors up.
        assert sum(passing.values()) + new == pytest.approx(peak - before, rel=2e-4, abs=6000 if on_gpu else 2000), part


def test_constants_are_the_kernels() -> None:
    pytest.importorskip("triton")
    from limbeck.kernels import conv_triton, scan_sizes

    assert {sizes[1].tokens for sizes in conv_triton.SIZES.values()} == {causal_conv1d.SEGMENT}
    for (_, width), sizes in scan_sizes.SIZES.items():
        assert min(found.tokens for found in sizes[1:]) == ssd.GRADIENT_TOKENS[width]
        assert sizes[0].tokens <= ssd.STEP_TOKENS


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
    rounded = train_memory(SMALL, LARGE, Training(quantized=True, processes=4, dtype=torch.bfloat16, batch=4)).lines
    assert rounded["student weights"] == rounded["master copies"] == pytest.approx(size, rel=1e-3)
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


def test_rows_split_by_hand() -> None:
    """Of eight processes that split a row each keeps an eighth of it, and for the Mamba layers the decays of its tokens
    and the states that it was given; for attention the keys and values of the whole row in place of its own."""
    tokens, parts = 65536, 8
    whole, split = (
        step_trace(SMALL, Training(seq_len=tokens, processes=parts, teacher="none", context_parallel=each).load(None))
        for each in (1, parts)
    )
    heads, each = SMALL.mamba_num_heads, tokens // parts
    state = heads * SMALL.mamba_head_dim * SMALL.ssm_state_size
    given = 4 * (parts * (state + heads) + 2 * parts * state)  # gathered, and what the combination keeps at most
    halo = 2 * SMALL.conv_dim * (SMALL.conv_kernel - 1)
    more = split.kept["M"] - whole.kept["M"] / parts
    assert 4 * heads * each < more <= 4 * heads * each + given + 4 * halo
    keys = 2 * 2 * SMALL.num_key_value_heads * SMALL.head_dim  # bytes a token
    assert split.kept["*"] - whole.kept["*"] / parts == pytest.approx(keys * (tokens - each), rel=0.02)
    assert split.kept["-"] == whole.kept["-"] / parts


@pytest.mark.slow
def test_command_plans_the_published_recipe(tmp_path: Path) -> None:
    """Four stages on eight H100s: 262,144 tokens fit where four processes split a row, and the plan says so."""
    words = ["memory-fit", "mode=train", "recipe=nemotron-nano-9b-v2", "hardware=h100", "processes=8"]
    words.append("distill.train.activation_checkpointing=true")
    code, text, err = limbeck(*words, f"output={tmp_path / 'plan'}")
    assert code == 3 and "2-width/3 does not fit" in err and "context_parallel 4" in err.splitlines()[-1]
    plan = json.loads((tmp_path / "plan" / "result.json").read_text())
    assert [stage["training"]["seq_len"] for stage in plan["stages"]] == [8192, 8192, 49152, 262144]
    assert [stage["fits"] for stage in plan["stages"]] == [True, True, True, False]
    for stage in plan["stages"]:
        lines = stage["moments"][stage["fullest"]]
        assert stage["total"] == sum(lines.values()) and all(line in text for line, size in lines.items() if size)
    knob = next(knob for knob in plan["stages"][-1]["knobs"] if knob["fits"])
    assert knob["name"] == "context_parallel 4" and plan["stages"][0]["training"]["batch"] == 768
    assert plan["together"] == ["distill.train.context_parallel=4"] and plan["together"][0] in text
    assert limbeck(*words, *plan["together"])[0] == 0


def test_what_the_plan_says_fits_fits() -> None:
    """With exactly its options, where nobody has given a micro-batch: a group of more processes has more rows."""
    words = ["train-fit", "teacher=nemotron-nano-12b-v2", "student=nemotron-nano-9b-v2", "hardware=h100", "processes=8",
             "dtype=bfloat16", "distill.batch=8", "distill.train.activation_checkpointing=true"]  # fmt: skip
    code, text, _ = limbeck(*words, "distill.seq_len=131072")
    found = next(line for line in text.splitlines() if "stages fit with" in line).split(" fit with ")[1].split()
    assert code == 3 and found == ["distill.train.micro_batch=1", "distill.train.context_parallel=2"]
    assert limbeck(*words, "distill.seq_len=131072", *found)[0] == 0


def test_turns_that_a_stage_refuses_are_not_named() -> None:
    """Rows that the student writes are neither split nor cached, a cache has no reverse KL, what saves nothing is no
    turn."""
    words = ["train-fit", "teacher=nemotron-nano-12b-v2", "student=nemotron-nano-9b-v2", "hardware=l4", "processes=2",
             "dtype=bfloat16", "distill.batch=2"]  # fmt: skip
    own = ["distill.rollouts={prompt_tokens: 64, new_tokens: 64}", "distill.loss.divergence=reverse"]
    code, text, _ = limbeck(*words, own[0])
    assert code == 3 and "context_parallel" not in text and "cached teacher" not in text
    code, text, _ = limbeck(*words, own[1])
    assert code == 3 and "cached teacher" not in text and "-1." not in text
    assert "cached teacher" in limbeck(*words)[1]


def test_the_teacher_s_own_training_and_compared_states_are_planned() -> None:
    words = ["train-fit", "teacher=nemotron-nano-12b-v2", "student=nemotron-nano-9b-v2", "hardware=h100", "processes=8",
             "dtype=bfloat16", "distill.batch=8", "distill.seq_len=8192"]  # fmt: skip
    text = limbeck(*words, "distill.teacher_correction={tokens: 1e6, learning_rate: 1e-5}")[1]
    assert "teacher" in next(line for line in text.splitlines() if "stage" in line and "distill" in line)
    plain, hidden = (
        train_memory(SMALL, LARGE, Training(hidden_streams=count, seq_len=32768, checkpointing=True)).moments["loss"]
        for count in (0, 4)
    )
    # Two float32 numbers a channel of each stream, as the autograd of the loss keeps them (143,376 bytes a token).
    more = hidden["kept for the backward"] - plain["kept for the backward"]
    assert more / 32768 == pytest.approx(143_376, rel=1e-3)
    assert hidden["hidden states"] == 4 * 32768 * LARGE.hidden_size * 2


def test_command_of_two_models() -> None:
    """teacher= and student= take named configs and folders; the micro-batch is of a process's rows."""
    words = ["teacher=nemotron-nano-12b-v2", "student=nemotron-nano-9b-v2", "hardware=h100", "distill.batch=64"]
    code, text, _ = limbeck(
        "train-fit", *words, "processes=64", "distill.train.activation_checkpointing=true", "distill.seq_len=4096"
    )
    assert code == 0 and "1 x 4,096" in text and "64 processes" in text and "12,310,001,152" in text
    hardware = ("hardware=cpu", "hardware.usable_gib=4", "dtype=float32")
    assert limbeck("train-fit", "teacher=zoo", "student=zoo-small", *hardware)[0] == 0


@pytest.mark.slow
def test_command_says_what_to_turn() -> None:
    hardware = ("hardware=cpu", "dtype=float32")
    assert limbeck("train-fit", "teacher=zoo", "student=zoo-small", *hardware, "hardware.usable_gib=0.1")[0] == 3


def test_a_recipe_may_set_what_this_command_adds(tmp_path: Path) -> None:
    own = {"model": "zoo", "student": "zoo-small", "processes": 8, "training": {"utilisation": 0.5, "reserve_gib": 1.0}}
    (tmp_path / "mine.yaml").write_text(json.dumps(own))
    made = compose_config("train-fit", [f"recipe={tmp_path / 'mine.yaml'}", "training.reserve_gib=2"])
    assert {name: made[name] for name in ("model", "student", "processes")}.items() <= own.items()
    assert (made["training"]["utilisation"], made["training"]["reserve_gib"]) == (0.5, 2)
    assert made["hardware"]["name"] == "h100"


@pytest.mark.parametrize(
    ("words", "says"),
    (
        ("train-fit", "model is missing"),
        ("train-fit recipe=tiny student=zoo", "student is given beside recipe"),
        ("train-fit teacher=zoo student=zoo training.teacher=off", "known: online, cached, none"),
        ("train-fit recipe=tiny processes=3", "a batch of 4 rows is not for 3 processes"),
        ("train-fit recipe=tiny processes=4 distill.train.context_parallel=3", "expected a divisor of the processes"),
        ("memory-fit mode=training model=zoo", "known: inference, train"),
        ("memory-fit mode=train recipe=tiny fit.reserve_gib=9", "give training.reserve_gib=VALUE"),
        ("train-fit recipe=tiny ++fit.overhead_gib=9", "give training.overhead_gib=VALUE"),
    ),
)
def test_command_refuses(words: str, says: str) -> None:
    code, _, err = limbeck(*words.split())
    assert code == 2 and says in err and len(err.splitlines()) == 1
