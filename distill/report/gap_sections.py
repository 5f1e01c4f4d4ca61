"""The page's part on the gap: cards, figures of every model, where the divergence is, and the worst inputs."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import plots
from .gap_rows import (
    MEANINGS,
    TEACHER,
    TITLES,
    estimates,
    few_documents,
    pair_rows,
    probe_rows,
    students,
    task_rows,
    titles,
    won_back,
)
from .page import Cell, Example, Section, Table, cell, drawn, size

FIGURES = ("bits_per_byte", "cross_entropy", "perplexity", "kl", "agreement")
LOSSES = ("bits_per_byte", "cross_entropy", "perplexity")  # of which a relative difference says something
NEARNESS = ("reverse_kl", "top5_agreement", "mean_rank", "mass_kept", "ece", "length")
GROUPS = {"by_part": "part of the conversation", "by_class": "kind of token", "by_domain": "domain"}
FURTHEST = 3  # tokens of a stretch that are told in words
SHADES = (0.1, 0.3, 1.0, 2.0, 4.0)  # nats from which on a token is coloured more strongly


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
        figures = models[best]
        share = f"of the teacher's parameters: {parameters[best]:,} of {parameters[TEACHER]:,}"
        yield {"value": f"{parameters[best] / parameters[TEACHER]:.0%}", "label": share, "kind": ""}
        label = f"bits per byte, {best}; teacher {teacher:.3f}"
        yield {"value": f"{figures['bits_per_byte']['value']:.3f}", "label": label, "kind": ""}
        yield {"value": f"{figures['kl']['value']:.3f}", "label": "nats a token, forward KL to the teacher", "kind": ""}
        label = "of tokens: the teacher's first choice too"
        yield {"value": f"{figures['agreement']['value']:.1%}", "label": label, "kind": ""}
    if (share_back := won_back(gap)) is not None:
        label = "of what the plain selection loses, won back by repair and distillation"
        yield {"value": f"{share_back:.0%}", "label": label, "kind": ""}
    elif gap["recovery"] is not None:
        label = "of the loss that pruning cost, recovered"
        yield {"value": f"{gap['recovery']['value']:.0%}", "label": label, "kind": ""}
    fit = None if memory is None else memory.get(best or TEACHER) or memory.get("student")
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
        yield from sample_section(gap)
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
        (name, [Cell(f"{gap['parameters'][name]:,}", "", share_of(gap, name)), *(
            cell(figures[key], beside=models[TEACHER][key] if key in LOSSES else None) for key in FIGURES
        )])
        for name, figures in models.items()
    ]  # fmt: skip
    tables = [Table("", ["model", "parameters", *titles(FIGURES)], rows)]
    if students(gap):
        tables.append(nearness_table(gap))
    if len(models) > 2:
        keys = [key for key in FIGURES if key != "perplexity"]
        pairs = pair_rows(gap, keys, cell, " \N{MINUS SIGN} ", teacher=True)
        tables.append(Table("Differences, paired by document", ["models", *titles(keys)], pairs))
    return Section(
        "Teacher and students on held-out text",
        "Whiskers and the second lines are 95% intervals over documents; a percentage below is the distance from the"
        " teacher's. " + few_documents(gap),
        pictures,
        tables,
        terms=[(TITLES[key], MEANINGS[key]) for key in (*FIGURES, *(NEARNESS if students(gap) else ()))],
    )


def share_of(gap: Mapping[str, Any], name: str) -> str:
    """A student's parameters as a share of the teacher's."""
    return "" if name == TEACHER else f"{gap['parameters'][name] / gap['parameters'][TEACHER]:.1%}"


def nearness_table(gap: Mapping[str, Any]) -> Table:
    """How near a model is to the teacher by other measures; how far its confidence is from being right."""
    keys = NEARNESS if gap.get("continuation") else NEARNESS[:-1]
    rows = []
    for name, figures in estimates(gap).items():
        cells = {key: cell(figures[key]) if figures[key] else Cell("") for key in keys}
        cells["mean_rank"] = cell(figures["mean_rank"], more=f"; median {figures['median_rank']}")
        if figures.get("length"):
            cells["length"] = cell(figures["length"], more=" tokens")
        rows.append((name, list(cells.values())))
    return Table("Nearness to the teacher, and calibration", ["model", *titles(keys)], rows)


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
        if len(some.get(key, ())) > 1:
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
        cells = [cell(gap["models"][name][key][group][kind]) for name, kind in wanted]
        rows.append((group, [Cell(f"{first['tokens']:,}"), Cell(f"{first['documents']:,}"), *cells]))
    kinds = [f"{name}: {kind}" for name in names for kind in ("KL", "top-1")]
    return Table(f"By {title}", [title, "tokens", "documents", "teacher's cross-entropy", *kinds], rows)


def task_section(gap: Mapping[str, Any]) -> Iterator[Section]:
    """Answers to task suites, where there are any."""
    answers = gap.get("tasks") or {}
    if answers:
        rows = [(label, [Cell(value) for value in cells]) for label, *cells in task_rows(answers)]
        yield Section(
            "Tasks",
            "Answers to lm-evaluation-harness, with its standard errors.",
            tables=[Table("", ["task, metric", *answers], rows)],
        )


def probe_section(gap: Mapping[str, Any]) -> Iterator[Section]:
    """Retrieval from long text, where it was measured."""
    rows = [
        (label, [cell(each[key]) for each in answers for key in ("answered", "nats")])
        for label, answers in probe_rows(gap)
    ]
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
            [choice(p) for p in sorted(window["pieces"], key=lambda p: -p["kl"])[:FURTHEST]],
        )
        for window in windows
    ]
    if examples:
        yield Section(
            "Worst inputs",
            f"Stretches where {best} is furthest from the teacher, one a document, each token coloured by its forward"
            " KL in nats; below each the tokens with most of it, and what both models hold most probable instead.",
            examples=examples,
            legend=[f"up to {SHADES[0]:g}", *(f"from {shade:g}" for shade in SHADES)],
        )


def choice(token: Mapping[str, Any]) -> str:
    """What stands in the text, and what teacher and student would have written."""
    return f"{token['kl']:.2f} nats at {token['text']!r}: teacher {token['teacher']!r}, student {token['student']!r}"


def sample_section(gap: Mapping[str, Any]) -> Iterator[Section]:
    """What all models write after the same prompts."""
    samples = gap.get("samples") or ()
    if samples:
        names = [name for name in gap["models"] if name in samples[0]]
        rows = [(sample["prompt"], [Cell(sample[name]) for name in names]) for sample in samples]
        yield Section(
            "Sample continuations",
            "Greedy text after held-out prompts, side by side.",
            tables=[Table("", ["prompt", *names], rows, texts=True, code=True)],
        )


def piece(token: Mapping[str, Any]) -> tuple[str, int, str]:
    """Text with its line breaks to be seen, its shade, and what a pointer on it reads."""
    text = token["text"].replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n")
    said = f"KL {token['kl']:.2f}; teacher {token['teacher']!r}, student {token['student']!r}"
    return text, bisect.bisect_right(SHADES, token["kl"]), said
