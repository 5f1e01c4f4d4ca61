"""Three sizes in one checkpoint by one distillation, beside each size alone: bits per byte on held-out files.

    python -m limbeck.benchmarks.nested OUTPUT [--model zoo] [--steps 235] [--seeds 0,1,2] [--ways nested,third,full]
        [--tokens 32768]

The model teaches itself at 90, 75 and 60% of its parameters. `nested` is one run for all sizes, `nested-by-largest` one
in which the largest size teaches the others; `third` are three runs of a third of its tokens each, `full` three runs of
all of its tokens each, both from the very slices that the nested run begins with; `third-repaired` and `full-repaired`
begin with what `limbeck prune data=` makes of the same scores (rotation and least squares). A seed draws the
calibration text of the scores, the order of the text, and the sizes of the steps; held-out text is the same for all.
The nested run's slices are written as folders and read again by transformers.

A cell (a run) is a file in OUTPUT/cells that is not made twice, and one that is killed resumes from its last state.
Tables give means and, in brackets, the least and the largest of the seeds.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from limbeck.benchmarks.cells import print_table, spread
from limbeck.benchmarks.pruning import Bench, Subject
from limbeck.distill.gap.measure import measure_gap
from limbeck.distill.losses import DistillLoss, distillation_loss
from limbeck.distill.nested import open_nest
from limbeck.distill.nested_options import NestedSize, NestedSizes
from limbeck.distill.options import TrainOptions
from limbeck.distill.parallel import Trained, prepare
from limbeck.distill.trainer import train
from limbeck.models.checkpoint import save_model
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.hybrid import HybridLM
from limbeck.models.named import model_folder
from limbeck.models.provenance import provenance
from limbeck.prune.choose import select
from limbeck.prune.nested import NestedCut, between, nested_cut
from limbeck.prune.repair import Repair, repair_model
from limbeck.prune.slice import slice_config, slice_model
from limbeck.prune.target import Target

SHARES = (0.9, 0.75, 0.6)
TARGETS = tuple({"parameters": share} for share in SHARES)
NAMES = tuple(f"{share:.0%}" for share in SHARES)
TEACHERS = {"nested": "teacher", "nested-by-largest": "largest"}
ALONE = {"third": (3, False), "full": (1, False), "third-repaired": (3, True), "full-repaired": (1, True)}
Figures = dict[str, float]


def subject(folder: Path) -> Subject:
    return Subject(
        folder.name, folder, 16384, 8192, 16384, {}, Target(), Target(), (), steps=235, batch=4, optimizer="muon",
        learning_rates=(1e-3,), repairs=(), distilled=(), ablated=False,
    )  # fmt: skip


class NestedBench:
    """A model that teaches its own sizes, for so many steps in all."""

    def __init__(self, folder: Path, output: Path, steps: int, tokens: int) -> None:
        self.base, self.output = Bench(subject(folder), output / "cells"), output
        self.steps, self.tokens = steps, tokens

    @functools.cache  # noqa: B019 - one bench a process
    def cut(self, seed: int) -> NestedCut:
        model = self.base.model
        return nested_cut(model.config, self.base.widths("activation", seed), TARGETS)

    def trained(self, name: str, student: HybridLM | Trained, loss_of: Any, steps: int, seed: int) -> None:
        """Trains in place, from the last state of a run that was killed. Its folder goes once the cell is written."""
        subject = self.base.subject
        how = TrainOptions(
            steps, subject.learning_rates[0], subject.optimizer, warmup_steps=5, save_every=20, log_every=steps
        )
        text = self.base.corpus("train")
        train(
            student, loss_of,
            lambda start: text.train_batches(
                batch_size=subject.batch, seq_len=subject.seq_len, seed=seed, start=start
            ),
            how, self.training(name),
        )  # fmt: skip

    def training(self, name: str) -> Path:
        return self.output / "training" / f"{self.steps} steps, {name}"

    def cell(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        found = self.base.cell(f"{self.steps} steps, {name}", make)
        shutil.rmtree(self.training(name), ignore_errors=True)
        return found

    def figures(self, students: dict[str, HybridLM]) -> dict[str, Figures]:
        """Bits per byte and KL of each on held-out text."""
        sample = self.base.sample("test", self.tokens, 0)
        models = measure_gap(self.base.model, students, sample, resamples=2).models
        return {
            name: {"bits per byte": models[name].bits_per_byte.value, "KL": models[name].kl.value,
                   "parameters": count_parameters(student.config)}
            for name, student in students.items()
        }  # fmt: skip

    def nested(self, way: str, seed: int) -> dict[str, Any]:
        """One run for all sizes."""
        name = f"{way}, seed {seed}"

        def make() -> dict[str, Any]:
            cut = self.cut(seed)
            largest = slice_model(self.base.model, cut.largest)
            sizes = [(slice_config(largest.config, size), size.kept) for size in cut.sizes]
            told = NestedSizes(tuple(NestedSize(target) for target in TARGETS), TEACHERS[way])
            own = count_parameters(self.base.model.config)
            student, nest = open_nest(told, largest, sizes, own, torch.float32)
            loss = nest.loss(distillation_loss(self.base.model, DistillLoss()), seed)
            self.trained(name, student, loss, self.steps, seed)
            cut_out = {label: slice_model(largest, size).eval() for label, size in zip(NAMES, cut.sizes, strict=True)}
            reread = {label: self.reread(model) for label, model in cut_out.items()}
            return {"sizes": self.figures(cut_out), "transformers": reread}

        return self.cell(name, make)

    def alone(self, way: str, number: int, seed: int) -> dict[str, Any]:
        """A run of one size."""
        part, repaired = ALONE[way]
        name = f"{way}, {NAMES[number]}, seed {seed}"

        def make() -> dict[str, Any]:
            student = self.repaired(number, seed) if repaired else self.sliced(number, seed)
            before = self.figures({"before": student})["before"]
            loss = distillation_loss(self.base.model, DistillLoss())
            self.trained(name, prepare(student.train()), loss, self.steps // part, seed)
            return self.figures({NAMES[number]: student.eval()}) | {"before": before}

        return self.cell(name, make)

    def sliced(self, number: int, seed: int) -> HybridLM:
        """A size as the nested run begins with it."""
        cut = self.cut(seed)
        return slice_model(slice_model(self.base.model, cut.largest), cut.sizes[number])

    def repaired(self, number: int, seed: int) -> HybridLM:
        """A size as prune cuts it out of the model at once, with repair."""
        model, widths = self.base.model, self.base.widths("activation", seed)
        target = between(model.config, self.sliced(number, seed).config)
        selection = select(model.config, widths, (), target)
        return repair_model(model, selection, self.base.calibration(seed), Repair(rotate=True, least_squares=True))

    @torch.no_grad()
    def reread(self, model: HybridLM) -> float:
        """The relative RMS difference of transformers' logits, of a folder written of a model, from the model's."""
        import transformers

        ids = self.base.sample("test", 512, 0)[0].input_ids[:1]
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, Path(folder) / "size", tokenizer_from=self.base.subject.folder)
            theirs = transformers.AutoModelForCausalLM.from_pretrained(
                Path(folder) / "size", dtype=torch.float32
            ).eval()
            ours, found = model(ids), theirs(ids).logits
        return float((ours - found).norm() / ours.norm())


def compare(bench: NestedBench, ways: Sequence[str], seeds: Sequence[int]) -> None:
    """The tables: a row a way, a column a size."""
    found: dict[str, list[list[Figures]]] = {}  # by way, size and seed
    differences: list[float] = []
    for way in ways:
        if way in TEACHERS:
            cells = [bench.nested(way, seed) for seed in seeds]
            differences += [difference for cell in cells for difference in cell["transformers"].values()]
            found[way] = [[cell["sizes"][name] for cell in cells] for name in NAMES]
        else:
            found[way] = [[bench.alone(way, number, seed)[name] for seed in seeds] for number, name in enumerate(NAMES)]
    step = bench.base.subject.batch * bench.base.subject.seq_len
    for figure in ("bits per byte", "KL"):
        rows = []
        for way, sizes in found.items():
            steps = bench.steps if way in TEACHERS else len(SHARES) * (bench.steps // ALONE[way][0])
            values = [spread([cell[figure] for cell in cells], 4) for cells in sizes]
            rows.append([way, f"{steps * step:,}", *values])
        print_table(f"{bench.base.subject.name}: {figure}", ["way", "tokens, of all sizes", *NAMES], rows)
    if differences:
        print(f"\ntransformers' logits of the nested slices differ by {max(differences):.1e} at most, relative RMS")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the cells, made where it is not there")
    parser.add_argument("--model", default="zoo", help="a folder, or the name of a shipped model")
    parser.add_argument("--steps", type=int, default=235, help="of 2,048 tokens, of the nested run")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--ways", default="nested,third,full", help=f"of {', '.join([*TEACHERS, *ALONE])}")
    parser.add_argument("--tokens", type=int, default=32768, help="of held-out text")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    bench = NestedBench(model_folder(options.model), options.output, options.steps, options.tokens)
    ways = options.ways.split(",")
    if unknown := set(ways) - {*TEACHERS, *ALONE}:
        parser.error(f"unknown ways {', '.join(sorted(unknown))}; known: {', '.join([*TEACHERS, *ALONE])}")
    compare(bench, ways, [int(seed) for seed in options.seeds.split(",")])
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in provenance().items()))


if __name__ == "__main__":
    main()
