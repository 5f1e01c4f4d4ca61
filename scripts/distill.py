"""`limbeck distill`: a student recovers from its teacher's logits. Killed, the same command goes on where it was."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..distill.data import Batch, Corpus, train_batches
from ..distill.gap import measure_gap
from ..distill.losses import DistillLoss, check_vocabularies, distillation_loss
from ..distill.trainer import Evaluate, OnStep, TrainOptions, train
from ..models.checkpoint import load_model, model_dtypes, model_tensors, write_checkpoint
from ..models.hybrid import HybridLM
from .inputs import corpus, data_input, model_folder, sample, torch_device, torch_dtype
from .show import progress, result
from .stage import run_stage


@dataclasses.dataclass(frozen=True)
class Distill:
    """What conf/distill/ sets: the loss, the schedule, and the tokens."""

    loss: DistillLoss
    train: TrainOptions
    seq_len: int
    batch: int
    evaluate_tokens: int


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
        options={"distill": options.distill, "seed": options.seed, "dtype": options.dtype},
        make=lambda folder, facts: fill(folder, teacher, student, options),
        scratch="training",
    )


def fill(folder: Path, teacher_folder: Path, student_folder: Path, options: Options) -> None:
    """Trains in `folder/training`, which holds the state, and leaves the checkpoint and metrics.jsonl in `folder`."""
    how = options.distill
    dtype, device = torch_dtype(options.dtype), torch_device(options.device)
    teacher, student = load_model(teacher_folder, dtype, device), load_model(student_folder, dtype, device)
    check_vocabularies(teacher, student)
    text = corpus(options.data, "train", student_folder)
    held_out = sample(
        options.data, "validation", student_folder,
        tokens=how.evaluate_tokens, seq_len=how.seq_len, batch=how.batch, seed=options.seed,
    )  # fmt: skip
    student.train()
    train_with_bar(
        "distilling",
        student,
        distillation_loss(teacher, how.loss),
        text,
        how.train,
        folder / "training",
        batch=how.batch,
        seq_len=how.seq_len,
        seed=options.seed,
        evaluate=lambda model: gap_now(teacher, model, held_out),
    )
    finish_training(folder, student, student_folder)


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
    text: Corpus,
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
