"""Experiments' pictures: plots/experiment.png and .svg."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from .plots import THEME, WIDE, save_png, save_svg, say, short, styled

STARTS = {"pruned": ("pruned", THEME["teal"]), "random": ("from scratch", THEME["orange"])}


@styled
def draw_rows(folder: Path, title: str, label: str, rows: Mapping[str, Sequence[float]]) -> None:
    """A variant a line, its mean over the seeds as a point and their spread as a bar."""
    figure = Figure(figsize=(WIDE, 1.1 + 0.42 * len(rows)), layout="constrained")
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
    split, where the palest line is the smallest model. groups: cells (see scripts/cells.py) by their start."""
    figure = Figure(figsize=(WIDE, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    at_teacher = teacher["bits_per_byte"]["value"]
    for start, cells in groups.items():
        name, shade = STARTS[start]
        models = sorted((cell["models"]["distilled"] for cell in cells), key=lambda model: model["parameters"])
        left.plot(
            [model["parameters"] for model in models],
            [model["bits_per_byte"]["value"] for model in models],
            "o-", color=shade, label=name,
        )  # fmt: skip
        smallest = min(cell["models"]["distilled"]["parameters"] for cell in cells)
        span = max(cell["models"]["distilled"]["parameters"] for cell in cells) - smallest
        for cell in cells:
            place = (cell["models"]["distilled"]["parameters"] - smallest) / max(span, 1)
            tokens, bits = ([point[key] for point in cell["curve"]] for key in ("tokens", "bits_per_byte"))
            right.plot(tokens, bits, ".-", color=shade, alpha=0.35 + 0.65 * place, linewidth=1.4)
    left.axhline(at_teacher, color=THEME["blue"], linewidth=1, linestyle="--")
    left.plot([teacher["parameters"]], [at_teacher], "o", color=THEME["blue"], label="teacher")
    left.legend(frameon=False)
    left.set(xlabel="Parameters", ylabel="Bits per byte, test split")
    right.set(xlabel="Tokens of distillation", ylabel="Bits per byte, validation split")
    for axes in (left, right):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    save(figure, folder)


@styled
def draw_order(folder: Path, title: str, order: Mapping[str, Sequence[float]]) -> None:
    """How well each thing foretells the order at the end: a point for each seed, a larger one for their mean."""
    figure = Figure(figsize=(WIDE, 1.1 + 0.42 * len(order)), layout="constrained")
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
