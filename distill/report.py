"""The page that shows a compression: it stands alone, without network, and is made from the stages' files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from safetensors.numpy import load_file

from . import plots

COLUMNS = {
    "parameters": "parameters",
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity",
    "kl": "KL to teacher",
    "agreement": "top-1 agreement",
}


def write_page(
    folder: Path,
    name: str,
    *,
    title: str,
    gap: Mapping[str, Any],
    provenance: Mapping[str, Any],
    scores: Path | None = None,
    metrics: Path | None = None,
    memory: Mapping[str, Any] | None = None,
    selection: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `folder/name`, and its plots as PNG and SVG below `folder/plots`; returns the page's path.

    `gap` is gap.json's content with "parameters"; `scores` a scores folder, `metrics` a metrics.jsonl, `memory` the
    memory-fit results by model, `selection` selection.json's content: what is not given is left out of the page.
    """
    pictures = list(draw(folder, gap, scores, metrics, memory, selection))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    text = environment.get_template("report.html.jinja").render(
        title=title,
        lead=f"{gap['tokens']:,} held-out tokens of {gap['documents']} documents; intervals are 95%, over documents.",
        cards=cards(gap, memory),
        columns=list(COLUMNS.values()),
        rows=[{"name": model, "cells": cells(gap, model)} for model in gap["models"]],
        pictures=pictures,
        provenance={key: json.dumps(value, indent=1) for key, value in provenance.items()},
    )
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def cards(gap: Mapping[str, Any], memory: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """The few figures to read first."""
    parameters, models = gap["parameters"], gap["models"]
    found = []
    best = next((name for name in ("distilled", *models) if name in models and name != "teacher"), None)
    if best is not None:
        share = parameters[best] / parameters["teacher"]
        found.append({"value": f"{share:.0%}", "label": f"of the teacher's {parameters['teacher']:,} parameters"})
        found.append({"value": f"{models[best]['bits_per_byte']['value']:.3f}", "label": f"bits per byte, {best}"})
        found.append(
            {"value": f"{models[best]['agreement']['value']:.1%}", "label": "top-1 agreement with the teacher"}
        )
    found.insert(1, {"value": f"{models['teacher']['bits_per_byte']['value']:.3f}", "label": "bits per byte, teacher"})
    if gap["recovery"] is not None:
        found.append({"value": f"{gap['recovery']['value']:.0%}", "label": "of the loss that pruning cost, recovered"})
    if memory is not None:
        fit = memory["student"]
        verdict = "fits" if fit["verdict"]["fits"] else "does not fit"
        context = f"{fit['memory']['context']:,} tokens x {fit['memory']['batch']}"
        found.append({"value": verdict, "label": f"{fit['hardware']['name']} at {context}"})
    return found


def cells(gap: Mapping[str, Any], model: str) -> list[dict[str, str]]:
    row = [{"value": f"{gap['parameters'][model]:,}", "range": ""}]
    for key in list(COLUMNS)[1:]:
        figure = gap["models"][model][key]
        row.append({"value": f"{figure['value']:.4f}", "range": f"{figure['low']:.4f} to {figure['high']:.4f}"})
    return row


def draw(
    folder: Path,
    gap: Mapping[str, Any],
    scores: Path | None,
    metrics: Path | None,
    memory: Mapping[str, Any] | None,
    selection: Mapping[str, Any] | None,
) -> Any:
    """The pictures that the given files allow, as {title, svg, caption}."""

    def picture(figure: Any, name: str, title: str, caption: str) -> dict[str, Any]:
        return {"title": title, "svg": Markup(plots.finish(figure, folder, name)), "caption": caption}

    yield picture(plots.gap_bars(gap["models"]), "gap", "The gap", "Whiskers are 95% intervals over documents.")
    if len(gap["models"]) > 1:
        yield picture(
            plots.kl_by_position(gap["models"]),
            "position",
            "Along the context",
            "Mean KL to the teacher at each position of the row.",
        )
    if metrics is not None:
        records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        caption = "Left the loss of each logged step, right the KL on validation files."
        yield picture(plots.training_curve(records), "training", "Distillation", caption)
    if scores is not None:
        found = json.loads((scores / "scores.json").read_text(encoding="utf-8"))
        units = unit_scores(scores)
        kept = {} if selection is None else kept_units(units, selection)
        caption = "Sorted within each layer, relative to its largest; hidden channels are summed over all norms."
        yield picture(plots.importance(units, kept), "importance", "Importance of units", caption)
        candidates = [{int(k): v for k, v in step.items()} for step in found["layers"]["candidates"]]
        if candidates:
            figure = plots.layers(found["pattern"], found["layers"]["order"], candidates)
            caption = "Mean squared change of the logits when one layer is left out, before any was."
            yield picture(figure, "layers", "Importance of layers", caption)
    if memory is not None:
        caption = "Weights, key-value cache, SSM and convolution states."
        yield picture(plots.memory_bars(memory), "memory", "Memory", caption)


def unit_scores(folder: Path) -> dict[str, Any]:
    """One score a unit, by axis: matrices of heads and channels, and the norms' rows, are summed up as in choosing."""
    found = {}
    tensors = load_file(folder / "scores.safetensors")
    for name in sorted(tensors, key=lambda name: int(name.partition(".")[2] or -1)):
        values = tensors[name]
        kind, _, layer = name.partition(".")
        if kind == "hidden":
            values = values.sum(0)
        elif values.ndim == 2:
            values = (values**2).sum(1) ** 0.5
        found[f"{kind}({layer})" if layer else kind] = values
    return found


def kept_units(units: Mapping[str, Any], selection: Mapping[str, Any]) -> dict[str, Any]:
    """The units of each axis that stay: none of a removed layer, all of an axis that was not cut."""
    kept = {}
    for name, values in units.items():
        layer = name.partition("(")[2].rstrip(")")
        gone = layer != "" and int(layer) not in selection["layers"]
        kept[name] = [] if gone else selection["kept"].get(name, list(range(len(values))))
    return kept
