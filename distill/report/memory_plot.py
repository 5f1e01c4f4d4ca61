"""Memory against context and batch, with the budget's line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...models.config import HybridConfig
from ...models.cost.fit import Estimate
from ...models.cost.hardware import GIB
from ...models.cost.inference import MemoryReport, sketch
from ...models.cost.tables import places
from .plots import PANEL, THEME, WIDE, blank, save_png, save_svg, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SHADES = ("#1f9383", "#3a8f9c", "#3f6fb3", "#8465b5", "#b0607f", "#d17a22", "#a98a2c")
PARTS = {  # from the bottom up
    "weights": ("weights", THEME["blue"]),
    "kv": ("keys and values", THEME["teal"]),
    "states": ("SSM and convolution states", THEME["violet"]),
    "passing": ("prefill or decoding", THEME["orange"]),
}


def contexts_of(config: HybridConfig, context: int) -> list[int]:
    """Powers of two and what lies between, from 1024 (of a short model earlier) to its limit or `context`."""
    last = max(config.max_position_embeddings, context)
    first = min(1024, max(last // 64, 1))
    lengths = {first, last, context}
    length = first
    while length < last:
        lengths |= {length, min(length * 3 // 2, last)}
        length *= 2
    return sorted(lengths)


def parts_of(report: MemoryReport) -> dict[str, float]:
    """GiB of a report's parts; together its peak."""
    passing = report.prompt + report.transient + report.workspace
    return {
        "weights": report.weights / GIB,
        "kv": report.kv / GIB,
        "states": (report.ssm + report.conv) / GIB,
        "passing": passing / GIB,
    }


@styled
def memory_plot(name: str, config: HybridConfig, report: MemoryReport, budget: float, card: str) -> Figure:
    """Left what it is made of at the requested batch, right the peak for more and fewer sequences."""
    contexts = contexts_of(config, report.context)
    figure = blank(WIDE * 1.15, PANEL * 0.95)
    figure.suptitle(f"{name} on {card}", x=0.01, ha="left", fontsize=12.5, color=THEME["ink"])
    left, right = figure.subplots(1, 2, sharey=True)
    lines = sketch(config, report, contexts, sorted({*BATCHES, report.batch}))
    draw_parts(left, lines[report.batch])
    peaks = {batch: [each.peak / GIB for each in line] for batch, line in lines.items()}
    height = min(max(1.35 * budget, 1.1 * report.peak), 4 * max(budget, report.weights)) / GIB
    draw_batches(right, contexts, {batch: line for batch, line in peaks.items() if line[0] < height}, report.batch)
    left.set_title(f"What it is made of, batch {report.batch}")
    right.set_title("Peak by batch")
    for axes in (left, right):
        axes.axhline(budget / GIB, color=THEME["ink"], linewidth=1.4, linestyle=(0, (5, 3)))
        axes.set_xscale("log", base=2)
        axes.set_xlim(contexts[0], contexts[-1])
        ticks = [context for context in contexts if context & (context - 1) == 0][::-2]
        axes.set_xticks(ticks, [short(context) for context in ticks])
        axes.minorticks_off()
        axes.set_xlabel("context (tokens)")
        axes.plot(report.context, report.peak / GIB, "o", color=THEME["ink"], markersize=5, zorder=5, clip_on=False)
    left.set_ylim(0, height)
    left.set_ylabel("GiB")
    text, place = f"budget {budget / GIB:.2f} GiB", (contexts[0], budget / GIB)
    left.annotate(text, place, (6, 5), textcoords="offset points", color=THEME["ink"])
    return figure


def draw_parts(axes: Axes, reports: Sequence[MemoryReport]) -> None:
    each = [parts_of(report) for report in reports]
    stacks = [[parts[key] for parts in each] for key in PARTS]
    labels, shades = zip(*PARTS.values(), strict=True)
    axes.stackplot(
        [report.context for report in reports], stacks, labels=labels, colors=shades, alpha=0.85, linewidth=0
    )
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], loc="lower left", frameon=True, facecolor=THEME["paper"], edgecolor="none")


def draw_batches(axes: Axes, contexts: Sequence[int], peaks: dict[int, list[float]], requested: int) -> None:
    for number, (batch, line) in enumerate(peaks.items()):
        width = 2.6 if batch == requested else 1.5
        axes.plot(contexts, line, color=SHADES[number % len(SHADES)], linewidth=width, label=f"{batch}")
    axes.legend(title="batch", loc="lower right", frameon=False, ncols=4)


def short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 else f"{tokens}"


def draw_memory(folder: Path, name: str, estimate: Estimate) -> None:
    """`memory_plot` of an estimate, in both formats."""
    config, report, answer = estimate.config, estimate.memory, estimate.verdict
    figure = memory_plot(name, config, report, answer.budget, places(estimate))
    for save in (save_png, save_svg):
        save(figure, folder, "memory")
