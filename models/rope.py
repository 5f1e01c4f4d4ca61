"""How rotary positions are stretched over more tokens than a model was first trained on, as config.json files say it.

Both ways are transformers' (`modeling_rope_utils.py`), whose defaults hold where a file is silent; what is computed
stands in kernels/rotary.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..kernels.rotary import slowed_llama3, slowed_yarn, yarn_attention
from .errors import InputError


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's: see `slowed_llama3`. Raises InputError where the numbers contradict each other."""

    rope_type: ClassVar[str] = "llama3"

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        check_stretch(self.factor, self.original_max_position_embeddings)
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise InputError(
                f"config: rope scaling has low_freq_factor {self.low_freq_factor} and high_freq_factor"
                f" {self.high_freq_factor}; expected 0 < low < high"
            )

    def slowed(self, turns: Tensor, theta: float) -> tuple[Tensor, float]:
        """The turns a token [D / 2], and what cosine and sine are multiplied by."""
        length = self.original_max_position_embeddings
        return slowed_llama3(turns, self.factor, self.low_freq_factor, self.high_freq_factor, length), 1.0


@dataclasses.dataclass(frozen=True)
class YarnRope:
    """YaRN's: see `slowed_yarn`. `attention_factor` is what cosine and sine are multiplied by; without one it follows
    from `mscale` and `mscale_all_dim` where both are there, and else from the factor. Raises InputError as above."""

    rope_type: ClassVar[str] = "yarn"

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        check_stretch(self.factor, self.original_max_position_embeddings)
        fast, slow = self.betas
        if not 0 < slow < fast < math.inf:
            raise InputError(
                f"config: rope scaling has beta_fast {fast} and beta_slow {slow}; expected 0 < slow < fast"
            )

    @property
    def betas(self) -> tuple[float, float]:
        return self.beta_fast or 32, self.beta_slow or 1

    def slowed(self, turns: Tensor, theta: float) -> tuple[Tensor, float]:
        """The turns a token [D / 2], and what cosine and sine are multiplied by."""
        length, whole = self.original_max_position_embeddings, self.truncate is not False
        return slowed_yarn(turns, theta, self.factor, *self.betas, length, whole), self.sharpness

    @property
    def sharpness(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_attention(self.factor, self.mscale) / yarn_attention(self.factor, self.mscale_all_dim)
        return yarn_attention(self.factor)


RopeScaling = Llama3Rope | YarnRope
ROPE_SCALINGS: dict[str, type[Llama3Rope] | type[YarnRope]] = {kind.rope_type: kind for kind in (Llama3Rope, YarnRope)}


def check_stretch(factor: float, length: int) -> None:
    if not 1 <= factor < math.inf or length < 1:
        raise InputError(
            f"config: rope scaling has factor {factor} and original_max_position_embeddings {length}; expected both to"
            " be at least 1"
        )
