"""Training on two processes against one: the same gradients and losses, half the memory, states that both can read."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill.hidden import make_pairing
from limbeck.distill.losses import DistillLoss, cross_entropy_loss, distillation_loss
from limbeck.distill.options import HiddenLoss, TrainOptions
from limbeck.distill.parallel import Trained, load_sharded, prepare
from limbeck.distill.stop import Stopper
from limbeck.distill.text.packing import Batch
from limbeck.distill.trainer import TrainingRun, train
from limbeck.models import processes
from limbeck.models.checkpoint import load_model, save_model
from limbeck.models.hybrid import HybridLM
from limbeck.tests.helpers import assert_close, random_model, tiny_config
from limbeck.tests.processes_helpers import run_workers
from limbeck.tests.training_helpers import draw_batch
from safetensors.torch import load_file, save_file
from torch import Tensor

SEQUENCES = 16


def ragged(seed: int, count: int = SEQUENCES) -> Batch:
    """Rows of documents of unequal length; every fifth token or so does not count, and a whole row does not."""
    batch = draw_batch(seed, count=count)
    ignored = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
    ignored[3] = True
    return dataclasses.replace(batch, labels=batch.labels.masked_fill(ignored, -100))


def ragged_from(start: int) -> Iterator[Batch]:
    while True:
        yield ragged(start, count=4)
        start += 1


def write_models(folder: Path) -> None:
    made: dict[str, dict[str, Any]] = {
        "teacher": {},
        "student": {"hidden_size": 24},
        "tied": {"tie_word_embeddings": True},
    }
    for seed, (name, changes) in enumerate(made.items()):
        save_model(random_model(tiny_config(**changes), seed, torch.float32), folder / name)


def pair(
    folder: Path, split: bool, student: str = "student", dtype: torch.dtype | None = None, hidden: bool = False
) -> tuple[Trained, Any]:
    """A student in training and its loss, `hidden` states of two streams in it; `split` among the processes, or whole
    in each."""
    if split:
        place = (torch.float32, torch.device("cpu"))
        teacher: HybridLM = load_sharded(folder / "teacher", *place, frozen=True)
        trained = prepare(load_sharded(folder / student, *place, dtype=dtype))
    else:
        teacher, trained = load_model(folder / "teacher"), prepare(load_model(folder / student), dtype)
    if not hidden:
        return trained, distillation_loss(teacher, DistillLoss(ce_weight=0.3))
    loss = DistillLoss(ce_weight=0.3, hidden=HiddenLoss(0.5, streams=2))
    return trained, distillation_loss(
        teacher, loss, make_pairing(teacher, trained.model, loss.hidden, None, [ragged(1)])
    )


def gradients(
    folder: Path, split: bool, micro: int, student: str, hidden: bool = False, **options: Any
) -> dict[str, Tensor]:
    """The whole gradients of one batch, and the loss and the norm."""
    trained, loss_of = pair(folder, split, student, hidden=hidden)
    how = TrainOptions(steps=1, learning_rate=1.0, micro_batch=micro, **options)
    run = TrainingRun(trained, loss_of, how, folder / "run", Stopper(), None, None, None)
    loss, norm, _ = run.gradients(ragged(7))
    found = {}
    for weight in trained.weights:
        assert weight.local.grad is not None
        found[weight.name] = weight.whole(weight.local.grad).clone()
    return found | {"loss": torch.tensor(loss), "norm": torch.tensor(norm)}


def save_gradients(folder: str, student: str, hidden: str, thorough: str) -> None:
    place = Path(folder)
    for micro in (4, 2):
        for split in (True, False):
            found = gradients(place, split, micro, student, hidden == "True")
            if thorough == "True":
                again = gradients(place, split, micro, student, hidden == "True", activation_checkpointing=True)
                for name, value in found.items():
                    assert_close(name, value, again[name], 1e-6)
            if processes.rank() == 0:
                save_file({k: v.contiguous() for k, v in found.items()}, place / f"{split}-{micro}.safetensors")


@pytest.mark.parametrize(
    ("student", "hidden", "thorough"),
    [
        ("student", False, False),
        *(
            pytest.param(name, hidden, True, marks=pytest.mark.slow)
            for name in ("student", "tied")
            for hidden in (False, True)
        ),
    ],
)
def test_gradient_of_every_split(student: str, hidden: bool, thorough: bool, tmp_path: Path) -> None:
    """micro-batch x accumulation x processes: 16x1x1, 4x4x1, 1x16x1, and 4x2x2, 2x4x2 with matrices split and whole;
    with and without hidden states in the loss, and with every layer run twice."""
    write_models(tmp_path)
    run_workers(save_gradients, tmp_path, student, hidden, thorough)
    expected = gradients(tmp_path, False, 16, student, hidden)
    found = {f"{micro}x{16 // micro}x1": gradients(tmp_path, False, micro, student, hidden) for micro in (4, 1)}
    for micro in (4, 2):
        for split in (True, False):
            found[f"{micro}x{8 // micro}x2 {split}"] = load_file(tmp_path / f"{split}-{micro}.safetensors")
    for name, values in found.items():
        assert values.keys() == expected.keys()
        for weight, value in expected.items():
            assert_close(f"{name} {weight}", value, values[weight], 1e-5)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fifty(folder: str, name: str, split: str, optimizer: str, stop: str = "50") -> None:
    """Fifty steps, or up to a step, in a folder of that name."""
    trained, loss_of = pair(Path(folder), split == "True")
    how = TrainOptions(
        steps=50, learning_rate=0.01, optimizer=optimizer, warmup_steps=5, micro_batch=1, save_every=10, log_every=1
    )
    place = Path(folder) / name
    train(trained, loss_of, ragged_from, how, place, stop_after=int(stop))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_two_processes_train_as_one(optimizer: str, tmp_path: Path) -> None:
    """Fifty steps; and begun by two, ended by one, and the other way round."""
    write_models(tmp_path)
    fifty(str(tmp_path), "one", "False", optimizer)
    run_workers(fifty, tmp_path, "two", True, optimizer)
    run_workers(fifty, tmp_path, "two-one", True, optimizer, 24)
    fifty(str(tmp_path), "two-one", "False", optimizer)
    fifty(str(tmp_path), "one-two", "False", optimizer, "24")
    run_workers(fifty, tmp_path, "one-two", True, optimizer)
    expected = losses(tmp_path / "one")
    assert len(expected) == 50 and expected[-1] < 0.8 * expected[0]
    for name in ("two", "two-one", "one-two"):
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-5), name


def half_precision(folder: str, name: str, split: str) -> None:
    """Ten steps in bfloat16; A_log, D, dt_bias and norms stay float32 beside it."""
    trained, loss_of = pair(Path(folder), split == "True", dtype=torch.bfloat16)
    seen: dict[str, torch.dtype] = {}
    block: Any = trained.model.layers[0]
    block.mixer.register_forward_pre_hook(
        lambda mixer, _: seen.update({name: weight.dtype for name, weight in mixer.named_parameters()})
    )
    how = TrainOptions(steps=10, learning_rate=0.003, warmup_steps=2, micro_batch=1, log_every=1)
    train(trained, loss_of, ragged_from, how, Path(folder) / name)
    assert seen["in_proj.weight"] == torch.bfloat16, seen
    assert {seen[name] for name in ("A_log", "D", "dt_bias", "norm.weight")} == {torch.float32}, seen
    assert {weight.local.dtype for weight in trained.weights} == {torch.float32}


@pytest.mark.slow
def test_bfloat16_beside_float32_vectors(tmp_path: Path) -> None:
    """Split (FSDP2) and whole in two processes, and in one: as near as bfloat16 gets."""
    write_models(tmp_path)
    half_precision(str(tmp_path), "one", "False")
    for name, split in (("split", True), ("whole", False)):
        run_workers(half_precision, tmp_path, name, split)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=0.01)


def megabytes(key: str) -> float:
    found = re.search(key + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def peak(folder: str, split: str) -> None:
    """Three steps of a model of 50 million parameters: what it holds, counted, and the process's high-water mark."""
    place = (torch.float32, torch.device("cpu"))
    path = Path(folder)
    prepare(load_sharded(path / "small", *place) if split == "True" else load_model(path / "small"))  # what torch takes
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew
    before = megabytes("VmRSS")
    model = load_sharded(path / "large", *place) if split == "True" else load_model(path / "large")
    trained = prepare(model)
    how = TrainOptions(steps=3, learning_rate=1e-4, log_every=1, save_every=1000)
    run = TrainingRun(trained, cross_entropy_loss, how, path / f"peak-{split}", Stopper(), None, None, None)
    for number in range(2):
        run.step(draw_batch(number, count=2, length=8))
    highest = megabytes("VmHWM") - before
    run.gradients(draw_batch(2, count=2, length=8))
    held = [tensor for w in trained.weights for tensor in (w.local, w.local.grad) if tensor is not None]
    held += [tensor for optimizer in run.optimizers.values() for state in optimizer.state.values()
             for tensor in state.values()]  # fmt: skip
    counted = sum(tensor.numel() * tensor.element_size() for tensor in held) / 2**20
    (path / f"peak-{split}-{processes.rank()}.json").write_text(json.dumps([counted, highest]))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's high-water mark")
def test_memory_of_each_process_is_half(tmp_path: Path) -> None:
    """Parameters, gradients and moments: 4 x 200 MB in one process, half of it and a layer or two in each of two."""
    config = tiny_config(pattern="-" * 24, hidden_size=512, intermediate_size=2048, vocab_size=2048)
    for name, pattern in (("large", "-" * 24), ("small", "-")):
        save_model(random_model(config.replace(pattern=pattern), dtype=torch.float32), tmp_path / name)
    exact = {"MALLOC_MMAP_THRESHOLD_": "262144"}  # what is freed goes back to the system at once
    run_workers(peak, tmp_path, False, count=1, **exact)
    run_workers(peak, tmp_path, True, count=2, **exact)
    read = [json.loads((tmp_path / f"peak-{name}.json").read_text()) for name in ("False-0", "True-0", "True-1")]
    (whole, whole_peak), *parts = read
    print(f"counted and highest, MiB: one process {whole:.0f} {whole_peak:.0f}; two {parts}")
    layer = 2 * 512 * 2048 * 4 / 2**20
    assert whole > 780 and whole_peak > 0.95 * whole
    for part, highest in parts:
        assert part < 0.51 * whole
        assert highest < 0.5 * whole_peak + 6 * layer, read
