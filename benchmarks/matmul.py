"""Training steps and forward passes with products in float32 and in bfloat16 (matmul=), in turns, in one process.

    OMP_NUM_THREADS=2 python -m limbeck.benchmarks.matmul [--rounds 5] [--cases NAME ...] [--processor-time] [--json F]

Cases: a pretraining step of the shipped mixture of experts (8 x 512 tokens, Muon), a distillation step of the shipped
model as its own teacher, and of 28 M parameters with 32,768 tokens as cpu_vs_transformers draws them (4 x 512, Muon);
of each the forward pass alone as well. A step is forward, loss, backward and optimizer; each figure is the median of
the rounds, the first of which counts for nothing. Beside them stands how far the gradient is off: the norm of the
difference over the norm of the float32 gradient, of the same weights and batch. `--processor-time` counts the process's
time instead of the clock's: for one thread on a busy machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from limbeck.benchmarks.cpu_vs_transformers import CONFIG
from limbeck.distill.losses import DistillLoss, cross_entropy_loss, distillation_loss
from limbeck.distill.options import TrainOptions
from limbeck.distill.text.packing import Batch, tokenize
from limbeck.distill.text.resolve import documents
from limbeck.distill.trainer import make_optimizers
from limbeck.kernels.products import bfloat16_products
from limbeck.models import processes
from limbeck.models.checkpoint import load_model
from limbeck.models.hybrid import HybridLM, initialize
from limbeck.models.matmul import measured_gain
from limbeck.models.named import SHIPPED
from limbeck.models.provenance import provenance
from limbeck.models.tokenizer import load_tokenizer

VOCABULARY = 32768
WAYS = {"float32": False, "bfloat16": True}


@dataclasses.dataclass
class Case:
    model: HybridLM
    loss_of: Callable[[HybridLM, Any, float], torch.Tensor]
    batch: Batch

    def loss(self) -> torch.Tensor:
        return self.loss_of(self.model, self.batch, float((self.batch.labels >= 0).sum()))

    def gradient(self) -> torch.Tensor:
        self.loss().backward()
        found = torch.cat([weight.grad.flatten() for weight in self.model.parameters() if weight.grad is not None])
        self.model.zero_grad(set_to_none=True)
        return found


def shipped(name: str, rows: int, teaches: bool) -> Case:
    model = load_model(SHIPPED[name], torch.float32)
    teacher = load_model(SHIPPED[name], torch.float32)
    text = tokenize(list(documents("stdlib", "test"))[:40], load_tokenizer(SHIPPED[name]))
    batch = next(text.train_batches(batch_size=rows, seq_len=512, seed=0))
    if not teaches:
        return Case(model, cross_entropy_loss, batch)
    with torch.no_grad():  # something to learn: noise of a tenth of each matrix
        generator = torch.Generator().manual_seed(0)
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1 * float(weight.std()))
    return Case(model, distillation_loss(teacher, DistillLoss()), batch)


def drawn() -> Case:
    config, models = CONFIG.replace(vocab_size=VOCABULARY), []
    for seed in range(2):
        model = HybridLM(config)
        initialize(model, torch.Generator().manual_seed(seed))
        models.append(model)
    ids = torch.randint(VOCABULARY, (4, 513), generator=torch.Generator().manual_seed(2))
    one = torch.zeros(4, 512, dtype=torch.int64)  # one document a row
    batch = Batch(ids[:, :-1], ids[:, 1:], one.int(), one.int(), one)
    return Case(models[0], distillation_loss(models[1], DistillLoss()), batch)


CASES: dict[str, Callable[[], Case]] = {
    "pretrain zoo-moe, 8 x 512": lambda: shipped("zoo-moe", 8, False),
    "distill zoo, 4 x 512": lambda: shipped("zoo", 4, True),
    f"distill 28 M, vocabulary {VOCABULARY:,}, 4 x 512": drawn,
}


def measure(name: str, rounds: int, now: Callable[[], float]) -> dict[str, Any]:
    """Seconds of a step and of a forward pass each way, and how far the gradient is off."""
    case = CASES[name]()
    optimizers = make_optimizers(case.model, TrainOptions(steps=1, learning_rate=1e-6, optimizer="muon"))
    gradients, seconds = {}, {way: {"step": list[float](), "forward": list[float]()} for way in WAYS}
    for way, narrow in WAYS.items():
        with bfloat16_products(narrow):
            gradients[way] = case.gradient()
    exact, found = gradients["float32"], gradients["bfloat16"]
    for _ in range(rounds + 1):
        for way, narrow in WAYS.items():
            with bfloat16_products(narrow):
                begun = now()
                case.loss().backward()
                for optimizer in optimizers.values():
                    optimizer.step()
                case.model.zero_grad(set_to_none=True)
                done = now()
                with torch.inference_mode():
                    case.model.hidden_states(case.batch.input_ids, seq_idx=case.batch.seq_idx)
            seconds[way]["step"].append(done - begun)
            seconds[way]["forward"].append(now() - done)
    medians = {way: {what: statistics.median(taken[1:]) for what, taken in each.items()}
               for way, each in seconds.items()}  # fmt: skip
    return {"seconds": medians, "tokens": case.batch.input_ids.numel(),
            "gradient_off": float((found - exact).norm() / exact.norm())}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=list(CASES), help="those whose names begin so")
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    now = time.process_time if options.processor_time else time.perf_counter
    processes.set_up()
    facts = provenance() | {"load before": round(os.getloadavg()[0], 2), "one product": f"{measured_gain():.2f} times"}
    print("| case | | float32, s | bfloat16, s | gain | tokens/s | gradient off |\n|---|---|---|---|---|---|---|")
    results: dict[str, Any] = {}
    for name in (name for name in CASES if name.startswith(tuple(options.cases))):
        found = results[name] = measure(name, options.rounds, now)
        for what in ("step", "forward"):
            single, half = (found["seconds"][way][what] for way in WAYS)
            off = f"{found['gradient_off']:.1%}" if what == "step" else ""
            print(
                f"| {name} | {what} | {single:.3f} | {half:.3f} | {single / half:.2f} | {found['tokens'] / half:,.0f} |"
                f" {off} |",
                flush=True,
            )
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in facts.items()))
    if options.json is not None:
        options.json.write_text(json.dumps({"results": results, "facts": facts}, indent=1))


if __name__ == "__main__":
    main()
