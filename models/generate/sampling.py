"""The next token out of logits: greedy, or drawn after temperature, top-k, top-p and min-p. Shapes: [V] vocabulary."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ..errors import InputError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Temperature 0 takes the argmax; else tokens are drawn from softmax(logits / temperature), cut to the top-k, to
    the smallest set of probability top_p (nucleus), to those of at least min_p times the greatest probability.

    Raises InputError from the constructor for what is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"generate: temperature is {self.temperature}; expected 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"generate: top_k is {self.top_k}; expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"generate: top_p is {self.top_p}; expected more than 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"generate: min_p is {self.min_p}; expected 0 to 1")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"generate: seed is {self.seed}; expected 0 to 2^63 - 1")

    def probabilities(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What is drawn from, in descending order, not summing to 1, and the tokens' numbers; both [V] or [top_k]."""
        scores = logits.float() / self.temperature
        if not scores.isfinite().all():  # a tiny temperature, at whose end is the argmax
            least = torch.finfo(torch.float32).tiny
            scores = (logits.float() - logits.max()) / max(self.temperature, least)
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            scores, order = scores.topk(self.top_k, sorted=True)
        else:
            scores, order = scores.sort(descending=True, stable=True)
        probabilities = scores.softmax(-1)
        if self.top_p is not None:
            # A token stays while those before it do not yet reach top_p; the first always stays.
            before = probabilities.cumsum(-1) - probabilities
            probabilities[before >= self.top_p] = 0
        if self.min_p is not None:
            probabilities[probabilities < self.min_p * probabilities[0]] = 0
        return probabilities, order


def most_probable(logits: Tensor) -> Tensor:
    """The numbers [...] of the most probable tokens of logits [..., V]. Raises InputError where these are not
    finite."""
    highest, tokens = logits.max(-1)
    if not bool(highest.isfinite().all()):
        raise InputError(
            "generate: the logits are not finite; the weights are damaged, or their numbers beyond the dtype: give"
            " dtype=float32 or bfloat16"
        )
    return tokens


class Sampler:
    """One sequence's choices, from random numbers of its own: what is drawn does not depend on its neighbours."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.generator = torch.Generator(device=device).manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """A token for logits [V]. Raises InputError where they are not finite."""
        token = most_probable(logits)
        if self.sampling.temperature == 0:
            return int(token)
        probabilities, order = self.sampling.probabilities(logits)
        return int(order[torch.multinomial(probabilities, 1, generator=self.generator)])
