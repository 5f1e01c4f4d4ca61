"""A matrix product with a weight, x W^T, by the way that is fastest for the number of rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# oneDNN reads a weight for one row about twice as fast as the BLAS behind F.linear does on CPUs without Intel's
# favour (benchmarks/cpu_vs_transformers.py); torch reaches it through this operator alone.
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
FEW_ROWS = 16


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times weight [N, K] transposed: [..., N]. Differentiable wherever gradients are on."""
    if (
        ONEDNN is not None
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() <= FEW_ROWS * x.shape[-1]
    ):
        return ONEDNN(x, weight, None, "none", [], "")
    return F.linear(x, weight)
