"""What a sweep (`limbeck COMMAND --multirun`, sweep.py) leaves beside its jobs' folders: the list of them, by which
its own folder is known, and a table of their figures."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...distill.state import last_figures
from ...models.errors import CheckFailed, InputError
from ...models.folder import write_json
from .show import read_json, result, say, table

MARK = "sweep.json"
FIGURES = ("loss", "validation_loss", "validation_kl", "validation_agreement")


@contextlib.contextmanager
def marked(out: Path) -> Iterator[None]:
    """The folder is a sweep's: a new one, which has a sweep.json from now on, or one that has. Raises InputError for
    others. A new one in which no job was begun goes again."""
    mark, there = out / MARK, os.path.lexists(out)
    new = not there or (out.is_dir() and not any(out.iterdir()))
    if not new and not is_sweep(mark):
        raise InputError(f"{out} exists already and is not of limbeck --multirun; give an output that does not")
    if new:
        out.mkdir(exist_ok=True)
        write_json(mark, [])
    try:
        yield
    except BaseException:
        if new and [path.name for path in out.iterdir()] == [MARK]:
            mark.unlink()
            if not there:
                out.rmdir()
        raise


def is_sweep(path: Path) -> bool:
    """Whether a file is the list of a sweep's jobs."""
    try:
        rows = read_json(path)
    except InputError:
        return False
    return isinstance(rows, list) and all(
        isinstance(row, dict) and {"folder", "overrides"} <= row.keys() for row in rows
    )


def list_jobs(out: Path, jobs: Sequence[Any]) -> None:
    """What each job that wrote a folder was given, and the last figures that it logged. Raises what the first one
    raised that could not be made."""
    rows: list[dict[str, Any]] = []
    failed: list[Exception] = []
    for number, job in enumerate(jobs):
        chosen = [word for word in job.overrides if word in varied(jobs)]
        if isinstance(job.return_value, Exception):
            failed.append(of_job(f"job {number} ({' '.join(chosen)})", job.return_value))
            continue
        if not os.path.exists(job.return_value):
            say(f"job {number} wrote nothing: {' '.join(chosen)}")
            continue
        rows.append({"folder": job.return_value, "overrides": chosen, **last_figures(Path(job.return_value), FIGURES)})
        say(f"{job.return_value}: {' '.join(chosen)}")
    shown = [name for name in FIGURES if any(name in row for row in rows)]
    if shown:
        lines = [(Path(row["folder"]).name, *(f"{row.get(name, math.nan):.4f}" for name in shown)) for row in rows]
        table(f"{len(rows)} jobs", ("job", *shown), lines)
    made = {row["folder"] for row in rows}
    kept = [row for row in read_json(out / MARK) if row["folder"] not in made and Path(row["folder"]).is_dir()]
    write_json(out / MARK, sorted([*kept, *rows], key=lambda row: int(Path(row["folder"]).name)))
    if failed:
        raise failed[0]
    result(out, {"jobs": rows})


def of_job(name: str, error: Exception) -> Exception:
    """The error, which begins with the job's name where it is the user's to read."""
    if isinstance(error, InputError | CheckFailed):
        return (CheckFailed if isinstance(error, CheckFailed) else InputError)(f"{name}: {error}")
    return error


def varied(jobs: Sequence[Any]) -> set[str]:
    """The overrides that not all jobs have."""
    sets = [set(job.overrides) for job in jobs]
    return set.union(*sets) - set.intersection(*sets) if len(sets) > 1 else set.union(*sets)
