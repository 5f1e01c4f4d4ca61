"""What a page is made of: sections with pictures, tables and examples, as plain data for the template."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from . import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Cell:
    """A figure, and the interval below it."""

    value: str
    interval: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]


@dataclasses.dataclass(frozen=True)
class Picture:
    """An SVG; a wide one scrolls on small screens."""

    svg: Markup
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Example:
    """Text under a title: pieces (text, shade from 0 to 5, what a pointer on it reads)."""

    title: str
    pieces: Sequence[tuple[str, int, str]]


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    note: str
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    examples: Sequence[Example] = ()
    legend: Sequence[str] = ()


def drawn(folder: Path, figure: Figure, name: str, label: str, wide: bool = False) -> Picture:
    """A figure for the page, written as plots/NAME.png and .svg too."""
    return Picture(Markup(plots.finish(figure, folder, name, label)), wide)


def cell(estimate: Mapping[str, Any], sign: str = "", digits: int = 4, more: str = "", p: float | None = None) -> Cell:
    if estimate["low"] is None:
        return Cell(f"{estimate['value']:{sign}.{digits}f}")
    value, low, high = (f"{estimate[end]:{sign}.{digits}f}" for end in ("value", "low", "high"))
    return Cell(value, f"{low} to {high}{more}" + ("" if p is None else f"; p {p:.3f}"))


def size(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB" if abs(count) >= 2**30 / 10 else f"{count / 2**20:,.2f} MiB"
