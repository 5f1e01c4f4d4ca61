"""What tables, plots and cards call the parts of a model, and what they say of scores; nothing here draws."""

from __future__ import annotations

from collections.abc import Sequence

from ...models.axes import AxisRow
from ...models.kinds import KINDS, kinds_of

# What scores.json may say of layers: the smaller, the sooner one may go.
DEPTH_METRICS = {
    "mse": "MSE of the logits",
    "kl": "KL of the logits (nats)",
    "perplexity": "cross-entropy (nats)",
    "block_influence": "block influence",
}


def layer_name(pattern: str, layer: int) -> str:
    return kinds_of(pattern)[layer].name


def layer_counts(pattern: str) -> dict[str, int]:
    """How many layers of each kind a model has, by the kind's name."""
    return {kind.name: pattern.count(letter) for letter, kind in KINDS.items() if letter in pattern}


def units_title(axis: AxisRow) -> str:
    """What a picture of an axis's units is headed with."""
    words = axis.units or axis.title
    return words[:1].upper() + words[1:]


def removal_steps(order: Sequence[int], values: Sequence[float]) -> list[tuple[tuple[int, ...], float]]:
    """The layers that go in each step, one or (of pairs) several, and what the step costs."""
    size = len(order) // len(values) if values else 1
    return [(tuple(order[place * size : (place + 1) * size]), value) for place, value in enumerate(values)]
