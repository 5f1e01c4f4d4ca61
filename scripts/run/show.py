"""What commands print: progress bars with rate and time left, tables, and the result's path. Rich does the drawing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

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
from torch import Tensor

from ...models.errors import gib as gib
from ...models.folder import write_json
from ...models.foreign import read_json as read_json
from ...models.foreign import read_lines as read_lines

# Names of files and pieces of programs are shown as they are: [/b] is no markup, and :key: no picture.
console = Console(highlight=False, markup=False, emoji=False)


class Bar:
    """One line of progress: how much of what, and a note such as the loss."""

    def __init__(self, display: Progress, task: Any) -> None:
        self.display, self.task = display, task

    def set(self, done: float, total: float | None = None, note: str = "") -> None:
        changes = {} if total is None else {"total": total}
        self.display.update(self.task, completed=done, note=note, **changes)  # type: ignore[arg-type]

    def add(self, count: float) -> None:
        self.display.advance(self.task, count)


@contextlib.contextmanager
def progress(what: str, total: float | None = None, *, in_bytes: bool = False) -> Iterator[Bar]:
    """A bar while the block runs; one line that says what was done where the output is no terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        *((DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as display:
        yield Bar(display, display.add_task(what, total=total, note=""))


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
        drawn.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    if title:  # rich would break it to the width of the table
        say(title)
    console.print(drawn)


def say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def result(folder: Path, content: dict[str, Any]) -> None:
    """Writes result.json into a finished folder, and says where it is."""
    write_json(folder / "result.json", content)
    say(f"result: {folder / 'result.json'}")
