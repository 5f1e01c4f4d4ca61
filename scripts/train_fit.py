"""`limbeck memory-fit mode=train`: what each GPU will hold in distillation, stage by stage, and how long it takes. Exit
code 0 fits, 3 no."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ..distill.losses import beyond_cache
from ..distill.options import DistillOptions
from ..models.config import HybridConfig
from ..models.cost.hardware import Reserve
from ..models.cost.parameters import count_parameters
from ..models.cost.speed import check_efficiency
from ..models.cost.stages import PlannedStage, as_json, fit_rows, kept_apart, line_rows, time_rows, time_sentence
from ..models.cost.training import Training, train_memory
from ..models.cost.training_time import UTILISATION, train_time
from ..models.cost.turns import Knob, common_options, knobs
from ..models.errors import CheckFailed, InputError, check_counts
from ..models.folder import atomic_folder, check_new, write_json
from ..prune.rounds import in_kinds, leftovers, plan_cuts
from ..prune.target import Target
from . import compress
from .run.resolve import model_config, torch_dtype, training_dtype
from .run.show import gib, say, table, told

ONLINE = frozenset({"teacher"})  # excludes the turn to a cached teacher


@dataclasses.dataclass(frozen=True)
class Setup(Reserve):
    """How a step is done, beside what distill says, and the share of the card's bf16 rate that it reaches; and what of
    the card is not ours."""

    teacher: str = "online"
    utilisation: float = UTILISATION

    def __post_init__(self) -> None:
        super().__post_init__()
        check_efficiency("training.", utilisation=self.utilisation)


@dataclasses.dataclass(frozen=True)
class Options(compress.Options):
    """A compress command, of which nothing is done."""

    student: str | None
    processes: int
    training: Setup
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_counts(self, "processes")
        for name in (field.name for field in dataclasses.fields(Reserve)):  # a recipe's are of its inference
            if any(word.lstrip("+").startswith(f"fit.{name}=") for word in self.words):
                raise InputError(f"fit.{name} is not read for training, whose budget is of training.*; give"
                                 f" training.{name}=VALUE")  # fmt: skip
        if not self.shard:
            raise InputError("train-fit: matrices are counted as split among the processes (FSDP2); leave shard out")
        self.plan()


def run(options: Options) -> None:
    if options.output is not None:
        check_new(options.output)
    teacher, how = model_config(options.model), options.training
    budget = how.budget(options.hardware)
    stages = list(planned(options, teacher))
    print_stages(options, teacher, stages, budget)
    over = [stage for stage in stages if stage.report.total > budget]
    turns = {stage.name: knobs(stage.student, teacher, stage.training, budget, stage.excluded) for stage in over}
    for name, found in turns.items():
        print_knobs(name, found)
    excluded = frozenset(key for stage in stages for key in stage.excluded)
    each = [(one.student, one.training) for one in stages]
    together = common_options(each, teacher, budget, excluded) if over else []
    if together:
        say(f"all {len(stages)} stages fit with {' '.join(together)}")
    if options.output is not None:
        with atomic_folder(options.output) as folder:
            content = as_json(stages, turns, options.hardware, budget, how.utilisation) | {"together": together}
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


def planned(options: Options, teacher: HybridConfig) -> Iterator[PlannedStage]:
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
) -> Iterator[PlannedStage]:
    how.check_one_size("memory-fit mode=train")
    plan = how.plan()
    if how.teacher_correction is not None:
        first = how.correction()
        training = dataclasses.replace(training_of(first, options), teacher="none")
        report = train_memory(teacher, None, training)
        time = train_time(teacher, None, training, report, first.train.steps, options.hardware,
                          options.training.utilisation)  # fmt: skip
        yield PlannedStage(f"{name}/teacher" if name else "teacher", teacher, training, report, time, excluded=ONLINE)
    for number, stage in enumerate(plan, 1):
        training = training_of(stage, options)
        reports = [(train_memory(student, teacher, training), student) for student in students]
        report, student = max(reports, key=lambda found: found[0].total)
        label = f"{name}/{number}" if name else f"{number}" if len(plan) > 1 else "distill"
        steps, card, share = stage.train.steps, options.hardware, options.training.utilisation
        time = train_time(student, teacher, training, report, steps, card, share)
        yield PlannedStage(label, student, training, report, time, uncounted(stage), excluded_turns(stage))


def excluded_turns(stage: DistillOptions) -> frozenset[str]:
    """The turns that a stage's other options refuse."""
    whole_rows = stage.own_rows > 0 or stage.loss.mtp_weight > 0 or stage.train.compile
    online = stage.own_rows > 0 or stage.teacher_correction is not None or beyond_cache(stage.loss) is not None
    return frozenset({"context_parallel"} if whole_rows else ()) | (ONLINE if online else frozenset())


def uncounted(stage: DistillOptions) -> tuple[str, ...]:
    """What of a stage its time leaves out."""
    apart = {
        "the text that the student writes": stage.own_rows > 0,
        "the teacher's way from main memory": stage.teacher_offload,
        "the exchange of split rows": stage.train.context_parallel > 1,
    }
    return tuple(what for what, there in apart.items() if there)


def training_of(stage: DistillOptions, options: Options) -> Training:
    """A stage's step on one of the processes."""
    how, parts = options.training, stage.train.context_parallel
    rows = max(1, stage.batch * parts // options.processes)
    return Training(
        micro_batch=min(stage.train.micro_batch or rows, rows),
        seq_len=stage.seq_len,
        batch=stage.batch,
        dtype=training_dtype(options.dtype),
        optimizer=stage.train.optimizer,
        checkpointing=stage.train.activation_checkpointing,
        average=stage.train.ema_decay > 0,
        quantized=stage.train.quantize is not None,
        teacher=how.teacher if stage.loss.reads_teacher else "none",
        teacher_dtype=torch_dtype(stage.teacher_dtype or options.dtype),
        teacher_offload=stage.teacher_offload,
        processes=options.processes,
        context_parallel=parts,
        device=options.hardware.device,
        hidden_streams=(len(stage.loss.hidden.pairs) or stage.loss.hidden.streams) * stage.loss.hidden_weighs,
        trains_ahead=stage.loss.mtp_weight > 0,
        rows_given=stage.train.micro_batch > 0,
    )


def print_stages(options: Options, teacher: HybridConfig, stages: list[PlannedStage], budget: float) -> None:
    title = f"What each of {options.processes:,} processes holds at the fullest moment of a step"
    table(title, ("stage", *(stage.name for stage in stages)), line_rows(stages))
    columns = ("stage", "rows x tokens", "holds", "margin", "fits", "fullest")
    table(kept_apart(budget, options.hardware), columns, fit_rows(stages, budget))
    say(f"teacher: {count_parameters(teacher):,} parameters")
    if rows := time_rows(stages):
        heads = ("stage", "steps", "tokens", "tokens a second", "bound by", "GPU-hours", "days")
        table(f"How long it takes on {options.processes:,} {options.hardware.name}", heads, rows)
    say(time_sentence(stages, options.hardware, options.training.utilisation))


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
