"""`limbeck experiment=NAME`: an ablation, re-run: variants times seeds of the compression chain, a table and a plot.

conf/experiment/ has one file an experiment: what differs, what is measured, and what was published; `experiment=all`
is all of them. Each cell, a variant with a seed, is a short chain of its own: score, prune, distil where the figure
wants it, evaluate (see cells.py). Its figures stand in `cells/`, so that a killed command goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..distill.report.experiment_plot import draw_order, draw_rows, draw_sizes
from ..models.errors import InputError
from ..models.fingerprint import RESULT
from . import compress
from .experiments.cells import CELLS, DISTILLED, MEASURES, PRUNED, STARTS, TEACHER, WORK, Cell, load_cell, make_all
from .experiments.figures import Row, agreement, order_of, published_pairs, spread, stable_from
from .run.compose import build, compose_config, guess
from .run.resolve import model_folder, torch_device
from .run.show import read_json, result, say, table

STUDENTS = (PRUNED, DISTILLED)
PICTURES = ("rows", "sizes", "order")
UNREAD = ("seed", "device", "output", "dry_run", "export_dtype", "hardware", "fit")  # of compress


@dataclasses.dataclass(frozen=True)
class Variant:
    """overrides: of limbeck compress, behind the experiment's own; published: the source's figure, on another model;
    start: the student's first weights, "pruned" or "random"; top_k: how many of the teacher's likeliest tokens teach,
    one bucket for the others (0: all tokens)."""

    overrides: tuple[str, ...] = ()
    published: float | None = None
    start: str = "pruned"
    top_k: int = 0


@dataclasses.dataclass(frozen=True)
class Experiment:
    """measure: STUDENT.FIGURE of the gap; base: overrides of limbeck compress that all variants share; held_out: the
    data of the figures where it is not what a variant is trained on; published_more: of the published figures more is
    better; orders: variants from the best to the worst, as the source says it without figures; picture: "rows", a
    variant a line; "sizes", against parameters and against tokens; "order", when the order of the variants is that of
    the end; members: of a set of experiments the names, and nothing else."""

    question: str = ""
    source: str = ""
    measure: str = "distilled.kl"
    base: tuple[str, ...] = ()
    variants: dict[str, Variant] = dataclasses.field(default_factory=dict)
    held_out: str | None = None
    published_more: bool = False
    orders: tuple[tuple[str, ...], ...] = ()
    picture: str = "rows"
    members: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.student not in STUDENTS or self.figure not in MEASURES:
            raise InputError(
                f"experiment.measure is {self.measure!r}; expected one of {', '.join(STUDENTS)}, a dot, and one of"
                f" {', '.join(MEASURES)}"
            )
        if self.picture not in PICTURES:
            raise InputError(f"experiment.picture is {self.picture!r}; known: {', '.join(PICTURES)}")
        if self.picture != "rows" and self.student != DISTILLED:
            raise InputError(f"experiment.picture {self.picture} is of distilled students; measure is {self.measure}")
        if bool(self.members) == bool(self.variants):
            raise InputError("experiment: expected variants, or members of a set of experiments")
        for name, variant in self.variants.items():
            if variant.start not in STARTS:
                raise InputError(f"experiment.variants.{name}.start is {variant.start!r}; known: {', '.join(STARTS)}")
            if variant.top_k < 0:
                raise InputError(f"experiment.variants.{name}.top_k is {variant.top_k}; expected 0 (all) or more")

        for name in (name for order in self.orders for name in order):
            if name not in self.variants:
                known = list(self.variants)
                raise InputError(
                    f"experiment.orders: {name!r} is no variant; known: {', '.join(known)}{guess(name, known)}"
                )

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


@dataclasses.dataclass(frozen=True)
class Plan:
    """An experiment, where its table goes, and its cells by variant, one a seed."""

    experiment: Experiment
    folder: Path
    cells: dict[str, list[Cell]]


def run(options: Options) -> None:
    claim(options)
    plans = plans_of(options)
    cells: dict[str, Cell] = {}
    for cell in (cell for plan in plans for found in plan.cells.values() for cell in found):
        cells.setdefault(cell.name, cell)
    check(options, plans)
    say(f"{len(cells)} cells; figures in {options.output / CELLS}")
    shown: set[Path] = set()

    def ready() -> None:
        for plan in plans:
            if plan.folder not in shown and show(plan, options):
                shown.add(plan.folder)

    try:
        make_all(list(cells.values()), options.output, jobs=options.jobs, keep=options.keep, ready=ready)
    finally:
        ready()
        if options.experiment.members:
            gather(options)


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
        names = {cell.name for found in plan.cells.values() for cell in found}
        if len(names) < len(plan.cells) * len(options.seeds):
            raise InputError(
                f"also={options.also} makes variants of {plan.experiment.question!r} the same; leave it out"
            )
        for found in plan.cells.values():
            chain = found[0].chain
            assert chain.data is not None
            with said_of(found[0]):
                compress.check_feasible(chain.data, model_folder(chain.model), chain.plan())


@contextlib.contextmanager
def said_of(cell: Cell) -> Iterator[None]:
    """Says of which variant an input was wrong."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{cell.title}: {error}") from None


def plans_of(options: Options) -> list[Plan]:
    """The experiments asked for, composed. Raises InputError, naming the override that is wrong."""
    members = options.experiment.members
    if not members:
        return [plan_of(options, options.experiment, "", options.output, options.only)]
    plans = []
    for name in options.only or members:
        content = compose_config("experiment", [f"experiment={name}", f"output={options.output}"])
        plans.append(plan_of(options, build(Options, content).experiment, name, options.output / name, ()))
    return plans


def plan_of(options: Options, experiment: Experiment, name: str, folder: Path, only: Sequence[str]) -> Plan:
    cells = {}
    for variant in only or experiment.variants:
        title = f"{name}: {variant}" if name else variant
        cells[variant] = cells_of(options, experiment, experiment.variants[variant], title)
    return Plan(experiment, folder, cells)


def cells_of(options: Options, experiment: Experiment, variant: Variant, title: str) -> list[Cell]:
    """A variant's cells, one a seed."""
    words = [*experiment.base, *variant.overrides, *also_of(options), f"device={options.device}"]
    chain = build(compress.Options, compose_config("compress", [*words, f"output={options.output / WORK}"]))
    assert chain.data is not None
    trained, held_out = experiment.student == DISTILLED, experiment.held_out or chain.data
    return [
        Cell(dataclasses.replace(chain, seed=seed), variant.start, variant.top_k, trained, held_out, title)
        for seed in options.seeds
    ]


def also_of(options: Options) -> list[str]:
    """The overrides of `also`. Raises InputError where they cannot be read, or are of what no cell reads."""
    try:
        words = shlex.split(options.also)
    except ValueError as error:
        raise InputError(f"also={options.also!r} cannot be read: {error}") from None
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        if key.partition(".")[0] in UNREAD:
            raise InputError(f"also: no cell of an experiment reads {key}; leave it out")
    return words


def show(plan: Plan, options: Options) -> bool:
    """The table on the terminal, table.md, the plot, and result.json, once all cells are there; whether they are."""
    experiment = plan.experiment
    cells = {name: [load_cell(options.output, cell) for cell in found] for name, found in plan.cells.items()}
    found = {name: [each for each in each_seed if each is not None] for name, each_seed in cells.items()}
    if any(len(each) < len(options.seeds) for each in found.values()):
        return False
    rows = {
        name: Row(
            tuple(cell["models"][experiment.student][experiment.figure]["value"] for cell in each),
            experiment.variants[name].published,
        )
        for name, each in found.items()
    }
    with FileLock(options.output / CELLS / ".tables.lock"):  # commands that share the cells end together
        write_tables(plan, options, found, rows)
    return True


def write_tables(
    plan: Plan, options: Options, found: Mapping[str, list[dict[str, Any]]], rows: Mapping[str, Row]
) -> None:
    experiment = plan.experiment
    plan.folder.mkdir(parents=True, exist_ok=True)
    pairs = published_pairs(rows, experiment.published_more, experiment.orders)
    facts = order_of(rows, found) if experiment.picture == "order" else {}
    sentence = stable_from(facts) if facts else agreement(rows, experiment.figure == "agreement", pairs)
    lines, title = table_of(plan, options, found, rows, sentence)
    lines += order_lines(facts)
    (plan.folder / "table.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    draw(plan, found, rows, title, facts)
    content: dict[str, Any] = {
        name: {"values": row.values, "mean": row.mean, "published": row.published} for name, row in rows.items()
    }
    made_on = [
        dict(each) for each in sorted({tuple(cell["made_on"].items()) for each in found.values() for cell in each})
    ]
    said = {"question": experiment.question, "measure": experiment.measure, "seeds": options.seeds}
    result(plan.folder, said | {"rows": content, "agreement": sentence, "order": facts, "made_on": made_on})


def table_of(
    plan: Plan, options: Options, cells: Mapping[str, list[dict[str, Any]]], rows: Mapping[str, Row], sentence: str
) -> tuple[list[str], str]:
    """The lines of table.md, which the terminal shows as well, and the figure's title."""
    experiment = plan.experiment
    first = next(iter(rows))
    counts = {
        name: sorted({cell["models"][experiment.student]["parameters"] for cell in each})
        for name, each in cells.items()
    }
    sizes = {
        name: " to ".join(f"{count:,}" for count in dict.fromkeys((each[0], each[-1]))) for name, each in counts.items()
    }
    teacher = next(iter(cells.values()))[0]["models"][TEACHER]
    title = f"{experiment.measure.replace('.', ', ').replace('_', ' ')}; {len(options.seeds)} seeds"
    columns = ["variant", "mean [least, largest]", f"minus {first}"]
    different, known = len(set(sizes.values())) > 1, any(row.published is not None for row in rows.values())
    columns += ["parameters"] * different + ["published"] * known
    body = []
    for name, row in rows.items():
        line = [name, row.spread, "" if name == first else spread(row.less(rows[first]), "+")]
        line += [sizes[name]] * different
        line += ["" if row.published is None else f"{row.published:g}"] * known
        body.append(line)
    say(experiment.question)
    table(title, columns, body)
    say(f"{sentence} ({experiment.source})")
    words = [f"Seeds {', '.join(map(str, options.seeds))}"]
    if experiment.student == DISTILLED:
        tokens = sorted({cell["tokens"] for each in cells.values() for cell in each})
        words.append(f"{' to '.join(f'{count:,}' for count in dict.fromkeys((tokens[0], tokens[-1])))} tokens")
    if experiment.figure in ("cross_entropy", "bits_per_byte"):
        words.append(f"the teacher's is {teacher[experiment.figure]['value']:.4f}")
    if options.also:
        words.append(f"with `{options.also}`")
    machines: dict[str, set[str]] = {}
    for cell in (cell for each in cells.values() for cell in each):
        machine = ", ".join(f"{key} {value}" for key, value in cell["made_on"].items() if key != "commit")
        machines.setdefault(machine, set()).add(cell["made_on"]["commit"])
    made_on = [f"{machine}, commit {', '.join(sorted(commits))}" for machine, commits in machines.items()]
    lines = [f"**{experiment.question}** {title[0].upper()}{title[1:]}.", "", f"| {' | '.join(columns)} |"]
    lines += ["|---" * len(columns) + "|", *(f"| {' | '.join(line)} |" for line in body), ""]
    lines += [f"Published: {experiment.source}. {sentence} {', '.join(words)}; {'; '.join(made_on)}."]
    return lines, title


def order_lines(facts: Mapping[str, Sequence[float]]) -> list[str]:
    if not facts:
        return []
    body = [(name, spread(values)) for name, values in facts.items()]
    table("How well it foretells the order at the end (Spearman)", ("by", "correlation"), body)
    lines = [
        "",
        "How well the order at the end is foretold, Spearman's correlation:",
        "",
        "| by | correlation |",
        "|---|---|",
    ]
    return [*lines, *(f"| {name} | {value} |" for name, value in body)]


def draw(
    plan: Plan,
    cells: Mapping[str, list[dict[str, Any]]],
    rows: Mapping[str, Row],
    title: str,
    order: Mapping[str, Sequence[float]],
) -> None:
    experiment = plan.experiment
    if experiment.picture == "sizes":
        groups: dict[str, list[dict[str, Any]]] = {}
        for name, each in cells.items():
            groups.setdefault(experiment.variants[name].start, []).extend(each)
        teacher = next(iter(cells.values()))[0]["models"][TEACHER]
        draw_sizes(plan.folder, experiment.question, groups, teacher)
    elif experiment.picture == "order":
        draw_order(plan.folder, experiment.question, order)
    else:
        draw_rows(plan.folder, experiment.question, title, {name: row.values for name, row in rows.items()})


def gather(options: Options) -> None:
    """experiments.md: the tables and pictures of all members that are finished, one below the other."""
    parts = ["# Experiments", ""]
    for name in options.experiment.members:
        if (options.output / name / "table.md").is_file():
            question = read_json(options.output / name / RESULT)["question"]
            text = (options.output / name / "table.md").read_text(encoding="utf-8")
            parts += [f"## {name}", "", text, f"![{question}]({name}/plots/experiment.svg)", ""]
    (options.output / "experiments.md").write_text("\n".join(parts), encoding="utf-8")
    say(f"tables: {options.output / 'experiments.md'}")
