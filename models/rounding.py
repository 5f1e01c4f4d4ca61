"""The formats of rounded weights that export writes and training can go through."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What a format rounds to: `largest` is the largest number of its range, `layout` compressed-tensors' name."""

    layout: str
    kind: str
    bits: int
    largest: float
    activations: bool
    grouped: bool


ROUNDINGS = {
    "fp8": Rounding("float-quantized", "float", 8, 448.0, activations=True, grouped=False),
    "w8a8": Rounding("int-quantized", "int", 8, 127.0, activations=True, grouped=False),
    "w4a16": Rounding("pack-quantized", "int", 4, 7.0, activations=False, grouped=True),
}
ALIASES: dict[str | None, str] = {"int8": "w8a8"}  # what training's `quantize` takes as well
