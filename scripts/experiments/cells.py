"""The cells of experiments: one variant with one seed is a short chain of its own, and its figures are one file.

A cell is known by all that its figures come from, so that variants of several experiments which are the same share
it. What several cells begin with, scores and pruned students, is made once. Any number of processes may work through
the same cells (see sharing.py).
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...distill.gap.measure import measure_gap
from ...distill.teacher import CacheOptions
from ...distill.text.resolve import NamedData, content
from ...models.checkpoint import load_config, load_model, save_model
from ...models.config import HybridConfig
from ...models.cost.parameters import count_parameters
from ...models.errors import CheckFailed, DiskError, InputError
from ...models.fingerprint import digest, fingerprint_of, look_of, plain
from ...models.folder import write_json
from ...models.foreign import read_lines
from ...models.hybrid import HybridLM, initialize
from ...models.provenance import provenance
from ...prune.choose import select
from ...prune.kept import importance_kept
from ...prune.scores import Scores, load_scores
from ...prune.target import Target
from .. import cache_teacher, compress
from ..run.resolve import data_input, model_folder, sample, torch_device, torch_dtype
from ..run.rounds import Round
from ..run.show import console, progress, read_json, say
from .sharing import Shared, in_processes

MEASURES = ("cross_entropy", "bits_per_byte", "kl", "agreement")
STARTS = ("pruned", "random")
TEACHER, PRUNED, DISTILLED = "teacher", "pruned", "distilled"
WORK, CELLS = "making", "cells"
# Of a chain what a cell depends on, and of its training what it does not.
CHOSEN = ("dtype", "importance", "target", "repair", "rounds", "seed", "evaluate_tokens")
IDLE = ("save_every", "log_every", "data_timeout")


@dataclasses.dataclass(frozen=True)
class Cell:
    """chain: the compress command; start: the student's first weights, "pruned" or "random"; top_k: so many of the
    teacher's top tokens teach (0: all); trained: distilled, or measured as it was pruned; held_out: the data of
    the figures; title: experiment and variant, for the eye alone."""

    chain: compress.Options
    start: str
    top_k: int
    trained: bool
    held_out: NamedData
    title: str = dataclasses.field(default="", compare=False)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """All that the figures come from. Raises InputError where model or data do not exist."""
        how = self.chain.distill
        facts = {
            **{name: said(getattr(self.chain, name)) for name in CHOSEN},
            "distill": said({"seq_len": how.seq_len, "rows": how.rows}),
            "model": model_sum(model_folder(self.chain.model)),
            "data": text_sum(self.chain.data or ""),
            "held_out": text_sum(self.held_out),
            "versions": {"limbeck": __version__, "torch": torch.__version__.partition("+")[0]},
        }
        if self.trained or self.chain.rounds:
            facts["distill"] = said(how.chosen)
            for name in IDLE:
                facts["distill"]["train"].pop(name, None)
        return facts | ({"start": self.start, "top_k": self.top_k} if self.trained else {})

    @property
    def name(self) -> str:
        return digest(self.facts)[:16]

    @property
    def tokens(self) -> int:
        """Tokens of distillation, of all rounds; 0 where nothing is trained."""
        return sum(one.distill.tokens for one in self.chain.plan()) if self.trained else 0


def said(value: Any) -> Any:
    """Options as JSON knows them, without those that say nothing, so that a new one changes no name."""
    value = plain(value)
    return {key: said(item) for key, item in value.items() if item is not None} if isinstance(value, dict) else value


@functools.cache
def made_on() -> dict[str, Any]:
    """As it was when the process began: so old is the code that it has read."""
    return provenance()


@functools.cache
def model_sum(folder: Path) -> str:
    return fingerprint_of(folder)


@functools.cache
def text_sum(data: NamedData) -> str:
    """What stands for the text of data=, the standard library's included. Raises InputError where it is not there."""
    given = data_input(data)
    look_of(given)
    return content(data) if given == data and isinstance(data, str) else fingerprint_of(given)


def complete_cells(
    cells: Sequence[Cell], output: Path, *, jobs: int, keep: bool, after_each: Callable[[], None]
) -> None:
    """Makes all cells that `output/cells` lacks, in `jobs` processes; `after_each` is called after each of this one's.

    Raises InputError where cells could not be made, once the others are.
    """
    (output / CELLS).mkdir(parents=True, exist_ok=True)
    with Shared(output / WORK) as shared:
        with in_processes(jobs, shared.folder, assist, cells, output, keep):
            made_on()
            failed = work_through(cells, shared, keep, lambda: True, after_each)
        if not failed and not keep:
            shared.clear()
    if failed:
        raise InputError(f"{len(failed)} of {len(cells)} cells could not be made; the first is {failed[0]}")


def assist(cells: Sequence[Cell], output: Path, keep: bool, alive: Callable[[], bool]) -> None:
    """A further process's part."""
    made_on()
    with Shared(output / WORK) as shared:
        work_through(cells, shared, keep, alive, lambda: None)


def work_through(
    cells: Sequence[Cell], shared: Shared, keep: bool, alive: Callable[[], bool], after_each: Callable[[], None]
) -> list[str]:
    """Makes the cells that nobody else makes, and then waits for those that others do. What was wrong with those that
    could not be made, a line each."""
    failed: dict[str, str] = {}
    for patient in (False, True):
        for number, cell in enumerate(cells, 1):
            file = file_of(shared.folder.parent, cell)
            if file.is_file() or cell.name in failed:
                continue
            with shared.alone(cell.name, patient=patient) as free:
                if not alive():
                    return list(failed.values())
                if free and not file.is_file():
                    title = f"{cell.title}, seed {cell.chain.seed}"
                    console.rule(f"{title}: cell {number} of {len(cells)}", align="left")
                    try:
                        write_cell(cell, file, shared, keep)
                    except DiskError:
                        raise
                    except (InputError, CheckFailed) as error:
                        failed[cell.name] = f"{title}: {error}"
                        say(failed[cell.name])
            after_each()
    return list(failed.values())


def write_cell(cell: Cell, file: Path, shared: Shared, keep: bool) -> None:
    """Writes a cell's file: facts, the models' figures, the share of importance that its last cut kept, the held-out
    curve, and what it was made on."""
    teacher = str(model_folder(cell.chain.model))
    students, own, kept = students_of(cell, teacher, shared)
    content = {
        "title": cell.title,
        "seed": cell.chain.seed,
        "tokens": cell.tokens,
        "models": measured(cell, teacher, students),
        "importance_kept": kept,
        "curve": curve(students[DISTILLED] / "metrics.jsonl") if cell.trained else [],
        "made_on": made_on(),
        "facts": cell.facts,
    }
    write_json(file, content)
    if not keep:
        for folder in own:
            shutil.rmtree(folder, ignore_errors=True)


def students_of(cell: Cell, teacher: str, shared: Shared) -> tuple[dict[str, Path], list[Path], float]:
    """Makes the students of a cell: their folders by name, those folders that are of no use to other cells, and the
    share of importance that the last cut kept."""
    chain, before = cell.chain, teacher
    known: Any = [cell.facts[name] for name in ("model", "data", "dtype")]
    own: list[Path] = []
    rounds = chain.plan()
    for number, one in enumerate(rounds, 1):
        known = [known, plain(one.scored(load_config(model_folder(before)))), one.distill.seq_len, one.distill.rows,
                 one.seed]  # fmt: skip
        scores = once(shared, "scores", known, functools.partial(compress.score_round, chain, before, one))
        known = [known, said(one.target), plain(one.repair)]
        prune = functools.partial(compress.prune_round, chain, before, one, scores)
        start = student = once(shared, "pruned", known, prune)
        if one is rounds[-1]:
            kept = kept_by(load_config(model_folder(before)), load_scores(scores), one.target)
            if not cell.trained:
                return {PRUNED: student}, own, kept
            if cell.start == "random":
                start = once(shared, "random", known, functools.partial(random_like, student, one.seed))
        distilled = shared.folder / f"distilled-{cell.name}-{number}"
        own += [distilled, distilled.with_name(f"{distilled.name}-corrected-teacher")]
        cache = cached_answers(cell, teacher, one, shared) if cell.top_k else None
        compress.distill_round(chain, teacher, start, one, distilled, cache)
        known, before = [known, cell.name], str(distilled)
    return {PRUNED: student, DISTILLED: distilled}, own, kept


def kept_by(config: HybridConfig, scores: Scores, target: Target) -> float:
    return importance_kept(config, scores.widths, select(config, scores.widths, scores.layers.order, target))


def once(shared: Shared, name: str, known: Any, write: Callable[[Path], None]) -> Path:
    """The folder that `write` makes of what is known, by the first process that comes to it."""
    folder = shared.folder / f"{name}-{digest(known)[:12]}"
    with shared.alone(folder.name):
        if not folder.is_dir():
            write(folder)
    return folder


def cached_answers(cell: Cell, teacher: str, one: Round, shared: Shared) -> Path:
    """The teacher's `top_k` tokens at all that a student of this round will read."""
    chain, how = cell.chain, one.distill
    assert chain.data is not None
    cache = CacheOptions(cell.top_k)
    options = cache_teacher.Options(teacher, chain.data, shared.folder, one.seed, chain.device, chain.dtype, cache, how)
    read = [[part.train.steps, part.batch, part.seq_len, part.evaluate_tokens] for part in how.plan()]
    known = [cell.facts["model"], cell.facts["data"], chain.dtype, one.seed, cell.top_k, read, how.repack]
    return once(shared, "answers", known, lambda folder: cache_teacher.run(dataclasses.replace(options, output=folder)))


def random_like(student: Path, seed: int, folder: Path) -> None:
    """A checkpoint of a student's shape and tokenizer, with random weights."""
    model = HybridLM(load_config(student))
    initialize(model, torch.Generator().manual_seed(seed))
    save_model(model, folder, tokenizer_from=student)


def measured(cell: Cell, teacher: str, students: dict[str, Path]) -> dict[str, Any]:
    """The figures of teacher and students on the test split, the same text for every seed."""
    chain = cell.chain
    dtype, device, how = torch_dtype(chain.dtype), torch_device(chain.device), chain.distill
    folders = {TEACHER: Path(teacher), **students}
    models = {name: load_model(folder, dtype, device) for name, folder in folders.items()}
    batches = sample(
        cell.held_out, "test", Path(teacher), tokens=chain.evaluate_tokens, seq_len=how.seq_len, batch=how.rows, seed=0
    )
    with progress("evaluating", len(batches)) as bar:
        report = measure_gap(models.pop(TEACHER), models, batches, on_step=bar.set).to_json()
    return {
        name: {"parameters": count_parameters(load_config(folders[name]))}
        | {key: value for key, value in figures.items() if key in MEASURES}
        for name, figures in report["models"].items()
    }


def curve(metrics: Path) -> list[dict[str, float]]:
    """What was measured on the validation split while the student was trained, and after how many tokens."""
    records = read_lines(metrics)
    return [
        {"tokens": record["tokens"], "kl": record["validation_kl"], "bits_per_byte": record["validation_bits_per_byte"]}
        for record in records
        if "validation_kl" in record
    ]


def file_of(output: Path, cell: Cell) -> Path:
    return output / CELLS / f"{cell.name}.json"


def load_cell(output: Path, cell: Cell) -> dict[str, Any] | None:
    """A cell's content where it is there."""
    file = file_of(output, cell)
    return read_json(file) if file.is_file() else None
