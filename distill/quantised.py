"""Training through the rounding of an export format (quantisation-aware distillation, arXiv 2601.20088).

Forward and backward see the weights as a reader of the exported folder will have them, and, where the format's server
rounds what they multiply, every token rounded by its largest number. Gradients pass both as if nothing were rounded
(the straight-through estimator, arXiv 1308.3432), to the weights that the optimizer moves, which stay as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..models.config import HybridConfig
from ..models.families.family import stored_tensors
from ..models.quantise import group_of, rounded, rounded_input, rounded_names
from ..models.rounding import ROUNDINGS, Rounding
from .parallel import Trained, TrainedWeight, lowered, placed


class RoundedInput(torch.autograd.Function):
    """x rounded token by token; its gradient is the answer's."""

    @staticmethod
    def forward(ctx, x, rounding):
        return rounded_input(x, rounding)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


@dataclasses.dataclass(frozen=True)
class WeightRounding:
    """What `rounding` makes of a weight in training, whose last dimension is its inputs'; of `group` columns each has a
    scale (0: of all)."""

    rounding: Rounding
    group: int

    def __call__(self, weight: Tensor) -> Tensor:
        if not weight.numel():  # a process without rows of it
            return weight
        flat = weight.detach().float().flatten(0, -2)
        return rounded(flat, self.rounding, self.group or flat.shape[1]).view_as(weight)


def rounded_parts(config: HybridConfig, rounding: Rounding) -> tuple[set[str], int]:
    """The tensors of ours that a format rounds, and the columns of a group (0: all of a row). Raises InputError where
    the family cannot be stored so."""
    names = rounded_names(config, rounding)
    group = group_of(config, names) if rounding.grouped else 0
    return {piece.ours for name in names for piece in stored_tensors(config)[name].pieces}, group


@contextlib.contextmanager
def quantised(trained: Trained, name: str | None) -> Iterator[Trained]:
    """The same model while it learns to be quantised; afterwards it has the optimizer's weights again, as they are.
    Raises InputError where the format does not fit the family."""
    if name is None:
        yield trained
        return
    rounding = ROUNDINGS[name]
    parts, group = rounded_parts(trained.model.config, rounding)
    model, weights = trained.model, []
    for weight in trained.weights:
        weights.append(through(weight, WeightRounding(rounding, group), model) if weight.name in parts else weight)
    owners = {model.get_submodule(part.rpartition(".")[0]) for part in parts}

    def round_input(module: nn.Module, x: Tensor) -> Tensor:
        return RoundedInput.apply(x, rounding) if module in owners else x

    if rounding.activations:
        model.round_input = round_input
    within = Trained(model, tuple(weights))
    within.moved()
    try:
        yield within
    finally:
        model.round_input = None
        for weight, learned in zip(trained.weights, weights, strict=True):
            if weight.split:
                with torch.no_grad():
                    weight.local.copy_(learned.local)
            else:
                placed(model, weight.name, weight.parameter)
        trained.moved()


def through(weight: TrainedWeight, used: WeightRounding, model: nn.Module) -> TrainedWeight:
    """A weight whose place in the model is taken by what a format makes of it."""
    if weight.split:  # whole rows, whose memory the model has
        return dataclasses.replace(weight, local=nn.Parameter(weight.local.detach().clone()), used=used)
    if weight.local is not weight.parameter:  # a copy in fewer bits is there already
        return dataclasses.replace(weight, used=used)
    copy = lowered(model, weight.name, weight.parameter, weight.parameter.dtype)
    return dataclasses.replace(weight, parameter=copy, used=used)
