"""What tables and plots say of the order of layers; nothing here draws."""

from __future__ import annotations

from collections.abc import Sequence

# What scores.json may say of layers: the smaller, the sooner one may go.
DEPTH_METRICS = {
    "mse": "MSE of the logits",
    "kl": "KL of the logits (nats)",
    "perplexity": "cross-entropy (nats)",
    "block_influence": "block influence",
}


def removal_steps(order: Sequence[int], values: Sequence[float]) -> list[tuple[tuple[int, ...], float]]:
    """The layers that go in each step, one or (of pairs) several, and what the step costs."""
    size = len(order) // len(values) if values else 1
    return [(tuple(order[place * size : (place + 1) * size]), value) for place, value in enumerate(values)]
