"""The stages of a training as `limbeck memory-fit mode=train` plans them: tables, json, and what is assumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import HybridConfig
from ..errors import gib
from .hardware import GIB, Hardware
from .parameters import count_parameters
from .speed import BANDWIDTH_EFFICIENCY
from .training import LINES, Training, TrainReport
from .training_time import TrainTime, unknown_time
from .turns import Knob

Cells = list[tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class PlannedStage:
    """A stage of distillation: the student (of those that a round may leave the one that takes most), its step and what
    that holds, how long it takes (None: unknown), what of it is not in that time, and the turns that it cannot take."""

    name: str
    student: HybridConfig
    training: Training
    report: TrainReport
    time: TrainTime | None
    apart: tuple[str, ...] = ()
    excluded: frozenset[str] = frozenset()


def line_rows(stages: Sequence[PlannedStage]) -> Cells:
    """A column a stage, its fullest moment line by line."""
    lines = [line for line in LINES if any(stage.report.lines[line] for stage in stages)]
    return [
        ("student, 10^6 parameters", *(f"{count_parameters(stage.student) / 1e6:,.0f}" for stage in stages)),
        *((line, *(gib(stage.report.lines[line]) for stage in stages)) for line in lines),
        ("together", *(gib(stage.report.total) for stage in stages)),
    ]


def fit_rows(stages: Sequence[PlannedStage], budget: float) -> Cells:
    """Stage, rows x tokens, what it holds, margin, whether it fits, the fullest moment."""
    return [
        (
            stage.name,
            f"{stage.training.micro_batch:,} x {stage.training.seq_len:,}",
            gib(stage.report.total),
            gib(budget - stage.report.total),
            "yes" if stage.report.total <= budget else "no",
            stage.report.fullest,
        )
        for stage in stages
    ]


def time_rows(stages: Sequence[PlannedStage]) -> Cells:
    """Stage, steps, tokens, tokens a second, what bounds it, GPU-hours, days; and of several stages all together."""
    times = [(stage.name, stage.time) for stage in stages if stage.time is not None]
    rows: Cells = [
        (name, f"{one.steps:,}", large(one.steps * one.tokens), f"{one.tokens_per_second:,.0f}", one.bound,
         hours(one.gpu_hours), hours(one.days))
        for name, one in times
    ]  # fmt: skip
    if len(times) > 1:
        steps, tokens = sum(one.steps for _, one in times), sum(one.steps * one.tokens for _, one in times)
        both = total_time(stages)
        rate = tokens / (both["days"] * 86400)
        row = ("all", f"{steps:,}", large(tokens), f"{rate:,.0f}", "", hours(both["gpu_hours"]), hours(both["days"]))
        rows.append(row)
    return rows


def large(count: int) -> str:
    """A number of tokens as a narrow column has it."""
    return f"{count / 1e9:,.3g} 10^9" if count >= 1e9 else f"{count / 1e6:,.3g} 10^6" if count >= 1e6 else f"{count:,}"


def hours(count: float) -> str:
    """A time by three digits, whole from 100 on."""
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}" if count >= 0.01 else "< 0.01"


def total_time(stages: Sequence[PlannedStage]) -> dict[str, float]:
    times = [stage.time for stage in stages if stage.time is not None]
    return {"gpu_hours": sum(one.gpu_hours for one in times), "days": sum(one.days for one in times)}


def time_sentence(stages: Sequence[PlannedStage], card: Hardware, utilisation: float) -> str:
    """What the times assume and leave out; or why there are none."""
    unknown = next((why for stage in stages if (why := unknown_time(stage.training, card)) is not None), None)
    if unknown is not None:
        return f"GPU-hours: {unknown}"
    processes = stages[0].training.processes
    links = f" and of the {card.interconnect_gb_s / 2:g} GB/s one way between cards" if processes > 1 else ""
    apart = dict.fromkeys(each for stage in stages for each in stage.apart)
    return (
        f"times: a roofline at {utilisation:.0%} of {card.bf16_tflops:g} TFLOP/s (training.utilisation) and"
        f" {BANDWIDTH_EFFICIENCY:.0%} of {card.bandwidth_gb_s:g} GB/s{links}, both assumed; three passes of the"
        " student, a fourth with activation checkpointing, one of an online teacher, attention over whole rows; without"
        f" {', '.join(('scoring, evaluation, launches, start and waiting', *apart))}"
    )


def as_json(
    stages: Sequence[PlannedStage], turns: Mapping[str, list[Knob]], card: Hardware, budget: float, utilisation: float
) -> dict[str, Any]:
    """The content of result.json."""

    def plain(training: Training) -> dict[str, Any]:
        names = {name: str(getattr(training, name)).removeprefix("torch.") for name in ("dtype", "teacher_dtype")}
        return dataclasses.asdict(training) | names

    return {
        "budget": budget, "hardware": dataclasses.asdict(card), "utilisation": utilisation,
        "time": total_time(stages) if all(stage.time for stage in stages) else None,
        "stages": [
            {
                "name": stage.name,
                "parameters": count_parameters(stage.student),
                "training": plain(stage.training),
                "fullest": stage.report.fullest,
                "moments": stage.report.moments,
                "total": stage.report.total,
                "fits": stage.report.total <= budget,
                "time": stage.time and stage.time.content(),
                "knobs": [dataclasses.asdict(knob) for knob in turns.get(stage.name, [])],
            }
            for stage in stages
        ],
    }  # fmt: skip


def kept_apart(budget: float, card: Hardware) -> str:
    """The title of `fit_rows`."""
    usable = card.usable_gib * GIB
    kept = f"{gib(usable)} less {gib(usable - budget)} for framework, reserve and overhead"
    return f"Within {gib(budget)} of {card.name} ({kept})"
