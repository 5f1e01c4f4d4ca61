"""How long a training takes by a card's rates: sums by hand, what binds, and what `memory-fit mode=train` says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from limbeck.models.cost.hardware import Hardware
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.cost.stages import PlannedStage, time_rows, time_sentence, total_time
from limbeck.models.cost.training import Training, train_memory
from limbeck.models.cost.training_time import UTILISATION, TrainTime, train_time
from limbeck.models.errors import InputError
from limbeck.models.named import model_config, read_hardware
from limbeck.tests.helpers import dense_config, limbeck

LARGE, SMALL = model_config("nemotron-nano-12b-v2"), model_config("nemotron-nano-9b-v2")
CARD = Hardware("card", 80.0, 79.0, 1000, 100, interconnect_gb_s=200)


def timed(student, teacher, training: Training, card: Hardware = CARD, steps: int = 1, **share: float) -> TrainTime:
    found = train_time(student, teacher, training, train_memory(student, teacher, training), steps, card, **share)
    assert found is not None
    return found


def test_products_by_hand() -> None:
    """A dense model: two FLOPs a weight of a matrix and of the head, and four a channel of every query head and token
    before, on average half a row; three passes or four, and the teacher's."""
    student, teacher = dense_config(51, "qwen3"), dense_config(53, "qwen3")

    def forward(config, length: int) -> float:
        c, layers = config, config.pattern.count("*")
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        matrices = layers * c.hidden_size * (2 * queries + 2 * keys + 3 * c.intermediate_size)
        return 2 * (matrices + c.vocab_size * c.hidden_size) + layers * 4 * queries * length / 2

    for checkpointing in (False, True):
        training = Training(micro_batch=2, seq_len=256, batch=8, checkpointing=checkpointing, processes=2)
        found = timed(student, teacher, training, steps=7)
        flops = 8 * 256 * ((3 + checkpointing) * forward(student, 256) + forward(teacher, 256))
        assert found.flops == pytest.approx(flops) and found.tokens == 8 * 256
        assert found.seconds["products"] == pytest.approx(flops / 2 / (100e12 * UTILISATION))
        alone = timed(student, None, dataclasses.replace(training, teacher="cached"))
        assert alone.flops == pytest.approx(8 * 256 * (3 + checkpointing) * forward(student, 256))


def test_bytes_and_links_by_hand() -> None:
    """Two processes, two micro-batches each: bytes of bfloat16 weights a pass, float32 gradients and moments."""
    training = Training(micro_batch=1, seq_len=512, batch=4, processes=2)
    found, report = timed(SMALL, LARGE, training), train_memory(SMALL, LARGE, training)
    small, large = count_parameters(SMALL), count_parameters(LARGE)
    kept = report.moments["loss"]["kept for the backward"]
    moved = 2 * (3 * 2 * small + 2 * large + 2 * kept + 4 * small)
    optimizer = 2 * (4 + 8) * small / 2 + 4 * small / 2  # master and moments read and written, gradients read
    assert found.seconds["memory"] == pytest.approx((moved + optimizer) / (1000e9 * 0.7), rel=1e-6)
    assert found.seconds["links"] == pytest.approx(2 * (2 * 2 * small + 4 * small + 2 * large) / 2 / (100e9 * 0.7))
    alone = dataclasses.replace(training, processes=1, batch=2)
    assert timed(SMALL, LARGE, alone).seconds["links"] == 0


def test_what_binds() -> None:
    """Long rows the products, few tokens a micro-batch the memory, and links where they are slow."""
    long, few = Training(micro_batch=1, seq_len=8192, batch=1), Training(micro_batch=1, seq_len=64, batch=1)
    assert timed(SMALL, LARGE, long).bound == "products" and timed(SMALL, LARGE, few).bound == "memory"
    many = Training(micro_batch=1, seq_len=1024, batch=8, processes=8)
    assert timed(SMALL, LARGE, many, read_hardware("rtx4090")).bound == "links"
    h200, longer = read_hardware("h200"), dataclasses.replace(many, seq_len=4096)
    assert timed(SMALL, LARGE, many, h200).bound == "links" and timed(SMALL, LARGE, longer, h200).bound == "products"


def test_what_it_comes_to() -> None:
    training = Training(micro_batch=1, seq_len=8192, batch=16, processes=8, checkpointing=True)
    card = read_hardware("h100")
    found, half = (timed(SMALL, LARGE, training, card, 1000, utilisation=share) for share in (0.4, 0.2))
    assert found.gpu_hours == pytest.approx(found.days * 24 * 8) == pytest.approx(half.gpu_hours / 2)
    assert found.tokens_per_second * found.days * 86400 == pytest.approx(1000 * 16 * 8192)
    # arXiv 2508.14444's 50 10^9 tokens of rows of 8,192, as the README has them.
    hours = timed(SMALL, LARGE, training, card).gpu_hours * 50e9 / (16 * 8192)
    assert f"{hours:,.0f}" == "3,716"
    with pytest.raises(InputError, match="utilisation"):
        timed(SMALL, LARGE, training, card, utilisation=1.5)


def test_where_no_time_is_known() -> None:
    """Without a rate, and in float32: no figure, and why."""
    for card, training, why in (
        (Hardware("card", 80, 79, 0, 0), Training(batch=1), "hardware.bandwidth_gb_s, hardware.bf16_tflops"),
        (Hardware("card", 80, 79, 10, 10), Training(batch=2, processes=2), "hardware.interconnect_gb_s"),
        (CARD, Training(batch=1, dtype=torch.float32), "float32"),
        (CARD, Training(batch=1, teacher_dtype=torch.float32), "float32"),
    ):
        report = train_memory(SMALL, LARGE, training)
        assert train_time(SMALL, LARGE, training, report, 1, card) is None
        stage = PlannedStage("one", SMALL, training, report, None)
        assert why in time_sentence([stage], card, 0.35) and not time_rows([stage]) and not total_time([stage])["days"]


def test_command(tmp_path: Path) -> None:
    """Each stage of the recipe, and all of them; half of the utilisation takes twice as long."""
    words = ["memory-fit", "mode=train", "recipe=nemotron-nano-9b-v2", "hardware=h100", "processes=8",
             "distill.train.activation_checkpointing=true", "distill.train.context_parallel=4"]  # fmt: skip
    plans = []
    for name, more in (("one", []), ("two", [f"training.utilisation={UTILISATION / 2}"])):
        code, text, _ = limbeck(*words, *more, f"output={tmp_path / name}")
        assert code == 0 and "GPU-hours" in text and "│ all " in text
        assert "a roofline at" in text and "of 989 TFLOP/s (training.utilisation)" in text
        assert "the exchange of split rows" in text
        plans.append(json.loads((tmp_path / name / "result.json").read_text()))
    stages = plans[0]["stages"]
    assert [f"{stage['time']['tokens']:.1e}" for stage in stages] == ["6.0e+10", "5.0e+10", "2.5e+10", "1.0e+09"]
    assert all(stage["time"]["bound"] == "products" for stage in stages)
    assert plans[0]["time"]["gpu_hours"] == pytest.approx(sum(stage["time"]["gpu_hours"] for stage in stages))
    assert f"{plans[0]['time']['gpu_hours']:,.0f}" == "11,318"  # docs/recipes.md
    assert plans[0]["time"]["days"] == pytest.approx(plans[0]["time"]["gpu_hours"] / 8 / 24)
    assert plans[1]["time"]["days"] == pytest.approx(2 * plans[0]["time"]["days"])
    code, _, err = limbeck(*words, "training.utilisation=0")
    assert code == 2 and "training.utilisation" in err and err.count("\n") == 1
    cpu = ["train-fit", "teacher=zoo", "student=zoo-small", "hardware.usable_gib=4", "distill.train.optimizer=muon"]
    code, text, _ = limbeck(*cpu, "hardware=cpu")
    assert code == 0 and "GPU-hours: unknown without hardware.bandwidth_gb_s" in text
    own = limbeck(*cpu, "hardware=custom", "hardware.device=cpu")[1]
    sizes, own_sizes = ([line for line in said.splitlines() if "iB │" in line] for said in (text, own))
    assert sizes == own_sizes and len(sizes) > 5
