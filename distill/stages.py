"""A distillation's stages one after another: the text that each reads, what it learns, and what it hands on to the
next."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..models import processes
from ..models.fingerprint import SPEED
from ..models.foreign import read_lines
from ..models.hybrid import HybridLM
from .average import final_weights
from .hidden import Pairing
from .losses import cross_entropy_loss
from .nested import Nest
from .options import DistillOptions, TrainOptions
from .parallel import Trained
from .rollouts import stage_loss
from .state import METRICS, Say, drop_damaged, fill_weights, states
from .teacher import CachedTeacher
from .teaching import held_out_figures
from .text.mixture import Mixture, Text
from .text.notes import say as say_notes
from .text.packing import Batch, check_measurable
from .text.prompts import Prompts, prompt_batches
from .trainer import OnStep, train

Bar = Callable[[str, int, Mapping[str, int]], AbstractContextManager[OnStep]]
Describe = Callable[[DistillOptions], Callable[[float], dict[str, float]]]
SEEDS_APART = 1000  # the seeds of two stages, so that the second does not begin with the first one's text


def stage_batches(text: Text, how: DistillOptions, stage: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """What a stage is trained on, from the step `start` to its last."""
    own = seed + SEEDS_APART * stage
    source: Iterator[Batch]
    if how.rollouts is None or not how.own_rows:
        source = text.train_batches(batch_size=how.batch, seq_len=how.seq_len, seed=own, start=start, repack=how.repack)
    else:
        source = prompt_batches(
            text, rows=how.batch, own_rows=how.own_rows, seq_len=how.seq_len, width=how.rollouts.width,
            prompt_tokens=how.rollouts.prompt_tokens, seed=own, start=start, repack=how.repack,
        )  # fmt: skip
    return itertools.islice(source, how.train.steps - start)


def check_text(text: Text, how: DistillOptions) -> None:
    """Raises InputError where the text does not fill a stage's batches, or has no prompt for it."""
    if how.text_rows:
        text.batches_per_epoch(how.text_rows, how.seq_len)
    if how.rollouts is not None and how.own_rows:
        prompts = Prompts(text, how.rollouts.prompt_tokens, 0)
        for corpus in prompts.corpora:
            Prompts(corpus, prompts.length, 0)[0]
        say_notes(prompts.notes(), "distill.rollouts")


def check_epochs(text: Text, plan: Sequence[DistillOptions]) -> None:
    """Raises InputError where a mixture's source would be read more often than its `epochs`."""
    if isinstance(text, Mixture):
        text.check_epochs([how.reads for how in plan])


def check_reads(read: Callable[[str], Text], how: DistillOptions, data: object) -> None:
    """`check_text` and `check_epochs` of a distillation's stages, and of the teacher's correction before them; and that
    there is something to measure stages on, and their outcome on the test split. `read` gives the text of a split of
    `data`. Raises InputError."""
    text, plan = read("train"), how.plan()
    for stage in plan:
        check_text(text, stage)
        if stage.train.evaluate_every:
            check_measurable(read("validation").sample(batch_size=1, seq_len=stage.seq_len), data, "validation")
    check_epochs(text, plan)
    if how.teacher_correction is not None:
        check_text(text, how.correction())
        check_epochs(text, [how.correction()])
    check_measurable(read("test").sample(batch_size=1, seq_len=how.seq_len), data, "test")


def check_texts(
    text: Text,
    plan: Sequence[DistillOptions],
    seed: int,
    teacher: HybridLM | CachedTeacher | None,
    held_out: Callable[[DistillOptions], Sequence[Batch]],
    data: object,
) -> None:
    """`check_text` of all stages; that those which are measured have something to be measured on; and that a cached
    teacher holds the rows that one which was made for something else is most likely to lack: the last ones, and those
    that a stage is measured on. `data` is what errors call the text."""
    for number, how in enumerate(plan):
        check_text(text, how)
        rows = measured_rows(how, held_out)
        if how.train.evaluate_every:
            check_measurable(rows, data, "validation")
        if isinstance(teacher, CachedTeacher):
            last = stage_batches(text, how, number, seed, how.train.steps - 1)
            teacher.check_holds([*last, *rows])


def measured_rows(how: DistillOptions, held_out: Callable[[DistillOptions], Sequence[Batch]]) -> Sequence[Batch]:
    """What a stage is measured on; nothing, which is not read either, where it never is."""
    return held_out(how) if how.train.evaluate_every else ()


def train_stages(
    student: Trained,
    teacher: HybridLM | CachedTeacher,
    plan: Sequence[DistillOptions],
    folders: Sequence[Path],
    text: Text,
    seed: int,
    *,
    pairing: Pairing | None,
    nest: Nest | None,
    ends: tuple[int, ...],
    held_out: Callable[[DistillOptions], Sequence[Batch]],
    bar: Bar,
    describe: Describe,
    say: Say,
) -> None:
    """Trains a student through the stages that are left, each in its folder; `ends` are the tokens at which its own
    text ends. Of each stage `held_out` gives what it is measured on, and `describe` what a speed comes to; `bar(title,
    steps, before)` shows how far it is, `before` the step and the tokens at which earlier stages ended."""
    for number in range(current_stage(folders, say), len(plan)):
        how, own = plan[number], seed + SEEDS_APART * number
        loss, figures = stage_loss(teacher, how, pairing, own, ends), held_out_figures
        measured: dict[str, Any] = {
            "sample": measured_rows(how, held_out), "context_parallel": how.train.context_parallel,
        }  # fmt: skip
        title = f"distilling, stage {number + 1} of {len(plan)}" if len(plan) > 1 else "distilling"
        steps, tokens = (sum(count) for count in zip((0, 0), *map(read_by, plan[:number]), strict=True))
        with bar(title, how.train.steps, {"step": steps, "tokens": tokens}) as on_step:
            train(
                student, loss if nest is None else nest.loss(loss, own),
                functools.partial(stage_batches, text, how, number, seed), how.train, folders[number],
                evaluate=functools.partial(figures if nest is None else nest.figures, teacher, **measured),
                on_step=on_step, describe=describe(how), say=say,
            )  # fmt: skip
        hand_on(student, folders, number, how.train)


def read_by(how: DistillOptions) -> tuple[int, int]:
    """The steps of a stage, and the tokens that they read."""
    return how.train.steps, how.train.steps * how.batch * how.seq_len


def correct(
    teacher: Trained,
    how: DistillOptions,
    folder: Path,
    text: Text,
    seed: int,
    bar: Callable[[str, int], AbstractContextManager[OnStep]],
    describe: Describe,
    say: Say,
) -> None:
    """Trains a teacher on the text itself, before it teaches."""
    batches = functools.partial(stage_batches, text, how, 0, seed)
    with bar("correcting the teacher", how.train.steps) as on_step:
        train(teacher, cross_entropy_loss, batches, how.train, folder, on_step=on_step, describe=describe(how),
              say=say)  # fmt: skip


def current_stage(folders: Sequence[Path], say: Say = print) -> int:
    """The number of the last stage that has begun, by the whole states in its folder; every process has to call it."""
    with processes.together():
        if processes.rank() == 0:
            for folder in folders:
                drop_damaged(folder, say)
    begun = (number for number, folder in enumerate(folders) if states(folder))
    return int(processes.from_first(max(begun, default=0)))


def hand_on(student: Trained, folders: Sequence[Path], number: int, options: TrainOptions) -> None:
    """After stage `number`: the student has the weights that it leaves, and earlier stages' states are gone."""
    kept = final_weights(folders[number], options)
    if number + 1 < len(folders) and kept.said["kept"] != "last":
        fill_weights(student, kept.tensors())
    with processes.together():
        if processes.rank() == 0:
            for folder in folders[:number]:
                for state in (*states(folder), *folder.glob("best-*")):
                    shutil.rmtree(state)


def join_metrics(folders: Sequence[Path], target: Path) -> None:
    """The stages' records as one file, and what they took as another: each with the number of its stage, steps and
    tokens counted from the first."""
    for name in (METRICS, SPEED):
        records: list[dict[str, Any]] = []
        for stage, folder in enumerate(folders, 1):
            before: Mapping[str, int] = records[-1] if records else {}
            for record in read_lines(folder / name):
                counted = {each: record[each] + before.get(each, 0) for each in ("step", "tokens") if each in record}
                records.append({"stage": stage} | record | counted)
        (target / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
