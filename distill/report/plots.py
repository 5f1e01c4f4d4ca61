"""The report's pictures: matplotlib figures, as SVG for the page and as PNG beside it.

Colours are a theme: in the page's SVG each becomes a CSS variable, so that pictures follow light and dark. matplotlib
is imported by the first picture: commands that may draw at their end do not wait for it at their start.
"""

from __future__ import annotations

import functools
import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
from markupsafe import escape

from .gap_rows import ends

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The page's stylesheet has a variable of each name, for light and dark.
THEME = {
    "ink": "#1d2530", "soft": "#5d6875", "line": "#dde3ea", "paper": "#fefefe", "blue": "#3f6fb3",
    "orange": "#d17a22", "teal": "#1f9383", "violet": "#8465b5", "gold": "#a98a2c", "pale": "#d3c8b8",
}  # fmt: skip
COLOURS = {"teacher": THEME["blue"], "pruned": THEME["orange"], "distilled": THEME["teal"]}
SPARE = (THEME["violet"], THEME["gold"], "#5b9aa0", "#b0607f")
# Text as text: smaller, searchable, and read out by screen readers. A fixed salt makes equal plots equal bytes.
# A `$` in a model's name is no mathematics.
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "limbeck", "font.family": "sans-serif", "font.size": 10.5,
    "text.color": THEME["ink"], "axes.labelcolor": THEME["soft"], "axes.edgecolor": THEME["line"],
    "xtick.color": THEME["soft"], "ytick.color": THEME["soft"], "axes.titlesize": 11, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": THEME["line"], "grid.linewidth": 0.8, "ytick.left": False,
    "xtick.bottom": False, "figure.facecolor": THEME["paper"], "axes.facecolor": "none", "text.parse_math": False,
}  # fmt: skip
PANEL, WIDE = 4.9, 9.6  # inches
METRICS = {"bits_per_byte": "Bits per byte", "kl": "Forward KL to the teacher (nats)", "agreement": "Top-1 agreement"}
Given = ParamSpec("Given")
Drawn = TypeVar("Drawn")


def styled(draw: Callable[Given, Drawn]) -> Callable[Given, Drawn]:
    """A function that draws or saves, in the page's style."""

    @functools.wraps(draw)
    def draw_in_style(*args: Given.args, **kwargs: Given.kwargs) -> Drawn:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return draw_in_style


def blank(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def in_thousands(axes: Axes) -> None:
    """Writes 5M for 5,000,000 along x."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def colour(name: str, number: int) -> str:
    return COLOURS.get(name, SPARE[number % len(SPARE)])


def short(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "\N{HORIZONTAL ELLIPSIS}"


@styled
def finish(figure: Figure, folder: Path, name: str, label: str) -> str:
    """Writes plots/NAME.png and NAME.svg, and gives the SVG for the page: no namespaces (HTML needs none), ids of its
    own, the theme's variables for colours, never larger than drawn, with `label` for those who hear it."""
    save_png(figure, folder, name)
    figure.set_layout_engine("none")  # where all lies is known by now
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    (folder / "plots" / f"{name}.svg").write_text(text, encoding="utf-8")
    body = text[text.index("<defs>") :]
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert box is not None
    width, height = (float(number) for number in box.groups())
    body = re.sub(
        r'(id="|href="#|url\(#)', lambda match: f"{match.group(1)}{name}-", body.replace("xlink:href", "href")
    )
    for role, value in THEME.items():
        body = body.replace(value, f"var(--{role})")
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}"'
    return f'{head} style="max-width:{width * 4 / 3:.0f}px">\n{body}'


@styled
def save_png(figure: Figure, folder: Path, name: str) -> None:
    (folder / "plots").mkdir(exist_ok=True)
    figure.savefig(folder / "plots" / f"{name}.png", dpi=144, bbox_inches="tight", metadata={"Software": None})


@styled
def save_svg(figure: Figure, folder: Path, name: str) -> None:
    """Writes plots/NAME.svg, a file of its own."""
    (folder / "plots").mkdir(exist_ok=True)
    path = folder / "plots" / f"{name}.svg"
    figure.savefig(path, format="svg", bbox_inches="tight", dpi=144, metadata={"Date": None, "Creator": None})


def say(axes: Axes, x: float, y: float, text: str, shade: str = THEME["ink"]) -> None:
    """Text just right of a point."""
    axes.annotate(text, (x, y), (6, 0), textcoords="offset points", va="center", color=shade, annotation_clip=False)


def whiskers(estimates: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """How far the intervals reach below and above their values."""
    return [[abs(ends(each)[side] - each["value"]) for each in estimates] for side in (0, 1)]


def draw_bars(axes: Axes, models: Mapping[str, Any], key: str) -> None:
    """One figure of every model, with its interval and value."""
    estimates = [models[name][key] for name in models]
    values = [figure["value"] for figure in estimates]
    errors = whiskers(estimates)
    places = range(len(values))
    axes.barh(places, values, color=[colour(name, number) for number, name in enumerate(models)], height=0.62)
    axes.errorbar(values, places, xerr=errors, fmt="none", ecolor=THEME["ink"], elinewidth=1.2, capsize=3)
    largest = max(*(ends(figure)[1] for figure in estimates), 1e-12)
    for place, figure in zip(places, estimates, strict=True):
        say(axes, max(ends(figure)[1], figure["value"]), place, f"{figure['value']:.3f}")
    axes.set_yticks(places, [short(name) for name in models], color=THEME["ink"])
    axes.set(title=METRICS[key], xlim=(0, 1.2 * largest))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


@styled
def gap_bars(models: Mapping[str, Any], keys: Sequence[str] = tuple(METRICS)) -> Figure:
    """Models beside each other, a panel for each figure in `keys`."""
    figure = blank(PANEL * len(keys), 0.8 + 0.48 * len(models))
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        draw_bars(axes, models, key)
    return figure


@styled
def kl_by_position(models: Mapping[str, Any]) -> Figure:
    figure = blank(PANEL, 2.5)
    axes = figure.subplots()
    for number, (name, figures) in enumerate(models.items()):
        if name != "teacher":
            starts, values = zip(*figures["kl_by_position"], strict=True)
            end = starts[-1] + (starts[-1] - starts[-2] if len(starts) > 1 else 1)
            axes.stairs(values, (*starts, end), baseline=None, color=colour(name, number), linewidth=2)
            say(axes, end, values[-1], short(name), colour(name, number))
    axes.set(title="KL along the row (nats)", xlabel="position (tokens)", ylim=(0, None))
    return figure


@styled
def kl_by_context(models: Mapping[str, Any]) -> Figure:
    """Each student's KL by the tokens of the document seen so far, in powers of two, with intervals."""
    figure = blank(PANEL, 2.7)
    axes = figure.subplots()
    names: list[str] = []
    top = 0.0
    for number, (name, model) in enumerate(models.items()):
        if name != "teacher":
            names = list(model["by_context"])
            figures = [part["kl"] for part in model["by_context"].values()]
            values, (lows, highs) = [figure["value"] for figure in figures], zip(*map(ends, figures), strict=True)
            axes.fill_between(range(len(names)), lows, highs, color=colour(name, number), alpha=0.18, linewidth=0)
            axes.plot(range(len(names)), values, "o-", color=colour(name, number), linewidth=1.8, markersize=3.5)
            say(axes, len(names) - 1, values[-1], short(name), colour(name, number))
            top = max(top, *highs)
    axes.set_xticks(range(len(names)), [name.split(" ")[0] for name in names], fontsize=9)
    axes.set(title="KL by context (nats)", xlabel="tokens of the document seen, from", ylim=(0, 1.08 * top or 1))
    return figure


@styled
def calibration(models: Mapping[str, Any]) -> Figure:
    """Reliability: of the tokens predicted with a confidence, the share that came; the diagonal is the ideal."""
    figure = blank(PANEL, 2.7)
    axes = figure.subplots()
    axes.plot((0, 1), (0, 1), color=THEME["soft"], linestyle=":", linewidth=1.2)
    for number, (name, figures) in enumerate(models.items()):
        _, confidence, correct = zip(*figures["calibration"]["bins"], strict=True)
        ece = figures["calibration"]["ece"]["value"]
        label = f"{short(name)}, ECE {ece:.3f}"
        axes.plot(confidence, correct, "o-", color=colour(name, number), linewidth=1.6, markersize=3.5, label=label)
    axes.set(title="Share right by confidence", xlabel="confidence", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=9.5, loc="upper left", handlelength=1.2, borderaxespad=0.2)
    return figure


@styled
def kl_by_group(models: Mapping[str, Any], key: str, title: str) -> Figure:
    """Each student's KL in every group, the largest group on top, with intervals."""
    students = [(number, name) for number, name in enumerate(models) if name != "teacher"]
    first = models[students[0][1]][key]
    groups = sorted(first, key=lambda group: -first[group]["tokens"])
    figure = blank(PANEL, 1.0 + 0.3 * len(groups))
    axes = figure.subplots()
    top = 0.0
    for place, (number, name) in enumerate(students):
        estimates = [models[name][key][group]["kl"] for group in groups]
        values = [part["value"] for part in estimates]
        errors = whiskers(estimates)
        rows = [row + 0.22 * (place - (len(students) - 1) / 2) for row in range(len(groups))]
        shade = colour(name, number)
        axes.errorbar(
            values, rows, xerr=errors, fmt="o", color=shade, markersize=4.5, elinewidth=1.4, label=short(name)
        )
        top = max(top, *(ends(part)[1] for part in estimates))
    axes.set_yticks(range(len(groups)), [short(group) for group in groups], color=THEME["ink"])
    axes.set(title=f"KL by {title} (nats)", xlim=(0, 1.05 * top or 1))
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=9.5, loc="best", handletextpad=0.2)
    return figure


@styled
def training_curve(records: Sequence[Mapping[str, float]], key: str, title: str) -> Figure:
    """One column of metrics.jsonl against the tokens seen; few points are marked, and the last says its value."""
    points = [(record["tokens"], record[key]) for record in records if key in record]
    tokens, values = zip(*points, strict=True)
    figure = blank(PANEL, 2.5)
    axes = figure.subplots()
    style = "o-" if len(points) <= 24 else "-"
    axes.plot(tokens, values, style, color=THEME["teal"], linewidth=1.8, markersize=4, clip_on=False)
    say(axes, tokens[-1], values[-1], f"{values[-1]:.3f}")
    in_thousands(axes)
    axes.set(title=title, xlabel="tokens", ylim=(0, 1.08 * max(values)), xlim=(0, tokens[-1]))
    return figure


@styled
def importance(title: str, scores: Mapping[str, np.ndarray], kept: Mapping[str, Sequence[int]]) -> Figure:
    """Every unit's score, sorted within its layer and relative to the layer's largest; what was cut is pale.

    `scores`: the units of each layer, by the text that stands above them. Wide layers are drawn in bins, in the
    colour of most of their units."""
    figure = blank(WIDE, 1.9)
    axes = figure.subplots()
    offset = 0.0
    for name, values in scores.items():
        order = np.argsort(-values, kind="stable")
        bins = np.array_split(order, min(len(order), max(600 // len(scores), 16)))
        heights = np.array([values[bin].mean() for bin in bins]) / max(values.max(), 1e-30)
        stays = [2 * np.isin(bin, kept.get(name, order)).sum() >= len(bin) for bin in bins]
        edges = offset + np.linspace(0, 1, len(bins) + 1)
        for stay, run in itertools.groupby(range(len(bins)), key=stays.__getitem__):
            places = list(run)
            steps = np.append(heights[places], heights[places[-1]])
            shade = THEME["blue"] if stay else THEME["pale"]
            axes.fill_between(edges[places[0] : places[-1] + 2], steps, step="post", color=shade, linewidth=0)
        axes.text(offset + 0.5, 1.04, name, ha="center", fontsize=9, color=THEME["soft"])
        offset += 1.12
    axes.set(ylim=(0, 1.15), xlim=(-0.02, offset - 0.1), xticks=[], yticks=[0, 0.5, 1], title=title)
    return figure


@styled
def layers(pattern: str, removed: Sequence[int], first: Mapping[int, float], metric: str, together: int = 1) -> Figure:
    """How much each layer, or so many `together` from each on, are missed at the first step, in the metric named; the
    removed ones are marked."""
    figure = blank(WIDE, 2.4)
    axes = figure.subplots()
    places = sorted(first)
    shades = [THEME["orange"] if layer in removed else THEME["blue"] for layer in places]
    axes.bar(range(len(places)), [first[layer] for layer in places], color=shades, width=0.72)
    axes.set_xticks(
        range(len(places)),
        [f"{layer}\n{pattern[layer : layer + together]}" for layer in places],
        fontsize=10 if len(places) < 40 else 7,
    )
    if max(first.values()) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    without = "one layer" if together == 1 else f"{together} layers"
    axes.set(title=f"Without {without}: {metric}", xlabel="layer and its kind")
    axes.margins(x=0.01)
    axes.grid(axis="x", visible=False)
    return figure


@styled
def tradeoff(
    points: Sequence[tuple[float, float]], front: Sequence[int], named: Mapping[str, int], *, title: str, xlabel: str
) -> Figure:
    """Candidates as points (cost, value): those on the Pareto front are joined, those in `named` say their names."""
    figure = blank(WIDE, 4.2)
    axes = figure.subplots()
    x, y = zip(*points, strict=True)
    axes.scatter(x, y, s=14, color=THEME["blue"], alpha=0.55, linewidths=0, rasterized=len(points) > 1000)
    if front:
        edge = [points[index] for index in front]
        axes.plot(
            *zip(*edge, strict=True), "o-", color=THEME["teal"], markersize=4, linewidth=1.6, label="Pareto front"
        )
        axes.legend(frameon=False, loc="best", fontsize=9.5)
    for name, index in named.items():
        right = x[index] > (min(x) + max(x)) / 2  # a name stands on the side that has space
        axes.plot(*points[index], "o", color=THEME["orange"], markersize=6)
        axes.annotate(
            name, points[index], (-7 if right else 7, 4), textcoords="offset points", ha="right" if right else "left",
            va="bottom", color=THEME["orange"], fontsize=9,
        )  # fmt: skip
    axes.set(title=title, xlabel=xlabel)
    axes.margins(x=0.08, y=0.08)
    return figure


PARTS = {"weights": "blue", "kv": "violet", "ssm": "teal", "conv": "gold"}


@styled
def memory_bars(fits: Mapping[str, Any]) -> Figure:
    """Stacked bytes of each model against the budget, whose line is drawn where it is near."""
    figure = blank(PANEL, 1.25 + 0.5 * len(fits))
    axes = figure.subplots()
    largest = max(fit["memory"]["total"] for fit in fits.values())
    unit, name = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
    before = np.zeros(len(fits))
    for part, role in PARTS.items():
        widths = np.array([fit["memory"][part] / unit for fit in fits.values()])
        axes.barh(range(len(fits)), widths, left=before, color=THEME[role], label=part, height=0.62)
        before += widths
    for place, total in enumerate(before):
        say(axes, total, place, f"{total:.2f}")
    axes.set_yticks(range(len(fits)), [short(model) for model in fits], color=THEME["ink"])
    budget = next(iter(fits.values()))["verdict"]["budget"] / unit
    near = 0 < budget < 2.5 * largest / unit
    if near:
        axes.axvline(budget, color=THEME["orange"], linestyle="--", linewidth=1.6, label="budget")
    axes.set(xlabel=name, xlim=(0, 1.2 * max(largest / unit, budget if near else 0)))
    axes.invert_yaxis()
    axes.legend(frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(-0.02, 1.0), fontsize=9.5,
                handlelength=0.9, handletextpad=0.4, columnspacing=0.9, borderaxespad=0)  # fmt: skip
    axes.grid(axis="y", visible=False)
    return figure
