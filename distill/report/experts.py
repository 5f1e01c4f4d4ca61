"""Which experts stayed, how they were used where the model was scored, and how students use theirs: tables of the
page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .page import Cell, Section, Table

COLUMNS = ("layer", "experts that stay", "of all choices", "most used", "least used", "never used", "evenness")
LEFT = ("layer", "stay", "go")
TEACHER = "teacher"


def expert_section(
    uses: Mapping[str, list[int]],
    selection: Mapping[str, Any] | None,
    measured: Mapping[str, Mapping[str, list[int]]],
) -> Iterator[Section]:
    """`uses`: by layer how many tokens chose each expert; `selection` is selection.json's content; `measured`: by model
    the uses on the held-out text."""
    kept = {} if selection is None else selection["kept"]
    layers = [layer for layer in uses if selection is None or int(layer) in selection["layers"]]
    if not layers:
        return
    stays = {layer: kept.get(f"experts({layer})") or list(range(len(uses[layer]))) for layer in layers}
    rows = [(layer, [Cell(text) for text in use_row(uses[layer], stays[layer])]) for layer in layers]
    note = (
        "What each router chose on the text that the model was scored on, before anything was cut: the share of all"
        " choices that went to the experts that stay, and what the most and the least used of these had, 1 being an"
        " equal share. Evenness is the entropy of their choices over that of equal ones."
    )
    tables = [Table("By layer", list(COLUMNS), rows)]
    if any(len(stays[layer]) < len(uses[layer]) for layer in layers):
        left = [
            (layer, [Cell(ranges(stays[layer])), Cell(ranges(sorted({*range(len(uses[layer]))} - {*stays[layer]})))])
            for layer in layers
        ]
        tables.append(Table("Which stay, by their numbers in the teacher", list(LEFT), left, texts=True))
    source = layers if selection is None else [str(layer) for layer in selection["layers"]]
    students = {name: own for name, own in measured.items() if name != TEACHER and own}
    for name, own in students.items():
        columns = [COLUMNS[0], "experts", *COLUMNS[3:]]
        tables.append(Table(f"How {name} uses its experts", columns, student_rows(own, source, stays)))
    if students:
        note += (
            " What students choose is counted on the held-out text; where a student has the layers and experts that"
            " stay, these bear the teacher's numbers."
        )
    yield Section("Experts", note, tables=tables)


def student_rows(
    uses: Mapping[str, list[int]], source: list[str], stays: Mapping[str, list[int]]
) -> list[tuple[str, list[Cell]]]:
    """The rows of a student, `uses` by its layers; `source` are the teacher's layers that stay, in their order, and
    `stays` the experts of each that do."""
    names = {layer: source[int(layer)] for layer in uses if int(layer) < len(source)}
    same = len(names) == len(uses) and all(len(stays.get(names[layer], ())) == len(uses[layer]) for layer in uses)
    rows = []
    for layer, counts in uses.items():
        cells = use_row(counts, None, stays[names[layer]] if same else None)
        rows.append((names[layer] if same else layer, [Cell(f"{len(counts):,}"), *(Cell(text) for text in cells[2:])]))
    return rows


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as text, neighbours as a range: 0-3, 7; a dash where there are none."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs) or "-"


def use_row(uses: list[int], kept: list[int] | None, numbers: list[int] | None = None) -> list[str]:
    """The cells of a layer of which those experts stay; None: all. `numbers` are what experts are called."""
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
        f"{most if numbers is None else numbers[most]} ({counts[most] / fair:.2f})",
        f"{least if numbers is None else numbers[least]} ({counts[least] / fair:.2f})",
        f"{int((own == 0).sum()):,}",
        f"{evenness:.3f}",
    ]
