"""`limbeck distill`: a student recovers from its teacher's logits. Killed, the same command goes on where it was."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..distill.data import Batch
from ..distill.gap import measure_gap
from ..distill.losses import DistillLoss, check_vocabularies, distillation_loss
from ..distill.mixture import Text, batches_per_epoch, train_batches
from ..distill.trainer import Evaluate, OnStep, TrainOptions, states, train
from ..models.checkpoint import load_model, model_dtypes, model_tensors, write_checkpoint
from ..models.errors import InputError
from ..models.hybrid import HybridLM
from .compose import build, convert, guess
from .inputs import corpus, data_input, model_folder, sample, torch_device, torch_dtype
from .show import progress, result
from .stage import plain, run_stage

STAGE_SEEDS = 1000  # between the seeds of two stages, so that the second does not begin with the first one's text


@dataclasses.dataclass(frozen=True)
class Distill:
    """What conf/distill/ sets: the loss, the schedule, and the tokens. Each of `stages` goes on from the weights that
    the one before it left, and says what it does otherwise (see `stage_of`); none is one stage as it stands."""

    loss: DistillLoss
    train: TrainOptions
    seq_len: int
    batch: int
    evaluate_tokens: int
    stages: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.seq_len < 1 or self.batch < 1:
            raise InputError(f"distill: seq_len ({self.seq_len}) and batch ({self.batch}) must be at least 1")
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


def run(options: Options) -> None:
    make(options)
    result(options.output, {"model": str(options.output), "metrics": str(options.output / "metrics.jsonl")})


def make(options: Options) -> None:
    """The stage without its result.json."""
    teacher, student = model_folder(options.teacher), model_folder(options.student)
    run_stage(
        options.output,
        name="distill",
        inputs={"teacher": teacher, "student": student, "data": data_input(options.data)},
        options={"distill": options.distill.chosen, "seed": options.seed, "dtype": options.dtype},
        make=lambda folder, facts: fill(folder, teacher, student, options),
        scratch="training",
    )


def fill(folder: Path, teacher_folder: Path, student_folder: Path, options: Options) -> None:
    """Trains in `folder/training`, which holds the state, and leaves the checkpoint and metrics.jsonl in `folder`.

    Of several stages each has a folder of its own in there, and its last state is where the next one begins.
    """
    plan = options.distill.plan()
    dtype, device = torch_dtype(options.dtype), torch_device(options.device)
    teacher, student = load_model(teacher_folder, dtype, device), load_model(student_folder, dtype, device)
    check_vocabularies(teacher, student)
    text = corpus(options.data, "train", student_folder)
    for how in plan:
        batches_per_epoch(text, how.batch, how.seq_len)
    student.train()
    training = folder / "training"
    places = [training / str(number) for number in range(1, len(plan) + 1)] if options.distill.stages else [training]
    begun = max((number for number, place in enumerate(places) if states(place)), default=0)
    for number in range(begun, len(plan)):
        how = plan[number]
        held_out = sample(
            options.data, "validation", student_folder,
            tokens=how.evaluate_tokens, seq_len=how.seq_len, batch=how.rows, seed=options.seed,
        )  # fmt: skip
        train_with_bar(
            f"distilling, stage {number + 1} of {len(plan)}" if options.distill.stages else "distilling",
            student,
            distillation_loss(teacher, how.loss),
            text,
            how.train,
            places[number],
            batch=how.batch,
            seq_len=how.seq_len,
            seed=options.seed + STAGE_SEEDS * number,
            evaluate=functools.partial(gap_now, teacher, sample=held_out),
        )
        for state in (state for place in places[:number] for state in states(place)):  # the weights have moved on
            shutil.rmtree(state)
    if options.distill.stages:
        join_metrics(places, training / "metrics.jsonl")
    finish_training(folder, student, student_folder)


def join_metrics(places: Sequence[Path], target: Path) -> None:
    """The stages' records as one file: each with the number of its stage, steps and tokens counted from the first."""
    records: list[dict[str, Any]] = []
    for stage, place in enumerate(places, 1):
        before = {name: records[-1][name] if records else 0 for name in ("step", "tokens")}
        for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            records.append({"stage": stage} | record | {name: record[name] + begin for name, begin in before.items()})
    target.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def gap_now(teacher: HybridLM, student: HybridLM, sample: list[Batch]) -> dict[str, float]:
    """The held-out figures that go into metrics.jsonl."""
    found = measure_gap(teacher, {"student": student}, sample, resamples=2).models["student"]
    return {
        "validation_loss": found.cross_entropy.value,
        "validation_bits_per_byte": found.bits_per_byte.value,
        "validation_kl": found.kl.value,
        "validation_agreement": found.agreement.value,
    }


def train_with_bar(
    what: str,
    model: HybridLM,
    loss_of: Any,
    text: Text,
    options: TrainOptions,
    folder: Path,
    *,
    batch: int,
    seq_len: int,
    seed: int,
    evaluate: Evaluate | None,
) -> None:
    """`trainer.train` on a corpus, under a progress bar."""
    source: Any = functools.partial(train_batches, text, batch_size=batch, seq_len=seq_len, seed=seed)
    device = model.head_weight.device

    def batches(start: int) -> Iterator[Batch]:
        for found in source(start=start):
            yield Batch(*(getattr(found, field.name).to(device) for field in dataclasses.fields(found)))

    with progress(what, options.steps) as bar:

        def on_step(record: dict[str, Any]) -> None:
            held = f" validation {record['validation_loss']:.3f}" if "validation_loss" in record else ""
            note = f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s{held}"
            bar.set(record["step"], note=note)

        shown: OnStep = on_step
        train(model, loss_of, batches, options, folder, evaluate=evaluate, on_step=shown)


def finish_training(folder: Path, model: HybridLM, tokenizer_from: Path) -> None:
    """The trained model becomes a checkpoint: weights, tokenizer, metrics."""
    write_checkpoint(
        folder, model.config, model_tensors(model), dtypes=model_dtypes(model), tokenizer_from=tokenizer_from
    )
    if (folder / "training" / "metrics.jsonl").exists():
        shutil.copyfile(folder / "training" / "metrics.jsonl", folder / "metrics.jsonl")
