"""Numbers of a config that activations are multiplied by. 1, which is what most models have, costs nothing.

They are applied while the model runs, and not folded into weights: a folder in bfloat16 is read and written bit for
bit, and in training a weight keeps the learning rate that it was made for. Sources: muP (arXiv 2203.03466) for why they
are there; transformers' granitemoehybrid and falcon_h1 for where.
"""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from .errors import InputError

PARTS = ("z", "x", "B", "C", "dt")  # of what a Mamba mixer's in_proj gives


@dataclasses.dataclass(frozen=True)
class Multipliers:
    """`embedding` of what the embedding gives, `residual` of what every layer adds to the stream, `head` and
    1 / `logits_scaling` of the logits. `attention` is what scores q k are multiplied by (None: 1 / sqrt(head_dim)),
    `key` the keys. `*_in` and `*_out` stand before and after a mixer, `mamba_parts` after in_proj, `mlp_gate` before
    the gate's activation. Raises InputError where one is no finite number, or a layer's or the head's part is zero.
    """

    embedding: float = 1.0
    residual: float = 1.0
    head: float = 1.0
    logits_scaling: float = 1.0
    attention: float | None = None
    key: float = 1.0
    attention_in: float = 1.0
    attention_out: float = 1.0
    mamba_in: float = 1.0
    mamba_out: float = 1.0
    mamba_parts: tuple[float, ...] = (1.0,) * len(PARTS)
    mlp_gate: float = 1.0
    mlp_out: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not math.isfinite(number):
                    raise InputError(f"config: the multiplier {field.name} is {value}; expected finite numbers")
        for name in ("residual", "head", "logits_scaling", "attention_out", "mamba_out", "mlp_out"):
            if getattr(self, name) == 0:
                raise InputError(f"config: the multiplier {name} is 0, which leaves nothing; expected another number")
        if len(self.mamba_parts) != len(PARTS):
            raise InputError(
                f"config: {len(self.mamba_parts)} multipliers of what in_proj gives; expected {len(PARTS)}:"
                f" {', '.join(PARTS)}"
            )

    @property
    def logits(self) -> float:
        """Of the logits, or, which is the same, of what the head reads."""
        return self.head / self.logits_scaling

    @property
    def in_proj(self) -> tuple[float, ...]:
        """Of each of the `PARTS` that in_proj gives: in_proj has no bias, so that what stands before it commutes."""
        return tuple(self.mamba_in * part for part in self.mamba_parts)

    def refuse_others(self, sayable: set[str], family: str) -> None:
        """Raises InputError for a multiplier that a config.json of the family has no place for."""
        for field in dataclasses.fields(self):
            if field.name not in sayable and getattr(self, field.name) != field.default:
                value = getattr(self, field.name)
                raise InputError(
                    f"config: the multiplier {field.name} is {value}, which a config.json of {family} cannot say"
                )


ONES = Multipliers()


def scaled(x: Tensor, by: float) -> Tensor:
    """x times a number; x itself where that is 1."""
    return x if by == 1 else x * by
