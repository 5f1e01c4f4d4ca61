"""The training loop that pretraining and distillation share: deterministic, and resumable to the bit.

A step takes one batch of rows, split in micro-batches whose losses share one normalizer, so that the gradient does
not depend on the split. State (weights, optimizer, step, best) goes to `folder/state-<step>/` as safetensors and
JSON; a folder appears whole or not at all, and the newest one is where a later call goes on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..models.errors import InputError
from ..models.folder import atomic_folder, write_json
from ..models.hybrid import HybridLM
from ..models.tensors import save_tensors
from .muon import Muon

SCHEDULES = ("cosine", "wsd")
OPTIMIZERS = ("adamw", "muon")


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How to train. Rates are per step; `micro_batch` rows go through the model at once (0: the whole batch).

    `schedule`: "cosine" from `learning_rate` to `final_ratio` times it, or "wsd": constant, then linear to
    `final_ratio` over the last `decay_fraction` of the steps; both after a linear warm-up. `optimizer`: "adamw", or
    "muon" for the matrices of the layers with AdamW (at `adamw_ratio` times the rate) for the rest.
    """

    steps: int
    learning_rate: float
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup_steps: int = 20
    decay_fraction: float = 0.3
    final_ratio: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    adamw_ratio: float = 1.0
    clip_norm: float = 1.0
    micro_batch: int = 0
    save_every: int = 100
    evaluate_every: int = 0
    log_every: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1 or self.save_every < 1 or self.log_every < 1 or self.micro_batch < 0:
            raise InputError(
                f"training: steps ({self.steps}), save_every ({self.save_every}) and log_every ({self.log_every})"
                f" must be at least 1, micro_batch ({self.micro_batch}) at least 0"
            )
        if self.schedule not in SCHEDULES:
            raise InputError(f"training: schedule {self.schedule!r} is unknown; known: {', '.join(SCHEDULES)}")
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"training: optimizer {self.optimizer!r} is unknown; known: {', '.join(OPTIMIZERS)}")
        if not (0 < self.learning_rate < math.inf and self.clip_norm > 0):
            raise InputError(
                f"training: learning_rate ({self.learning_rate}) and clip_norm ({self.clip_norm}) must be more than 0"
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "cosine":
            done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
            share = (1 + math.cos(math.pi * done)) / 2
        else:
            share = min(1.0, (self.steps - step) / max(1.0, self.decay_fraction * self.steps))
        return self.learning_rate * (self.final_ratio + (1 - self.final_ratio) * share)


class Rows(Protocol):
    """What a batch has to offer; see `distill.data.Batch`."""

    input_ids: Tensor
    labels: Tensor
    seq_idx: Tensor

    def rows(self, start: int, stop: int) -> Any: ...


LossOf = Callable[[HybridLM, Any, float], Tensor]
Evaluate = Callable[[HybridLM], dict[str, float]]
OnStep = Callable[[dict[str, Any]], None]


def train(
    model: HybridLM,
    loss_of: LossOf,
    batches: Callable[[int], Iterator[Any]],
    options: TrainOptions,
    folder: Path,
    *,
    evaluate: Evaluate | None = None,
    on_step: OnStep | None = None,
    stop_after: int | None = None,
) -> int:
    """Trains `model` in place to `options.steps`, going on from the newest state in `folder`; returns the step reached.

    `loss_of(model, rows, normalizer)` is the sum of the rows' token losses over the normalizer (the number of
    labels of the whole batch); `batches(start)` yields the batches from number `start` on. Figures go to
    `folder/metrics.jsonl`, and to `on_step`. `stop_after` ends early, after so many steps of this call.

    Raises FloatingPointError where loss or gradient is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizers = make_optimizers(model, options)
    step, tokens = load_state(model, optimizers, folder)
    metrics = folder / "metrics.jsonl"
    trim_metrics(metrics, step)
    source = batches(step)
    begun = step
    clock = time.perf_counter()
    seen = 0
    while step < options.steps and (stop_after is None or step - begun < stop_after):
        batch = next(source)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = options.rate(step) * group["rate_ratio"]
        if hasattr(loss_of, "at"):  # its weights move with the steps
            loss_of.at(step)
        loss, norm = one_step(model, loss_of, batch, optimizers, options)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {norm}; lower the learning rate")
        step += 1
        tokens += batch.input_ids.numel()
        seen += batch.input_ids.numel()
        record: dict[str, Any] = {"step": step, "tokens": tokens, "loss": loss, "gradient_norm": norm}
        record["learning_rate"] = options.rate(step - 1)
        record["tokens_per_second"] = seen / (time.perf_counter() - clock)
        last = step == options.steps
        if evaluate is not None and options.evaluate_every and (last or step % options.evaluate_every == 0):
            paused = time.perf_counter()
            record.update(evaluate(model))
            clock += time.perf_counter() - paused
        if last or step % options.log_every == 0 or len(record) > 6:
            append_line(metrics, record)
        if on_step is not None:
            on_step(record)
        if last or step % options.save_every == 0:
            save_state(model, optimizers, folder, step, tokens)
    return step


def one_step(
    model: HybridLM, loss_of: LossOf, batch: Any, optimizers: dict[str, torch.optim.Optimizer], options: TrainOptions
) -> tuple[float, float]:
    """Loss and gradient norm of one batch, and the weights moved."""
    rows = batch.input_ids.shape[0]
    micro = options.micro_batch or rows
    normalizer = float((batch.labels >= 0).sum())
    loss = 0.0
    for start in range(0, rows, micro):
        part = loss_of(model, batch.rows(start, min(start + micro, rows)), normalizer)
        part.backward()
        loss += part.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm).item()
    if math.isfinite(norm):
        for optimizer in optimizers.values():
            optimizer.step()
    for optimizer in optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    return loss, norm


def make_optimizers(model: HybridLM, options: TrainOptions) -> dict[str, torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the layers' matrices beside it. Weight decay is for matrices only."""
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    matrices = {name: weight for name, weight in named.items() if weight.dim() == 2}
    muon = {name: weight for name, weight in matrices.items() if name.startswith("layers.")}
    if options.optimizer == "adamw":
        muon = {}
    decayed = [weight for name, weight in matrices.items() if name not in muon]
    plain = [weight for name, weight in named.items() if name not in matrices]
    assert len(muon) + len(decayed) + len(plain) == len(named)
    ratio = options.adamw_ratio if muon else 1.0
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay, "rate_ratio": ratio},
        {"params": plain, "weight_decay": 0.0, "rate_ratio": ratio},
    ]
    betas = (options.beta1, options.beta2)
    optimizers: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW(groups, lr=options.learning_rate, betas=betas, fused=True)
    }
    if muon:
        muons = [{"params": list(muon.values()), "rate_ratio": 1.0}]
        optimizers["muon"] = Muon(muons, options.learning_rate, weight_decay=options.weight_decay)
    return optimizers


def save_state(
    model: HybridLM, optimizers: dict[str, torch.optim.Optimizer], folder: Path, step: int, tokens: int
) -> None:
    """Writes `folder/state-<step>/`, and removes older ones once it is there."""
    target = folder / f"state-{step:08d}"
    if target.exists():
        return
    with atomic_folder(target) as temporary:
        save_tensors(temporary / "model.safetensors", dict(model.named_parameters()))
        names: dict[Tensor, str] = {weight: name for name, weight in model.named_parameters()}
        tensors = {}
        for kind, optimizer in optimizers.items():
            for weight, state in optimizer.state.items():
                for key, value in state.items():
                    tensors[f"{kind}/{names[weight]}/{key}"] = torch.as_tensor(value)
        save_tensors(temporary / "optimizer.safetensors", tensors)
        write_json(temporary / "state.json", {"step": step, "tokens": tokens})
    for old in states(folder)[:-1]:
        shutil.rmtree(old)


def states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("state-*") if path.name[6:].isdigit())


def load_state(model: HybridLM, optimizers: dict[str, torch.optim.Optimizer], folder: Path) -> tuple[int, int]:
    """Fills model and optimizers from the newest state; (step, tokens), zeros when there is none."""
    for leftover in folder.glob(".state-*"):
        shutil.rmtree(leftover)
    found = states(folder)
    if not found:
        return 0, 0
    weights = load_file(found[-1] / "model.safetensors")
    parameters = dict(model.named_parameters())
    assert weights.keys() == parameters.keys(), "the state is of another model"
    with torch.no_grad():
        for name, weight in parameters.items():
            weight.copy_(weights[name])
    for key, value in load_file(found[-1] / "optimizer.safetensors").items():
        kind, name, field = key.split("/")
        optimizers[kind].state[parameters[name]][field] = value
    state = json.loads((found[-1] / "state.json").read_text())
    return state["step"], state["tokens"]


def append_line(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(record) + "\n")


def trim_metrics(path: Path, step: int) -> None:
    """Drops what was logged beyond the state that training goes on from, and a line cut off by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
