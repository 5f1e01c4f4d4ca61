"""Figures of benchmarks that are made once and stand in files, and the tables of them."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from limbeck.models.folder import write_json


def stored_cell(folder: Path, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of a cell, from its file or made now."""
    file = folder / f"{name}.json".replace("/", " of ")
    if not file.exists():
        clock = time.perf_counter()
        found = make()
        write_json(file, found | {"seconds": time.perf_counter() - clock})
        print(f"{file.stem}: {found}", flush=True)
    return json.loads(file.read_text(encoding="utf-8"))


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean [least, largest]."""
    shown = f"{statistics.fmean(values):.{digits}f}"
    return shown if len(values) == 1 else f"{shown} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
