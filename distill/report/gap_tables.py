"""The tables of gap.json as a terminal shows them: (title, columns, rows) each, intervals of 95% over documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..gap.measure import TEACHER
from .gap_sections import task_rows

TableText = tuple[str, Sequence[str], Sequence[Sequence[str]]]
FIGURES = {
    "bits_per_byte": "bits per byte",
    "cross_entropy": "cross-entropy",
    "kl": "KL to teacher",
    "agreement": "top-1 agreement",
}
FURTHER = {
    "reverse_kl": "KL from teacher",
    "top5_agreement": "top-5 agreement",
    "mean_rank": "mean rank",
    "mass_kept": "probability mass kept",
}


def gap_tables(gap: Mapping[str, Any]) -> Iterator[TableText]:
    """The figures, how near the students are, probes and tasks where there are any, and how two students differ."""
    models = gap["models"]
    rows = [
        (f"{name}\n{gap['parameters'][name]:,}", *(interval(figures[key]) for key in FIGURES))
        for name, figures in models.items()
    ]
    title = f"Held-out text: {gap['tokens']:,} tokens of {gap['documents']} documents (95% intervals over documents)"
    yield title, ("model\nparameters", *FIGURES.values()), rows
    yield "Nearness to the teacher, and calibration", ("", *models), nearness(models, gap["continuation"])
    if gap["probes"]:
        rows = [
            (f"{kind}, {int(length):,} tokens", *(answered(figures[name]) for name in models))
            for kind, lengths in gap["probes"].items()
            for length, figures in lengths.items()
        ]
        yield "Retrieval: share of probes answered, and nats of an answer", ("", *models), rows
    if gap["tasks"]:
        yield task_table(gap["tasks"])
    pairs = [
        (f"{pair['second']}\n- {pair['first']}", *(interval(pair[key], "+", pair["p"][key]) for key in FIGURES))
        for pair in gap["differences"]
        if pair["first"] != TEACHER
    ]
    if pairs:
        yield "Differences between students, paired by document", ("", *FIGURES.values()), pairs


def nearness(models: Mapping[str, Any], continuation: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The further figures, a line each."""
    rows = [(title, *(interval(figures[key]) for figures in models.values())) for key, title in FURTHER.items()]
    errors = (interval(figures["calibration"]["ece"]) for figures in models.values())
    rows.append(("calibration error (ECE)", *errors))
    if continuation:
        tokens = next(iter(continuation.values()))["new_tokens"]
        lengths = (interval(continuation[name]["length"]) if name in continuation else "" for name in models)
        rows.append((f"same greedy text, of {tokens} tokens", *lengths))
    return rows


def task_table(tasks: Mapping[str, Mapping[str, Mapping[str, float]]]) -> TableText:
    """A row for each task and metric, a column for each model, with standard errors."""
    return "Tasks (lm-evaluation-harness)", ("task, metric", *tasks), [*task_rows(tasks)]


def answered(figures: Mapping[str, Any]) -> str:
    return f"{interval(figures['answered'])}\n{figures['nats']['value']:.1f} nats"


def recovery_line(gap: Mapping[str, Any]) -> str:
    """A sentence on what distillation gave back; empty where nothing was pruned and distilled."""
    recovery = gap["recovery"]
    if recovery is not None:
        shares = (f"{recovery[key]:.1%}" for key in ("value", "low", "high"))
        return "recovered of what pruning lost: {} ({} to {})".format(*shares)
    if {"pruned", "distilled"} <= gap["models"].keys():
        return "recovered: not said, since pruning lost nothing that these documents show"
    return ""


def interval(estimate: Mapping[str, float], sign: str = "", p: float | None = None) -> str:
    """A value over its interval: two lines, and a third for a p-value."""
    lines = [f"{estimate['value']:{sign}.4f}", f"{estimate['low']:.3f}..{estimate['high']:.3f}"]
    return "\n".join([*lines, *([] if p is None else [f"p {p:.3f}"])])
