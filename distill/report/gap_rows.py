"""What the tables on a gap have in common, whoever writes them: the page, the model card, the terminal.

`gap` is gap.json's content; `write(estimate)` makes a cell of a value with its interval, in the writer's own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ..gap.statistics import Estimate

TEACHER = "teacher"
TITLES = {
    "bits_per_byte": "bits per byte",
    "cross_entropy": "cross-entropy",
    "perplexity": "perplexity",
    "kl": "forward KL",
    "agreement": "top-1 agreement",
    "reverse_kl": "reverse KL",
    "top5_agreement": "top-5 agreement",
    "mean_rank": "mean rank",
    "mass_kept": "mass kept",
    "ece": "ECE",
    "length": "same greedy text",
}
MEANINGS = {  # of the titles, where a table has them
    "bits_per_byte": "cross-entropy in bits over the text's bytes: comparable between tokenizers; lower is better",
    "cross_entropy": "nats a token that the model needs for what comes next; lower is better",
    "perplexity": "e to the cross-entropy: among how many equally probable tokens it chooses",
    "kl": "KL(teacher || student), nats a token: what the student lacks of what the teacher holds probable; 0 is equal",
    "reverse_kl": "KL(student || teacher), nats a token: what the student holds probable and the teacher does not",
    "agreement": "share of tokens at which both hold the same one most probable",
    "top5_agreement": "share of the teacher's five most probable tokens that are among the student's five",
    "mean_rank": "place of the teacher's first choice among the student's, 1 at best",
    "mass_kept": "overlap of the two distributions, the sum of min(p, q); 1 is equal",
    "ece": "expected calibration error: how far, on average, confidence is from the share that is right",
    "length": "tokens of greedy text until the student leaves the teacher's",
}
CellOf = TypeVar("CellOf")
Write = Callable[..., CellOf]


FEW = 10  # documents below which an interval is rough


def ends(estimate: Mapping[str, Any]) -> tuple[float, float]:
    """The ends of an interval, for a picture; the value itself where there is none."""
    low, high = (estimate["value"] if estimate[end] is None else estimate[end] for end in ("low", "high"))
    return low, high


def few_documents(gap: Mapping[str, Any]) -> str:
    """What to keep in mind of intervals over so few documents; empty where there are enough."""
    count = gap["documents"]
    if count >= FEW:
        return ""
    if count < 2:
        return "Of one document there are no intervals and no p-values: nothing says how other text would come out."
    return f"Intervals and p-values are over {count} documents only, and rough; give text of {FEW} documents or more."


def titles(keys: Sequence[str]) -> list[str]:
    return [TITLES[key] for key in keys]


def students(gap: Mapping[str, Any]) -> list[str]:
    return [name for name in gap["models"] if name != TEACHER]


def estimates(gap: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each model's figures by key, with the calibration error ("ece") and the length of the same greedy text
    ("length"), which gap.json has elsewhere; None for what was not measured."""
    written = gap.get("continuation") or {}
    return {
        name: {
            **figures,
            "ece": figures.get("calibration", {}).get("ece"),
            "length": written.get(name, {}).get("length"),
        }
        for name, figures in gap["models"].items()
    }


def pair_rows(
    gap: Mapping[str, Any], keys: Sequence[str], write: Write[CellOf], minus: str, teacher: bool = False
) -> list[tuple[str, list[CellOf]]]:
    """Of every two students (or the teacher, too) the second minus the first: `write(estimate, "+", p=p)`."""
    return [
        (f"{pair['second']}{minus}{pair['first']}", [write(pair[key], "+", p=pair["p"][key]) for key in keys])
        for pair in gap.get("differences", ())
        if teacher or TEACHER not in (pair["first"], pair["second"])
    ]


def probe_rows(gap: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Each kind and length of probe, and every model's answers to it."""
    return [
        (f"{kind}, {int(length):,} tokens", [answers[name] for name in gap["models"]])
        for kind, lengths in (gap.get("probes") or {}).items()
        for length, answers in lengths.items()
    ]


def task_rows(tasks: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[tuple[str, ...]]:
    """Of {model: {task: {metric: value}}} as lm-evaluation-harness names them: a row for each task and metric."""
    first = next(iter(tasks.values()))
    for task, metrics in first.items():
        for key in metrics:
            name, _, filtered = key.partition(",")
            if name.endswith("_stderr"):
                continue
            cells = []
            for answers in tasks.values():
                error = answers[task].get(f"{name}_stderr,{filtered}")
                cells.append(
                    f"{answers[task][key]:.4f}" + ("" if error is None else f" \N{PLUS-MINUS SIGN} {error:.4f}")
                )
            yield f"{task}, {name}", *cells


def won_back(gap: Mapping[str, Any]) -> float | None:
    """The share of the cross-entropy lost by the selection alone ("plain") that repair and distillation win back; None
    where there is no such student, or the interval of what it lost holds 0, as `recovery` has it."""
    names = (TEACHER, "plain", "distilled")
    lost = next((Estimate(**pair["cross_entropy"]) for pair in gap.get("differences", ())
                 if (pair["first"], pair["second"]) == names[:2]), None)  # fmt: skip
    if lost is None or not lost.above_zero or names[2] not in gap["models"]:
        return None
    teacher, plain, distilled = (gap["models"][name]["cross_entropy"]["value"] for name in names)
    return float((plain - distilled) / (plain - teacher))
