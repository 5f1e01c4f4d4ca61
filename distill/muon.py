"""Muon for the matrices of the layers, in a precision that the device multiplies well.

Momentum whose singular values are then set to about one by Newton-Schulz steps (K. Jordan,
https://kellerjordan.github.io/posts/muon/), with the update scaled to AdamW's size (arXiv 2502.16982, section 2.2).
torch.optim.Muon does the same, but always multiplies in bfloat16: hundreds of times slower than float32 on a CPU
without bfloat16 units, so that it took three quarters of a training step there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.products import narrows
from .parallel import TrainedWeight

# The post's quintic: odd polynomial a x + b x^3 + c x^5, steep at zero, that keeps (0, 1] within about 0.7 to 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalize(matrix: Tensor) -> Tensor:
    """[rows, columns] with its singular vectors kept and its singular values moved near one; float32 on a CPU, unless
    its products are bfloat16. Of a
    stack each matrix for itself."""
    if matrix.dim() > 2:
        return torch.stack([orthogonalize(each) for each in matrix])
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(torch.bfloat16 if matrix.is_cuda or narrows(len(matrix), matrix) else torch.float32)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, times 0.2 sqrt(longer side): AdamW's learning rates fit. Decoupled decay.

    Of a matrix whose rows are split among processes each has its rows' momentum; the update is put together for the
    Newton-Schulz steps, which every process takes, and keeps its rows of.
    """

    def __init__(
        self, weights: Sequence[TrainedWeight], lr: float, *, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        self.weights = tuple(weights)
        group = {"params": [weight.local for weight in weights], "rate_ratio": 1.0}
        super().__init__([group], {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: losses come in parts
        (group,) = self.param_groups
        for weight in self.weights:
            local = weight.local
            if local.grad is None:
                continue
            state = self.state[local]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(local.grad)
            buffer = state["momentum_buffer"]
            buffer.lerp_(local.grad, 1 - group["momentum"])
            update = orthogonalize(weight.whole(local.grad.lerp(buffer, group["momentum"])))[weight.rows]
            local.mul_(1 - group["lr"] * group["weight_decay"])
            local.add_(update.to(local.dtype), alpha=-0.2 * max(weight.shape[-2:]) ** 0.5 * group["lr"])
