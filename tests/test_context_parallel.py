"""Rows split over processes against whole rows: losses, gradients, held-out figures and what is kept for the backward.

The workers of each number of processes run all cases of it, since starting them takes longest."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill.hidden import make_pairing
from limbeck.distill.losses import DistillLoss, cross_entropy_loss, distillation_loss
from limbeck.distill.options import HiddenLoss, TrainOptions
from limbeck.distill.parallel import placed_model, shard
from limbeck.distill.stop import Stopper
from limbeck.distill.teaching import held_out_figures
from limbeck.distill.text.packing import Batch
from limbeck.distill.trainer import TrainingRun
from limbeck.models import processes
from limbeck.tests.helpers import assert_close, dense_config, moe_config, random_model, tiny_config
from limbeck.tests.processes_helpers import run_workers
from limbeck.tests.training_helpers import draw_batch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step: the student's name, the rows' length, and how it is done."""

    student: str
    length: int = 37  # divides by neither 2 nor 4
    split: bool = False  # FSDP2
    hidden: float = 0.0
    plain: bool = False  # cross-entropy, without a teacher
    documents: bool = True
    train: dict[str, Any] = dataclasses.field(default_factory=dict)

    def rows(self) -> Batch:
        batch = draw_batch(7, count=4, length=self.length)
        if not self.documents:
            return dataclasses.replace(batch, seq_idx=torch.zeros_like(batch.seq_idx))
        ignored = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(3)) < 0.2
        weights = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(4))
        return dataclasses.replace(batch, labels=batch.labels.masked_fill(ignored, -100), weights=weights)


CASES = {
    "mamba and attention": Case("hybrid", documents=False),
    "documents": Case("hybrid"),
    "checkpointing": Case("hybrid", train={"activation_checkpointing": True, "micro_batch": 1}),
    "experts": Case("experts", plain=True),
    "side by side, rotary": Case("parallel", train={"micro_batch": 1}),
    "rotary, no Mamba": Case("qwen3"),
    "parts shorter than the convolution": Case("hybrid", length=6),
    "sharded, hidden states": Case("experts", split=True, hidden=0.5, train={"micro_batch": 1}),
    "sharded, checkpointing": Case("hybrid", split=True, train={"activation_checkpointing": True}),
}


CONFIGS = {
    "teacher": tiny_config(hidden_size=24),
    "hybrid": tiny_config(),
    "experts": moe_config(),
    "parallel": tiny_config(pattern="PP-", rope_theta=1e4),
    "qwen3": dense_config(1).replace(vocab_size=97),
}


def started(folder: Path, case: Case, parts: int) -> tuple[TrainingRun, Any]:
    """A case's run, and its teacher."""
    teacher, student = (random_model(CONFIGS[name], 1, torch.float32) for name in ("teacher", case.student))
    teacher.requires_grad_(False)
    if case.split and processes.count() > 1:
        shard(teacher)
    trained = placed_model(student, torch.float32, case.split)
    how = DistillLoss(ce_weight=0.3, hidden=HiddenLoss(case.hidden, streams=2))
    pairing = make_pairing(teacher, trained.model, how.hidden, None, [case.rows()]) if case.hidden else None
    loss_of: Any = cross_entropy_loss if case.plain else distillation_loss(teacher, how, pairing)
    options = TrainOptions(
        **{"steps": 1, "learning_rate": 1.0, "warmup_steps": 0, "context_parallel": parts, **case.train}
    )
    return TrainingRun(trained, loss_of, options, folder / "run", Stopper(), None, None, None), teacher


def gradients(folder: Path, case: Case, parts: int = 1) -> dict[str, Tensor]:
    """The whole gradients of one batch, the loss and the norm, and held-out figures on the same rows."""
    run, teacher = started(folder, case, parts)
    loss, norm, _ = run.gradients(case.rows())
    found = {"loss": torch.tensor(loss), "norm": torch.tensor(norm)}
    for weight in run.trained.weights:
        assert weight.local.grad is not None, weight.name
        found[weight.name] = weight.whole(weight.local.grad).clone().contiguous()
    figures = held_out_figures(teacher, run.trained.model, [case.rows()], context_parallel=parts)
    return found | {name: torch.tensor(value) for name, value in figures.items()}


@functools.cache
def gradients_of_whole_rows(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {name: gradients(folder, case) for name, case in CASES.items()}


def save_gradients(folder: str, *parts: str) -> None:
    for count in map(int, parts):
        for name, case in CASES.items():
            found = gradients(Path(folder), case, count)
            if processes.rank() == 0:
                save_file(found, Path(folder) / f"{name} {count}.safetensors")


@pytest.mark.parametrize(("count", "parts"), [(2, (2,)), (4, (4, 2))])
def test_every_gradient_is_that_of_whole_rows(count: int, parts: tuple[int, ...], tmp_path: Path) -> None:
    """Of 2 and 4 processes, the latter also in two groups that share rows; a row's figures, too."""
    run_workers(save_gradients, tmp_path, *parts, count=count)
    for name, expected in gradients_of_whole_rows(tmp_path).items():
        for number in parts:
            found = load_file(tmp_path / f"{name} {number}.safetensors")
            assert expected.keys() == found.keys()
            for weight, value in expected.items():
                assert_close(f"{name}, {number} parts: {weight}", value, found[weight], 1e-5)
