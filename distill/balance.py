"""Keeping all experts of a mixture in use while it trains: the router's correction bias follows their load.

After each step the bias of an expert that more tokens chose than the mean falls by `rate`, that of one with fewer
rises (Wang et al., arXiv 2408.15664). No loss is added, so that nothing pulls against the language model's gradient,
and since the bias chooses and never weights, an expert's share in the output stays what the router gives it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..models import processes
from ..models.errors import InputError
from ..models.hybrid import HybridLM
from ..models.moe import Router


class ExpertBalance:
    """Counts the experts that the tokens of a step choose, and moves the biases after it; `detach` ends the counting.

    Only passes with gradients count, so that an evaluation between steps changes nothing. With activation
    checkpointing every token counts twice, which no comparison with the mean sees.
    Raises InputError where no router of the model has a correction bias.
    """

    def __init__(self, model: HybridLM, rate: float) -> None:
        modules: list[Any] = [module for module in model.modules() if isinstance(module, Router)]
        self.routers = [module for module in modules if module.config.router == "sigmoid"]
        if not self.routers:
            raise InputError(
                f"training: expert_balance is {rate:g}, but the model has no expert layer whose router has a correction"
                " bias; expected 0"
            )
        self.rate = rate
        self.loads = [
            torch.zeros(router.config.n_routed_experts, dtype=torch.float64, device=router.weight.device)
            for router in self.routers
        ]
        self.hooks = [
            router.register_forward_hook(functools.partial(self.count, number))
            for number, router in enumerate(self.routers)
        ]

    def count(self, number: int, router: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
        if torch.is_grad_enabled():
            load = self.loads[number]
            load += torch.bincount(outputs[0].flatten(), minlength=len(load)).to(load)

    @torch.no_grad()
    def move(self, finite: bool = True) -> dict[str, float]:
        """Moves the biases by the loads of all processes since the last call, not where the step was not finite.
        Returns those of the worst layer: the most loaded expert's over the mean (1: all alike), and how many experts
        no token chose."""
        counts = processes.all_sum(torch.cat(self.loads)).split([len(load) for load in self.loads])
        busiest, idle = 0.0, 0
        for router, load, mine in zip(self.routers, counts, self.loads, strict=True):
            mean = load.mean()
            if finite:
                bias = router.e_score_correction_bias
                bias += self.rate * (mean - load).sign().to(bias)
            mine.zero_()
            busiest = max(busiest, float(load.max() / mean.clamp(min=1)))
            idle = max(idle, int((load == 0).sum()))
        return {"expert_load": busiest, "idle_experts": float(idle)}

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()
