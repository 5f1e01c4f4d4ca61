"""`limbeck memory-fit mode=train`: what each GPU will hold in distillation, stage by stage. Exit code 0 fits, 3 no."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from ..distill.options import DistillOptions
from ..models.config import HybridConfig
from ..models.cost.hardware import GIB, Reserve
from ..models.cost.parameters import count_parameters
from ..models.cost.training import LINES, Training, TrainReport, train_memory
from ..models.cost.turns import Knob, common_options, knobs
from ..models.errors import CheckFailed, InputError, check_counts
from ..models.folder import atomic_folder, write_json
from ..prune.rounds import in_kinds, leftovers, plan_cuts
from ..prune.target import Target
from . import compress
from .run.resolve import model_config, torch_dtype
from .run.show import gib, say, table, told


@dataclasses.dataclass(frozen=True)
class Setup(Reserve):
    """How a step is done, beside what distill says; and what of the card is not ours."""

    teacher: str = "online"


@dataclasses.dataclass(frozen=True)
class Options(compress.Options):
    """A compress command, of which nothing is done."""

    student: str | None
    processes: int
    training: Setup

    def __post_init__(self) -> None:
        check_counts(self, "processes")
        self.plan()


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of distillation: the student (of those that a round may leave the one that takes most), and its step."""

    name: str
    student: HybridConfig
    training: Training
    report: TrainReport


def run(options: Options) -> None:
    teacher, how = model_config(options.model), options.training
    budget = how.budget(options.hardware)
    stages = list(planned(options, teacher))
    print_stages(options, teacher, stages, budget)
    over = [stage for stage in stages if stage.report.total > budget]
    turns = {stage.name: knobs(stage.student, teacher, stage.training, budget) for stage in over}
    for name, found in turns.items():
        print_knobs(name, found)
    together = common_options([(one.student, one.training) for one in stages], teacher, budget) if over else []
    if together:
        say(f"all {len(stages)} stages fit with {' '.join(together)}")
    if options.output is not None:
        with atomic_folder(options.output) as folder:
            content = as_json(options, stages, turns, budget) | {"together": together}
            write_json(folder / "result.json", told(folder, content, options.output))
        say(f"result: {options.output / 'result.json'}")
    if turns:
        worst = max(stages, key=lambda stage: stage.report.total)
        answer = next((knob.name for knob in turns[worst.name] if knob.fits), None)
        enough = f"{answer}, with what stands above it, would do" if answer else "nothing that can be turned would do"
        raise CheckFailed(
            f"stage {worst.name} does not fit {options.hardware.name}: {gib(worst.report.total - budget)} too much"
            f" at {worst.training.seq_len:,} tokens x {worst.training.micro_batch}; {enough}"
        )


def planned(options: Options, teacher: HybridConfig) -> Iterator[Stage]:
    """The stages of all rounds in their order. Raises InputError where nothing says what the student is."""
    if options.student is not None:
        if options.rounds or options.target != Target():
            raise InputError("student is given beside recipe, rounds or target; leave one of them out")
        yield from stages_of("", options.distill, [model_config(options.student)], options, teacher)
        return
    if not options.rounds and options.target == Target():
        raise InputError("student is missing; give student=VALUE, a recipe, or a target (limbeck train-fit --help)")
    patterns, rounds = {in_kinds(teacher)}, options.plan()
    for one, step in zip(rounds, plan_cuts(teacher, [one.cut for one in rounds]), strict=True):
        patterns = leftovers(step, patterns)
        students = [step.after.replace(pattern=pattern) for pattern in sorted(patterns)]
        yield from stages_of(one.name, one.distill, students, options, teacher)


def stages_of(
    name: str, how: DistillOptions, students: list[HybridConfig], options: Options, teacher: HybridConfig
) -> Iterator[Stage]:
    how.check_one_size("memory-fit mode=train")
    plan = how.plan()
    for number, stage in enumerate(plan, 1):
        training = training_of(stage, options)
        reports = [(train_memory(student, teacher, training), student) for student in students]
        report, student = max(reports, key=lambda found: found[0].total)
        label = f"{name}/{number}" if name else f"{number}" if len(plan) > 1 else "distill"
        yield Stage(label, student, training, report)


def training_of(stage: DistillOptions, options: Options) -> Training:
    """A stage's step on one of the processes."""
    how, parts = options.training, stage.train.context_parallel
    rows = max(1, stage.batch * parts // options.processes)
    return Training(
        micro_batch=min(stage.train.micro_batch or rows, rows),
        seq_len=stage.seq_len,
        batch=stage.batch,
        dtype=torch_dtype(options.dtype),
        optimizer=stage.train.optimizer,
        checkpointing=stage.train.activation_checkpointing,
        average=stage.train.ema_decay > 0,
        quantized=stage.train.quantize is not None,
        teacher=how.teacher if stage.loss.reads_teacher else "none",
        teacher_dtype=torch_dtype(stage.teacher_dtype or options.dtype),
        teacher_offload=stage.teacher_offload,
        processes=options.processes,
        context_parallel=parts,
        device="cpu" if options.hardware.name == "cpu" else "cuda",
    )


def print_stages(options: Options, teacher: HybridConfig, stages: list[Stage], budget: float) -> None:
    """A column a stage, its fullest moment line by line; then a row a stage."""
    lines = [line for line in LINES if any(stage.report.lines[line] for stage in stages)]
    rows = [
        ("student, 10^6 parameters", *(f"{count_parameters(stage.student) / 1e6:,.0f}" for stage in stages)),
        *((line, *(gib(stage.report.lines[line]) for stage in stages)) for line in lines),
        ("together", *(gib(stage.report.total) for stage in stages)),
    ]
    card, usable = options.hardware.name, options.hardware.usable_gib * GIB
    title = f"What each of {options.processes:,} processes holds at the fullest moment of a step"
    table(title, ("stage", *(stage.name for stage in stages)), rows)
    summary = [
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
    kept = f"{gib(usable)} less {gib(usable - budget)} for framework, reserve and overhead"
    columns = ("stage", "rows x tokens", "holds", "margin", "fits", "fullest")
    table(f"Within {gib(budget)} of {card} ({kept})", columns, summary)
    say(f"teacher: {count_parameters(teacher):,} parameters")


def print_knobs(name: str, found: list[Knob]) -> None:
    """What could be turned for a stage that does not fit."""
    rows = [
        (
            knob.name,
            gib(knob.saves),
            "yes" if knob.fits_alone else "no",
            "-" if knob.together is None else gib(knob.together),
            "-" if knob.together is None else "yes" if knob.fits else "no",
        )
        for knob in found
    ]
    columns = ("turn", "saves alone", "fits alone", "with those above", "fits")
    table(f"Stage {name} does not fit; what to turn, from the least cost on", columns, rows)


def as_json(options: Options, stages: list[Stage], turns: dict[str, list[Knob]], budget: float) -> dict[str, Any]:
    def plain(training: Training) -> dict[str, Any]:
        names = {name: str(getattr(training, name)).removeprefix("torch.") for name in ("dtype", "teacher_dtype")}
        return dataclasses.asdict(training) | names

    return {
        "budget": budget, "hardware": dataclasses.asdict(options.hardware),
        "stages": [
            {
                "name": stage.name,
                "parameters": count_parameters(stage.student),
                "training": plain(stage.training),
                "fullest": stage.report.fullest,
                "moments": stage.report.moments,
                "total": stage.report.total,
                "fits": stage.report.total <= budget,
                "knobs": [dataclasses.asdict(knob) for knob in turns.get(stage.name, [])],
            }
            for stage in stages
        ],
    }  # fmt: skip
