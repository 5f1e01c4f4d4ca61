"""`limbeck experiment=NAME`: an ablation, re-run: variants times seeds of the compression chain, a table and a plot.

conf/experiment/ has one file an experiment: what differs, what is measured, and what was published; `experiment=all`
is all of them. Each cell, a variant with a seed, is a short chain of its own: score, prune, distil where the figure
wants it, evaluate (see experiments/cells.py). Its figures stand in `cells/`, so that a killed command resumes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..models.errors import InputError, guess
from ..models.fingerprint import RESULT
from .experiments.cells import CELLS, complete_cells, load_cell
from .experiments.plans import Experiment, Plan, plan_of
from .experiments.tables import gather_tables, write_tables
from .run.compose import build, compose_config
from .run.resolve import model_folder, torch_device
from .run.rounds import check_feasible
from .run.show import read_json, say


@dataclasses.dataclass(frozen=True)
class Options:
    output: Path
    seeds: tuple[int, ...]
    only: tuple[str, ...]
    also: str
    jobs: int
    keep: bool
    device: str
    experiment: Experiment

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
    check(options, plans)
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
    """Raises InputError where the output is of something else, or of another experiment."""
    output = options.output
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / CELLS).is_dir())):
        raise InputError(f"{output} exists already and is not of limbeck experiment; give an output that does not")
    if (output / RESULT).is_file():
        question = read_json(output / RESULT).get("question")
        if question != options.experiment.question:
            raise InputError(f"{output} holds another experiment ({question}); give another output")


def check(options: Options, plans: Sequence[Plan]) -> None:
    """Finds what is wrong with a variant's model, target or data before the first cell is made. Raises InputError."""
    torch_device(options.device)
    for plan in plans:
        names = {cell.name for cell in plan.all_cells()}
        if len(names) < len(plan.cells) * len(options.seeds):
            raise InputError(
                f"also={options.also} makes variants of {plan.experiment.question!r} the same; leave it out"
            )
        for cell, *_ in plan.cells.values():
            assert cell.chain.data is not None
            try:
                check_feasible(cell.chain.data, model_folder(cell.chain.model), cell.chain.plan(), whole=True)
            except InputError as error:
                raise InputError(f"{cell.title}: {error}") from None


def plans_of(options: Options) -> list[Plan]:
    """The experiments that are to be made, composed. Raises InputError, naming the override that is wrong."""
    words = (options.seeds, options.also, options.device)
    if not options.experiment.members:
        return [plan_of(options.experiment, "", options.output, options.only, *words)]
    plans = []
    for name in options.only or options.experiment.members:
        content = compose_config("experiment", [f"experiment={name}", f"output={options.output}"])
        plans.append(plan_of(build(Options, content).experiment, name, options.output / name, (), *words))
    return plans
