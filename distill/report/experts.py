"""Which experts stayed, and how they were used where the model was scored: a table of the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .page import Cell, Section, Table

COLUMNS = ("layer", "experts that stay", "of all choices", "most used", "least used", "never used", "evenness")


def expert_section(uses: Mapping[str, list[int]], selection: Mapping[str, Any] | None) -> Iterator[Section]:
    """`uses`: by layer how many tokens chose each expert; `selection` is selection.json's content."""
    kept = {} if selection is None else selection["kept"]
    layers = [layer for layer in uses if selection is None or int(layer) in selection["layers"]]
    if not layers:
        return
    rows = [(layer, [Cell(text) for text in use_row(uses[layer], kept.get(f"experts({layer})"))]) for layer in layers]
    note = (
        "What each router chose on the text that the model was scored on, before anything was cut: the share of all"
        " choices that went to the experts that stay, and what the most and the least used of these had, 1 being an"
        " equal share. Evenness is the entropy of their choices over that of equal ones."
    )
    yield Section("Experts", note, tables=[Table("By layer", list(COLUMNS), rows)])


def use_row(uses: list[int], kept: list[int] | None) -> list[str]:
    """The cells of a layer of which those experts stay; None: all."""
    counts = np.array(uses, dtype=np.float64)
    stay = list(range(len(uses))) if kept is None else kept
    total = max(counts.sum(), 1.0)
    own = counts[stay]
    share = own / max(own.sum(), 1.0)
    used = share[share > 0]
    evenness = -(used * np.log(used)).sum() / np.log(len(stay)) if len(stay) > 1 else 1.0
    fair = counts.sum() / len(uses) or 1.0
    most, least = stay[int(own.argmax())], stay[int(own.argmin())]
    return [
        f"{len(stay):,} of {len(uses):,}",
        f"{own.sum() / total:.1%}",
        f"{most} ({counts[most] / fair:.2f})",
        f"{least} ({counts[least] / fair:.2f})",
        f"{int((own == 0).sum()):,}",
        f"{evenness:.3f}",
    ]
