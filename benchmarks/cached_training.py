"""A student that learns from a cached teacher: a top k and its tail beside draws of as many bytes, and the online one.

    python -m limbeck.benchmarks.cached_training OUTPUT [--steps 60] [--seeds 0,1,2] [--tokens 32768]
        [--ways online,"top 6","12 draws","top 64","128 draws"]

The model is pruned by a quarter of its parameters (activations; rotation, least squares) and learns forward KL of
4 x 512 tokens a step with Muon, from a cache of the very rows that it reads. A seed draws calibration text and the
order of the rows; the held-out text is the same for all. 12 draws take about the bytes of the top 6, 128 those of the
top 64 (docs/RESULTS.md). A cell is a file of OUTPUT/cells that is not made twice; tables give means and, in brackets,
the least and the largest of the seeds.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from limbeck.benchmarks.cells import print_table, spread
from limbeck.benchmarks.pruning import BEST, REPAIRS, Bench, zoo
from limbeck.benchmarks.teacher_cache import make_cache
from limbeck.distill.gap.measure import measure_gap
from limbeck.distill.losses import DistillLoss, distillation_loss
from limbeck.distill.options import TrainOptions
from limbeck.distill.teacher import SAMPLE, CachedTeacher
from limbeck.distill.text.packing import Batch
from limbeck.distill.trainer import train
from limbeck.models.hybrid import HybridLM
from limbeck.models.provenance import provenance

WAYS: dict[str, dict[str, Any] | None] = {
    "online": None,
    "top 6": {"k": 6, "dtype": "float16"},
    "12 draws": {"k": 12, "method": SAMPLE},
    "top 64": {"k": 64, "dtype": "float16"},
    "128 draws": {"k": 128, "method": SAMPLE},
}
FIGURES = ("KL", "bits per byte")


class CacheBench:
    """The shipped model, its pruned student and the caches of what the student reads."""

    def __init__(self, output: Path, steps: int, tokens: int) -> None:
        self.base, self.output, self.steps, self.tokens = Bench(zoo(), output / "cells"), output, steps, tokens

    def pruned(self, seed: int) -> HybridLM:
        selection = self.base.selection(self.base.subject.together, "activation", seed)
        return self.base.pruned(selection, seed, REPAIRS[BEST[0]])

    def rows(self, seed: int, start: int = 0) -> Iterator[Batch]:
        subject = self.base.subject
        text = self.base.corpus("train")
        return text.train_batches(batch_size=subject.batch, seq_len=subject.seq_len, seed=seed, start=start)

    def cache(self, way: str, seed: int) -> CachedTeacher:
        folder = self.output / f"cache, {self.steps} steps, {way}, seed {seed}"
        shutil.rmtree(folder, ignore_errors=True)
        read = list(itertools.islice(self.rows(seed), self.steps))
        return make_cache(self.base.model, read, folder, **(WAYS[way] or {}))

    def figures(self, model: HybridLM) -> dict[str, float]:
        sample = self.base.sample("test", self.tokens, 0)
        gap = measure_gap(self.base.model, {"student": model.eval()}, sample, resamples=2).models["student"]
        return {"KL": gap.kl.value, "bits per byte": gap.bits_per_byte.value}

    def before(self, seed: int) -> dict[str, Any]:
        return self.base.cell(f"cached, before, seed {seed}", lambda: self.figures(self.pruned(seed)))

    def trained(self, way: str, seed: int) -> dict[str, Any]:
        """Figures after training, and the bytes a token of the teacher's answers."""
        subject = self.base.subject

        def make() -> dict[str, Any]:
            student, found = self.pruned(seed), {"bytes": 0.0}
            teacher: Any = self.base.model
            if WAYS[way] is not None:
                teacher = self.cache(way, seed)
                size = sum(path.stat().st_size for path in teacher.folder.glob("rows-*"))
                found["bytes"] = size / (len(teacher) * subject.seq_len)
            how = TrainOptions(
                self.steps, subject.learning_rates[0], subject.optimizer, warmup_steps=5, save_every=self.steps,
                log_every=self.steps,
            )  # fmt: skip
            loss_of = distillation_loss(teacher, DistillLoss())
            with tempfile.TemporaryDirectory() as folder:
                train(student.train(), loss_of, functools.partial(self.rows, seed), how, Path(folder))
            if teacher is not self.base.model:
                shutil.rmtree(teacher.folder)
            return found | self.figures(student)

        return self.base.cell(f"cached, {self.steps} steps, {way}, seed {seed}", make)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the cells, made where it is not there")
    parser.add_argument("--steps", type=int, default=60, help="of 2,048 tokens")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--tokens", type=int, default=32768, help="of held-out text")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    bench, seeds = CacheBench(options.output, options.steps, options.tokens), list(map(int, options.seeds.split(",")))
    rows = []
    for way in options.ways.split(","):
        if way not in WAYS:
            parser.error(f"unknown way {way!r}; known: {', '.join(WAYS)}")
        cells = [bench.trained(way, seed) for seed in seeds]
        size = f"{cells[0]['bytes']:,.0f}" if WAYS[way] else ""
        rows.append([way, size, *(spread([cell[name] for cell in cells], 4) for name in FIGURES)])
    started = [bench.before(seed) for seed in seeds]
    rows.insert(0, ["before training", "", *(spread([cell[name] for cell in started], 4) for name in FIGURES)])
    tokens = options.steps * bench.base.subject.batch * bench.base.subject.seq_len
    print_table(f"{bench.base.subject.name}, after {tokens:,} tokens", ["teacher", "bytes a token", *FIGURES], rows)
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in provenance().items()))


if __name__ == "__main__":
    main()
