"""Which inputs of the matrices that write the stream stay, chosen with the refit in view.

A score looks at a unit alone. What pruning costs is what least squares lose without it: where others carry the same,
nothing. So units go one after the other, each time the one whose absence costs the refitted matrix least (the optimal
brain surgeon, Hassibi and Stork 1993, for whole columns): with S the damped second moments of the inputs and W what is
left of the matrix, refitted, column j costs |W_j|^2 / (S^-1)_jj, after which S^-1 and W are those without it.

Axes are chosen so whose units are single inputs of a writer and live in no groups: neurons of MLPs and shared experts.
Shapes: [K] inputs, [O] outputs, [N] counted tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ..models.axes import Axis, Factor, tensor_table
from ..models.config import HybridConfig
from .ridge import check_finite, products
from .slice import Selection
from .streams import GetTensor

AT_ONCE = 32  # columns that go between two looks at all: the cheapest AT_ONCE of the 4 * AT_ONCE that were so then

RIDGE = 0.001  # of the refit that is thought of: less than that of the one that is made chooses better (docs/LOG.md)


class Reselection:
    """The units of a selection chosen anew, as many as before, while the source's streams pass its layers."""

    def __init__(self, config: HybridConfig, get_tensor: GetTensor, selection: Selection) -> None:
        self.selection, self.get_tensor = selection, get_tensor
        self.places = reselected(config, selection)
        self.kept = dict(selection.kept)
        self.moments: dict[str, Tensor] = {}

    def see(self, layer: int, seen: Mapping[str, Tensor]) -> None:
        """Takes in what passes in a layer [N, K] for one batch."""
        for observed in self.places.get(layer, {}):
            self.moments[observed] = products(seen[observed], seen[observed]) + self.moments.get(observed, 0)

    def leave(self, layer: int) -> None:
        """Chooses: all batches have passed the layer."""
        for observed, (axis, name) in self.places.get(layer, {}).items():
            moments = self.moments.pop(observed)
            check_finite(moments)
            weights = self.get_tensor(name).to(moments)
            self.kept[axis] = least_lost(moments, weights, len(self.selection.kept[axis]), RIDGE)

    def result(self) -> Selection:
        return dataclasses.replace(self.selection, kept=self.kept)


def reselected(config: HybridConfig, selection: Selection) -> dict[int, dict[str, tuple[Axis, str]]]:
    """By layer the activations that its writers read where each input is a unit, of an axis without groups that no
    other writer reads, of which the selection keeps a part: the axis, and the name of the matrix."""
    table, found = tensor_table(config), dict[int, dict[str, tuple[Axis, str]]]()
    for layer in selection.layers:
        read = [(table[name].dimensions[-1], observed, name) for part, observed in config.kinds[layer].writers.items()
                if (name := f"layers.{layer}.mixer.{part}") in table]  # fmt: skip
        for dimension, observed, name in read:
            match dimension:
                case ((Factor(axis=Axis() as axis, size=size),),) if not axis.row.groups and not axis.row.within:
                    alone = [other for other, _, _ in read].count(dimension) == 1
                    if alone and 0 < len(selection.kept.get(axis, ())) < size:
                        found.setdefault(layer, {})[observed] = axis, name
    return found


def least_lost(moments: Tensor, weights: Tensor, count: int, ridge: float) -> tuple[int, ...]:
    """The `count` inputs, ascending, that are left of `weights` [O, K] when the others go one after the other, each the
    cheapest in squared error of the refitted rest. `moments` [K, K] (float64) of the inputs; `ridge` relative to their
    mean. Columns are compared AT_ONCE at a time among the cheapest, so that whole matrices are updated by products."""
    size, tiny = len(moments), torch.finfo(moments.dtype).tiny
    damp = ridge * moments.diagonal().mean().clamp(min=tiny)
    inverse = torch.linalg.inv(moments + damp * torch.eye(size, dtype=moments.dtype, device=moments.device))
    left, stays = weights.clone(), torch.ones(size, dtype=torch.bool, device=moments.device)
    while (gone := int(stays.sum()) - count) > 0:
        costs = torch.where(stays, left.square().sum(0) / inverse.diagonal(), torch.inf)
        near = costs.topk(min(4 * AT_ONCE, int(stays.sum())), largest=False).indices
        go = near[cheapest(inverse[near][:, near], left[:, near].T @ left[:, near], min(gone, AT_ONCE))]
        step = torch.linalg.solve(inverse[go][:, go], inverse[go])
        left -= left[:, go] @ step
        inverse -= inverse[:, go] @ step
        stays[go] = False
    return tuple(stays.nonzero().flatten().tolist())


def cheapest(inverse: Tensor, products: Tensor, count: int) -> list[int]:
    """Which `count` of a few columns go, in turn: by their part of the inverse moments, and W^T W of their weights."""
    inverse, products = inverse.cpu().clone(), products.cpu().clone()
    gone: list[int] = []
    for _ in range(count):
        costs = products.diagonal() / inverse.diagonal()
        costs[gone] = torch.inf
        column = int(costs.argmin())
        share, own = inverse[column] / inverse[column, column], products[column].clone()
        products += own[column] * torch.outer(share, share) - torch.outer(own, share) - torch.outer(share, own)
        inverse -= torch.outer(inverse[column].clone(), share)
        gone.append(column)
    return gone
