"""What to distil with, and what to begin with: the table of docs/RESULTS.md.

    python -m limbeck.benchmarks.losses OUTPUT [--steps 200] [--seeds 0,1,2] [--parts losses,beginnings]

On the shipped model, at equal tokens. Losses: KL, cross-entropy, both, and KL with hidden states, from two cuts: all
axes to 75% of the parameters, and 12 layers to 7 (hidden states pay where many layers go, says arXiv 2407.14679).
Beginnings: the first cut's weights, or random ones of the same size, each with cross-entropy and with KL; random ones
at the rate that the shipped model was trained with as well, and the better of both counts. A seed draws calibration
text, the order of the training text and random weights; held-out text is the same for all. Every cell is a file in
OUTPUT/cells that is not made twice. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from limbeck.benchmarks.provenance import provenance
from limbeck.benchmarks.pruning import Bench, Subject, print_table, spread, zoo
from limbeck.distill.data import Batch, train_batches
from limbeck.distill.gap import measure_gap
from limbeck.distill.hidden import HiddenLoss, Kept, make_pairing
from limbeck.distill.losses import DistillLoss, cross_entropy_loss, distillation_loss
from limbeck.distill.trainer import TrainOptions, train
from limbeck.models.axes import Axis
from limbeck.models.hybrid import HybridLM, initialize
from limbeck.prune.choose import Target
from limbeck.prune.compensate import Repair
from limbeck.prune.slice import Selection, slice_config

CUTS = {"all axes, 25% fewer": zoo().together, "12 layers to 7": Target(layers=7)}
LOSSES = {
    "KL": DistillLoss(),
    "CE": None,
    "CE + KL": DistillLoss(kl_weight=1.0, ce_weight=1.0),
    "KL + hidden states": DistillLoss(hidden=HiddenLoss(weight=1.0)),
}
RATE, RANDOM_RATES = 1.5e-3, (1.5e-3, 5e-3)
FIGURES = {"loss": "held-out loss", "kl": "KL to the teacher", "agreement": "agreement"}


def subject() -> Subject:
    """The shipped model, its layers in the order of removal as far as the cuts ask for."""
    return dataclasses.replace(zoo(), layers=tuple(12 - (cut.layers or 12) for cut in CUTS.values()))


def student_of(bench: Bench, cut: str, seed: int) -> tuple[HybridLM, Selection]:
    selection = bench.selection(CUTS[cut], "activation", seed)
    return bench.pruned(selection, seed, Repair()), selection


def distil(
    bench: Bench, student: HybridLM, selection: Selection, loss: str, rate: float, seed: int, steps: int
) -> None:
    """Trains in place."""
    chosen, shape = LOSSES[loss], bench.subject
    loss_of: Any = cross_entropy_loss
    if chosen is not None:
        kept = Kept(selection.layers, selection.kept.get(Axis("hidden"), tuple(range(bench.model.config.hidden_size))))
        pairing = make_pairing(bench.model, student, chosen.hidden, kept, ()) if "hidden" in loss else None
        loss_of = distillation_loss(bench.model, chosen, pairing)
    options = TrainOptions(steps, rate, shape.optimizer, warmup_steps=min(10, steps), save_every=steps, log_every=steps)

    def batches(start: int) -> Iterator[Batch]:
        text = bench.corpus("train")
        return train_batches(text, batch_size=shape.batch, seq_len=shape.seq_len, seed=1000 + seed, start=start)

    with tempfile.TemporaryDirectory() as folder:
        train(student.train(), loss_of, batches, options, Path(folder))
    student.eval()


def figures(bench: Bench, student: HybridLM) -> dict[str, float]:
    held_out = bench.sample("test", bench.subject.held_out_tokens, 0)
    found = measure_gap(bench.model, {"student": student}, held_out, resamples=2).models["student"]
    return {"loss": found.cross_entropy.value, "kl": found.kl.value, "agreement": found.agreement.value}


def trained(bench: Bench, cut: str, begin: str, loss: str, rate: float, seed: int, steps: int) -> dict[str, float]:
    """The figures of a student after so many steps (0: before the first)."""

    def make() -> dict[str, Any]:
        student, selection = student_of(bench, cut, seed)
        if begin == "random":
            student = HybridLM(slice_config(bench.model.config, selection))
            initialize(student, torch.Generator().manual_seed(seed))
        if steps:
            distil(bench, student, selection, loss, rate, seed, steps)
        return figures(bench, student)

    name = f"losses, {cut}, {begin}, {loss if steps else 'untrained'} at {rate:g}, {steps} steps, seed {seed}"
    return bench.cell(name, make)


def row(name: str, found: Sequence[dict[str, float]]) -> list[str]:
    return [name, *(spread([cell[figure] for cell in found]) for figure in FIGURES)]


def loss_table(bench: Bench, seeds: Sequence[int], steps: int) -> None:
    """What is minimised, from pruned weights."""
    for cut in CUTS:
        rows = [row("not trained", [trained(bench, cut, "pruned", "KL", RATE, seed, 0) for seed in seeds])]
        for loss in LOSSES:
            rows.append(row(loss, [trained(bench, cut, "pruned", loss, RATE, seed, steps) for seed in seeds]))
        print_table(title_of(bench, cut, steps), ["minimised", *FIGURES.values()], rows)


def beginning_table(bench: Bench, seeds: Sequence[int], steps: int) -> None:
    """Pruned or random weights, with and without a teacher."""
    cut = next(iter(CUTS))
    rows = []
    for loss in ("CE", "KL"):
        found = [trained(bench, cut, "pruned", loss, RATE, seed, steps) for seed in seeds]
        rows.append(row(f"pruned, {loss}", found))
        ways = [[trained(bench, cut, "random", loss, rate, seed, steps) for seed in seeds] for rate in RANDOM_RATES]
        best = min(ways, key=lambda cells: sum(cell["loss"] for cell in cells))
        rows.append(row(f"random, {loss}", best))
    print_table(title_of(bench, cut, steps), ["weights, loss", *FIGURES.values()], rows)


def title_of(bench: Bench, cut: str, steps: int) -> str:
    tokens = steps * bench.subject.batch * bench.subject.seq_len
    return f"{bench.subject.name}: {cut}, after {tokens:,} tokens (unpruned {bench.base():.3f})"


PARTS = {"losses": loss_table, "beginnings": beginning_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the cells, made where it is not there")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, of " + ", ".join(PARTS))
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    bench = Bench(subject(), options.output / "cells")
    for part in options.parts.split(","):
        PARTS[part](bench, [int(seed) for seed in options.seeds.split(",")], options.steps)
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in provenance().items()))


if __name__ == "__main__":
    main()
