"""What importance, depth and repair are worth, before training and after a little: the tables of docs/RESULTS.md.

    python -m limbeck.benchmarks.pruning OUTPUT [--smollm2 FOLDER] [--parts selection,repair,...] [--seeds 0,1,2]

On the shipped model, and on SmolLM2-135M where its folder is given (benchmarks/smollm2.py makes it). Every cell is a
file in OUTPUT/cells that is not made twice: a killed run resumes, and one that has all only prints. A seed draws the
calibration text (and the random scores); held-out text is the same for all. Tables give means and, in brackets, the
least and the largest of the seeds. Plain is what the papers do: L2 over samples of means over tokens, layers by
iterative logit MSE, slices as they are. Run it alone on the machine; one model's parts take one to two hours.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from limbeck.benchmarks.cells import print_table, spread, stored_cell
from limbeck.distill.losses import DistillLoss, distillation_loss
from limbeck.distill.text.packing import Batch, Corpus, tokenize
from limbeck.distill.text.resolve import documents
from limbeck.distill.trainer import TrainOptions, train
from limbeck.kernels.linear_kl import linear_cross_entropy
from limbeck.models import mamba2
from limbeck.models.checkpoint import load_model
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.hybrid import HybridLM
from limbeck.models.named import SHIPPED
from limbeck.models.provenance import provenance
from limbeck.models.tokenizer import load_tokenizer
from limbeck.prune.choose import select
from limbeck.prune.depth import random_layers, score_layers
from limbeck.prune.importance import score_widths
from limbeck.prune.repair import Repair, RepairOptions, repair_model
from limbeck.prune.scores import LayerScores, WidthScores
from limbeck.prune.slice import Selection, slice_config
from limbeck.prune.target import Target
from limbeck.prune.width_metrics import AGGREGATES, ActivationScores, MagnitudeScores, RandomScores, TaylorScores
from torch import Tensor

PLAIN = Repair(norms="none")
DEFAULTS = RepairOptions().repair(with_data=True)
REPAIRS = {
    "plain": PLAIN,
    "norms by count": Repair(),
    "norms measured": Repair(norms="measured"),
    "rotation": Repair(rotate=True),
    "least squares": Repair(least_squares=True),
    "rotation, measured, least squares": Repair(rotate=True, norms="measured", least_squares=True),
    "rotation, least squares": Repair(rotate=True, least_squares=True),
    "rotation, least squares, neurons": DEFAULTS,
    "rotation, least squares, neurons, local distillation": dataclasses.replace(DEFAULTS, local_steps=64),
}
BEST = tuple(REPAIRS)[-3:]
METHODS = ("random", "magnitude", "activation", "taylor")
DEPTHS = ("random", "single shot", "iterative")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, the samples it is measured with, and its cuts (share of the parameters that goes -> target)."""

    name: str
    folder: Path
    calibration_tokens: int
    depth_tokens: int
    held_out_tokens: int
    selected: dict[str, Target]  # selection: cuts by every method
    together: Target  # repair: all axes, 25% fewer parameters
    hidden: Target  # repair: the hidden axis alone, 25% fewer
    layers: tuple[int, ...]  # depth: numbers of layers that go
    steps: int
    batch: int
    optimizer: str
    learning_rates: tuple[float, ...]
    repairs: tuple[str, ...]
    distilled: tuple[str, ...]
    ablated: bool  # whether aggregations and sources are compared on it
    seq_len: int = 512


def zoo() -> Subject:
    together = Target(layers=11, hidden_size=224, intermediate_size=704, mamba_num_heads=12)
    hidden = Target(hidden_size=192)
    cuts = {
        "hidden 256 to 192": hidden,
        "FFN 768 to 384": Target(intermediate_size=384),
        "Mamba heads 16 to 12": Target(mamba_num_heads=12),
        "all axes, 25% fewer": together,
    }
    return Subject(
        "shipped model", SHIPPED["zoo"], 16384, 8192, 16384, cuts, together, hidden, (1, 2, 3),
        steps=60, batch=4, optimizer="muon", learning_rates=(1.5e-3,), repairs=tuple(REPAIRS),
        distilled=("plain", "rotation", *BEST), ablated=True,
    )  # fmt: skip


def smollm2(folder: Path) -> Subject:
    together = Target(layers=27, hidden_size=504, intermediate_size=1344)
    cuts = {
        "all axes, 10% fewer": Target(layers=29, hidden_size=549, intermediate_size=1472),
        "all axes, 20% fewer": Target(layers=28, hidden_size=522, intermediate_size=1344),
        "all axes, 30% fewer": Target(layers=26, hidden_size=495, intermediate_size=1280),
    }
    return Subject(
        "SmolLM2-135M", folder, 6144, 1024, 4096, cuts, together, Target(hidden_size=432), (2, 4, 8),
        steps=30, batch=1, optimizer="adamw", learning_rates=(1e-4, 3e-4),
        repairs=("plain", "norms by count", "rotation", *BEST), distilled=("plain", *BEST), ablated=False,
    )  # fmt: skip


class Bench:
    """One model with its text; scores and losses are made once and stand in files."""

    def __init__(self, subject: Subject, cells: Path) -> None:
        self.subject, self.cells = subject, cells
        cells.mkdir(parents=True, exist_ok=True)
        self.corpus, self.widths = functools.cache(self.tokenized), functools.cache(self.scored)

    @functools.cached_property
    def model(self) -> HybridLM:
        return load_model(self.subject.folder)

    @functools.cached_property
    def teacher(self) -> HybridLM:
        """The model, which keeps what it says of rows: every training reads the same text in the same order."""
        teacher, said = copy.copy(self.model), dict[bytes, Tensor]()

        def hidden_states(input_ids: Tensor, *, seq_idx: Tensor, **none: None) -> Tensor:
            assert not any(value is not None for value in none.values()), "nothing else is kept"
            key = torch.stack((input_ids, seq_idx.to(input_ids.dtype))).numpy().tobytes()
            if key not in said:
                said[key] = self.model.hidden_states(input_ids, seq_idx=seq_idx)
            return said[key]

        teacher.hidden_states = hidden_states  # type: ignore[method-assign,assignment]
        return teacher

    def tokenized(self, split: str) -> Corpus:
        return tokenize(documents("stdlib", split), load_tokenizer(self.subject.folder))

    def sample(self, split: str, tokens: int, seed: int) -> list[Batch]:
        text = self.corpus(split)
        return list(text.sample(batch_size=4, seq_len=self.subject.seq_len, seed=seed, max_tokens=tokens))

    def calibration(self, seed: int) -> list[Batch]:
        return self.sample("train", self.subject.calibration_tokens, seed)

    def cell(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return stored_cell(self.cells, f"{self.subject.name}, {name}", make)

    @torch.no_grad()
    def loss(self, model: HybridLM) -> float:
        """Held-out cross-entropy, nats a token."""
        total, tokens = 0.0, 0
        for batch in self.sample("test", self.subject.held_out_tokens, 0):
            labels = batch.labels.flatten()
            hidden = model.hidden_states(batch.input_ids, seq_idx=batch.seq_idx).flatten(0, 1)
            found = linear_cross_entropy(hidden, model.head_weight, labels, normalizer=1.0)
            total += float(found.cross_entropy.double().sum())
            tokens += int((labels >= 0).sum())
        return total / tokens

    def base(self) -> float:
        return self.cell("unpruned", lambda: {"loss": self.loss(self.model)})["loss"]

    def scored(self, method: str, seed: int) -> WidthScores:
        if method == "random":
            return RandomScores(seed).scores(self.model.config)
        if method == "magnitude":
            return MagnitudeScores().scores(self.model.config, self.model.state_dict().__getitem__)
        return score_widths(self.model, self.calibration(seed), TaylorScores() if method == "taylor" else None)

    def order(self, kind: str, seed: int) -> tuple[int, ...]:
        """Layers in the order of their removal: as many as any cut of the model asks for."""
        config, subject = self.model.config, self.subject
        targets = [*subject.selected.values(), subject.together]
        total, size = config.num_hidden_layers, config.block_size
        most = max(*subject.layers, *(size * (total - (target.layers or total)) for target in targets))
        if kind == "random":
            return random_layers(config, remove=most, seed=seed).order
        batches = self.sample("train", subject.depth_tokens, seed)
        found = self.cell(f"order, {kind}, seed {seed}", lambda: order_of(self.model, batches, most, kind))
        return tuple(found["order"])

    def selection(self, target: Target, method: str, seed: int) -> Selection:
        order = self.order("iterative", seed) if target.layers is not None else ()  # for all, so that sizes are equal
        return select(self.model.config, self.widths(method, seed), order, target)

    def pruned(self, selection: Selection, seed: int, repair: Repair) -> HybridLM:
        return repair_model(self.model, selection, self.calibration(seed) if repair.needs_data else [], repair)

    def distilled(self, model: HybridLM, rate: float) -> HybridLM:
        """After the subject's steps of forward KL, the same text in the same order for all."""
        subject, steps = self.subject, self.subject.steps
        options = TrainOptions(steps, rate, subject.optimizer, warmup_steps=5, save_every=steps, log_every=steps)

        def batches(start: int) -> Iterator[Batch]:
            text = self.corpus("train")
            return text.train_batches(batch_size=subject.batch, seq_len=subject.seq_len, seed=0, start=start)

        loss_of = distillation_loss(self.teacher, DistillLoss())
        with tempfile.TemporaryDirectory() as folder:
            train(model.train(), loss_of, batches, options, Path(folder))
        return model.eval()


def order_of(model: HybridLM, batches: Sequence[Batch], remove: int, kind: str) -> dict[str, Any]:
    how: Any = {} if kind == "iterative" else {"iterative": False}
    found: LayerScores = score_layers(model, batches, remove=remove, **how)
    return {"order": found.order, "evaluations": found.layer_evaluations}


def selection_table(bench: Bench, seeds: Sequence[int]) -> None:
    """Held-out loss by what was kept: activations, magnitudes or anything, slices as they are."""
    rows = []
    for cut, target in bench.subject.selected.items():
        losses: dict[str, list[float]] = {}
        for method in METHODS:
            for seed in seeds:
                losses.setdefault(method, []).append(loss_of_cut(bench, cut, target, method, seed))
        rows.append([cut, *(spread(losses[method]) for method in METHODS)])
    print_table(f"{bench.subject.name}: loss by importance (unpruned {bench.base():.3f})", ["cut", *METHODS], rows)


def loss_of_cut(bench: Bench, cut: str, target: Target, method: str, seed: int) -> float:
    def make() -> dict[str, Any]:
        selection = bench.selection(target, method, seed)
        share = count_parameters(slice_config(bench.model.config, selection)) / count_parameters(bench.model.config)
        return {"loss": bench.loss(bench.pruned(selection, seed, PLAIN)), "share": share}

    return bench.cell(f"selection, {cut}, {method}, seed {seed}", make)["loss"]


def depth_table(bench: Bench, seeds: Sequence[int]) -> None:
    """Held-out loss with layers gone: in any order, in the order of one measurement, or measured after each removal."""
    rows = []
    for number in bench.subject.layers:
        losses = {kind: [loss_of_depth(bench, number, kind, seed) for seed in seeds] for kind in DEPTHS}
        rows.append([str(number), *(spread(losses[kind]) for kind in DEPTHS)])
    print_table(f"{bench.subject.name}: loss by depth (unpruned {bench.base():.3f})", ["layers gone", *DEPTHS], rows)


def loss_of_depth(bench: Bench, number: int, kind: str, seed: int) -> float:
    def make() -> dict[str, Any]:
        config = bench.model.config
        target = Target(layers=(config.num_layers - number) // config.block_size)
        selection = select(config, bench.widths("random", 0), bench.order(kind, seed), target)
        return {"loss": bench.loss(bench.pruned(selection, seed, PLAIN))}

    return bench.cell(f"depth, {number}, {kind}, seed {seed}", make)["loss"]


def repair_table(bench: Bench, seeds: Sequence[int]) -> None:
    """What the cut adds to the loss, and what of that each repair leaves."""
    by_count = Target(parameters=0.75)
    for cut, target in (
        ("all axes", bench.subject.together), ("hidden alone", bench.subject.hidden), ("by count", by_count)
    ):  # fmt: skip
        found = {name: [increase(bench, cut, target, name, seed) for seed in seeds] for name in bench.subject.repairs}
        rows = [
            [name, spread(values), spread([v / p for v, p in zip(values, found["plain"], strict=True)], 2)]
            for name, values in found.items()
        ]
        title = f"{bench.subject.name}: {cut}, 25% fewer parameters (unpruned {bench.base():.3f})"
        print_table(title, ["repair", "added to the loss", "of plain"], rows)


def increase(bench: Bench, cut: str, target: Target, name: str, seed: int) -> float:
    def make() -> dict[str, Any]:
        selection = bench.selection(target, "activation", seed)
        return {"loss": bench.loss(bench.pruned(selection, seed, REPAIRS[name]))}

    return bench.cell(f"repair, {cut}, {name}, seed {seed}", make)["loss"] - bench.base()


def distill_table(bench: Bench, seeds: Sequence[int]) -> None:
    """What is left of the lead once both have been trained on the same tokens."""
    subject = bench.subject
    tokens = subject.steps * subject.batch * subject.seq_len
    rows = []
    for name in subject.distilled:
        before = [increase(bench, "all axes", subject.together, name, seed) for seed in seeds]
        after = [[distilled_increase(bench, name, seed, rate) for seed in seeds] for rate in subject.learning_rates]
        rows.append([name, spread(before), *(spread(values) for values in after)])
    title = f"{subject.name}: all axes, 25% fewer parameters, before and after {tokens:,} tokens of distillation"
    columns = ["repair", "added to the loss before", *(f"after, at {rate:g}" for rate in subject.learning_rates)]
    print_table(title, columns, rows)


def distilled_increase(bench: Bench, name: str, seed: int, rate: float) -> float:
    def make() -> dict[str, Any]:
        selection = bench.selection(bench.subject.together, "activation", seed)
        student = bench.pruned(selection, seed, REPAIRS[name])
        return {"loss": bench.loss(bench.distilled(student, rate))}

    return bench.cell(f"distilled at {rate:g}, {name}, seed {seed}", make)["loss"] - bench.base()


def aggregation_table(bench: Bench, seeds: Sequence[int]) -> None:
    """Zero-shot loss by the aggregation over samples and over tokens, all widths cut."""
    target = dataclasses.replace(bench.subject.together, layers=None)
    rows = []
    for over_samples in AGGREGATES:
        row = [over_samples]
        for over_tokens in AGGREGATES:
            options = {"aggregate_batch": over_samples, "aggregate_sequence": over_tokens}
            name = f"aggregation, {over_samples}, {over_tokens}"
            row.append(spread([loss_of_scores(bench, name, target, seed, options) for seed in seeds]))
        rows.append(row)
    title = f"{bench.subject.name}: loss by aggregation over samples (rows) and tokens (columns), all widths"
    print_table(title, ["", *AGGREGATES], rows)


def source_table(bench: Bench, seeds: Sequence[int]) -> None:
    """Zero-shot loss by where Mamba heads are scored, heads alone cut."""
    heads = bench.model.config.mamba_num_heads
    rows = []
    for kept in (heads * 3 // 4, heads // 2):
        row = [f"{heads} to {kept}"]
        for source in mamba2.KIND.scores["mamba_heads"].observed:
            name, target = f"Mamba source, {kept}, {source}", Target(mamba_num_heads=kept)
            losses = [loss_of_scores(bench, name, target, seed, {"mamba_source": source}) for seed in seeds]
            row.append(spread(losses))
        rows.append(row)
    print_table(
        f"{bench.subject.name}: loss by the source of Mamba scores",
        ["heads", *mamba2.KIND.scores["mamba_heads"].observed],
        rows,
    )


def loss_of_scores(bench: Bench, name: str, target: Target, seed: int, options: dict[str, Any]) -> float:
    def make() -> dict[str, Any]:
        widths = score_widths(bench.model, bench.calibration(seed), ActivationScores(**options))
        selection = select(bench.model.config, widths, (), target)
        return {"loss": bench.loss(bench.pruned(selection, seed, PLAIN))}

    return bench.cell(f"{name}, seed {seed}", make)["loss"]


PARTS = {
    "selection": selection_table,
    "depth": depth_table,
    "repair": repair_table,
    "distill": distill_table,
    "aggregation": aggregation_table,
    "source": source_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the cells, made where it is not there")
    parser.add_argument("--smollm2", type=Path, help="its folder; the shipped model alone without")
    parser.add_argument("--only", choices=("zoo", "smollm2"), help="one of the two models")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, of " + ", ".join(PARTS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--repairs", help="names, with semicolons between them, beside plain: " + "; ".join(REPAIRS))
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    subjects = [] if options.only == "smollm2" else [zoo()]
    if options.smollm2 is not None and options.only != "zoo":
        subjects.append(smollm2(options.smollm2))
    for subject in subjects:
        if options.repairs:
            subject = dataclasses.replace(subject, repairs=("plain", *options.repairs.split(";")))
        bench = Bench(subject, options.output / "cells")
        for part in options.parts.split(","):
            if subject.ablated or part not in ("aggregation", "source"):
                PARTS[part](bench, [int(seed) for seed in options.seeds.split(",")])
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in provenance().items()))


if __name__ == "__main__":
    main()
