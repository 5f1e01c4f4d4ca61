"""Experiments' pictures: plots/experiment.png and .svg."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plots import THEME, WIDE, blank, in_thousands, save_png, save_svg, say, short, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STARTS = {"pruned": ("pruned", THEME["teal"]), "random": ("from scratch", THEME["orange"])}


@styled
def draw_rows(folder: Path, title: str, label: str, rows: Mapping[str, Sequence[float]]) -> None:
    """A variant a line, its mean over the seeds as a point and their spread as a bar."""
    figure = blank(WIDE, 1.1 + 0.42 * len(rows))
    axes = figure.subplots()
    for place, values in enumerate(rows.values()):
        low, mean, high = min(values), statistics.fmean(values), max(values)
        axes.plot([low, high], [place, place], color=THEME["pale"], linewidth=6, solid_capstyle="round")
        axes.plot([mean], [place], "o", color=THEME["blue"], markersize=7)
        say(axes, high, place, f"{mean:.3f}")
    axes.set_yticks(range(len(rows)), [short(name) for name in rows], color=THEME["ink"])
    axes.set(title=title, xlabel=label, ylim=(len(rows) - 0.4, -0.6))
    axes.margins(x=0.12)
    save(figure, folder)


@styled
def draw_sizes(
    folder: Path, title: str, groups: Mapping[str, Sequence[Mapping[str, Any]]], teacher: Mapping[str, Any]
) -> None:
    """Bits per byte at the end against parameters, on the test split, and against the tokens read, on the validation
    split, where the palest line is the smallest model: the mean of the seeds, each of which has other validation text.
    groups: cells (see scripts/experiments/cells.py) by their start, each of which has a row with a scale of its own,
    since they can be far apart."""
    order = sorted(groups, reverse=True)  # random above pruned, as the figures are
    figure = blank(WIDE, 1.6 + 1.6 * len(order))
    grid = figure.subplots(len(order), 2, sharex="col", squeeze=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    at_teacher = teacher["bits_per_byte"]["value"]
    for row, (left, right) in zip(order, grid, strict=True):
        name, shade = STARTS[row]
        cells = groups[row]
        sizes = sorted({cell["models"]["distilled"]["parameters"] for cell in cells})
        ends = [[c["models"]["distilled"] for c in cells if c["models"]["distilled"]["parameters"] == s] for s in sizes]
        values = [[model["bits_per_byte"]["value"] for model in models] for models in ends]
        left.plot(sizes, [statistics.fmean(each) for each in values], "o-", color=shade, label=name)
        for size, each in zip(sizes, values, strict=True):
            left.plot([size] * len(each), each, "_", color=shade, markersize=9)
        for number, size in enumerate(sizes):
            curves = [
                {point["tokens"]: point["bits_per_byte"] for point in cell["curve"]}
                for cell in cells
                if cell["models"]["distilled"]["parameters"] == size
            ]
            tokens = sorted(set.intersection(*map(set, curves)))
            bits = [statistics.fmean(curve[count] for curve in curves) for count in tokens]
            place = number / max(len(sizes) - 1, 1)
            right.plot(tokens, bits, ".-", color=shade, alpha=0.35 + 0.65 * place, linewidth=1.4)
        if row == "pruned":
            left.axhline(at_teacher, color=THEME["blue"], linewidth=1, linestyle="--")
            left.plot([teacher["parameters"]], [at_teacher], "o", color=THEME["blue"], label="teacher")
        left.legend(frameon=False, loc="best")
        for axes in (left, right):
            in_thousands(axes)
    grid[0][0].set(title="At the end, test split")
    grid[0][1].set(title="On the way, validation split, mean of the seeds")
    grid[-1][0].set(xlabel="Parameters")
    grid[-1][1].set(xlabel="Tokens of training")
    figure.supylabel("Bits per byte", fontsize=10)
    save(figure, folder)


@styled
def draw_order(folder: Path, title: str, order: Mapping[str, Sequence[float]]) -> None:
    """How well each thing predicts the order at the end: a point for each seed, a larger one for their mean."""
    figure = blank(WIDE, 1.1 + 0.42 * len(order))
    axes = figure.subplots()
    for place, values in enumerate(order.values()):
        axes.plot(values, [place] * len(values), "o", color=THEME["pale"], markersize=6)
        axes.plot([statistics.fmean(values)], [place], "o", color=THEME["blue"], markersize=8)
        say(axes, max(values), place, f"{statistics.fmean(values):.2f}")
    axes.set_yticks(range(len(order)), [short(name) for name in order], color=THEME["ink"])
    axes.set(title=title, xlabel="Spearman's correlation with the order at the end", ylim=(len(order) - 0.4, -0.6))
    axes.margins(x=0.12)
    save(figure, folder)


def save(figure: Figure, folder: Path) -> None:
    save_png(figure, folder, "experiment")
    save_svg(figure, folder, "experiment")
