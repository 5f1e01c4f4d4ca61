"""Means of weights: along a run, over its last states, and of two checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..models import processes
from ..models.axes import WHOLE, tensor_table
from ..models.checkpoint import Checkpoint, row_blocks, write_checkpoint
from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.fingerprint import SPEED
from ..models.foreign import read_object
from .options import TrainOptions
from .parallel import Trained, stored_dtype
from .state import AVERAGE, METRICS, WEIGHTS, Say, numbered, states, step_of

LEFT = 0.1  # the share of the first weights in a moving average above which it is said


@contextlib.contextmanager
def averaged(trained: Trained, average: Mapping[str, Tensor]) -> Iterator[None]:
    """While it lasts the model has the averages for weights; nothing happens where there are none."""
    swap(trained, average)
    try:
        yield
    finally:
        swap(trained, average)


@torch.no_grad()
def swap(trained: Trained, average: Mapping[str, Tensor]) -> None:
    if not average:
        return
    for weight in trained.weights:
        kept = weight.local.detach().clone()
        weight.local.copy_(average[weight.name])
        average[weight.name].copy_(kept)
    trained.moved()


@dataclasses.dataclass(frozen=True)
class FinalWeights:
    """The weights that a training leaves: files of them all, of which the mean counts, and how to say it in JSON."""

    files: tuple[Path, ...]
    said: dict[str, Any]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return mean_tensors(self.files)


def final_weights(folder: Path, options: TrainOptions) -> FinalWeights:
    """What `options` ask for of the states in a folder of finished training."""
    all_states = states(folder)
    last = step_of(all_states[-1])
    if options.keep == "best" and (best := numbered(folder, "best")):
        said = read_object(best[-1] / "best.json")
        return FinalWeights((best[-1] / WEIGHTS,), {"kept": "best", **said})
    if options.average_states > 1:
        last_ones = meant(all_states, options)
        steps = [step_of(state) for state in last_ones]
        return FinalWeights(tuple(state / WEIGHTS for state in last_ones), {"kept": "mean", "steps": steps})
    if options.ema_decay:
        return FinalWeights((all_states[-1] / AVERAGE,), {"kept": "moving average", "step": last})
    return FinalWeights((all_states[-1] / WEIGHTS,), {"kept": "last", "step": last})


def meant(all_states: Sequence[Path], options: TrainOptions) -> list[Path]:
    """The last states that a mean is of: those of every `save_every` steps and of the last step. One that a signal left
    between them is not, so that a run that was stopped leaves what another leaves."""
    due = [s for s in all_states if step_of(s) % options.save_every == 0 or step_of(s) == options.steps]
    return due[-options.average_states :] if options.average_states > 1 else []


def check_average(options: TrainOptions, say: Say) -> None:
    """Says so where a run does not leave as many states as the mean is to be of, or where more than a tenth of the
    moving average is the weights before the first step."""
    if (share := options.ema_decay**options.steps) > LEFT:
        better = 1 - 5 / options.steps
        other = f"{better:.6g} (1 - 5/steps) leaves less than 1%" if better >= 0.5 else "leave it out of so short a run"
        say(
            f"note: ema_decay is {options.ema_decay:g}: after {options.steps:,} steps {share:.0%} of the moving average"
            f" are the weights that training began with; {other}"
        )
    due = -(-options.steps // options.save_every)
    if due < options.average_states:
        say(
            f"note: average_states is {options.average_states:,}, and {options.steps:,} steps leave {due:,}"
            f" (save_every {options.save_every:,}): the mean is of {'it' if due == 1 else 'these'}"
        )


def write_trained(
    folder: Path, training: Path, options: TrainOptions, config: HybridConfig, dtype: torch.dtype, tokenizer_from: Path
) -> dict[str, Any]:
    """What a finished training left in `folder/training` or below it, as a checkpoint in `folder`: weights, tokenizer,
    metrics.jsonl, speed.jsonl; returns which weights they are. Matrices have the dtype that they were used in. Every
    process has to call it; the first writes."""
    with processes.together():
        kept = final_weights(training, options)
        if processes.rank() == 0:
            table = tensor_table(config)
            dtypes = {name: stored_dtype(dtype) if spec.role in WHOLE else dtype for name, spec in table.items()}
            write_checkpoint(folder, config, kept.tensors(), dtypes=dtypes, tokenizer_from=tokenizer_from)
            for name in (METRICS, SPEED):
                if (folder / "training" / name).exists():
                    shutil.copyfile(folder / "training" / name, folder / name)
    return kept.said


def mean_tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every (name, mean over the files), summed in float64, one tensor in memory at a time."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
        for name in opened[0].keys():  # noqa: SIM118
            first = opened[0].get_tensor(name)
            if len(opened) == 1:
                yield name, first
                continue
            total = first.double()
            for file in opened[1:]:
                total += file.get_tensor(name)
            yield name, (total / len(opened)).to(first.dtype)


def merged_rows(one: Checkpoint, other: Checkpoint, weight: float) -> Iterator[tuple[str, Tensor]]:
    """Every (name, rows) of (1 - weight) one + weight other, in float32, in the order of the table.

    Raises InputError where the two are not of one config.
    """
    if one.config != other.config:
        fields = vars(one.config)
        differs = [name for name in fields if fields[name] != getattr(other.config, name) and name != "extra"]
        values = "; ".join(f"{name} {fields[name]!r} and {getattr(other.config, name)!r}" for name in differs[:3])
        raise InputError(f"{one.path} and {other.path} are not of one config ({values}); merge models of equal shapes")
    for name, axes in tensor_table(one.config).items():
        for start, stop in row_blocks(axes.shape, one.stored[name].dtype):
            first, second = (side.rows(name, start, stop).to(torch.float32) for side in (one, other))
            yield name, torch.lerp(first, second, weight)
