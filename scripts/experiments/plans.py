"""What an experiment compares, and the cells that it needs: a variant with a seed each."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...models.errors import InputError, guess
from .. import compress
from ..run.compose import build, compose_config
from ..run.resolve import model_folder, torch_device
from ..run.rounds import check_feasible
from .cells import DISTILLED, MEASURES, PRUNED, STARTS, WORK, Cell

STUDENTS = (PRUNED, DISTILLED)
PICTURES = ("rows", "sizes", "order")
UNREAD = ("seed", "device", "output", "dry_run", "export_dtype", "hardware", "fit", "matmul")  # of compress

OF_THE_SET = ("experiment", "output", "only", "experiment.members")  # options that its members do not have from it


@dataclasses.dataclass(frozen=True)
class Variant:
    """overrides: of limbeck compress, after the experiment's own; published: the source's figure, on another model;
    start: the student's first weights, "pruned" or "random"; top_k: how many of the teacher's top tokens teach,
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
class Plan:
    """An experiment, where its table goes, and its cells by variant, one a seed."""

    experiment: Experiment
    folder: Path
    cells: dict[str, list[Cell]]

    def all_cells(self) -> Iterator[Cell]:
        for row in self.cells.values():
            yield from row


def plan_of(
    experiment: Experiment,
    name: str,
    folder: Path,
    only: Sequence[str],
    seeds: Sequence[int],
    also: str,
    device: str,
    folders: Sequence[Path] = (),
) -> Plan:
    """The cells of an experiment's variants, or of `only` some; `also` are overrides that all share, `folders` hold
    choices of groups beside those of conf/. Raises InputError, naming the override that is wrong."""
    cells = {}
    for variant in only or experiment.variants:
        title = f"{name}: {variant}" if name else variant
        words = [*experiment.base, *experiment.variants[variant].overrides]
        check_read(words, f"experiment.variants.{variant}: ")
        words += [*overrides_of(also), f"device={device}"]
        cells[variant] = cells_of(experiment, experiment.variants[variant], words, seeds, title, folders)
    return Plan(experiment, folder, cells)


def cells_of(
    experiment: Experiment,
    variant: Variant,
    words: Sequence[str],
    seeds: Sequence[int],
    title: str,
    folders: Sequence[Path],
) -> list[Cell]:
    """A variant's cells, one a seed."""
    chain = build(compress.Options, compose_config("compress", [*words, f"output={WORK}"], folders))
    assert chain.data is not None
    trained, held_out = experiment.student == DISTILLED, experiment.held_out or chain.data
    return [
        Cell(dataclasses.replace(chain, seed=seed), variant.start, variant.top_k, trained, held_out, title)
        for seed in seeds
    ]


def overrides_of(also: str) -> list[str]:
    """The overrides of `also`. Raises InputError where they cannot be read, or are of what no cell reads."""
    try:
        words = shlex.split(also)
    except ValueError as error:
        raise InputError(f"also={also!r} cannot be read: {error}") from None
    check_read(words, "also: ")
    return words


def check_read(words: Sequence[str], where: str) -> None:
    """Raises InputError for an override of what no cell reads."""
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        if key.partition(".")[0] in UNREAD:
            raise InputError(f"{where}no cell of an experiment reads {key}; leave it out")


def member_words(name: str, given: Sequence[str], output: Path) -> list[str]:
    """The command line of a member of a set: the set's, but for what is the set's alone. An override of the experiment
    is one whether the member has that option or not."""
    words = []
    for word in given:
        key = word.partition("=")[0].lstrip("+~")
        if key not in OF_THE_SET:
            of_experiment = key.startswith("experiment.") and not word.startswith("~")
            words.append(f"++{word.lstrip('+')}" if of_experiment else word)
    return [f"experiment={name}", f"output={output}", *words]


def check_plans(plans: Sequence[Plan], seeds: Sequence[int], also: str, device: str) -> None:
    """Finds what is wrong with a variant's model, target or data before the first cell is made. Raises InputError."""
    torch_device(device)
    for plan in plans:
        names = {cell.name for cell in plan.all_cells()}
        if len(names) < len(plan.cells) * len(seeds):
            raise InputError(f"also={also} makes variants of {plan.experiment.question!r} the same; leave it out")
        for cell, *_ in plan.cells.values():
            assert cell.chain.data is not None
            try:
                check_feasible(cell.chain.data, model_folder(cell.chain.model), cell.chain.plan(), whole=True)
            except InputError as error:
                raise InputError(f"{cell.title}: {error}") from None
