"""What to turn so that a training step fits a card (`training` says what it holds): each turn alone, and one after the
other from the least cost on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch

from ..config import HybridConfig
from ..errors import InputError
from .inference import largest
from .training import Training, train_memory

MOST_PROCESSES = 1024


@dataclasses.dataclass(frozen=True)
class Knob:
    """Something to turn: what it saves alone and whether that is enough; what is held with all above it turned as well
    (None once those are enough), and whether that is."""

    name: str
    saves: int
    fits_alone: bool
    together: int | None
    fits: bool


def knobs(
    student: HybridConfig,
    teacher: HybridConfig | None,
    training: Training,
    budget: float,
    excluded: Container[str] = (),
) -> list[Knob]:
    """What to turn so that a step fits `budget` bytes, cheapest first; what saves nothing, and the turns that
    are `excluded` (by their names in `TURNS`), are left out."""
    over = functools.partial(excess, student, teacher, budget)
    answers, above = [], training
    for key, turn in TURNS.items():
        if key in excluded:
            continue
        alone, name = turn(training, over)
        enough = over(above) <= 0
        before, (turned, name) = above, (above, name) if enough else turn(above, over)
        above = turned if over(turned) < over(above) else above
        if over(alone) < over(training) or above != before:
            together = None if enough else int(over(above) + budget)
            saves = int(over(training) - over(alone))
            answers.append(Knob(name, saves, over(alone) <= 0, together, over(above) <= 0))
    return answers


def common_options(
    stages: Sequence[tuple[HybridConfig, Training]],
    teacher: HybridConfig | None,
    budget: float,
    excluded: Container[str] = (),
) -> list[str]:
    """The options, the same for all stages, by which the turns (but those `excluded`) let each of them fit; none where
    that takes more processes or shorter rows, or what one stage needs does not suit another."""
    changes: dict[str, Any] = {}
    for student, training in stages:
        over = functools.partial(excess, student, teacher, budget)
        turned = training
        for key, turn in TURNS.items():
            if over(turned) > 0 and key not in excluded:
                more, _ = turn(turned, over)
                turned = more if over(more) < over(turned) else turned
        if (turned.processes, turned.seq_len) != (training.processes, training.seq_len):
            return []
        for field in OPTIONS:
            value = getattr(turned, field)
            if field == "micro_batch" and turned.rows_given and not training.rows_given and training.batch is not None:
                changes[field] = min(value, changes.get(field, value))
            elif value != getattr(training, field):
                changes[field] = max(value, changes.get(field, 0)) if field == "context_parallel" else value
    try:
        fit = all(excess(student, teacher, budget, dataclasses.replace(how, **changes)) <= 0 for student, how in stages)
    except InputError:  # a batch that the groups do not share evenly
        return []
    return [f"{OPTIONS[field]}={spelled(changes[field])}" for field in OPTIONS if field in changes] if fit else []


def excess(student: HybridConfig, teacher: HybridConfig | None, budget: float, how: Training) -> float:
    """Bytes beyond the budget."""
    return train_memory(student, teacher, how).total - budget


def spelled(value: Any) -> str:
    """As a command line says it."""
    return str(value).lower() if isinstance(value, bool) else str(value).removeprefix("torch.")


Turned = tuple[Training, str]
Over = Callable[[Training], float]  # bytes beyond the budget


def checkpoint_blocks(how: Training, over: Over) -> Turned:
    return dataclasses.replace(how, checkpointing=True), "activation checkpointing"


def single_rows(how: Training, over: Over) -> Turned:
    return dataclasses.replace(how, micro_batch=1, rows_given=True), "micro_batch 1"


def split_rows(how: Training, over: Over) -> Turned:
    """Each row among the fewest processes with which it fits, of those numbers that leave groups which share the batch
    evenly; among the most if none does."""
    counts = [
        count
        for count in range(how.context_parallel, min(how.processes, how.seq_len) + 1)
        if how.processes % count == 0 and (how.batch is None or how.batch % (how.processes // count) == 0)
    ]
    for count in counts:
        more = dataclasses.replace(how, context_parallel=count)
        if over(more) <= 0:
            break
    # A run that is told nothing puts all rows of a group through at once, and a larger group has more.
    said = "" if how.rows_given or how.batch is None else f", micro_batch {how.micro_batch}"
    return dataclasses.replace(more, rows_given=True), f"context_parallel {count}{said}"


def half_width(how: Training, over: Over) -> Turned:
    narrow = {name: min(getattr(how, name), torch.bfloat16, key=lambda dtype: dtype.itemsize) for name in DTYPES}
    return dataclasses.replace(how, **narrow), "bfloat16 weights, of the teacher too"


def cache_teacher(how: Training, over: Over) -> Turned:
    return dataclasses.replace(how, teacher="cached" if how.teacher == "online" else how.teacher), "cached teacher"


def more_processes(how: Training, over: Over) -> Turned:
    """The least number that fits, of those that share the batch evenly; none other helps."""
    for count in range(how.processes, MOST_PROCESSES + 1):
        groups, rest = divmod(count, how.context_parallel)
        if not rest and (how.batch is None or how.batch % groups == 0):
            rows = how.micro_batch if how.batch is None else min(how.micro_batch, how.batch // groups)
            more = dataclasses.replace(how, processes=count, micro_batch=rows)
            if over(more) <= 0:
                return more, f"{count:,} GPUs"
    return how, f"more than {MOST_PROCESSES:,} GPUs"


def offload_teacher(how: Training, over: Over) -> Turned:
    return dataclasses.replace(how, teacher_offload=how.teacher_offload or how.teacher == "online"), "teacher offload"


def shorter_rows(how: Training, over: Over) -> Turned:
    """The longest row that fits, of a multiple of 256 tokens; 256 if none does."""
    most = max(1, how.seq_len // 256)
    count = largest(lambda count: over(dataclasses.replace(how, seq_len=256 * count)), 0, most, most)
    length = min(how.seq_len, 256 * max(count, 1))
    return dataclasses.replace(how, seq_len=length), f"seq_len {length:,}"


# What `memory-fit mode=train` calls the fields that a turn can change and a run can take as they are.
OPTIONS = {
    "checkpointing": "distill.train.activation_checkpointing",
    "micro_batch": "distill.train.micro_batch",
    "context_parallel": "distill.train.context_parallel",
    "dtype": "dtype",
    "teacher_dtype": "distill.teacher_dtype",
    "teacher": "training.teacher",
    "teacher_offload": "distill.teacher_offload",
}
DTYPES = ("dtype", "teacher_dtype")
TURNS: dict[str, Callable[[Training, Over], Turned]] = {
    "checkpointing": checkpoint_blocks, "micro_batch": single_rows, "dtype": half_width, "context_parallel": split_rows,
    "teacher": cache_teacher, "processes": more_processes, "teacher_offload": offload_teacher, "seq_len": shorter_rows,
}  # fmt: skip
