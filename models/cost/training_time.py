"""How long a training takes by a card's rates, from configs alone: a roofline of a step, and what all steps come to.

A step takes whichever is longest: its FLOPs at a share of the card's bf16 rate, its bytes at a share of the card's
bandwidth, or what processes send each other at that share of their links, one way. Bytes are the least that a step
moves: weights once a pass, what is kept for the backward written and read, gradients, and what the optimizer moves
(`training.standing`). Links: FSDP2 puts the student together for forward and backward and the teacher once, and sums
gradients in parts, at each micro-batch. Left out are what happens within layers, exchanges of split rows, what comes
from main memory, waiting, and all that is no step.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from ..config import HybridConfig
from .hardware import Hardware
from .parameters import count_parameters
from .speed import BANDWIDTH_EFFICIENCY, check_efficiency, training_flops
from .training import Training, TrainReport, shard, standing

# Of the card's bf16 rate, assumed: no GPU has run this code. Below the 38 to 43% that the training of Llama 3 405B
# reached on H100s (arXiv 2407.21783, table 4).
UTILISATION = 0.35
BOUNDS = ("products", "memory", "links")


@dataclasses.dataclass(frozen=True)
class TrainTime:
    """Seconds of a step by what may bound it (`BOUNDS`), FLOPs and tokens of one in all processes, and how many steps
    and processes there are."""

    seconds: dict[str, float]
    flops: float
    tokens: int
    steps: int
    processes: int

    @property
    def bound(self) -> str:
        return max(BOUNDS, key=lambda name: self.seconds[name])

    @property
    def step_seconds(self) -> float:
        return self.seconds[self.bound]

    @property
    def tokens_per_second(self) -> float:
        """Of all processes together."""
        return self.tokens / self.step_seconds

    @property
    def gpu_hours(self) -> float:
        return self.days * 24 * self.processes

    @property
    def days(self) -> float:
        return self.steps * self.step_seconds / 86400

    def content(self) -> dict[str, float | str | dict[str, float]]:
        return {
            "steps": self.steps, "tokens": self.steps * self.tokens, "flops": self.steps * self.flops,
            "step_seconds": dict(self.seconds), "bound": self.bound, "tokens_per_second": self.tokens_per_second,
            "gpu_hours": self.gpu_hours, "days": self.days,
        }  # fmt: skip


def train_time(
    student: HybridConfig,
    teacher: HybridConfig | None,
    training: Training,
    report: TrainReport,
    steps: int,
    card: Hardware,
    utilisation: float = UTILISATION,
) -> TrainTime | None:
    """`steps` of a student, of each of which `report` is the plan, in all of its processes; None where the card's rates
    do not say how long (`unknown_time`). Raises InputError where the utilisation is no share."""
    check_efficiency("training.", utilisation=utilisation)
    if unknown_time(training, card) is not None:
        return None
    student = student.replace(mtp_steps=0)  # carried along
    teacher = teacher.replace(mtp_steps=0) if teacher is not None and training.teacher == "online" else None
    rows = training.batch or training.micro_batch * training.groups
    tokens = rows * training.seq_len
    flops = tokens * training_flops(student, teacher, training.seq_len, training.checkpointing)
    bandwidth, links = (
        rate * 1e9 * BANDWIDTH_EFFICIENCY for rate in (card.bandwidth_gb_s, card.interconnect_gb_s / 2)
    )  # fmt: skip
    sent = bytes_sent(student, teacher, training, rows)
    seconds = {
        "products": flops / training.processes / (card.bf16_tflops * 1e12 * utilisation),
        "memory": bytes_moved(student, teacher, training, report, rows) / bandwidth,
        "links": sent / links if sent else 0.0,
    }
    return TrainTime(seconds, flops, tokens, steps, training.processes)


def unknown_time(training: Training, card: Hardware) -> str | None:
    """Why there is no time; None where there is one."""
    if missing := card.missing_rates(training.processes):
        return f"unknown without {', '.join(missing)}"
    types = [training.dtype] + [training.teacher_dtype] * (training.teacher == "online")
    if any(dtype.itemsize > torch.bfloat16.itemsize for dtype in types):
        return f"unknown in float32: the profile of {card.name} has the rate of bfloat16"
    return None


def micro_batches(training: Training, rows: int) -> int:
    return math.ceil(rows / training.groups / training.micro_batch)


def bytes_moved(
    student: HybridConfig, teacher: HybridConfig | None, training: Training, report: TrainReport, rows: int
) -> float:
    """The least that a process reads and writes of its memory in a step."""
    size, held = count_parameters(student), standing(student, teacher, training)
    passes = (3 + training.checkpointing) * size * training.width
    if teacher is not None:
        passes += count_parameters(teacher) * training.teacher_dtype.itemsize
    kept = report.moments["loss"]["kept for the backward"]
    optimizer = 2 * (shard(size * training.stored, training) + held["optimizer state"] + held["weight average"])
    optimizer += shard(size * training.stored, training)
    return micro_batches(training, rows) * (passes + 2 * kept + size * training.stored) + optimizer


def bytes_sent(student: HybridConfig, teacher: HybridConfig | None, training: Training, rows: int) -> float:
    """What a process sends in a step: in a ring n - 1 of n parts of all that is gathered or summed."""
    size = count_parameters(student)
    each = 2 * size * training.width + size * training.stored
    if teacher is not None:
        each += count_parameters(teacher) * training.teacher_dtype.itemsize
    return micro_batches(training, rows) * each * (training.processes - 1) / training.processes
