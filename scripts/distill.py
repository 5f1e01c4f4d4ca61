"""`limbeck distill`: a student recovers from its teacher's logits. Killed, the same command goes on where it was."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..distill.agreement import check_agreement
from ..distill.average import kept_weights
from ..distill.losses import DistillLoss, cross_entropy_loss
from ..distill.options import TrainOptions
from ..distill.parallel import Trained
from ..distill.state import fill_weights, states
from ..distill.text.mixture import Text, batches_per_epoch, train_batches
from ..distill.text.packing import Batch
from ..distill.trainer import Evaluate, OnStep, train
from ..models import processes
from ..models.errors import InputError
from ..models.fingerprint import plain
from ..models.hybrid import HybridLM
from .run.compose import build, convert, guess
from .run.resolve import corpus, data_input, model_folder, sample, say_epochs, torch_dtype
from .run.show import progress, result, say
from .run.stage import Facts, run_stage
from .run.tracking import check_mode, journal
from .score import many_processes
from .teaching import cache_sum, open_teaching
from .training import figures, finish_training, load_frozen, load_trained, process_device

STAGE_SEEDS = 1000  # between the seeds of two stages, so that the second does not begin with the first one's text


@dataclasses.dataclass(frozen=True)
class Correction:
    """A teacher's own training on the text before it teaches: cross-entropy, for so many steps, or as many as read so
    many tokens; everything else as the student's."""

    steps: int = 0
    tokens: float = 0
    learning_rate: float = 1e-5

    def __post_init__(self) -> None:
        if (self.steps > 0) == (self.tokens > 0):
            raise InputError(
                f"distill.teacher_correction: steps is {self.steps}, tokens {self.tokens:g}; give one of the two"
            )


@dataclasses.dataclass(frozen=True)
class Distill:
    """What conf/distill/ sets: the loss, the schedule, and the tokens; `repack` cuts an epoch's rows anew. Each of
    `stages` goes on from the weights that the one before it left, and says what it does otherwise (see `stage_of`);
    none is one stage as it stands."""

    loss: DistillLoss
    train: TrainOptions
    seq_len: int
    batch: int
    evaluate_tokens: int
    repack: bool = True
    teacher_dtype: str | None = None
    teacher_offload: bool = False
    teacher_correction: Correction | None = None
    stages: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.seq_len < 1 or self.batch < 1:
            raise InputError(f"distill: seq_len ({self.seq_len}) and batch ({self.batch}) must be at least 1")
        if self.teacher_dtype is not None:
            torch_dtype(self.teacher_dtype)
        self.plan()

    def plan(self) -> tuple[Distill, ...]:
        """The stages in their order, each with everything that it does. Raises InputError."""
        return tuple(stage_of(self, f"distill.stages[{n}]", stage) for n, stage in enumerate(self.stages)) or (self,)

    @property
    def rows(self) -> int:
        """Rows that go through a model at once."""
        return self.train.micro_batch or self.batch

    @property
    def tokens(self) -> int:
        """Tokens that all steps of all stages read."""
        return sum(stage.train.steps * stage.batch * stage.seq_len for stage in self.plan())

    @property
    def chosen(self) -> dict[str, Any]:
        """The options that a fingerprint is made of."""
        return {name: value for name, value in plain(self).items() if name != "stages" or value}


def stage_of(how: Distill, where: str, changes: Mapping[str, Any]) -> Distill:
    """What a stage does: `how` but for seq_len, batch, evaluate_tokens and what `train` holds; `tokens` stands for
    steps, as many as read that many tokens. Raises InputError for anything else."""
    own = ("seq_len", "batch", "evaluate_tokens")
    known = [*own, "tokens", *(field.name for field in dataclasses.fields(TrainOptions))]
    for key in changes:
        if key not in known:
            raise InputError(f"{where}.{key} is no option here{guess(key, known)}; known: {', '.join(known)}")
    if "tokens" in changes and "steps" in changes:
        raise InputError(f"{where} has both tokens and steps; give one of the two")
    content = plain(how) | {name: changes[name] for name in own if name in changes} | {"stages": ()}
    content["train"] |= {name: value for name, value in changes.items() if name not in (*own, "tokens")}
    found = build(Distill, content, f"{where}.")
    if "tokens" not in changes:
        return found
    tokens = convert(float, changes["tokens"], f"{where}.tokens")
    if not tokens >= 1:
        raise InputError(f"{where}.tokens is {tokens:g}; expected at least 1")
    steps = math.ceil(tokens / (found.batch * found.seq_len))
    return dataclasses.replace(found, train=dataclasses.replace(found.train, steps=steps))


@dataclasses.dataclass(frozen=True)
class Options:
    teacher: str
    student: str
    data: str
    output: Path
    seed: int
    device: str
    dtype: str
    distill: Distill
    shard: bool = True
    wandb: str = "off"
    teacher_cache: Path | None = None

    def __post_init__(self) -> None:
        check_mode(self.wandb)
        if self.teacher_cache is not None and self.distill.teacher_correction is not None:
            raise InputError(
                "distill: teacher_cache holds what the teacher said as it was; leave teacher_correction out, and cache"
                " the corrected teacher"
            )


def run(options: Options) -> None:
    with many_processes(options.device), processes.together():
        make(options)
        if processes.rank() == 0:
            result(options.output, {"model": str(options.output), "metrics": str(options.output / "metrics.jsonl")})


def make(options: Options) -> None:
    """The stage without its result.json."""
    teacher, student = model_folder(options.teacher), model_folder(options.student)
    inputs: dict[str, Path | str] = {"teacher": teacher, "student": student, "data": data_input(options.data)}
    if options.teacher_cache is not None:
        inputs["teacher_cache"] = cache_sum(options.teacher_cache)
    if options.distill.teacher_correction is not None:
        teacher = inputs["teacher"] = correct_teacher(teacher, options)
    run_stage(
        options.output,
        name="distill",
        inputs=inputs,
        options={"distill": options.distill.chosen, "seed": options.seed, "dtype": options.dtype},
        make=lambda folder, facts: fill(folder, facts, teacher, student, options),
        scratch="training",
    )


def correct_teacher(teacher: Path, options: Options) -> Path:
    """The folder OUTPUT-corrected-teacher: the teacher, trained on the text (arXiv 2408.11796)."""
    folder = options.output.with_name(f"{options.output.name}-corrected-teacher")
    how, correction = options.distill, options.distill.teacher_correction
    assert correction is not None
    steps = correction.steps or math.ceil(correction.tokens / (how.batch * how.seq_len))
    settings = dataclasses.replace(how.train, steps=steps, learning_rate=correction.learning_rate)

    def make(temporary: Path, facts: Facts) -> None:
        with processes.together():
            text = corpus(options.data, "train", teacher)
            batches_per_epoch(text, how.batch, how.seq_len)
            check_share(how.batch)
        dtype, device = torch_dtype(options.dtype), process_device(options.device)
        model = load_trained(teacher, dtype, device, options.shard)
        training = temporary / "training"
        train_with_bar(
            "correcting the teacher", model, cross_entropy_loss, text, settings, training,
            batch=how.batch, seq_len=how.seq_len, seed=options.seed, evaluate=None,
        )  # fmt: skip
        finish_training(temporary, training, model.model.config, dtype, settings, facts, teacher)

    run_stage(
        folder,
        name="correct-teacher",
        inputs={"teacher": teacher, "data": data_input(options.data)},
        options={
            "train": settings, "seq_len": how.seq_len, "batch": how.batch, "seed": options.seed, "dtype": options.dtype,
        },
        make=make,
        scratch="training",
    )  # fmt: skip
    return folder


def fill(folder: Path, facts: Facts, teacher_folder: Path, student_folder: Path, options: Options) -> None:
    """Trains in `folder/training`, which holds the state, and leaves the checkpoint and metrics.jsonl in `folder`.

    Of several stages each has a folder of its own in there, and what it leaves is where the next one begins.
    """
    plan = options.distill.plan()
    dtype, device = torch_dtype(options.dtype), process_device(options.device)
    with processes.together():
        for note in check_agreement(teacher_folder, student_folder):
            say(f"note: {note}")
        text = corpus(options.data, "train", student_folder)
        for how in plan:
            batches_per_epoch(text, how.batch, how.seq_len)
            check_share(how.batch)
    student = load_trained(student_folder, dtype, device, options.shard)
    teaching = open_teaching(
        student.model,
        options.distill.loss,
        teacher_folder=teacher_folder,
        student_folder=student_folder,
        cache=options.teacher_cache,
        load_teacher=lambda: load_frozen(
            teacher_folder,
            torch_dtype(options.distill.teacher_dtype or options.dtype),
            device,
            options.shard,
            options.distill.teacher_offload,
        ),
        facts=facts.content,
        batches=lambda: fitting_rows(options, student_folder),
    )
    with processes.together():
        for number, how in enumerate(plan):
            teaching.check_holds(last_rows(text, options, number, how, student_folder))
        say_epochs(text, [(how.train.steps * how.batch, how.seq_len) for how in plan])
    training = folder / "training"
    places = [training / str(number) for number in range(1, len(plan) + 1)] if options.distill.stages else [training]
    begun = processes.from_first(max((number for number, place in enumerate(places) if states(place)), default=0))
    with journal(options.wandb, folder, options.output.name, facts.options) as note_down:
        for number in range(begun, len(plan)):
            how = plan[number]
            measured = held_out(options.data, student_folder, how, options.seed)
            train_with_bar(
                f"distilling, stage {number + 1} of {len(plan)}" if options.distill.stages else "distilling",
                student,
                teaching.loss(how.loss),
                text,
                how.train,
                places[number],
                batch=how.batch,
                seq_len=how.seq_len,
                seed=stage_seed(options.seed, number),
                repack=how.repack,
                evaluate=functools.partial(teaching.gap, sample=measured),
                teacher=teaching.model,
                note_down=note_down,
            )
            hand_on(student, places, number, how.train)
    if options.distill.stages and processes.rank() == 0:
        join_metrics(places, training / "metrics.jsonl")
    finish_training(folder, places[-1], student.model.config, dtype, plan[-1].train, facts, student_folder)


def check_share(batch: int) -> None:
    """Raises InputError where the processes cannot share a batch's rows evenly."""
    if batch % processes.count():
        raise InputError(
            f"distill.batch is {batch} rows, which {processes.count()} processes cannot share evenly; give a multiple"
            f" of {processes.count()}"
        )


def hand_on(student: Trained, places: Sequence[Path], number: int, options: TrainOptions) -> None:
    """Behind stage `number`: the student has the weights that it leaves, and earlier stages' states are gone."""
    kept = kept_weights(places[number], options)
    if number + 1 < len(places) and kept.said["kept"] != "last":
        fill_weights(student, kept.tensors())
    with processes.together():
        if processes.rank() == 0:
            for place in places[:number]:
                for state in (*states(place), *place.glob("best-*")):
                    shutil.rmtree(state)


def stage_seed(seed: int, stage: int) -> int:
    return seed + STAGE_SEEDS * stage


def held_out(data: str, folder: Path, how: Distill, seed: int) -> list[Batch]:
    """What a stage is measured on, in the tokens of a folder."""
    return sample(
        data, "validation", folder, tokens=how.evaluate_tokens, seq_len=how.seq_len, batch=how.rows, seed=seed
    )  # fmt: skip


def stage_batches(text: Text, how: Distill, stage: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """What a stage is trained on, from the step `start` to its last."""
    source = train_batches(
        text, batch_size=how.batch, seq_len=how.seq_len, seed=stage_seed(seed, stage), start=start, repack=how.repack
    )
    return itertools.islice(source, how.train.steps - start)


def last_rows(text: Text, options: Options, stage: int, how: Distill, folder: Path) -> Iterator[Batch]:
    """Of what a stage reads, that which a cache that was made for something else is most likely to lack."""
    yield from stage_batches(text, how, stage, options.seed, how.train.steps - 1)
    yield from held_out(options.data, folder, how, options.seed)


def fitting_rows(options: Options, folder: Path) -> list[Batch]:
    """What maps between hidden states are fitted on."""
    how = options.distill.plan()[0]
    tokens = how.loss.hidden.fit_tokens
    return sample(
        options.data, "train", folder, tokens=tokens, seq_len=how.seq_len, batch=how.rows, seed=options.seed
    )  # fmt: skip


def join_metrics(places: Sequence[Path], target: Path) -> None:
    """The stages' records as one file: each with the number of its stage, steps and tokens counted from the first."""
    records: list[dict[str, Any]] = []
    for stage, place in enumerate(places, 1):
        before = {name: records[-1][name] if records else 0 for name in ("step", "tokens")}
        for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            records.append({"stage": stage} | record | {name: record[name] + begin for name, begin in before.items()})
    target.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def train_with_bar(
    what: str,
    student: Trained,
    loss_of: Any,
    text: Text,
    options: TrainOptions,
    folder: Path,
    *,
    batch: int,
    seq_len: int,
    seed: int,
    evaluate: Evaluate | None,
    repack: bool = True,
    teacher: HybridLM | None = None,
    note_down: OnStep | None = None,
) -> None:
    """`trainer.train` on a corpus, under a progress bar; `note_down` takes every record."""
    batches: Any = functools.partial(train_batches, text, batch_size=batch, seq_len=seq_len, seed=seed, repack=repack)
    teacher_config = None if teacher is None else teacher.config
    describe = figures(student.model.config, teacher_config, seq_len, student.device)
    with progress(what, options.steps) as bar:

        def on_step(record: dict[str, Any]) -> None:
            bar.set(record["step"], note=note_of(record))
            if note_down is not None:
                note_down(record)

        train(
            student, loss_of, lambda start: batches(start=start), options, folder,
            evaluate=evaluate, on_step=on_step, describe=describe,
        )  # fmt: skip


def note_of(record: Mapping[str, Any]) -> str:
    """What the bar says of a step."""
    loss = f"loss {record['loss']:.3f}" if "loss" in record else "passed over: not finite"
    used = f"{record['mfu']:.1%} of peak" if "mfu" in record else f"{record['model_tflops']:.2g} TFLOP/s"
    held = f"  validation {record['validation_loss']:.3f}" if "validation_loss" in record else ""
    return f"{loss}  {record['tokens_per_second']:,.0f} tokens/s  {used}  {record['memory_gib']:.1f} GiB{held}"


if __name__ == "__main__":  # accelerate launch -m limbeck.scripts.distill KEY=VALUE ...
    from .run.main import main

    sys.exit(main(["distill", *sys.argv[1:]]))
