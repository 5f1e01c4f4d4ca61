"""The plan of a training step's memory beside what is allocated: the shipped model as teacher, a pruned one as student.

    python -m limbeck.benchmarks.train_memory [--json FILE]

On a CPU in float32. Every storage counts while it lives (benchmarks/live_bytes.py), models and optimizer state
among them; the peak is that of the second step, when all of that state is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from limbeck.benchmarks.live_bytes import LiveBytes
from limbeck.distill.losses import DistillLoss, cross_entropy_loss, distillation_loss
from limbeck.distill.parallel import Trained, prepare
from limbeck.distill.text.packing import Batch
from limbeck.distill.trainer import TrainOptions, train
from limbeck.models import processes
from limbeck.models.config import HybridConfig
from limbeck.models.cost.training import Training, TrainReport, train_memory
from limbeck.models.hybrid import HybridLM, initialize
from limbeck.models.provenance import provenance
from torch import Tensor

FORWARD = ("teacher forward", "loss")  # moments until the loss is known
SETTINGS: tuple[dict[str, Any], ...] = (
    {"micro_batch": 1, "seq_len": 256},
    {"micro_batch": 4, "seq_len": 1024},
    {"micro_batch": 4, "seq_len": 256, "optimizer": "muon", "checkpointing": True},
    {"micro_batch": 1, "seq_len": 1024, "batch": 4, "checkpointing": True},
)


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Bytes until the loss is known, and from then on."""

    forward: int
    rest: int

    @property
    def total(self) -> int:
        return max(self.forward, self.rest)


def on_cpu(**changes: Any) -> Training:
    """A training of float32 on a CPU in one micro-batch, but for the changes."""
    chosen: dict[str, Any] = {"dtype": torch.float32, "teacher_dtype": torch.float32, "device": "cpu"}
    return Training(**(chosen | {"batch": changes.get("micro_batch", 1)} | changes))


def planned(report: TrainReport) -> Peaks:
    sizes = {name: sum(lines.values()) for name, lines in report.moments.items()}
    forward = max(size for name, size in sizes.items() if name in FORWARD)
    return Peaks(forward, max(size for name, size in sizes.items() if name not in FORWARD))


def random_rows(vocabulary: int, rows: int, seq_len: int) -> Batch:
    """Random tokens, two documents a row."""
    ids = torch.randint(vocabulary, (rows, seq_len + 1), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(seq_len) >= seq_len // 2).to(torch.int32).expand(rows, -1).contiguous()
    ones = torch.ones(rows, seq_len, dtype=torch.int32)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), documents, ones, documents.long())


def model_of(config: HybridConfig) -> HybridLM:
    model = HybridLM(config)
    initialize(model, torch.Generator().manual_seed(0))
    return model


def measured(student: HybridConfig, teacher: HybridConfig, training: Training) -> Peaks:
    """The peaks of a second step of `distill.trainer.train`, on one process."""
    oracle = model_of(teacher).to(training.teacher_dtype) if training.teacher == "online" else None
    return peaks_of(prepare(model_of(student), training.dtype), oracle, training)


def peaks_of(trained: Trained, oracle: HybridLM | None, training: Training) -> Peaks:
    """The peaks of a second step in this process."""
    loss_of = cross_entropy_loss if oracle is None else distillation_loss(oracle, DistillLoss())
    batch = random_rows(trained.model.config.vocab_size, training.batch or training.micro_batch, training.seq_len)
    options = TrainOptions(
        steps=2,
        learning_rate=1e-4,
        warmup_steps=0,
        optimizer=training.optimizer,
        micro_batch=training.micro_batch,
        activation_checkpointing=training.checkpointing,
        ema_decay=0.9 * training.average,
    )
    held = [*trained.model.parameters(), *(weight.local for weight in trained.weights)]
    held += [] if oracle is None else list(oracle.parameters())
    parts = [getattr(weight, "to_local", weight.detach)() for weight in held]  # this process's, of what is split
    with tempfile.TemporaryDirectory() as folder, LiveBytes(parts) as live:
        peaks = {"forward": 0, "rest": 0}
        found: list[Peaks] = []

        def note(moment: str) -> None:
            peaks[moment] = max(peaks[moment], live.peak)
            live.restart()

        def watched(model: HybridLM, rows: Any, normalizer: float) -> Tensor:
            note("rest")
            loss = loss_of(model, rows, normalizer)
            note("forward")
            return loss

        def on_step(record: dict[str, Any]) -> None:
            note("rest")
            if record["step"] == 1:
                peaks.update(forward=0, rest=0)
            else:
                found.append(Peaks(**peaks))

        shared = processes.from_first(folder)
        train(trained, watched, lambda start: itertools.repeat(batch), options, Path(shared), on_step=on_step)
        with processes.together():  # whose folder it is goes last
            pass
    return found[0]


def main() -> None:
    from limbeck.models.named import model_config

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    teacher = model_config("zoo")
    student = teacher.replace(
        pattern=teacher.pattern[:-1], hidden_size=224, intermediate_size=640, mamba_num_heads=12
    )  # as recipe=tiny
    rows = []
    columns = ("rows x tokens", "optimizer", "checkpointing", "accumulation", "plan, MiB", "measured", "difference")
    print(f"| {' | '.join(columns)} | fullest |")
    print("|---|---|---|---|---|---|---|---|")
    for setting in SETTINGS:
        training = on_cpu(**setting)
        report, found = train_memory(student, teacher, training), measured(student, teacher, training)
        rows.append(setting | {"plan": report.total, "measured": found.total, "lines": report.lines})
        yes = ["yes" if given else "no" for given in (training.checkpointing, training.accumulates)]
        print(
            f"| {training.micro_batch} x {training.seq_len:,} | {training.optimizer} | {' | '.join(yes)}"
            f" | {report.total / 2**20:.1f} | {found.total / 2**20:.1f} | {report.total / found.total - 1:+.1%}"
            f" | {report.fullest} |",
            flush=True,
        )
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in provenance().items()))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "provenance": provenance()}, indent=1))


if __name__ == "__main__":
    main()
