"""The page that shows a compression: it stands alone, without network, and is made from the stages' files alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from safetensors.numpy import load_file

from ...models.axes import AXES
from ...models.errors import InputError
from ...models.foreign import read_lines, read_object
from ...models.kinds import kinds_of
from ...models.variants import LETTERS
from . import plots
from .experts import expert_section
from .gap_sections import cards, gap_sections
from .origin import model_section, run_lines, stage_section
from .page import Cell, Section, Table, drawn, size
from .words import DEPTH_METRICS, removal_steps

TINY = 0.02  # of the budget: below it what is left is all that counts
BRIEF = ("weights", "together", "budget")


def write_page(
    folder: Path,
    name: str,
    *,
    title: str,
    gap: Mapping[str, Any],
    provenance: Mapping[str, Mapping[str, Any]],
    scores: Path | None = None,
    metrics: Path | None = None,
    memory: Mapping[str, Any] | None = None,
    selection: Mapping[str, Any] | None = None,
    models: Mapping[str, str] | None = None,
    run: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `folder/name`, and its plots as PNG in `folder/plots`; returns the page's path.

    `gap` is gap.json's content with "parameters", `provenance` limbeck.json's content of each stage; `scores` a
    scores folder, `metrics` a metrics.jsonl, `memory` the memory-fit results by model, `selection` selection.json's
    content, `models` where each model comes from, `run` what limbeck.json says of the run that writes the page: what is
    not given is left out of the page.
    """
    sections = [*model_section(gap, models or {}), *gap_sections(folder, gap)]
    if metrics is not None:
        sections += training_section(folder, metrics)
    if scores is not None:
        sections += importance_sections(folder, scores, selection)
        content = json.loads((scores / "scores.json").read_text(encoding="utf-8"))
        sections += expert_section(content.get("expert_uses", {}), selection, gap.get("expert_uses", {}))
    if memory is not None:
        sections.append(memory_section(folder, memory))
    sections += stage_section(gap, provenance)
    sections.append(Section("Provenance", "What made each folder, from what. Files are known by their BLAKE3 sums."))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    text = environment.get_template("report.html.jinja").render(
        title=title,
        run=run_lines(run or {}),
        lead=f"{gap['tokens']:,} held-out tokens of {gap['documents']:,} documents. Intervals are 95%, over documents.",
        cards=list(cards(gap, memory)),
        sections=sections,
        stages=[(stage, made(facts), json.dumps(facts, indent=1)) for stage, facts in provenance.items()],
    )
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def training_section(folder: Path, metrics: Path) -> Iterator[Section]:
    """Nothing of a file that is another tool's."""
    records = training_records(metrics)
    curves = {"loss": "Training loss", "validation_kl": "KL on validation files (nats)"}
    pictures = [
        drawn(folder, plots.training_curve(records, key, title), f"training-{key.replace('_', '-')}", f"Curve: {title}")
        for key, title in curves.items()
        if any(key in record for record in records)
    ]
    if pictures:
        last = records[-1]
        yield Section("Distillation", f"{last['step']:,} steps, {last['tokens']:,} tokens.", pictures)


def training_records(metrics: Path) -> list[dict[str, float]]:
    """The numbers in the lines of a metrics.jsonl that have their step and tokens."""
    try:
        lines = read_lines(metrics)
    except InputError:
        return []
    numbers = [{key: value for key, value in line.items() if is_number(value)} for line in lines]
    return [record for record in numbers if {"step", "tokens"} <= record.keys()]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def importance_sections(folder: Path, scores: Path, selection: Mapping[str, Any] | None) -> Iterator[Section]:
    """Units by axis, and layers in the order of their removal."""
    content = read_object(scores / "scores.json")
    units = unit_scores(scores, content["pattern"], selection)
    kept = {} if selection is None else kept_units(units, selection)
    turned = "" if selection is None else directions(units, selection)
    if turned:
        del units["hidden"]
    pictures = []
    for kind, row in AXES.items():
        names = [name for name in units if name.partition("(")[0] == kind]
        labels = {name: f"layer {name.partition('(')[2][:-1]}" if len(names) < 9 else name.partition("(")[2][:-1]
                  for name in names}  # fmt: skip
        if names:
            above = {"" if kind == "hidden" else labels[name]: units[name] for name in names}
            stays = {"" if kind == "hidden" else labels[name]: kept[name] for name in names if name in kept}
            figure = plots.importance(row.title[:1].upper() + row.title[1:], above, stays)
            name = f"importance-{kind.replace('_', '-')}"
            pictures.append(drawn(folder, figure, name, f"Sorted importance of {row.title}", wide=True))
    note = f"Sorted within each layer, relative to its largest{'' if selection is None else '; pale: removed'}. "
    note += turned or "Channels are summed over the norms of the layers kept."
    yield Section("Importance of units", note, pictures)
    order, values, candidates = (content["layers"][key] for key in ("order", "values", "candidates"))
    name = DEPTH_METRICS[content["layers"]["metric"]]
    if not order:
        return
    removed = [] if selection is None else [layer for layer in order if layer not in selection["layers"]]
    pictures, tables = [], []
    if candidates:
        first = {int(layer): value for layer, value in candidates[0].items()}
        figure = plots.layers(content["pattern"], removed, first, name, len(order) // max(len(values), 1))
        pictures = [drawn(folder, figure, "layers", f"Bars: {name} without each of them", wide=True)]
    if values:
        rows = []
        for step, (layers, value) in enumerate(removal_steps(order, values), 1):
            kinds = ", ".join(f"{layer} ({kinds_of(content['pattern'], LETTERS)[layer].name})" for layer in layers)
            state = [] if selection is None else [Cell("removed" if set(layers) <= set(removed) else "kept")]
            rows.append((str(step), [Cell(kinds), Cell(f"{value:.4g}"), *state]))
        layer = "layer" if len(order) == len(values) else "layers"
        columns = ["step", layer, name, *([] if selection is None else [""])]
        tables = [Table("In the order of removal", columns, rows)]
    each = "layer that is" if len(order) == len(values) else "layers that are"
    note = f"Each step removes the {each} missed least; measured by the {name}."
    note += " Orange: removed." if removed else ""
    yield Section("Importance of layers", note, pictures, tables)


def memory_section(folder: Path, memory: Mapping[str, Any]) -> Section:
    fit = next(iter(memory.values()))
    lines = {
        "weights": lambda fit: size(fit["memory"]["weights"]),
        "key-value cache": lambda fit: size(fit["memory"]["kv"]),
        "SSM states": lambda fit: size(fit["memory"]["ssm"]),
        "convolution states": lambda fit: size(fit["memory"]["conv"]),
        "together": lambda fit: size(fit["memory"]["total"]),
        "budget": lambda fit: size(fit["verdict"]["budget"]),
        "margin": lambda fit: size(fit["verdict"]["margin"]),
        "largest context": lambda fit: "any" if (longest := fit["verdict"]["largest_context"]) < 0 else f"{longest:,}",
        "largest batch": lambda fit: f"{fit['verdict']['largest_batch']:,}",
        "vLLM: tokens a block": lambda fit: f"{fit['memory']['vllm']['block_size']:,}",
        "vLLM: cache of one request": lambda fit: size(fit["memory"]["vllm"]["bytes_per_request"]),
        "vLLM: requests at once": lambda fit: f"{fit['memory']['vllm']['max_num_seqs']:,}",
    }
    if any(fit.get("throughput") for fit in memory.values()):
        lines["estimated tokens a second"] = lambda fit: estimated(fit, "tokens_per_second")
        lines["at a batch of"] = lambda fit: estimated(fit, "batch")
    rows = [(line, [Cell(text(fit)) for fit in memory.values()]) for line, text in lines.items()]
    hardware, bytes_ = fit["hardware"], fit["memory"]
    several = fit.get("tensor_parallel", 1)
    card = hardware["name"] if several == 1 else f"each of {several} {hardware['name']}"
    share = max(fit["memory"]["total"] for fit in memory.values()) / max(fit["verdict"]["budget"], 1)
    few = share < TINY
    if few:  # a picture of what is nothing beside the card would take more place than it says
        columns = ["", *memory]
        short, rest = [row for row in rows if row[0] in BRIEF], [row for row in rows if row[0] not in BRIEF]
        tables = [
            Table("", columns, short),
            Table("Caches, limits, and what vLLM would do", columns, rest, folded=True),
        ]
    else:
        tables = [Table("", ["", *memory], rows)]
    return Section(
        "Memory",
        f"{bytes_['context']:,} tokens \N{MULTIPLICATION SIGN} {bytes_['batch']} on {card}: of"
        f" {hardware['usable_gib']:g} GiB usable a budget of {size(fit['verdict']['budget'])}; the largest model takes"
        f" {share:.1%} of it.",
        [] if few else [drawn(folder, plots.memory_bars(memory), "memory", "Stacked bars: memory of each model")],
        tables,
    )


def estimated(fit: Mapping[str, Any], what: str) -> str:
    """A figure of the throughput estimate, nothing where there is none."""
    speed = fit.get("throughput")
    return f"{speed[what]:,.0f}" if speed else ""


def made(facts: Mapping[str, Any]) -> list[str]:
    """What a stage's row says: what made it, its seed, versions, and its fingerprint."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return [facts["made_by"], str(facts["options"].get("seed", "")), versions, facts["fingerprint"]]


def unit_scores(folder: Path, pattern: str, selection: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
    """One score a unit, by axis, added up as in choosing: channels over the norms that stay, units that have others
    within them (Mamba heads) over those of them that stay; and these, where any was cut, over the units."""
    tensors = load_file(folder / "scores.safetensors")
    kept = {} if selection is None else selection["kept"]
    within = {row.within: row.name for row in AXES.values() if row.within is not None}
    scores: dict[str, np.ndarray] = {}
    for name in sorted(tensors, key=lambda name: int(name.partition(".")[2] or -1)):
        values = tensors[name]
        kind, _, layer = name.partition(".")
        axis = f"{kind}({layer})" if layer else kind
        if kind == "hidden":
            stay = range(len(pattern)) if selection is None else selection["layers"]
            values = values[[*stay, len(pattern)]].sum(0)
        elif kind in within:
            inner = f"{within[kind]}({layer})"
            columns = kept.get(inner)
            if columns is not None:
                scores[inner] = np.linalg.norm(values, axis=0)
            values = np.linalg.norm(values if columns is None else values[:, columns], axis=1)
        scores[axis] = values
    return scores


def directions(units: Mapping[str, Any], selection: Mapping[str, Any]) -> str:
    """What stands for the picture of the channels where none of them was removed but what a rotation made of them."""
    count = selection.get("principal_directions")
    if count is None:
        return ""
    return f"Of the residual stream {count:,} of {len(units['hidden']):,} principal directions stay, by their variance."


def kept_units(units: Mapping[str, Any], selection: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """The units of each axis that stay: none of a removed layer, all of an axis that was not cut."""
    kept = {}
    for name, values in units.items():
        layer = name.partition("(")[2].rstrip(")")
        gone = layer != "" and int(layer) not in selection["layers"]
        kept[name] = [] if gone else selection["kept"].get(name, list(range(len(values))))
    return kept
