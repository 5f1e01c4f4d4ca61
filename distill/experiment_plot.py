"""An experiment's picture: a variant a line, its mean over the seeds as a point and their spread as a bar."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from .plots import THEME, WIDE, save_png, save_svg, say, short, styled


@styled
def draw_experiment(folder: Path, title: str, label: str, rows: Mapping[str, tuple[float, float, float]]) -> None:
    """Writes plots/experiment.png and .svg; rows: (least, mean, largest) by the variant's name."""
    figure = Figure(figsize=(WIDE, 1.1 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (low, mean, high) in enumerate(rows.values()):
        axes.plot([low, high], [place, place], color=THEME["pale"], linewidth=6, solid_capstyle="round")
        axes.plot([mean], [place], "o", color=THEME["blue"], markersize=7)
        say(axes, high, place, f"{mean:.3f}")
    axes.set_yticks(range(len(rows)), [short(name) for name in rows], color=THEME["ink"])
    axes.set(title=title, xlabel=label, ylim=(len(rows) - 0.4, -0.6))
    axes.margins(x=0.12)
    save_png(figure, folder, "experiment")
    save_svg(figure, folder, "experiment")
