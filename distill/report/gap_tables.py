"""The tables of gap.json as a terminal shows them: (title, columns, rows) each, intervals of 95% over documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .gap_rows import TITLES, estimates, pair_rows, probe_rows, task_rows, titles

TableText = tuple[str, Sequence[str], Sequence[Sequence[str]]]
FIGURES = ("bits_per_byte", "cross_entropy", "kl", "agreement")
FURTHER = ("reverse_kl", "top5_agreement", "mean_rank", "mass_kept", "ece", "length")


def gap_tables(gap: Mapping[str, Any]) -> Iterator[TableText]:
    """The figures, how near the students are, probes and tasks where there are any, and how two students differ."""
    models, figures = gap["models"], estimates(gap)
    rows = [
        (f"{name}\n{gap['parameters'][name]:,}", *(interval(each[key]) for key in FIGURES))
        for name, each in figures.items()
    ]
    title = f"Held-out text: {gap['tokens']:,} tokens of {gap['documents']} documents (95% intervals over documents)"
    yield title, ("model\nparameters", *titles(FIGURES)), rows
    rows = [
        (TITLES[key], *(interval(each[key]) if each[key] else "" for each in figures.values()))
        for key in FURTHER
        if any(each[key] for each in figures.values())
    ]
    yield "Nearness to the teacher, and calibration", ("", *models), rows
    if gap["probes"]:
        rows = [(label, *map(answered, answers)) for label, answers in probe_rows(gap)]
        yield "Retrieval: share of probes answered, and nats of an answer", ("", *models), rows
    if gap["tasks"]:
        yield task_table(gap["tasks"])
    pairs = [(label, *cells) for label, cells in pair_rows(gap, FIGURES, interval, "\n- ")]
    if pairs:
        yield "Differences between students, paired by document", ("", *titles(FIGURES)), pairs


def task_table(tasks: Mapping[str, Mapping[str, Mapping[str, float]]]) -> TableText:
    """A row for each task and metric, a column for each model, with standard errors."""
    return "Tasks (lm-evaluation-harness)", ("task, metric", *tasks), [*task_rows(tasks)]


def answered(figures: Mapping[str, Any]) -> str:
    return f"{interval(figures['answered'])}\n{figures['nats']['value']:.1f} nats"


def recovery_line(gap: Mapping[str, Any]) -> str:
    """A sentence on what distillation gave back; empty where nothing was pruned and distilled."""
    recovery = gap["recovery"]
    if recovery is not None:
        if recovery["low"] is None:
            return f"recovered of what pruning lost: {recovery['value']:.1%}"
        shares = (f"{recovery[key]:.1%}" for key in ("value", "low", "high"))
        return "recovered of what pruning lost: {} ({} to {})".format(*shares)
    if {"pruned", "distilled"} <= gap["models"].keys():
        return "recovered: not said, since pruning lost nothing that these documents show"
    return ""


def interval(estimate: Mapping[str, Any], sign: str = "", p: float | None = None) -> str:
    """A value over its interval: two lines, and a third for a p-value."""
    lines = [f"{estimate['value']:{sign}.4f}"]
    if estimate["low"] is not None:
        lines.append(f"{estimate['low']:.3f}..{estimate['high']:.3f}")
    return "\n".join([*lines, *([] if p is None else [f"p {p:.3f}"])])
