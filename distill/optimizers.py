"""The optimizers of a training and their rates."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..models.axes import MATRICES
from ..models.hybrid import HybridLM
from .muon import Muon
from .options import TrainOptions
from .parallel import Trained, prepare
from .state import Optimizers


def set_rates(optimizers: Mapping[str, torch.optim.Optimizer], rate: float) -> None:
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate_ratio"]


def make_optimizers(model: HybridLM | Trained, options: TrainOptions) -> Optimizers:
    """AdamW for everything, or Muon for the layers' matrices beside it. Weight decay is for matrices only."""
    trained = model if isinstance(model, Trained) else prepare(model)
    matrices = [weight for weight in trained.weights if weight.spec.role in MATRICES]
    uses_muon = options.optimizer == "muon"
    muon = [weight for weight in matrices if uses_muon and weight.spec.layer is not None]
    decayed = [weight.local for weight in matrices if weight not in muon]
    plain = [weight.local for weight in trained.weights if weight not in matrices]
    assert len(muon) + len(decayed) + len(plain) == len(trained.weights)
    ratio = options.adamw_ratio if muon else 1.0
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay, "rate_ratio": ratio},
        {"params": plain, "weight_decay": 0.0, "rate_ratio": ratio},
    ]
    betas = (options.beta1, options.beta2)
    optimizers: Optimizers = {"adamw": torch.optim.AdamW(groups, lr=options.learning_rate, betas=betas, fused=True)}
    if muon:
        optimizers["muon"] = Muon(muon, options.learning_rate, weight_decay=options.weight_decay)
    return optimizers
