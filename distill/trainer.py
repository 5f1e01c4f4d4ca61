"""The training loop that pretraining and distillation share: deterministic, and resumable to the bit, where the
operators are. Ours are; of torch's, FlashAttention's backward on a GPU adds up in any order unless
`torch.use_deterministic_algorithms(True)` holds.

A step takes one batch of rows, shared among processes (or groups of them, each of which has a part of every row) and in
micro-batches whose losses share one normalizer, so that the gradient does not depend on the split. State goes to
`folder/state-<step>/` (see `state`), and a later call resumes from the newest one, with any number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..models import processes
from ..models.errors import CheckFailed, InputError, Stopped
from ..models.fingerprint import SPEED
from ..models.hybrid import HybridLM
from ..models.row_split import row_split
from .average import averaged, check_average, meant
from .balance import ExpertBalance
from .optimizers import make_optimizers, set_rates
from .options import TrainOptions
from .parallel import Trained, prepare, reshard, row_groups, share, sharers_of, squares
from .quantised import quantised
from .row_parts import part_rows
from .state import METRICS, Say, append_line, load_state, save_best, save_state, states, trim_lines
from .stop import SIGNALS, Stopper
from .text.prefetch import feed

__all__ = ["TrainOptions", "make_optimizers", "states", "train"]

HELD_OUT = ("validation_kl", "validation_loss")  # the first that an evaluation gives says which weights are best


class Rows(Protocol):
    """What a batch has to offer; see `distill.data.Batch`."""

    @property
    def input_ids(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    def rows(self, start: int, stop: int) -> Any: ...


@runtime_checkable
class Scheduled(Protocol):
    """A loss that changes on the way is told every step before its batch."""

    def at(self, step: int) -> None: ...


@runtime_checkable
class Writing(Protocol):
    """A loss whose batches the model writes in part, as it stands before the step. Every process has to call it."""

    def written(self, model: HybridLM, batch: Any, step: int) -> Any: ...


@runtime_checkable
class Reporting(Protocol):
    """A loss that has `figures` of a step for its record. Every process has to call it."""

    def figures(self) -> dict[str, float]: ...


LossOf = Callable[[HybridLM, Any, float], Tensor]
Evaluate = Callable[[HybridLM], dict[str, float]]
OnStep = Callable[[dict[str, Any]], None]


def train(
    model: HybridLM | Trained,
    loss_of: LossOf,
    batches: Callable[[int], Iterator[Any]],
    options: TrainOptions,
    folder: Path,
    *,
    evaluate: Evaluate | None = None,
    on_step: OnStep | None = None,
    stop_after: int | None = None,
    describe: Callable[[float], dict[str, float]] | None = None,
    say: Say = print,
) -> int:
    """Trains a model in place to `options.steps`, resuming from the newest state in `folder`; returns the step reached.

    `loss_of(model, rows, normalizer)` is the sum of the rows' token losses over the normalizer (the number of
    labels of the whole batch, in all processes); `batches(start)` yields the whole batches from number `start` on,
    the same in every process. Figures go to `folder/metrics.jsonl`, and to `on_step`, with the tokens a second and what
    `describe(tokens a second)` adds to them, which differ from run to run and go to `folder/speed.jsonl`. `stop_after`
    ends early, after so many steps of this call. `say` hears of what is odd: a damaged state, a warm-up without an end.

    Raises Stopped after a step in which SIGINT or SIGTERM came, with its state saved; InputError where a batch
    does not fit the processes or does not come, and where `max_skipped` steps in a row were not finite.
    """
    trained = model if isinstance(model, Trained) else prepare(model)
    with quantised(trained, options.quantize) as trained, Stopper() as stopper, ending_all():
        run = TrainingRun(trained, loss_of, options, folder, stopper, evaluate, on_step, describe, say)
        try:
            return run.to_the_end(batches, stop_after)
        finally:
            if run.balance is not None:
                run.balance.detach()


@dataclasses.dataclass
class TrainingRun:
    """One call of `train`: what it was given, and what changes from step to step."""

    trained: Trained
    loss_of: LossOf
    options: TrainOptions
    folder: Path
    stopper: Stopper
    evaluate: Evaluate | None
    on_step: OnStep | None
    describe: Callable[[float], dict[str, float]] | None
    say: Say = print

    def __post_init__(self) -> None:
        with processes.together():
            if processes.rank() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                check_warmup(self.options, self.say)
                check_average(self.options, self.say)
        self.split = row_split(self.options.context_parallel)
        self.metrics = self.folder / METRICS
        run_twice, compiled = self.options.activation_checkpointing, self.options.compile
        set_layers(self.trained.model, recompute=run_twice, compiled=compiled)
        self.optimizers = make_optimizers(self.trained, self.options)
        rate = self.options.expert_balance
        self.balance = ExpertBalance(self.trained.model, rate) if rate else None
        # The average starts from the weights before the first step: it has to be there before a state is read into it.
        decay = self.options.ema_decay
        self.average = {w.name: w.local.detach().clone() for w in self.trained.weights} if decay else {}
        self.progress = load_state(self.trained, self.optimizers, self.average, self.folder, self.say)
        self.saved = self.progress.step if states(self.folder) else None
        if processes.rank() == 0:  # lines beyond the state are of steps that come again
            trim_lines(self.folder / SPEED, self.progress.step)
        self.clock, self.seen = time.perf_counter(), 0

    def to_the_end(self, batches: Callable[[int], Iterator[Any]], stop_after: int | None) -> int:
        begun, options = self.progress.step, self.options
        if begun >= options.steps:
            return begun
        # Batch n belongs to step n in every run, so a resumed one starts reading where the state stands.
        with contextlib.closing(feed(batches(begun), begun, options.data_timeout)) as source:
            while self.progress.step < options.steps and self.progress.step - begun != stop_after:
                with processes.together():
                    batch = next(source)
                    check_rows(batch, options)
                signal = self.step(batch)
                if self.progress.step == options.steps or self.progress.step % options.save_every == 0 or signal:
                    self.save()
                if signal:
                    raise Stopped(signal, self.farewell())
        if self.progress.in_a_row and self.progress.step == options.steps and processes.rank() == 0:
            skipped = self.progress.in_a_row
            self.say(f"note: the last {skipped:,} steps were not finite and are skipped: the weights are those before")
        return self.progress.step

    def step(self, batch: Rows) -> int:
        """One batch, its record, and what goes with both; answers with the signal that came meanwhile in any process,
        or 0."""
        options, progress = self.options, self.progress
        set_rates(self.optimizers, options.rate(progress.step))
        if isinstance(self.loss_of, Scheduled):
            self.loss_of.at(progress.step)
        if isinstance(self.loss_of, Writing):
            batch = self.loss_of.written(self.trained.model, batch, progress.step)
        with ending_alone():
            loss, norm, signal = self.gradients(batch)
        reported: dict[str, float] = self.loss_of.figures() if isinstance(self.loss_of, Reporting) else {}
        # Sums over all processes, so that all of them skip a step or none does.
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.move(norm)
        loads = {} if self.balance is None else self.balance.move(finite)
        self.trained.zero_grad()
        progress.step += 1  # a skipped step counts: the schedule and the data's position follow from this number alone
        progress.tokens += batch.input_ids.numel()
        progress.in_a_row = 0 if finite else progress.in_a_row + 1
        progress.skipped += not finite
        self.seen += batch.input_ids.numel()
        record: dict[str, Any] = {"step": progress.step, "tokens": progress.tokens}
        if finite:
            record |= {"loss": loss, "gradient_norm": norm, **loads, **reported}
        else:
            record["skipped"] = {"loss": str(loss), "gradient_norm": str(norm), **ids_of(batch, progress.step - 1)}
        record |= {"learning_rate": options.rate(progress.step - 1)}
        speed = self.speed()
        last = progress.step == options.steps
        held_out = self.held_out(last)
        record |= held_out
        if processes.rank() == 0 and (last or progress.step % options.log_every == 0 or held_out or not finite):
            append_line(self.metrics, record)
            append_line(self.folder / SPEED, {"step": progress.step, **speed})
        if self.on_step is not None:
            self.on_step(record | speed)
        if progress.in_a_row >= options.max_skipped:
            raise InputError(self.complaint(loss, norm, batch))
        return signal

    def gradients(self, batch: Rows) -> tuple[float, float, int]:
        """Leaves the batch's gradients with the weights: its loss, their norm, and the signal that came, or 0."""
        mine = share(batch.input_ids.shape[0], self.options.context_parallel)
        micro = self.options.micro_batch or len(mine)
        normalizer = counted(batch)
        loss = torch.zeros((), dtype=torch.float64, device=self.trained.device)
        for start in range(mine.start, mine.stop, micro):
            rows = batch.rows(start, min(start + micro, mine.stop)).to(self.trained.device)
            part = self.loss_of(self.trained.model, part_rows(rows, self.split), normalizer)
            part.backward()
            loss += part.detach()
        self.trained.gradients()
        here, everywhere = squares(self.trained)
        # A signal reaches processes at different moments. Summed up with the loss, it stops all after the same step.
        told = torch.tensor(
            [float(loss), here, *(self.stopper.signal == number for number in SIGNALS)], dtype=torch.float64
        )
        total, here, *signals = processes.all_sum(told).tolist()
        signal = next((int(number) for number, came in zip(SIGNALS, signals, strict=True) if came), 0)
        return total, math.sqrt(here + everywhere), signal

    def move(self, norm: float) -> None:
        """Clips the gradients, and moves weights and average."""
        gradients = [w.local.grad for w in self.trained.weights if w.local.grad is not None]
        if norm > self.options.clip_norm:
            torch._foreach_mul_(gradients, self.options.clip_norm / norm)
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.trained.moved()
        if self.average:
            locals_ = [w.local.detach() for w in self.trained.weights]
            torch._foreach_lerp_(list(self.average.values()), locals_, 1 - self.options.ema_decay)

    def speed(self) -> dict[str, float]:
        rate = self.seen / (time.perf_counter() - self.clock)
        return {"tokens_per_second": rate, **(self.describe(rate) if self.describe is not None else {})}

    def held_out(self, last: bool) -> dict[str, float]:
        """The evaluation's figures, where this is a step for them; the best weights so far are put aside."""
        options, progress = self.options, self.progress
        if self.evaluate is None or not options.evaluate_every:
            return {}
        if not (last or (progress.step % options.evaluate_every == 0 and not progress.in_a_row)):
            return {}
        paused = time.perf_counter()
        with averaged(self.trained, self.average):
            figures = self.evaluate(self.trained.model)
            reshard(self.trained.model)
            value = next((figures[name] for name in HELD_OUT if name in figures), None)
            if options.keep == "best" and value is not None:
                value = processes.from_first(value)
                if progress.best_value is None or value < progress.best_value:
                    progress.best_step, progress.best_value = progress.step, value
                    save_best(self.trained, {w.name: w.local for w in self.trained.weights}, self.folder, progress)
        self.clock += time.perf_counter() - paused
        return figures

    def save(self) -> None:
        """Writes the state; not after a skipped step, since the newest finite state would go for it."""
        if self.progress.in_a_row and self.progress.step < self.options.steps:
            return
        if not finite_weights(self.trained):
            raise InputError(
                f"training: the weights are not finite after step {self.progress.step}; lower the learning rate;"
                f" {self.last_good}"
            )
        needed = functools.partial(meant, options=self.options)
        save_state(self.trained, self.optimizers, self.average, self.folder, self.progress, needed=needed)
        self.saved = self.progress.step

    @property
    def last_good(self) -> str:
        return f"the last good state is of {f'step {self.saved}' if self.saved is not None else 'no step'}"

    def farewell(self) -> str:
        if processes.rank():
            return ""
        where = f"saved at step {self.saved}" if self.saved is not None else "no state is saved yet"
        return f"stopped after step {self.progress.step} of {self.options.steps}, {where}; the same command resumes"

    def complaint(self, loss: float, norm: float, batch: Rows) -> str:
        ids = ids_of(batch, self.progress.step - 1)
        some = ", ".join(str(number) for number in ids.get("documents", [])[:8])
        return (
            f"training: {self.progress.in_a_row} steps in a row were not finite (step {self.progress.step}: loss"
            f" {loss:g}, gradient norm {norm:g}, batch {ids['batch']}{f', documents {some}' if some else ''}; all are"
            f" in {self.metrics}); lower the learning rate, or look at that text; {self.last_good}"
        )


@contextlib.contextmanager
def ending_all() -> Iterator[None]:
    """Of many processes one that fails alone would leave the others waiting for it: it says why and is gone, upon
    which their launcher ends them. What all raise together passes."""
    try:
        yield
    except (InputError, CheckFailed, Stopped, KeyboardInterrupt):
        raise
    except BaseException:
        if processes.count() == 1:
            raise
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


@contextlib.contextmanager
def ending_alone() -> Iterator[None]:
    """What one of many processes finds wrong while the others sum gradients: it says so in a line, and is gone."""
    try:
        yield
    except InputError as error:
        if processes.count() == 1:
            raise
        print(f"limbeck: {error}", file=sys.stderr, flush=True)
        os._exit(2)


def finite_weights(trained: Trained) -> bool:
    """Whether all weights of all processes are finite; each has to call it."""
    own = [weight.local.detach() for weight in trained.weights if weight.local.numel()]
    largest = torch.stack([norm.double().cpu() for norm in torch._foreach_norm(own, torch.inf)])
    return not float(processes.all_sum((~largest.isfinite()).sum().double()))


def check_warmup(options: TrainOptions, say: Say) -> None:
    """Says so where the rate never rises to what was given."""
    if options.warmup_steps > options.steps:
        say(
            f"note: warmup_steps is {options.warmup_steps:,}, the run has {options.steps:,}: the rate ends at"
            f" {options.rate(options.steps - 1):.2g} and never reaches learning_rate ({options.learning_rate:g})"
        )


def check_rows(batch: Rows, options: TrainOptions) -> None:
    rows, sharers = batch.input_ids.shape[0], row_groups(options.context_parallel)
    if rows % sharers:
        raise InputError(
            f"a batch has {rows} rows, which {sharers_of(options.context_parallel)} cannot share evenly; give a batch"
            f" that is a multiple of {sharers}"
        )


def counted(batch: Any) -> float:
    """How many labels count, each as its weight says; 1 where none does, and the loss is 0."""
    weights = getattr(batch, "weights", None)
    total = (batch.labels >= 0).sum() if weights is None else weights[batch.labels >= 0].sum()
    return float(total) or 1.0


def ids_of(batch: Any, number: int) -> dict[str, Any]:
    """Which batch it was, and the documents in it."""
    ids: dict[str, Any] = {"batch": number}
    if hasattr(batch, "doc_id"):
        ids["documents"] = sorted(set(batch.doc_id[batch.labels >= 0].tolist()))
    return ids


def set_layers(model: HybridLM, *, recompute: bool, compiled: bool) -> None:
    """How the layers run: kept or run twice, as they stand or compiled."""
    for block in model.layers:
        block.recompute = recompute  # type: ignore[assignment]
        if compiled:
            block.mix = torch.compile(type(block).mix.__get__(block))  # type: ignore[assignment, attr-defined]
        else:
            block.__dict__.pop("mix", None)
