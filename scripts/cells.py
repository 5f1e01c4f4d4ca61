"""The cells of experiments: one variant with one seed is a short chain of its own, and its figures are one file.

A cell is known by all that its figures come from, so that variants of several experiments which are the same share
it. What several cells begin with, scores and pruned students, is made once. Any number of processes may work through
the same cells: each takes those that no other has, and a cell of a process that died is free again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..distill.gap import measure_gap
from ..distill.teacher import CacheOptions
from ..models.checkpoint import load_config, load_model, save_model
from ..models.cost import count_parameters
from ..models.folder import write_json
from ..models.hybrid import HybridLM, initialize
from ..models.provenance import provenance
from . import cache_teacher, compress
from .inputs import content, data_input, model_folder, sample, torch_device, torch_dtype
from .main import set_up
from .show import console, progress, read_json
from .stage import digest, fingerprint_of, plain

MEASURES = ("cross_entropy", "bits_per_byte", "kl", "agreement")
STARTS = ("pruned", "random")
TEACHER, PRUNED, DISTILLED = "teacher", "pruned", "distilled"


@dataclasses.dataclass(frozen=True)
class Cell:
    """chain: the compress command; start: the student's first weights, "pruned" or "random"; top_k: so many of the
    teacher's likeliest tokens teach (0: all); trained: distilled, or measured as it was pruned; held_out: the data of
    the figures; titles: experiment and variant, for the eye alone."""

    chain: compress.Options
    start: str
    top_k: int
    trained: bool
    held_out: str
    title: str = dataclasses.field(default="", compare=False)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """All that the figures come from."""
        chain = plain(self.chain)
        names = ("dtype", "importance", "target", "repair", "rounds", "seed", "evaluate_tokens")
        how = chain["distill"] if self.trained else {name: chain["distill"][name] for name in ("seq_len", "batch")}
        return {
            **{name: chain[name] for name in names},
            "distill": how,
            "model": fingerprint_of(model_folder(self.chain.model)),
            "data": text_sum(self.chain.data or ""),
            "held_out": text_sum(self.held_out),
            **({"start": self.start, "top_k": self.top_k} if self.trained else {}),
        }

    @property
    def name(self) -> str:
        return digest(self.facts)[:16]


@functools.cache
def made_on() -> dict[str, Any]:
    """As it was when the process began: so old is the code that it has read."""
    return provenance()


@functools.cache
def text_sum(data: str) -> str:
    """What stands for the text of data=, the standard library's included."""
    found = data_input(data)
    return fingerprint_of(found) if found != data else content(data)


def make_all(cells: Sequence[Cell], folder: Path, *, jobs: int, keep: bool, ready: Callable[[], None]) -> None:
    """Makes all cells that `folder/cells` lacks, in `jobs` processes; `ready` is called behind each of this one's."""
    folder.joinpath("cells").mkdir(parents=True, exist_ok=True)
    work = folder / "work"
    work.mkdir(exist_ok=True)
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=assist, args=(list(cells), folder, threads, keep, number)) for number in range(1, jobs)
    ]
    for other in others:
        other.start()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    made_on()
    try:
        work_through(cells, folder, keep, ready)
        for other in others:
            other.join()
    finally:
        torch.set_num_threads(before)
        for other in others:
            other.terminate()
    if not keep:
        shutil.rmtree(work, ignore_errors=True)


def assist(cells: Sequence[Cell], folder: Path, threads: int, keep: bool, number: int) -> None:
    """A further process's part; what it says is in work/process-N.log."""
    set_up()
    torch.set_num_threads(threads)
    made_on()
    with (
        (folder / "work" / f"process-{number}.log").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        work_through(cells, folder, keep, lambda: None)


def work_through(cells: Sequence[Cell], folder: Path, keep: bool, ready: Callable[[], None]) -> None:
    """Makes the cells that nobody else makes, and then waits for those that others do."""
    for patient in (False, True):
        for number, cell in enumerate(cells, 1):
            file = folder / "cells" / f"{cell.name}.json"
            if file.is_file():
                continue
            with contextlib.suppress(Timeout), alone(folder / "work", cell.name, patient):
                if not file.is_file():
                    console.rule(f"{cell.title}, seed {cell.chain.seed}: cell {number} of {len(cells)}", align="left")
                    write_json(file, figures(cell, folder / "work", keep))
            ready()


@contextlib.contextmanager
def alone(work: Path, name: str, patient: bool = True) -> Iterator[None]:
    """No other process is in the block of that name. Raises Timeout where one is, unless `patient`."""
    with FileLock(work / f".{name}.lock", timeout=-1 if patient else 0):
        yield


def figures(cell: Cell, work: Path, keep: bool) -> dict[str, Any]:
    """A cell's content: facts, the models' figures, the held-out curve, and what it was made on."""
    assert cell.chain.data is not None
    begin = str(model_folder(cell.chain.model))
    students, own = students_of(cell, begin, work)
    found = {
        "title": cell.title,
        "seed": cell.chain.seed,
        "models": measured(cell, begin, students),
        "curve": curve(students[DISTILLED] / "metrics.jsonl") if cell.trained else [],
        "made_on": made_on(),
        "facts": cell.facts,
    }
    if not keep:
        for folder in own:
            shutil.rmtree(folder, ignore_errors=True)
    return found


def students_of(cell: Cell, begin: str, work: Path) -> tuple[dict[str, Path], list[Path]]:
    """Makes the students of a cell: their folders by name, and those folders that are of no use to other cells."""
    chain, before = cell.chain, begin
    known: Any = [cell.facts[name] for name in ("model", "data", "dtype")]
    own: list[Path] = []
    rounds = chain.plan()
    for found in rounds:
        last = found is rounds[-1]
        shape = [found.distill.seq_len, found.distill.rows, found.seed]

        def scored(folder: Path, before: str = before, found: Any = found) -> None:
            compress.score_round(chain, before, found, folder)

        known = [known, plain(found.importance), shape]
        scores = once(work, "scores", known, scored)

        def pruned(folder: Path, before: str = before, found: Any = found, scores: Path = scores) -> None:
            compress.prune_round(chain, before, found, scores, folder)

        known = [known, plain(found.target), plain(found.repair)]
        start = student = once(work, "pruned", known, pruned)
        if last and not cell.trained:
            return {PRUNED: student}, own
        if last and cell.start == "random":
            start = once(work, "random", known, functools.partial(random_like, student, found.seed))
        known = [known, found.distill.chosen, cell.start, cell.top_k]
        cache = None
        if cell.top_k:
            cache = once(work, "cache", known, functools.partial(answers, cell, begin, found))
            own.append(cache)
        distilled = work / f"distilled-{digest(known)[:12]}"
        own += [distilled, distilled.with_name(f"{distilled.name}-corrected-teacher")]
        compress.distill_round(chain, begin, start, found, distilled, cache)
        before = str(distilled)
    return {PRUNED: student, DISTILLED: distilled}, own


def once(work: Path, name: str, known: Any, make: Callable[[Path], None]) -> Path:
    """The folder that `make` makes of what is known, by the first process that asks for it."""
    folder = work / f"{name}-{digest(known)[:12]}"
    with alone(work, folder.name):
        if not folder.is_dir():
            make(folder)
    return folder


def answers(cell: Cell, teacher: str, found: Any, folder: Path) -> None:
    """The teacher's `top_k` likeliest tokens at all that the student will read."""
    chain = cell.chain
    assert chain.data is not None
    cache_teacher.run(
        cache_teacher.Options(
            teacher, chain.data, folder, found.seed, chain.device, chain.dtype, CacheOptions(cell.top_k), found.distill
        )
    )


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
        | {key: value for key, value in found.items() if key in MEASURES}
        for name, found in report["models"].items()
    }


def curve(metrics: Path) -> list[dict[str, float]]:
    """What was measured on the validation split while the student was trained, and after how many tokens."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [
        {"tokens": record["tokens"], "kl": record["validation_kl"], "bits_per_byte": record["validation_bits_per_byte"]}
        for record in records
        if "validation_kl" in record
    ]


def load_cell(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """A cell's content where it is there."""
    file = folder / "cells" / f"{cell.name}.json"
    found: dict[str, Any] | None = read_json(file) if file.is_file() else None
    return found
