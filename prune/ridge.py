"""Least squares that pull towards given weights. Shapes: [N] rows, [K] inputs, [O] outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.errors import InputError


def products(one: Tensor, other: Tensor) -> Tensor:
    """one^T other [K, O] of rows [N, K] and [N, O], in float64. What is narrower than float32 is widened first: squares
    of a few hundred are beyond float16."""
    wide = torch.promote_types(one.dtype, torch.float32)
    return (one.to(wide).T @ other.to(wide)).double()


def check_finite(moments: Tensor) -> None:
    """Raises InputError where the activations that were summed were not finite."""
    if not bool(moments.isfinite().all()):
        raise InputError(
            "repair: activations are not finite in the dtype that the layers run in; give dtype=bfloat16 or float32"
        )


class RidgeFit:
    """Least squares of targets t [N, O] on inputs a [N, K] that pull towards given weights W0 [O, K].

    min over W of sum |t - W a|^2 + damp |W - W0|^2, which W = W0 + S_ta' (S_aa + damp)^-1 solves, with the sums
    S_aa = sum a a^T and S_ta' = sum (t - W0 a) a^T. Both are float64: they square the condition of the inputs, and
    tokens are many. The damping keeps W where it was along directions that the data hardly has (more inputs than tokens
    leave S_aa singular); it is relative to the mean second moment, so that one `ridge` serves every layer, of each of
    the `sizes` into which the inputs are split where several activations lie side by side.
    """

    def __init__(self) -> None:
        self.moments: Tensor | float = 0.0  # S_aa [K, K]
        self.cross: Tensor | float = 0.0  # sum t a^T [O, K]

    def add(self, targets: Tensor, inputs: Tensor) -> None:
        self.moments = self.moments + products(inputs, inputs)
        self.cross = self.cross + products(targets, inputs)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Raises InputError where activations were not finite."""
        assert isinstance(self.moments, Tensor) and isinstance(self.cross, Tensor)
        check_finite(self.moments)
        check_finite(self.cross)
        return self.moments, self.cross

    def solve(self, weights: Tensor, ridge: float, sizes: Sequence[int] = ()) -> Tensor:
        """W [O, K] (float64) for W0 = weights."""
        moments, cross = self.sums()
        left, least = cross - weights.double() @ moments, torch.finfo(torch.float64).tiny
        parts = moments.diagonal().split(list(sizes) or len(moments))
        damp = torch.cat([(ridge * part.mean()).clamp(min=least).expand(len(part)) for part in parts])
        return weights.double() + torch.linalg.solve(moments + damp.diag(), left.T).T
