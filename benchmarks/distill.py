"""A distillation step part by part, and beside the same written plainly on transformers, on this CPU in one run.

    python -m limbeck.benchmarks.distill [--rounds 3] [--steps 3] [--settings 4x512,...] [--processor] [--json FILE]

Student and teacher are the recipe `tiny`'s: the shipped model, and its slice of 75% of the parameters (rows x tokens; a
third number is another vocabulary, with random weights). Ours is `distill.trainer.train` with all that goes with it:
packed text of the standard library, progress bar, metrics.jsonl. The peer has ready batches and a plain loop: both
models' logits, log_softmax, kl_div, backward, clipping, the same AdamW. The two take turns; a figure is the median of
the steps but each turn's first. Memory is of a fresh process of its own: its highest above what it held before the
models were there, after a small step that wakes everything, by the system's account, and by that of tensors alive
(benchmarks/live_bytes.py).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import functools
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from limbeck.benchmarks.cpu_vs_transformers import resident
from limbeck.benchmarks.live_bytes import LiveBytes
from limbeck.benchmarks.train_memory import random_rows
from limbeck.distill.losses import DistillLoss, distillation_loss
from limbeck.distill.text.packing import Batch, Corpus, tokenize
from limbeck.distill.text.resolve import documents
from limbeck.distill.trainer import TrainOptions, train
from limbeck.models.checkpoint import load_model
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.hybrid import HybridLM, initialize
from limbeck.models.named import SHIPPED
from limbeck.models.processes import keep_memory
from limbeck.models.provenance import provenance
from limbeck.models.tokenizer import load_tokenizer
from limbeck.prune.choose import select
from limbeck.prune.slice import slice_model
from limbeck.prune.target import Target
from limbeck.prune.width_metrics import MagnitudeScores
from torch import Tensor
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

SIDES = ("limbeck", "transformers")
PARTS = ("data", "teacher", "student", "loss", "backward", "optimizer", "logging")
TARGET = Target(layers=11, hidden_size=224, intermediate_size=640, mamba_num_heads=12)  # as recipe=tiny
DOCUMENTS = 150  # of the standard library, tokenised in seconds
RATE, CLIP = 1e-4, 1.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """Rows and tokens of a batch, and a vocabulary (0: the shipped model's)."""

    rows: int
    seq_len: int
    vocabulary: int = 0

    @classmethod
    def read(cls, text: str) -> Setting:
        return cls(*(int(number) for number in text.split("x")))

    def __str__(self) -> str:
        return "x".join(str(number) for number in (self.rows, self.seq_len, self.vocabulary) if number)


def models(setting: Setting) -> tuple[HybridLM, HybridLM]:
    """Student and teacher."""
    teacher = load_model(SHIPPED["zoo"])
    if setting.vocabulary:
        teacher = HybridLM(teacher.config.replace(vocab_size=setting.vocabulary))
        initialize(teacher, torch.Generator().manual_seed(0))
    scores = MagnitudeScores().scores(teacher.config, teacher.state_dict().__getitem__)
    student = slice_model(teacher, select(teacher.config, scores, (5,), TARGET))
    return student.train(), teacher.requires_grad_(False).eval()


def theirs(model: HybridLM) -> torch.nn.Module:
    """transformers' model with the same weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    found = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**model.config.to_hf()))
    weights = {name.removeprefix("model."): name for name in found.state_dict()}
    found.load_state_dict({weights[name]: weight for name, weight in model.state_dict().items()})
    return found.train(model.training).requires_grad_(next(model.parameters()).requires_grad)


@functools.cache
def corpus() -> Corpus:
    return tokenize(itertools.islice(documents("stdlib", "train"), DOCUMENTS), load_tokenizer(SHIPPED["zoo"]))


now: Callable[[], float] = time.perf_counter


class Clock:
    """Seconds of a step by part."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.parts: dict[str, float] = collections.defaultdict(float)
        self.last = now()

    def mark(self, part: str) -> None:
        """What has passed since the last mark was this."""
        reached = now()
        self.parts[part] += reached - self.last
        self.last = reached

    def step(self) -> None:
        self.steps.append(dict(self.parts))
        self.parts.clear()

    def around(self, work: Callable[..., Any], before: Callable[[], str], part: str) -> Callable[..., Any]:
        """`work`, with what came before it marked as `before()` says, and itself as `part`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.mark(before())
            found = work(*args, **kwargs)
            self.mark(part)
            return found

        return call


def our_steps(student: HybridLM, teacher: HybridLM, setting: Setting, steps: int) -> list[dict[str, float]]:
    """Seconds by part of so many steps of `train`, as `limbeck distill` runs it.

    Data is what passes between a step's record and the loss, logging what passes between the optimizer and the record
    as the progress bar has it; clipping belongs to the backward.
    """
    clock = Clock()
    loss_of = clock.around(
        distillation_loss(teacher, DistillLoss()), lambda: "backward" if "loss" in clock.parts else "data", "loss"
    )
    options = TrainOptions(steps=10**6, learning_rate=RATE, warmup_steps=0, clip_norm=CLIP, save_every=10**6)

    def batches(start: int) -> Iterator[Batch]:
        if setting.vocabulary:
            return itertools.repeat(random_rows(setting.vocabulary, setting.rows, setting.seq_len))
        return corpus().train_batches(batch_size=setting.rows, seq_len=setting.seq_len, seed=0, start=start)

    with contextlib.ExitStack() as stack:
        for model, part in ((student, "student"), (teacher, "teacher")):
            model.hidden_states = clock.around(model.hidden_states, lambda: "loss", part)  # type: ignore[method-assign]
            stack.callback(delattr, model, "hidden_states")
        for register, part in (
            (register_optimizer_step_pre_hook, "backward"),
            (register_optimizer_step_post_hook, "optimizer"),
        ):
            hook: Any = register(functools.partial(lambda part, *_: clock.mark(part), part))
            stack.callback(hook.remove)
        folder = stack.enter_context(tempfile.TemporaryDirectory())

        def on_step(record: dict[str, Any]) -> None:
            note = f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s"
            print(f"step {record['step']} of {steps}  {note}", file=sys.stderr)
            clock.mark("logging")
            clock.step()

        train(student, loss_of, batches, options, Path(folder), on_step=on_step, stop_after=steps)
    return clock.steps


def plain_loss(student: torch.nn.Module, teacher: torch.nn.Module, batch: Batch) -> Tensor:
    """KL(teacher || student) over all logits, a mean over the labels."""
    with torch.no_grad():
        target = teacher(batch.input_ids, use_cache=False).logits
    logits = student(batch.input_ids, use_cache=False).logits
    divergence = F.kl_div(F.log_softmax(logits, -1), F.log_softmax(target, -1), reduction="none", log_target=True)
    return divergence.sum(-1)[batch.labels >= 0].mean()


def plain_steps(student: torch.nn.Module, teacher: torch.nn.Module, batch: Batch, steps: int) -> Iterator[float]:
    """Seconds of each of so many steps."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for _ in range(steps):
        clock = now()
        loss = plain_loss(student, teacher, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        yield now() - clock


def disagreement(ours: tuple[HybridLM, HybridLM], peers: tuple[Any, Any], setting: Setting) -> float:
    """Relative difference of the two losses on rows of one document."""
    found = random_rows(ours[0].config.vocab_size, setting.rows, setting.seq_len)
    batch = dataclasses.replace(found, seq_idx=torch.zeros_like(found.seq_idx))
    with torch.no_grad():
        mine = distillation_loss(ours[1], DistillLoss())(ours[0], batch, float(batch.labels.numel()))
        plain = plain_loss(*peers, batch)
    return abs(mine.item() / plain.item() - 1)


def compare(setting: Setting, rounds: int, steps: int) -> dict[str, Any]:
    """Both sides in turns: seconds a step, ours by part, tokens a second."""
    ours = models(setting)
    peers = (theirs(ours[0]), theirs(ours[1]))
    error = disagreement(ours, peers, setting)
    batch = random_rows(ours[0].config.vocab_size, setting.rows, setting.seq_len)
    mine: list[dict[str, float]] = []
    plain: list[float] = []
    for _ in range(rounds):
        mine += our_steps(*ours, setting, steps + 1)[1:]
        plain += list(plain_steps(*peers, batch, steps + 1))[1:]
    seconds = {
        "limbeck": statistics.median(sum(parts.values()) for parts in mine),
        "transformers": statistics.median(plain),
    }
    shares = {
        part: sum(parts.get(part, 0) for parts in mine) / sum(sum(parts.values()) for parts in mine) for part in PARTS
    }
    tokens = setting.rows * setting.seq_len
    return {
        "setting": str(setting),
        "parameters": [count_parameters(model.config) for model in ours],
        "loss_error": error,
        "seconds": seconds,
        "tokens_per_second": {side: tokens / seconds[side] for side in SIDES},
        "ratio": seconds["transformers"] / seconds["limbeck"],
        "shares": shares,
    }


def peaks(side: str, setting: Setting) -> dict[str, int]:
    """Bytes at the highest of three steps above what the process held before: as the system sees it, and of tensors."""
    corpus()
    three_steps(side, Setting(1, 16, setting.vocabulary))
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what that has left
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the highest is what it is now
    three_steps(side, setting)
    highest = status("VmHWM")
    return {"resident": highest - before, "tensors": three_steps(side, setting, LiveBytes())}


def three_steps(side: str, setting: Setting, live: LiveBytes | None = None) -> int:
    """Of new models; the most bytes that their tensors took, if someone counts."""
    pair: tuple[Any, Any] = models(setting)
    batch = random_rows(pair[0].config.vocab_size, setting.rows, setting.seq_len)
    if side == "transformers":
        pair = theirs(pair[0]), theirs(pair[1])
        gc.collect()
    with contextlib.nullcontext() if live is None else live:
        if live is not None:
            for weight in itertools.chain(*(model.parameters() for model in pair)):
                live.count(weight)
        if side == "limbeck":
            our_steps(*pair, setting, 3)
        else:
            list(plain_steps(*pair, batch, 3))
    return 0 if live is None else live.peak


def status(field: str) -> int:
    """Bytes that the system states for this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def show(found: dict[str, Any]) -> None:
    rate, memory = found["tokens_per_second"], found["memory"]
    print(f"\n{found['setting']}: student {found['parameters'][0]:,}, teacher {found['parameters'][1]:,} parameters;"
          f" the losses differ by {found['loss_error']:.1e}")  # fmt: skip
    print("| part | share of the step |\n|---|---|")
    for part, share in found["shares"].items():
        print(f"| {part} | {share:.1%} |")
    print(f"| data and logging | {found['shares']['data'] + found['shares']['logging']:.2%} |")
    print("\n| | limbeck | transformers | ratio |\n|---|---|---|---|")
    print(f"| tokens a second | {rate['limbeck']:,.0f} | {rate['transformers']:,.0f} | {found['ratio']:.2f} |")
    for kind, name in (("resident", "resident memory, MiB"), ("tensors", "tensors alive, MiB")):
        mine, plain = (memory[side][kind] for side in SIDES)
        print(f"| {name} | {mine / 2**20:.0f} | {plain / 2**20:.0f} | {mine / plain:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--settings", default="4x512,2x1024,2x1024x32768")
    parser.add_argument("--processor", action="store_true", help="time of the processor, where other work is running")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peaks", nargs=2, metavar=("SIDE", "SETTING"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    global now
    now = time.process_time if options.processor else time.perf_counter
    torch.set_flush_denormal(True)
    keep_memory()  # both sides as `limbeck` runs
    if options.peaks:
        print(json.dumps(peaks(options.peaks[0], Setting.read(options.peaks[1]))))
        return
    results = []
    for setting in (Setting.read(text) for text in options.settings.split(",")):
        found = compare(setting, options.rounds, options.steps)
        command = [sys.executable, "-m", "limbeck.benchmarks.distill", "--peaks"]
        found["memory"] = {
            side: json.loads(
                subprocess.run(
                    [*command, side, str(setting)], check=True, capture_output=True, text=True
                ).stdout.splitlines()[-1]
            )
            for side in SIDES
        }
        show(found)
        results.append(found)
    facts = provenance()
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in facts.items()))
    if options.json:
        options.json.write_text(json.dumps({"results": results, "provenance": facts}, indent=1))


if __name__ == "__main__":
    main()
