"""What commands print: progress with rate and time left, tables, and the result's path. Rich does the drawing."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from ...models.errors import gib as gib
from ...models.fingerprint import LOG, PROVENANCE, RESULT, RUN, read_run
from ...models.folder import write_json
from ...models.foreign import read_json as read_json
from ...models.foreign import read_lines as read_lines
from .facts import run_facts

if TYPE_CHECKING:
    from torch import Tensor

# Names of files and pieces of programs are shown as they are: [/b] is no markup, and :key: no picture.
console = Console(highlight=False, markup=False, emoji=False)
if not console.is_terminal or console.width < 1:  # COLUMNS=0
    console.width = max(console.width, 80)

EVERY = 10.0  # seconds from line to line
logs: list[Path] = []  # where lines go beside the console


@contextlib.contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Lines of progress go to the folder's log as well, while it is there."""
    logs.append(folder / LOG)
    try:
        yield
    finally:
        logs.pop()


def log_line(text: str) -> None:
    """A line with its time, into the logs and, where there is no terminal that has a bar, on the console."""
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}"
    for path in logs:
        with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
    if not console.is_terminal:
        say(line)


def duration(seconds: float) -> str:
    """3:07, or 1:02:07"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Bar:
    """Progress of one piece of work: how much of what, and a note such as the loss."""

    def __init__(self, what: str, total: float | None, in_bytes: bool) -> None:
        self.what, self.total, self.in_bytes, self.note = what, total, in_bytes, ""
        self.begun, self.done = time.monotonic(), 0.0
        self.first: float | None = None  # where resumed work began
        self.shown: Callable[..., Any] | None = None  # draws it on a terminal

    def set(self, done: float, total: float | None = None, note: str = "") -> None:
        if self.first is None:
            self.first = done if done > 1 and not self.in_bytes else 0.0
        self.done, self.total, self.note = done, self.total if total is None else total, note
        if self.shown is not None:
            self.shown(completed=done, total=self.total, note=note)

    def add(self, count: float) -> None:
        self.set(self.done + count, note=self.note)

    def line(self, ended: bool = False) -> str:
        """The same in a line: what, how much of how much, time left or taken, the note."""
        elapsed, moved = time.monotonic() - self.begun, self.done - (self.first or 0.0)
        words = [self.what]
        if self.total or self.done:
            count, whole = (
                (self.done / 2**20, (self.total or 0) / 2**20) if self.in_bytes else (self.done, self.total or 0)
            )
            words.append(f"{count:,.0f}" + (f" of {whole:,.0f}" if whole else "") + (" MiB" if self.in_bytes else ""))
        if self.total and moved > 0 and not ended:
            words.append(f"{duration(elapsed / moved * max(self.total - self.done, 0))} left")
        else:
            words.append(f"{duration(elapsed)} taken")
        return "  ".join([*words, self.note] if self.note else words)


@contextlib.contextmanager
def progress(what: str, total: float | None = None, *, in_bytes: bool = False) -> Iterator[Bar]:
    """A bar on a terminal while the block runs; elsewhere, and in the output's log, a line every EVERY seconds and one
    at the end."""
    bar, over = Bar(what, total, in_bytes), threading.Event()

    def speak() -> None:
        while not over.wait(EVERY):
            log_line(bar.line())

    thread = threading.Thread(target=speak, name="limbeck-progress", daemon=True)
    thread.start()
    try:
        with drawn(bar) if console.is_terminal else contextlib.nullcontext():
            yield bar
    finally:
        over.set()
        thread.join()
    log_line(bar.line(ended=True))


@contextlib.contextmanager
def drawn(bar: Bar) -> Iterator[None]:
    """Draws it while the block runs; what counts comes first, since a narrow terminal cuts off the end."""
    columns = (
        TextColumn("{task.description}", markup=False),
        *((DownloadColumn(), TransferSpeedColumn()) if bar.in_bytes else (MofNCompleteColumn(),)),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        BarColumn(bar_width=16),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as display:
        bar.shown = functools.partial(display.update, display.add_task(bar.what, total=bar.total, note=""))
        yield


def counted(bar: Bar, pieces: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same pieces of tensors; the bar counts their bytes once they are written."""
    done = 0
    for name, rows in pieces:
        yield name, rows
        done += rows.numel() * rows.element_size()
        bar.set(done)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table under its title; the first column is text, the others are numbers."""
    drawn = Table(show_header=any(columns))
    for number, column in enumerate(columns):
        drawn.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    if title:  # rich would break it to the width of the table
        say(title)
    console.print(drawn)


def say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def result(folder: Path, content: dict[str, Any]) -> None:
    """Writes result.json into a finished folder, with what is to be told of the run, and says where it is."""
    write_json(folder / RESULT, told(folder, content))
    say(f"result: {folder / RESULT}")


def told(folder: Path, content: dict[str, Any], output: Path | None = None) -> dict[str, Any]:
    """The content of result.json, beside it in `run` who did it, when and where (`run_facts`), and the seconds of each
    stage that has left a folder in there."""
    stages = {path.parent.relative_to(folder).as_posix(): read_run(path.parent).get("seconds")
              for path in sorted([*folder.glob(f"*/{PROVENANCE}"), *folder.glob(f"*/*/{PROVENANCE}")])}  # fmt: skip
    taken = {"stages": {name: seconds for name, seconds in stages.items() if seconds is not None}}
    return content | {RUN: run_facts(folder, output=output) | (taken if taken["stages"] else {})}
