"""Rows split over processes against whole rows: losses, gradients, held-out figures and what is kept for the backward.

The workers of each number of processes run all cases of it, since starting them takes longest."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill.hidden import make_pairing
from limbeck.distill.losses import DistillLoss, cross_entropy_loss, distillation_loss
from limbeck.distill.options import DistillOptions, HiddenLoss, StageOptions, TrainOptions
from limbeck.distill.parallel import placed_model, shard
from limbeck.distill.row_parts import part_rows
from limbeck.distill.state import states
from limbeck.distill.stop import Stopper
from limbeck.distill.teacher import CachedTeacher, CacheOptions, finish_cache, write_cache
from limbeck.distill.teaching import held_out_figures
from limbeck.distill.text.packing import Batch
from limbeck.distill.trainer import TrainingRun, train
from limbeck.models import processes
from limbeck.models.errors import InputError
from limbeck.models.row_split import RowSplit, row_split
from limbeck.tests.helpers import assert_close, dense_config, limbeck, moe_config, random_model, tiny_config
from limbeck.tests.processes_helpers import run_workers
from limbeck.tests.training_helpers import draw_batch, records
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
    cached: bool = False  # the teacher's top-k tokens
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
    "cached teacher": Case("hybrid", cached=True),
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
    pairing = None
    if case.hidden:
        pairing = make_pairing(teacher, trained.model, how.hidden, None, [case.rows()], row_split(parts))
    source = CachedTeacher(folder / "cache") if case.cached else teacher
    loss_of: Any = cross_entropy_loss if case.plain else distillation_loss(source, how, pairing)
    options = TrainOptions(
        **{"steps": 1, "learning_rate": 1.0, "warmup_steps": 0, "context_parallel": parts, **case.train}
    )
    return TrainingRun(trained, loss_of, options, folder / "run", Stopper(), None, None, None), source


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


def kept_bytes(folder: Path, parts: int) -> int:
    """Bytes that autograd keeps of a step's forward pass on rows of 400 tokens, weights apart."""
    run, _ = started(folder, Case("hybrid", plain=True), parts)
    weights = {weight.untyped_storage().data_ptr() for weight in run.trained.model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    rows = part_rows(draw_batch(1, count=1, length=400), run.split)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = cross_entropy_loss(run.trained.model, rows, 1.0)
    sizes = {key: tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights}
    loss.backward()  # every process of the group enters the backward's exchanges, or leaves the others waiting
    return sum(sizes.values())


def trained_files(folder: Path, name: str, parts: int, stop: int | None = None) -> None:
    """Four steps with experts that are kept in balance, or up to a step; what is there already is resumed."""
    student = placed_model(random_model(CONFIGS["experts"], 1, torch.float32), torch.float32, split=True)
    options = TrainOptions(
        steps=4, learning_rate=0.01, warmup_steps=0, log_every=1, save_every=2, expert_balance=0.01, micro_batch=1,
        activation_checkpointing=True, context_parallel=parts,
    )  # fmt: skip
    train(student, cross_entropy_loss, batches_from, options, folder / name, stop_after=stop)


def batches_from(start: int) -> Iterator[Batch]:
    while True:
        yield draw_batch(start, count=4, length=21)
        start += 1


def all_in_parts(folder: str, *parts: str) -> None:
    """What a worker does: the cases in each number of parts, then in the first the bytes kept and the training."""
    place = Path(folder)
    for count in map(int, parts):
        for name, case in CASES.items():
            found = gradients(place, case, count)
            if processes.rank() == 0:
                save_file(found, place / f"{name} {count}.safetensors")
    most = int(parts[0])
    kept = processes.gather(kept_bytes(place, most))
    if processes.rank() == 0:
        (place / "kept.json").write_text(json.dumps(kept))
    trained_files(place, "calm", most)
    trained_files(place, "rough", most, stop=2)
    trained_files(place, "rough", most)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """What one process gives on whole rows, in a folder with the teacher's cached answers to them."""
    folder, options = tmp_path_factory.mktemp("whole"), CacheOptions(k=8, dtype="float32")
    (folder / "cache").mkdir()
    teacher = random_model(CONFIGS["teacher"], 1, torch.float32)
    write_cache(teacher, [(Case("hybrid").rows(), 4)], folder / "cache", options)
    finish_cache(folder / "cache", 97, "any", options)
    trained_files(folder, "whole", 1)
    return folder, {name: gradients(folder, case) for name, case in CASES.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("count", "parts"), [(2, (2,)), (4, (4, 2))])
def test_parts_of_rows_against_whole_rows(count: int, parts: tuple[int, ...], whole: Any, tmp_path: Path) -> None:
    """Of 2 and 4 processes, the latter also in two groups that share a batch's rows: losses, every gradient, held-out
    figures; what is kept for the backward; a training, and one that was stopped and resumed."""
    (tmp_path / "cache").symlink_to(whole[0] / "cache")
    run_workers(all_in_parts, tmp_path, *parts, count=count)
    for name, expected in whole[1].items():
        for number in parts:
            found = load_file(tmp_path / f"{name} {number}.safetensors")
            assert expected.keys() == found.keys()
            for weight, value in expected.items():
                assert_close(f"{name}, {number} parts: {weight}", value, found[weight], 1e-5)
    kept = json.loads((tmp_path / "kept.json").read_text())
    # The last part has the keys and values of all others beside its own.
    assert max(kept) < 1.2 * kept_bytes(tmp_path, 1) / parts[0], kept
    calm, rough = (records(tmp_path / name) for name in ("calm", "rough"))
    assert rough == calm and len(calm) == 4
    for ours, theirs in zip(calm, records(whole[0] / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)  # the experts' loads among them
    last, resumed = (states(tmp_path / name)[-1] for name in ("calm", "rough"))
    files = sorted(file.name for file in last.iterdir())
    assert last.name == resumed.name and files
    for file in files:
        assert (last / file).read_bytes() == (resumed / file).read_bytes(), file


def test_lengths_of_parts() -> None:
    """Every token is in one part, and the first parts are the longer ones."""
    for tokens in range(4, 20):
        borders = RowSplit(None, 4, 0).borders(tokens)
        sizes = [stop - start for start, stop in itertools.pairwise(borders)]
        assert borders[0] == 0 and borders[-1] == tokens and sizes == sorted(sizes, reverse=True)
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_refusals(tmp_path: Path) -> None:
    """One line each, before anything is read."""
    with pytest.raises(InputError, match="context_parallel is 0; expected 1"):
        TrainOptions(steps=1, learning_rate=0.1, context_parallel=0)
    with pytest.raises(InputError, match="compile does not go with context_parallel"):
        TrainOptions(steps=1, learning_rate=0.1, context_parallel=2, compile=True)
    with pytest.raises(InputError, match="multi-token prediction"):
        DistillOptions(
            DistillLoss(mtp_weight=0.1), TrainOptions(steps=1, learning_rate=0.1, context_parallel=2), 64, 4, 64
        )
    with pytest.raises(InputError, match="a row has 3 tokens; give longer rows"):
        RowSplit(None, 4, 0).borders(3)
    for words in (
        ["distill", "teacher=zoo", "student=zoo", "distill.train.context_parallel=2"],
        ["pretrain", "train.context_parallel=2"],
    ):
        code, _, err = limbeck(*words, "data=stdlib", f"output={tmp_path / 'out'}", "device=cpu", "wandb=off")
        assert code == 2 and err.count("\n") == 1 and "does not divide 1 process; give a divisor" in err, err
        assert not (tmp_path / "out").exists()


def test_who_splits_a_row_is_no_option_of_the_result() -> None:
    """An output that is half done can be resumed with another number of parts."""
    found = [
        DistillOptions(
            DistillLoss(), TrainOptions(steps=1, learning_rate=0.1, context_parallel=parts), 64, 4, 64,
            stages=(StageOptions(steps=2), StageOptions(context_parallel=parts)),
        ).chosen
        for parts in (1, 8)
    ]  # fmt: skip
    assert found[0] == found[1] and "micro_batch" in found[0]["train"]
