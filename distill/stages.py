"""A distillation's stages one after another: the text that each reads, and what it hands on to the next."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models import processes
from ..models.fingerprint import SPEED
from ..models.foreign import read_lines
from .average import final_weights
from .options import DistillOptions, TrainOptions
from .parallel import Trained
from .state import METRICS, Say, drop_damaged, fill_weights, states
from .text.mixture import Text
from .text.packing import Batch
from .text.prompts import Prompts, prompt_batches

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
