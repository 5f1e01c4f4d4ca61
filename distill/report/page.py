"""What a page is made of: sections with pictures, tables and examples, as plain data for the template."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from . import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Cell:
    """A figure, the interval below it, and what stands below that."""

    value: str
    interval: str = ""
    more: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A `folded` one opens under its title; one of `texts` has text in its cells, and no figures; `code` is that of
    programs, its spaces kept in line."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    folded: bool = False
    texts: bool = False
    code: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """An SVG; a wide one scrolls on small screens."""

    svg: Markup
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Example:
    """Text under a title: pieces (text, shade from 0 to 5, what a pointer on it reads), and lines of what counts most
    in it, to be read without a pointer."""

    title: str
    pieces: Sequence[tuple[str, int, str]]
    lines: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Section:
    """`terms` are words of it, each with what it means; `slug` is where a link into the page leads."""

    title: str
    note: str
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    examples: Sequence[Example] = ()
    legend: Sequence[str] = ()
    terms: Sequence[tuple[str, str]] = ()

    @property
    def slug(self) -> str:
        return "section-" + re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def drawn(folder: Path, figure: Figure, name: str, label: str, wide: bool = False) -> Picture:
    """A figure for the page, written as plots/NAME.png and .svg too."""
    return Picture(Markup(plots.finish(figure, folder, name, label)), wide)


def cell(
    estimate: Mapping[str, Any], sign: str = "", *, beside: Mapping[str, Any] | None = None, more: str = "",
    p: float | None = None,
) -> Cell:  # fmt: skip
    """A figure with its interval, in so many decimals that half of the interval's width has two significant digits;
    where it is not of what stands `beside` it, also how much larger or smaller it is than that."""
    digits = decimals(estimate)
    relative = ""
    if beside is not None and beside is not estimate and beside["value"]:
        relative = f"{100 * (estimate['value'] / beside['value'] - 1):+.1f}%".replace("-", "\N{MINUS SIGN}")
    if estimate["low"] is None:
        return Cell(f"{estimate['value']:{sign}.{digits}f}", "", relative)
    value, low, high = (f"{estimate[end]:{sign}.{digits}f}" for end in ("value", "low", "high"))
    return Cell(value, f"{low} to {high}{more}" + ("" if p is None else f"; p {p:.2g}"), relative)


def decimals(estimate: Mapping[str, Any], without: int = 4) -> int:
    """Decimals that show an interval's half-width by two significant digits, 6 at most; `without` where there is no
    interval, or none that is wider than nothing."""
    if estimate["low"] is None:
        return without
    half = (estimate["high"] - estimate["low"]) / 2
    if not 1e-6 * abs(estimate["value"]) < half < math.inf:  # what documents share to the last bits of a float
        return without
    return min(max(1 - math.floor(math.log10(half)), 0), 6)


def size(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB" if abs(count) >= 2**30 / 10 else f"{count / 2**20:,.2f} MiB"
