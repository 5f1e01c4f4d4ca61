"""The values of one axis of a search: a list, or a range that is written by its ends and its step."""

from __future__ import annotations

import dataclasses
from decimal import Decimal

from ..models.errors import InputError

MOST_VALUES = 100_000  # of a range


@dataclasses.dataclass(frozen=True)
class Range:
    """min, min + step, ... up to max. Raises InputError from the constructor."""

    min: float
    max: float
    step: float

    def __post_init__(self) -> None:
        if not (0 < self.min <= self.max and self.step > 0):
            raise InputError(
                f"space: a range has min={self.min:g}, max={self.max:g}, step={self.step:g};"
                " expected 0 < min <= max, and a step of more than 0"
            )
        if not (self.max - self.min) / self.step < MOST_VALUES:
            raise InputError(
                f"space: a range has min={self.min:g}, max={self.max:g}, step={self.step:g}; expected a step that makes"
                f" {MOST_VALUES:,} values at most"
            )


Values = tuple[float, ...] | Range | None


def values_of(name: str, values: tuple[float, ...] | Range) -> list[float]:
    """The values of one axis, ascending. Raises InputError."""
    if isinstance(values, Range):
        steps = int((values.max - values.min) / values.step + 1e-9)
        least, by = Decimal(str(values.min)), Decimal(str(values.step))  # as written: 2.4, and not 2.4000000000000004
        return [float(least + step * by) for step in range(steps + 1)]
    if not values or min(values) <= 0:
        raise InputError(f"space: {name} is {list(values)}; expected a list of numbers of more than 0")
    return sorted(set(values))


def whole(name: str, values: tuple[float, ...] | Range, largest: int) -> list[int]:
    """The values of a width, whole and within the source's. Raises InputError."""
    found = values_of(name, values)
    for value in found:
        if value != int(value) or value > largest:
            raise InputError(f"space: {name} has {value:g}; expected whole numbers of at most {largest}, the source's")
    return [int(value) for value in found]
