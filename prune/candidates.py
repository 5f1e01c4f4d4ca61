"""Candidates of a search beside their sizes: what has to fit, what is written of them, and which are worth a look."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ..models.cost.hardware import GIB, Hardware, Reserve
from ..models.cost.parameters import count_active
from ..models.device import torch_dtype
from ..models.errors import InputError, gib
from ..models.quantities import check_between
from .search import Budget, Candidate


@dataclasses.dataclass(frozen=True)
class BudgetOptions(Reserve):
    """What has to fit: `gib`, or what the card has less framework, reserve and overhead."""

    gib: float | None = None
    context: int = 131072
    batch: int = 1
    weight_dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    ssm_dtype: str = "float32"
    conv_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, "budget.", 1, math.inf, "context", "batch")
        check_between(self, "budget.", 0, math.inf, "gib", above=True)

    def limit(self, hardware: Hardware) -> Budget:
        """In bytes. Raises InputError where nothing is left."""
        left = self.budget(hardware) if self.gib is None else self.gib * GIB
        if not left > 0:
            raise InputError(
                f"budget: {left / GIB:g} GiB are left on {hardware.name}; expected more than 0 (budget.gib=NUMBER)"
            )
        names = ("weight_dtype", "kv_dtype", "ssm_dtype", "conv_dtype")
        return Budget(left, self.context, self.batch, {name: torch_dtype(getattr(self, name)) for name in names})


def candidate_json(candidate: Candidate, rank: int) -> dict[str, Any]:
    report = candidate.memory
    return {
        "rank": rank,
        "name": candidate.name,
        "prune": shlex.join(candidate.words()),
        "target": candidate.target.options(),
        "pattern": candidate.config.pattern,
        "layers": list(candidate.depth.layers),
        "parameters": candidate.parameters,
        "active": count_active(candidate.config),
        "memory": {name: getattr(report, name) for name in ("weights", "kv", "ssm", "conv", "total")},
        "throughput": None if candidate.throughput is None else dataclasses.asdict(candidate.throughput),
        "importance": candidate.importance,
        "loss": candidate.loss,
    }


@dataclasses.dataclass(frozen=True)
class Tradeoff:
    """Candidates by (memory, value): the value's title, the points, the indices of those that no other beats, and of
    those with a name to be shown."""

    title: str
    unit: str
    points: list[tuple[float, float]]
    front: list[int]
    named: dict[str, int]


def tradeoff_of(candidates: Sequence[Candidate], names: Sequence[str]) -> Tradeoff:
    """The best value for the bytes: loss where it is measured, else importance, else tokens/s or parameters."""
    size, unit = (GIB, "GiB") if candidates[0].memory.total >= GIB else (2**20, "MiB")
    shown = [candidate for candidate in candidates if candidate.loss is not None] or list(candidates)
    x = [candidate.memory.total / size for candidate in shown]
    cost, sign = x, 1
    if shown[0].loss is not None:
        title, y, sign = "Loss of the model cut in memory (nats a token)", [float(c.loss or 0) for c in shown], -1
    elif shown[0].importance is not None:
        title, y = "Share of the importance that stays", [float(c.importance or 0) for c in shown]
    elif any(candidate.throughput for candidate in shown):
        title, y = "Estimated tokens/s", [c.throughput.tokens_per_second if c.throughput else 0.0 for c in shown]
        cost = [-size for size in x]  # with nothing known of quality, more bytes stand for it
    else:
        title, y = "Parameters", [float(candidate.parameters) for candidate in shown]
    front = pareto([(c, sign * value) for c, value in zip(cost, y, strict=True)])
    named = {candidate.name: index for index, candidate in enumerate(shown) if candidate.name in names}
    return Tradeoff(title, unit, list(zip(x, y, strict=True)), front, named)


def best_rows(content: Mapping[str, Any], count: int) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of a table of the first candidates of a candidates.json."""
    proxies = [key for key in ("loss", "importance") if content["candidates"][0][key] is not None]
    rows = []
    for candidate in content["candidates"][:count]:
        speed, total = candidate["throughput"], candidate["memory"]["total"]
        row = [
            f"{candidate['rank']}. {candidate['name']}\n{candidate['parameters']:,} parameters" + active_of(candidate),
            f"{gib(total)}\n{gib(content['budget_bytes'] - total)}",
            "-" if speed is None else f"{speed['tokens_per_second']:,.0f}\n{speed['batch']:,}",
        ]
        if proxies:
            row.append("\n".join("-" if candidate[key] is None else f"{candidate[key]:.4f}" for key in proxies))
        rows.append(row)
    columns = ["candidate", "memory\nheadroom", "tokens/s\nbatch", *(["\n".join(proxies)] if proxies else [])]
    return columns, rows


def active_of(candidate: Mapping[str, Any]) -> str:
    """How many parameters a token meets, where that is not all of them."""
    active = candidate["active"]
    return "" if active == candidate["parameters"] else f", {active:,} active"


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, value) that no other beats, ascending in cost: less cost, more value; of equal
    points the first."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front
