"""What a distillation is: its loss, its schedule, its stages one after another, and the text that each reads."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models import processes
from ..models.errors import InputError
from .average import kept_weights
from .losses import DistillLoss
from .options import TrainOptions
from .parallel import Trained
from .state import fill_weights, states
from .text.mixture import Text
from .text.packing import Batch

SEEDS_APART = 1000  # the seeds of two stages, so that the second does not begin with the first one's text
TEACHER_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Correction:
    """A teacher's own training on the text before it teaches (arXiv 2408.11796): cross-entropy, for so many steps, or
    as many as read so many tokens; everything else as the student's."""

    steps: int = 0
    tokens: float = 0
    learning_rate: float = 1e-5

    def __post_init__(self) -> None:
        if (self.steps > 0) == (self.tokens > 0):
            raise InputError(
                f"distill.teacher_correction: steps is {self.steps}, tokens {self.tokens:g}; give one of the two"
            )


# A field for each of TrainOptions, None where a stage leaves it as it is.
TrainChanges = dataclasses.make_dataclass(
    "TrainChanges",
    [(name, kind | None, None) for name, kind in typing.get_type_hints(TrainOptions).items()],
    frozen=True,
)


@dataclasses.dataclass(frozen=True)
class StageOptions(TrainChanges):  # type: ignore[misc, valid-type]
    """What a stage does otherwise than the whole; `tokens` stands for steps, as many as read that many tokens."""

    tokens: float | None = None
    seq_len: int | None = None
    batch: int | None = None
    evaluate_tokens: int | None = None

    @property
    def changes(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class DistillOptions:
    """What conf/distill/ sets: the loss, the schedule, and the tokens; `repack` cuts an epoch's rows anew. Each of
    `stages` starts from the weights that the one before it left; none is one stage as it stands."""

    loss: DistillLoss
    train: TrainOptions
    seq_len: int
    batch: int
    evaluate_tokens: int
    repack: bool = True
    teacher_dtype: str | None = None
    teacher_offload: bool = False
    teacher_correction: Correction | None = None
    stages: tuple[StageOptions, ...] = ()

    def __post_init__(self) -> None:
        if self.seq_len < 1 or self.batch < 1:
            raise InputError(f"distill: seq_len ({self.seq_len}) and batch ({self.batch}) must be at least 1")
        if self.teacher_dtype not in (None, *TEACHER_DTYPES):
            raise InputError(f"dtype {self.teacher_dtype!r} is unknown; known: {', '.join(TEACHER_DTYPES)}")
        self.plan()

    def plan(self) -> tuple[DistillOptions, ...]:
        """The stages in their order, each with everything that it does. Raises InputError."""
        return tuple(self.stage(number) for number in range(len(self.stages))) or (self,)

    def stage(self, number: int) -> DistillOptions:
        where, changes = f"distill.stages[{number}]", self.stages[number].changes
        tokens = changes.pop("tokens", None)
        if tokens is not None and "steps" in changes:
            raise InputError(f"{where} has both tokens and steps; give one of the two")
        own = {name: changes.pop(name) for name in ("seq_len", "batch", "evaluate_tokens") if name in changes}
        train = dataclasses.replace(self.train, **changes)
        stage = dataclasses.replace(self, train=train, stages=(), **own)
        if tokens is None:
            return stage
        if not tokens >= 1:
            raise InputError(f"{where}.tokens is {tokens:g}; expected at least 1")
        return dataclasses.replace(stage, train=dataclasses.replace(train, steps=stage.steps_for(tokens)))

    def steps_for(self, tokens: float) -> int:
        """As many as read that many tokens."""
        return math.ceil(tokens / (self.batch * self.seq_len))

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
        stages = [stage.changes for stage in self.stages]
        options = dataclasses.asdict(self) | {"stages": stages}
        return {name: value for name, value in options.items() if name != "stages" or value}

    def correction(self) -> DistillOptions:
        """How the teacher is trained before it teaches."""
        correction = self.teacher_correction
        assert correction is not None
        steps = correction.steps or self.steps_for(correction.tokens)
        train = dataclasses.replace(self.train, steps=steps, learning_rate=correction.learning_rate)
        return dataclasses.replace(self, train=train, repack=True, teacher_correction=None, stages=())


def stage_seed(seed: int, stage: int) -> int:
    return seed + SEEDS_APART * stage


def stage_batches(text: Text, how: DistillOptions, stage: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """What a stage is trained on, from the step `start` to its last."""
    source = text.train_batches(
        batch_size=how.batch, seq_len=how.seq_len, seed=stage_seed(seed, stage), start=start, repack=how.repack
    )
    return itertools.islice(source, how.train.steps - start)


def check_share(batch: int) -> None:
    """Raises InputError where the processes cannot share a batch's rows evenly."""
    if batch % processes.count():
        raise InputError(
            f"distill.batch is {batch} rows, which {processes.count()} processes cannot share evenly; give a multiple"
            f" of {processes.count()}"
        )


def current_stage(folders: Sequence[Path]) -> int:
    """The number of the last stage that has begun, by the states in its folder; every process has to call it."""
    begun = (number for number, folder in enumerate(folders) if states(folder))
    return int(processes.from_first(max(begun, default=0)))


def hand_on(student: Trained, folders: Sequence[Path], number: int, options: TrainOptions) -> None:
    """After stage `number`: the student has the weights that it leaves, and earlier stages' states are gone."""
    kept = kept_weights(folders[number], options)
    if number + 1 < len(folders) and kept.said["kept"] != "last":
        fill_weights(student, kept.tensors())
    with processes.together():
        if processes.rank() == 0:
            for folder in folders[:number]:
                for state in (*states(folder), *folder.glob("best-*")):
                    shutil.rmtree(state)


def join_metrics(folders: Sequence[Path], target: Path) -> None:
    """The stages' records as one file: each with the number of its stage, steps and tokens counted from the first."""
    records: list[dict[str, Any]] = []
    for stage, folder in enumerate(folders, 1):
        before: Mapping[str, int] = records[-1] if records else {"step": 0, "tokens": 0}
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            counted = {name: record[name] + before[name] for name in ("step", "tokens")}
            records.append({"stage": stage} | record | counted)
    target.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
