"""What tables, plots and cards call the parts of a model, and what they say of scores; nothing here draws."""

from __future__ import annotations

from collections.abc import Sequence

LAYERS = {"M": "Mamba-2", "*": "attention", "-": "MLP"}
AXES = {
    "hidden": "Residual channels",
    "ffn": "FFN neurons",
    "mamba_heads": "Mamba heads",
    "mamba_head_dim": "Mamba head channels",
    "attn_heads": "Attention heads",
}
INNER = {"mamba_heads": "mamba_head_dim"}  # the axis within an axis, which has the columns of its scores
# What scores.json may say of layers: the smaller, the sooner one may go.
DEPTH_METRICS = {
    "mse": "MSE of the logits",
    "kl": "KL of the logits (nats)",
    "perplexity": "cross-entropy (nats)",
    "block_influence": "block influence",
}


def layer_name(pattern: str, layer: int) -> str:
    return LAYERS[pattern[layer]]


def layer_counts(pattern: str) -> dict[str, int]:
    """How many layers of each kind a model has, by the kind's name."""
    return {name: pattern.count(letter) for letter, name in LAYERS.items() if letter in pattern}


def removal_steps(order: Sequence[int], values: Sequence[float]) -> list[tuple[tuple[int, ...], float]]:
    """The layers that go in each step, one or (of pairs) several, and what the step costs."""
    size = len(order) // len(values) if values else 1
    return [(tuple(order[place * size : (place + 1) * size]), value) for place, value in enumerate(values)]
