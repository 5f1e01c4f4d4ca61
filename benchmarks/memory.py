"""The memory that generation takes, in three ways: the estimate, the simulation, and a measured run.

    python -m limbeck.benchmarks.memory                 the 9B and the 12B, 1k to 512k tokens, batch 1 to 64
    python -m limbeck.benchmarks.memory --short         one corner of that
    python -m limbeck.benchmarks.memory --cpu FOLDER    a model on the CPU, where the run is measured too

Needs torch alone, no GPU and no weights (but FOLDER's). Prints a table, and exits with 3 where the estimate is further
from the simulation than 1%, or either from a measured run than 2%.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from limbeck.benchmarks.published import PUBLISHED
from limbeck.models.checkpoint import load_model
from limbeck.models.cost.hardware import GIB, Place
from limbeck.models.cost.inference import memory
from limbeck.models.cost.peak import measure
from limbeck.models.cost.simulate import simulate
from limbeck.models.provenance import provenance

A10G = Place("cuda", 80, "8.6")
MODELS = ("nemotron-nano-9b-v2", "nemotron-nano-12b-v2")
CONTEXTS, BATCHES = (1024, 8192, 65536, 131072, 524288), (1, 8, 64)
STATES = (torch.float32, torch.bfloat16)
BUDGET = (22.06 * 0.95 - 1.3) * GIB  # arXiv 2508.14444
# On the CPU: context, batch, chunk, dtype of the SSM states.
RUNS = (
    (512, 1, 512, torch.float32),
    (2048, 1, 512, torch.float32),
    (2048, 8, 128, torch.float32),
    (4096, 2, 512, torch.bfloat16),
    (8192, 1, 1024, torch.float32),
    (64, 64, 512, torch.float32),
)


def compared(short: bool) -> Iterator[float]:
    """Rows of the published models; gives how far the estimate is from the simulation, as a share."""
    print("| model | context x batch | SSM | weights and caches | comes and goes | estimate | simulated | off | at |")
    print("|---|---|---|---|---|---|---|---|---|")
    contexts, batches = ((131072,), (1,)) if short else (CONTEXTS, BATCHES)
    for name, context, batch, state in itertools.product(MODELS, contexts, batches, STATES):
        config = PUBLISHED[name]
        report = memory(config, context, batch, ssm_dtype=state, place=A10G)
        found = simulate(config, context, batch, ssm_dtype=state, place=A10G)
        off = report.peak / found.peak - 1
        yield abs(off)
        where = "logits" if found.layer is None else f"layer {found.layer} ({found.letter})"
        print(
            f"| {name} | {context:,} x {batch} | {str(state)[6:]} | {gib(report.total)} | {gib(report.transient)}"
            f" | {gib(report.peak)} | {gib(found.peak)} | {off:+.4%} | {found.phase}, {where} |",
            flush=True,
        )
    for name in MODELS:
        report = memory(PUBLISHED[name], 131072, 1, place=A10G)
        verdict = "fits" if report.peak <= BUDGET else "does not fit"
        print(f"\n{name} at 131,072 x 1: floor {gib(report.total)}, peak {gib(report.peak)}: {verdict} {gib(BUDGET)}")


def measured(folder: Path) -> Iterator[float]:
    """Rows of a model's runs on the CPU; gives how far estimate and simulation are from them."""
    model = load_model(folder, torch.float32, torch.device("cpu"))
    place = Place("cpu", torch.get_num_threads())
    print("| context x batch, chunk | SSM | measured, MiB | estimate | simulated |\n|---|---|---|---|---|")
    for context, batch, chunk, state in RUNS:
        run = measure(model, context, batch, chunk=chunk, ssm_dtype=state)
        report = memory(
            model.config, context, batch, chunk=chunk, weight_dtype=torch.float32, ssm_dtype=state, place=place
        )
        found = simulate(
            model.config, context, batch, chunk=chunk, weight_dtype=torch.float32, ssm_dtype=state, place=place
        )
        offs = [peak / run.peak - 1 for peak in (report.peak, found.peak)]
        yield from map(abs, offs)
        print(
            f"| {context:,} x {batch}, {chunk} | {str(state)[6:]} | {run.peak / 2**20:.2f}"
            f" | {offs[0]:+.3%} | {offs[1]:+.3%} |",
            flush=True,
        )


def gib(count: float) -> str:
    return f"{count / GIB:.3f} GiB"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", type=Path, metavar="FOLDER", help="measure this model's runs on the CPU instead")
    parser.add_argument("--short", action="store_true", help="131,072 tokens x 1 alone")
    options = parser.parse_args(arguments)
    print(provenance(), flush=True)
    limit = 0.01 if options.cpu is None else 0.02
    furthest = max(compared(options.short) if options.cpu is None else measured(options.cpu))
    print(f"\nfurthest apart: {furthest:.4%}, allowed {limit:.0%}")
    return 3 if furthest > limit else 0


if __name__ == "__main__":
    sys.exit(main())
