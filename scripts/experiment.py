"""`limbeck experiment=NAME`: an ablation, re-run: variants times seeds of the compression chain, a table and a plot.

conf/experiment/ has one file an experiment: what differs, what is measured, and what was published. Each cell, a
variant with a seed, is a short chain of its own: score, prune, distil where the figure wants it, evaluate. Its figures
stand in `cells/`, so that a killed command goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..distill.experiment_plot import draw_experiment
from ..models.checkpoint import load_config, save_model
from ..models.errors import InputError
from ..models.folder import write_json
from ..models.hybrid import HybridLM, initialize
from ..models.provenance import provenance
from . import compress
from .compose import build, compose_config, guess
from .inputs import model_folder
from .show import console, read_json, result, say, table
from .stage import digest, fingerprint_of, plain

MEASURES = ("cross_entropy", "bits_per_byte", "kl", "agreement")
STUDENTS = ("pruned", "distilled")
STARTS = ("pruned", "random")


@dataclasses.dataclass(frozen=True)
class Variant:
    """overrides: of limbeck compress, behind the experiment's own; published: the source's figure, on another model;
    start: the student's first weights, "pruned" or "random"."""

    overrides: tuple[str, ...] = ()
    published: float | None = None
    start: str = "pruned"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """measure: STUDENT.FIGURE of gap.json; base: overrides of limbeck compress that all variants share."""

    question: str
    source: str
    measure: str
    base: tuple[str, ...]
    variants: dict[str, Variant]

    def __post_init__(self) -> None:
        if self.student not in STUDENTS or self.figure not in MEASURES:
            raise InputError(
                f"experiment.measure is {self.measure!r}; expected one of {', '.join(STUDENTS)}, a dot, and one of"
                f" {', '.join(MEASURES)}"
            )
        for name, variant in self.variants.items():
            if variant.start not in STARTS:
                raise InputError(f"experiment.variants.{name}.start is {variant.start!r}; known: {', '.join(STARTS)}")

    @property
    def student(self) -> str:
        return self.measure.partition(".")[0]

    @property
    def figure(self) -> str:
        return self.measure.partition(".")[2]


@dataclasses.dataclass(frozen=True)
class Options:
    output: Path
    seeds: tuple[int, ...]
    only: tuple[str, ...]
    also: str
    keep: bool
    device: str
    experiment: Experiment

    def __post_init__(self) -> None:
        if not self.seeds:
            raise InputError("seeds is empty; give one at least, as seeds=[0]")
        for name in self.only:
            if name not in self.experiment.variants:
                known = list(self.experiment.variants)
                raise InputError(f"only: {name!r} is no variant; known: {', '.join(known)}{guess(name, known)}")


def run(options: Options) -> None:
    experiment = options.experiment
    wanted = {name: each for name, each in experiment.variants.items() if not options.only or name in options.only}
    chains = {
        (name, seed): chain_of(options, variant, seed) for name, variant in wanted.items() for seed in options.seeds
    }  # all are composed before the first one runs: what is wrong with one is said at once
    say(f"{experiment.question}\n{len(chains)} cells; figures in {options.output / 'cells'}")
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
    for number, ((name, seed), chain) in enumerate(chains.items(), 1):
        facts = {
            "chain": {key: value for key, value in plain(chain).items() if key not in ("output", "device")},
            "start": wanted[name].start,
            "measure": experiment.student,
            "model": fingerprint_of(model_folder(chain.model)),
        }
        label = f"{re.sub(r'[^a-z0-9.]+', '-', name.lower()).strip('-')}-{seed}-{digest(facts)[:8]}"
        file = options.output / "cells" / f"{label}.json"
        if not file.is_file():
            console.rule(f"{name}, seed {seed}: {number} of {len(chains)}", align="left")
            work = options.output / "work" / label
            content = {"variant": name, "seed": seed, "models": measured(experiment, wanted[name], chain, work)} | facts
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, content)
            if not options.keep:
                shutil.rmtree(work)
        cells[name].append(read_json(file))
    show(options, {name: summary(experiment, wanted[name], found) for name, found in cells.items()})


def chain_of(options: Options, variant: Variant, seed: int) -> compress.Options:
    """The compress command of a cell. Raises InputError, naming the override that is wrong."""
    words = [
        *options.experiment.base,
        *variant.overrides,
        *shlex.split(options.also),
        f"seed={seed}",
        f"device={options.device}",
    ]
    return build(compress.Options, compose_config("compress", [*words, f"output={options.output / 'work'}"]))


def measured(experiment: Experiment, variant: Variant, chain: compress.Options, work: Path) -> dict[str, Any]:
    """The figures of a cell's models, without their positions and classes."""
    assert chain.data is not None
    begin, rounds = str(model_folder(chain.model)), chain.plan()
    students, distilled = compress.student_folders(work, rounds), experiment.student == "distilled"
    before = begin
    for found in rounds:
        folder = work / found.name
        compress.score_round(chain, before, found, folder)
        compress.prune_round(chain, before, found, folder)
        if not distilled and found is rounds[-1]:
            break
        start = folder / "pruned"
        if variant.start == "random" and found is rounds[-1]:
            start = random_like(start, found.seed)
        compress.distill_round(chain, begin, start, found, folder)
        before = str(folder / "distilled")
    held_out = dataclasses.replace(chain, seed=0)  # the same text for every seed
    compress.measure_gap(held_out, begin, {name: students[name] for name in STUDENTS[: 1 + distilled]}, work)
    found = read_json(work / "gap" / "gap.json")["models"]
    return {name: {key: value for key, value in figures.items() if key in MEASURES} for name, figures in found.items()}


def random_like(folder: Path, seed: int) -> Path:
    """A checkpoint beside `folder` of the same shape and tokenizer, with random weights."""
    target = folder.with_name("random")
    if not target.exists():
        model = HybridLM(load_config(folder))
        initialize(model, torch.Generator().manual_seed(seed))
        save_model(model, target, tokenizer_from=folder)
    return target


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant's figure: mean, least and largest over the seeds, and what was published."""

    mean: float
    low: float
    high: float
    published: float | None


def summary(experiment: Experiment, variant: Variant, cells: Sequence[Mapping[str, Any]]) -> Row:
    values = [cell["models"][experiment.student][experiment.figure]["value"] for cell in cells]
    return Row(statistics.fmean(values), min(values), max(values), variant.published)


def agreement(rows: Mapping[str, Row], more_is_better: bool) -> str:
    """A sentence on whether the order is the published one; a pair counts where the seeds' spreads do not overlap."""
    known = {name: row for name, row in rows.items() if row.published is not None}
    if len(known) < 2:
        return "The source gives no figures to compare the order with."
    same, other, open_ = [], [], []
    for first, second in itertools.combinations(known, 2):
        a, b = known[first], known[second]
        assert a.published is not None and b.published is not None
        pair = f"{first} and {second}"
        if a.low <= b.high and b.low <= a.high:
            open_.append(pair)
        elif ((a.mean > b.mean) == more_is_better) == (a.published < b.published):
            same.append(pair)
        else:
            other.append(pair)
    parts = [f"{len(same)} of {len(same) + len(other) + len(open_)} pairs are in the published order"]
    if other:
        parts.append(f"the other way round: {'; '.join(other)}")
    if open_:
        parts.append(f"within the seeds' spread: {'; '.join(open_)}")
    return ", ".join(parts) + "."


def show(options: Options, rows: Mapping[str, Row]) -> None:
    """The table on the terminal, table.md, the plot, and result.json."""
    experiment = options.experiment
    sentence = agreement(rows, experiment.figure == "agreement")
    title = f"{experiment.measure.replace('.', ', ').replace('_', ' ')}; {len(options.seeds)} seeds"
    columns = ("variant", "mean [least, largest]", "published")
    cells = [
        (name, f"{row.mean:.4f} [{row.low:.4f}, {row.high:.4f}]", "" if row.published is None else f"{row.published:g}")
        for name, row in rows.items()
    ]
    table(title, columns, cells)
    say(f"{sentence} ({experiment.source})")
    lines = [
        f"**{experiment.question}** {title[0].upper()}{title[1:]}.",
        "",
        f"| {' | '.join(columns)} |",
        "|---|---|---|",
    ]
    lines += [f"| {' | '.join(cell)} |" for cell in cells]
    facts = provenance()
    where = ", ".join(f"{name} {value}" for name, value in facts.items())
    asked = f" with `{options.also}`" if options.also else ""
    lines += [
        "",
        f"Published: {experiment.source}. {sentence} Seeds {', '.join(map(str, options.seeds))}{asked}; {where}.",
    ]
    (options.output / "table.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    draw_experiment(
        options.output, experiment.question, title, {name: (row.low, row.mean, row.high) for name, row in rows.items()}
    )
    content = {name: dataclasses.asdict(row) for name, row in rows.items()}
    result(options.output, {"measure": experiment.measure, "rows": content, "agreement": sentence, "made_on": facts})
