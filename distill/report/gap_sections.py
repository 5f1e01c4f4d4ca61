"""The page's part on the gap: cards, figures of every model, where the divergence is, and the worst inputs."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import plots
from .page import Cell, Example, Section, Table, cell, drawn, size

FIGURES = {
    "bits_per_byte": "bits per byte",
    "cross_entropy": "cross-entropy",
    "perplexity": "perplexity",
    "kl": "KL to teacher",
    "agreement": "top-1 agreement",
}
NEARNESS = {
    "reverse_kl": "KL from teacher",
    "top5_agreement": "top-5 agreement",
    "mean_rank": "mean rank",
    "mass_kept": "mass kept",
}
GROUPS = {"by_class": "kind of token", "by_domain": "domain"}
SHADES = (0.1, 0.3, 1.0, 2.0, 4.0)  # nats from which on a token is coloured more strongly
TEACHER = "teacher"


def students(gap: Mapping[str, Any]) -> list[str]:
    return [name for name in gap["models"] if name != TEACHER]


def best_student(gap: Mapping[str, Any]) -> str | None:
    """The student that a page speaks of where it speaks of one."""
    names = students(gap)
    return "distilled" if "distilled" in names else names[0] if names else None


def cards(gap: Mapping[str, Any], memory: Mapping[str, Any] | None) -> Iterator[dict[str, str]]:
    """The few figures to read first."""
    parameters, models = gap["parameters"], gap["models"]
    teacher = models[TEACHER]["bits_per_byte"]["value"]
    best = best_student(gap)
    if best is None:
        yield {"value": f"{teacher:.3f}", "label": "bits per byte", "kind": ""}
        yield {"value": f"{parameters[TEACHER]:,}", "label": "parameters", "kind": ""}
    else:
        found = models[best]
        share = f"of the teacher's parameters: {parameters[best]:,} of {parameters[TEACHER]:,}"
        yield {"value": f"{parameters[best] / parameters[TEACHER]:.0%}", "label": share, "kind": ""}
        label = f"bits per byte, {best}; teacher {teacher:.3f}"
        yield {"value": f"{found['bits_per_byte']['value']:.3f}", "label": label, "kind": ""}
        yield {"value": f"{found['kl']['value']:.3f}", "label": "nats a token, KL to the teacher", "kind": ""}
        label = "of tokens: the teacher's first choice too"
        yield {"value": f"{found['agreement']['value']:.1%}", "label": label, "kind": ""}
    if gap["recovery"] is not None:
        label = "of the loss that pruning cost, recovered"
        yield {"value": f"{gap['recovery']['value']:.0%}", "label": label, "kind": ""}
    fit = None if memory is None else memory.get("student") or memory.get(best or TEACHER)
    if fit is not None:
        fits = fit["verdict"]["fits"]
        place = f"{fit['hardware']['name']} at {fit['memory']['context']:,} tokens \N{MULTIPLICATION SIGN} "
        label = f"{'fits' if fits else 'does not fit'} {place}{fit['memory']['batch']}"
        yield {"value": size(fit["memory"]["total"]), "label": label, "kind": "good" if fits else "bad"}


def gap_sections(folder: Path, gap: Mapping[str, Any]) -> Iterator[Section]:
    """Figures, differences, and (where they were measured) context, groups, calibration, and the worst inputs."""
    yield figures_section(folder, gap)
    if students(gap):
        yield from where_section(folder, gap)
    yield from probe_section(gap)
    yield from task_section(gap)
    if students(gap):
        yield from worst_section(gap)


def figures_section(folder: Path, gap: Mapping[str, Any]) -> Section:
    models = gap["models"]
    overview = plots.gap_bars(models)
    plots.save_png(overview, folder, "gap")
    plots.save_svg(overview, folder, "gap")
    label = f"Bars of {', '.join(models)}: "
    pictures = [
        drawn(folder, plots.gap_bars(models, [key]), f"gap-{key.replace('_', '-')}", label + title)
        for key, title in plots.METRICS.items()
    ]
    if len(models) > 1:
        pictures.append(drawn(folder, plots.kl_by_position(models), "gap-position", "Lines: KL along the row"))
    rows = [
        (name, [Cell(f"{gap['parameters'][name]:,}"), *(cell(found[key]) for key in FIGURES)])
        for name, found in models.items()
    ]
    tables = [Table("", ["model", "parameters", *FIGURES.values()], rows)]
    if students(gap):
        tables.append(nearness_table(gap))
    if len(models) > 2:
        tables.append(difference_table(gap))
    return Section(
        "Teacher and students on held-out text",
        "Cross-entropy and KL in nats a token. Whiskers and the second lines are 95% intervals over documents.",
        pictures,
        tables,
    )


def nearness_table(gap: Mapping[str, Any]) -> Table:
    """How near a model is to the teacher by other measures; how far its confidence is from being right."""
    written = gap.get("continuation") or {}
    columns = ["model", *NEARNESS.values(), "ECE"]
    rows = []
    for name, found in gap["models"].items():
        cells = [cell(found[key]) for key in NEARNESS]
        rank = found["mean_rank"]
        cells[2] = Cell(
            f"{rank['value']:.2f}", f"{rank['low']:.2f} to {rank['high']:.2f}; median {found['median_rank']}"
        )
        rows.append((name, [*cells, cell(found["calibration"]["ece"])]))
    if written:
        columns.append("same greedy text")
        for name, cells in rows:
            cells.append(cell(written[name]["length"], digits=1, more=" tokens") if name in written else Cell(""))
    return Table("Nearness to the teacher, and calibration", columns, rows)


def difference_table(gap: Mapping[str, Any]) -> Table:
    pairs = []
    for pair in gap["differences"]:
        cells = [cell(pair[key], "+", more=f"; p {pair['p'][key]:.3f}") for key in FIGURES if key in pair]
        pairs.append((f"{pair['second']} \N{MINUS SIGN} {pair['first']}", cells))
    columns = ["models", *(text for key, text in FIGURES.items() if key != "perplexity")]
    return Table("Differences, paired by document", columns, pairs)


def where_section(folder: Path, gap: Mapping[str, Any]) -> Iterator[Section]:
    """KL by context, kind of token and domain, and calibration."""
    models = gap["models"]
    some = models[students(gap)[0]]
    pictures, tables = [], []
    if len(some["by_context"]) > 1:
        pictures.append(drawn(folder, plots.kl_by_context(models), "gap-context", "Lines: KL by the context seen"))
    if some["calibration"]["bins"]:
        pictures.append(
            drawn(folder, plots.calibration(models), "calibration", "Lines: how often a confidence is right")
        )
    for key, title in GROUPS.items():
        if len(some[key]) > 1:
            name = key.replace("_", "-")
            pictures.append(drawn(folder, plots.kl_by_group(models, key, title), name, f"Points: KL by {title}"))
            tables.append(group_table(gap, key, title))
    if pictures:
        yield Section(
            "Where the gap is",
            "Context: tokens of its document that a token has before it in its row. Calibration: of the tokens"
            " predicted with a confidence, the share that came; ECE is the mean distance from the diagonal. Kinds are"
            " told from a token's text alone.",
            pictures,
            tables,
        )


def group_table(gap: Mapping[str, Any], key: str, title: str) -> Table:
    """A line a group; one that a single document has tells no intervals."""
    names = students(gap)
    groups = sorted(gap["models"][names[0]][key].items(), key=lambda item: -item[1]["tokens"])
    rows = []
    for group, first in groups:
        wanted = [(TEACHER, "cross_entropy"), *((name, kind) for name in names for kind in ("kl", "agreement"))]
        cells = [cell(gap["models"][name][key][group][kind], digits=3) for name, kind in wanted]
        if first["documents"] == 1:
            cells = [Cell(found.value) for found in cells]
        rows.append((group, [Cell(f"{first['tokens']:,}"), Cell(f"{first['documents']:,}"), *cells]))
    kinds = [f"{name}: {kind}" for name in names for kind in ("KL", "top-1")]
    return Table(f"By {title}", [title, "tokens", "documents", "teacher's cross-entropy", *kinds], rows)


def task_rows(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[tuple[str, ...]]:
    """Of {model: {task: {metric: value}}} as lm-evaluation-harness names them: a row for each task and metric."""
    first = next(iter(found.values()))
    for task, metrics in first.items():
        for key in metrics:
            name, _, filtered = key.partition(",")
            if name.endswith("_stderr"):
                continue
            cells = []
            for answers in found.values():
                error = answers[task].get(f"{name}_stderr,{filtered}")
                cells.append(
                    f"{answers[task][key]:.4f}" + ("" if error is None else f" \N{PLUS-MINUS SIGN} {error:.4f}")
                )
            yield f"{task}, {name}", *cells


def task_section(gap: Mapping[str, Any]) -> Iterator[Section]:
    """Answers to task suites, where there are any."""
    found = gap.get("tasks") or {}
    if found:
        rows = [(label, [Cell(value) for value in cells]) for label, *cells in task_rows(found)]
        yield Section(
            "Tasks",
            "Answers to lm-evaluation-harness, with its standard errors.",
            tables=[Table("", ["task, metric", *found], rows)],
        )


def probe_section(gap: Mapping[str, Any]) -> Iterator[Section]:
    """Retrieval from long text, where it was measured."""
    rows = [
        (f"{kind}, {int(length):,} tokens", [cell(found[name][key], digits=digits) for name in gap["models"]
                                             for key, digits in (("answered", 2), ("nats", 1))])
        for kind, lengths in (gap.get("probes") or {}).items()
        for length, found in lengths.items()
    ]  # fmt: skip
    if rows:
        columns = [f"{name}: {what}" for name in gap["models"] for what in ("answered", "nats")]
        yield Section(
            "Retrieval from long text",
            "Share of probes whose value the model's greedy text would give, and the nats of a value's tokens together;"
            " intervals over probes.",
            tables=[Table("", ["probe", *columns], rows)],
        )


def worst_section(gap: Mapping[str, Any]) -> Iterator[Section]:
    """The windows where the best student is furthest from the teacher."""
    best = best_student(gap)
    windows = (gap.get("worst") or {}).get(best, ())
    examples = [
        Example(
            f"{window['document']} \N{MIDDLE DOT} {window['mean_kl']:.2f} nats a token",
            [piece(p) for p in window["pieces"]],
        )
        for window in windows
    ]
    if examples:
        yield Section(
            "Worst inputs",
            f"Stretches where {best} is furthest from the teacher, one a document, each token coloured by its KL"
            " in nats; a pointer on it reads the argmax of both.",
            examples=examples,
            legend=[f"up to {SHADES[0]:g}", *(f"from {shade:g}" for shade in SHADES)],
        )


def piece(found: Mapping[str, Any]) -> tuple[str, int, str]:
    """Text with its line breaks to be seen, its shade, and what a pointer on it reads."""
    text = found["text"].replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n")
    said = f"KL {found['kl']:.2f}; teacher {found['teacher']!r}, student {found['student']!r}"
    return text, bisect.bisect_right(SHADES, found["kl"]), said
