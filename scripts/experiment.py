"""`limbeck experiment=NAME`: an ablation, re-run: variants times seeds of the compression chain, a table and a plot.

conf/experiment/ has one file an experiment: what differs, what is measured, and what was published; `experiment=all`
is all of them. Each cell, a variant with a seed, is a short chain of its own: score, prune, distil where the figure
wants it, evaluate (see experiments/cells.py). Its figures stand in `cells/`, so that a killed command resumes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..models.errors import InputError, guess
from .experiments.cells import CELLS, complete_cells, load_cell
from .experiments.plans import Experiment, Plan, check_plans, member_words, plan_of
from .experiments.tables import check_tables, gather_tables, write_tables
from .run.compose import build, compose_config
from .run.show import say


@dataclasses.dataclass(frozen=True)
class Options:
    """words, folders: the command line's overrides and its --config-dir, for what is composed besides."""

    output: Path
    seeds: tuple[int, ...]
    only: tuple[str, ...]
    also: str
    jobs: int
    keep: bool
    device: str
    experiment: Experiment
    words: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds is {list(self.seeds)}; give one at least, as seeds=[0], and each once")
        if self.jobs < 1:
            raise InputError(f"jobs is {self.jobs}; expected at least 1")
        known = list(self.experiment.members or self.experiment.variants)
        for name in self.only:
            if name not in known:
                what = "experiment of this set" if self.experiment.members else "variant"
                raise InputError(f"only: {name!r} is no {what}; known: {', '.join(known)}{guess(name, known)}")


def run(options: Options) -> None:
    claim(options)
    plans = plans_of(options)
    check_tables(options.output, plans, options.seeds, options.also, options.experiment.members)
    check_plans(plans, options.seeds, options.also, options.device)
    cells = list({cell.name: cell for plan in plans for cell in plan.all_cells()}.values())
    say(f"{len(cells)} cells; figures in {options.output / CELLS}")
    waiting = list(plans)

    def write_finished() -> None:
        for plan in list(waiting):
            figures = {name: [load_cell(options.output, cell) for cell in row] for name, row in plan.cells.items()}
            complete = {name: [cell for cell in row if cell is not None] for name, row in figures.items()}
            if all(len(complete[name]) == len(row) for name, row in figures.items()):
                write_tables(plan, options.output / CELLS, options.seeds, options.also, complete)
                waiting.remove(plan)

    try:
        complete_cells(cells, options.output, jobs=options.jobs, keep=options.keep, after_each=write_finished)
    finally:
        write_finished()
        if options.experiment.members:
            gather_tables(options.output, options.experiment.members)


def claim(options: Options) -> None:
    """Raises InputError where the output is of something else."""
    output = options.output
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / CELLS).is_dir())):
        raise InputError(f"{output} exists already and is not of limbeck experiment; give an output that does not")


def plans_of(options: Options) -> list[Plan]:
    """The experiments that are to be made, composed. Raises InputError, naming the override that is wrong."""
    words = (options.seeds, options.also, options.device, options.folders)
    if not options.experiment.members:
        return [plan_of(options.experiment, "", options.output, options.only, *words)]
    plans = []
    for name in options.only or options.experiment.members:
        content = compose_config("experiment", member_words(name, options.words, options.output), options.folders)
        plans.append(plan_of(build(Options, content).experiment, name, options.output / name, (), *words))
    return plans
