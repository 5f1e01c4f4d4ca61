"""The report's pictures: matplotlib figures as SVG text for the page, and as PNG beside it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

COLOURS = {"teacher": "#4c6fa5", "pruned": "#c8553d", "distilled": "#3a8f6b"}
SPARE = ("#8a6db1", "#b58a3c", "#5b9aa0", "#9a5b7f")
# Text as text: smaller, searchable, and read out by screen readers. A fixed salt makes equal plots equal bytes.
matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "limbeck",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "figure.facecolor": "white",
    }
)


def colour(name: str, number: int) -> str:
    return COLOURS.get(name, SPARE[number % len(SPARE)])


def finish(figure: Figure, folder: Path, name: str) -> str:
    """Writes plots/NAME.png and .svg, and gives the SVG for the page."""
    (folder / "plots").mkdir(exist_ok=True)
    figure.savefig(folder / "plots" / f"{name}.png", dpi=144, bbox_inches="tight", metadata={"Software": None})
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    (folder / "plots" / f"{name}.svg").write_text(svg, encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    # Several pictures share the page, so that their ids must not clash.
    svg = re.sub(r'(id="|href="#|url\(#)', lambda found: f"{found.group(1)}{name}-", svg)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)


def gap_bars(models: Mapping[str, Any]) -> Figure:
    """Bits per byte, KL and agreement of every model, with their intervals."""
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    panels = (("bits_per_byte", "bits per byte"), ("kl", "KL to the teacher (nats)"), ("agreement", "top-1 agreement"))
    for axes, (key, title) in zip(figure.subplots(1, 3), panels, strict=True):
        values = [models[name][key]["value"] for name in models]
        errors = [
            [abs(models[name][key]["value"] - models[name][key]["low"]) for name in models],
            [abs(models[name][key]["high"] - models[name][key]["value"]) for name in models],
        ]
        colours = [colour(name, number) for number, name in enumerate(models)]
        bars = axes.bar(list(models), values, yerr=errors, color=colours, width=0.62, capsize=3)
        axes.bar_label(bars, [f"{value:.3f}" for value in values], padding=3, fontsize=9)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.18)
    return figure


def kl_by_position(models: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 2.7), layout="constrained")
    axes = figure.subplots()
    for number, (name, found) in enumerate(models.items()):
        if name != "teacher":
            places, values = zip(*found["kl_by_position"], strict=True)
            axes.step(places, values, where="post", color=colour(name, number), label=name, linewidth=2)
    axes.set(xlabel="position in the row (tokens)", ylabel="KL (nats)", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def training_curve(records: Sequence[Mapping[str, float]]) -> Figure:
    """Loss of each logged step, and the held-out figures."""
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    tokens = [record["tokens"] for record in records]
    left.plot(tokens, [record["loss"] for record in records], color=COLOURS["distilled"])
    left.set(xlabel="tokens", ylabel="training loss", ylim=(0, None))
    held = [record for record in records if "validation_kl" in record]
    right.plot([r["tokens"] for r in held], [r["validation_kl"] for r in held], "o-", color=COLOURS["distilled"])
    right.set(xlabel="tokens", ylabel="held-out KL (nats)", ylim=(0, None))
    return figure


def importance(scores: Mapping[str, np.ndarray], kept: Mapping[str, Sequence[int]]) -> Figure:
    """Every unit's score, sorted within its axis and relative to the axis's largest; what was cut is pale."""
    kinds = ("hidden", "ffn", "mamba_heads", "attn_heads")
    rows = [(kind, [name for name in scores if name.split("(")[0] == kind]) for kind in kinds]
    rows = [(kind, names) for kind, names in rows if names]
    figure = Figure(figsize=(9, 2.2 * len(rows)), layout="constrained")
    titles = {"hidden": "residual channels", "ffn": "FFN neurons", "mamba_heads": "Mamba heads",
              "attn_heads": "attention heads"}  # fmt: skip
    for axes, (kind, names) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        offset = 0
        for name in names:
            values = scores[name] / max(scores[name].max(), 1e-30)
            stays = np.isin(np.arange(len(values)), list(kept.get(name, range(len(values)))))
            order = np.argsort(-values, kind="stable")
            places = offset + np.arange(len(values))
            colours = np.where(stays[order], COLOURS["teacher"], "#d9c6bf")
            axes.bar(places, values[order], width=1.0, color=colours)
            if len(names) > 1:
                axes.text(offset + len(values) / 2, 1.04, name[len(kind) :], ha="center", fontsize=8)
            offset += len(values) + max(2, len(values) // 12)
        axes.set_title(f"{titles[kind]} (pale: removed)", fontsize=10, loc="left", pad=12)
        axes.set(ylim=(0, 1.02), xticks=[], ylabel="score")
        axes.grid(axis="x", visible=False)
    return figure


def layers(pattern: str, order: Sequence[int], candidates: Sequence[Mapping[int, float]]) -> Figure:
    """How much the logits miss each layer at the first step; the removed ones are marked."""
    figure = Figure(figsize=(9, 2.7), layout="constrained")
    axes = figure.subplots()
    first = candidates[0]
    places = sorted(first)
    colours = [COLOURS["pruned"] if layer in order else COLOURS["teacher"] for layer in places]
    axes.bar([str(layer) for layer in places], [first[layer] for layer in places], color=colours)
    axes.set_xticks(range(len(places)), [f"{layer}\n{pattern[layer]}" for layer in places])
    axes.set(yscale="log", ylabel="logit MSE without it", xlabel="layer (red: removed)")
    axes.grid(axis="x", visible=False)
    return figure


def memory_bars(fits: Mapping[str, Any]) -> Figure:
    """Stacked bytes of each model against the budget."""
    figure = Figure(figsize=(9, 0.75 + 0.62 * len(fits)), layout="constrained")
    axes = figure.subplots()
    parts = (("weights", "#4c6fa5"), ("kv", "#b58a3c"), ("ssm", "#3a8f6b"), ("conv", "#8a6db1"))
    largest = max(fit["memory"]["total"] for fit in fits.values())
    unit, name = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
    for number, (part, shade) in enumerate(parts):
        before = [sum(fit["memory"][earlier] for earlier, _ in parts[:number]) / unit for fit in fits.values()]
        widths = [fit["memory"][part] / unit for fit in fits.values()]
        axes.barh(list(fits), widths, left=before, color=shade, label=part, height=0.6)
    budget = next(iter(fits.values()))["verdict"]["budget"] / unit
    if budget < 4 * largest / unit:
        axes.axvline(budget, color="#c8553d", linestyle="--", label="budget")
    axes.set_xlabel(name)
    axes.invert_yaxis()
    axes.legend(frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.grid(axis="y", visible=False)
    return figure
