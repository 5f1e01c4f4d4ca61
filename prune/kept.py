"""The share of importance that a selection keeps: what candidates are ranked by before anything is trained."""

from __future__ import annotations

import torch

from ..models.axes import AXES, HIDDEN, columns_of, dimension_size, segment_size, tensor_table
from ..models.config import HybridConfig
from ..models.cost.parameters import kind_sizes
from .scores import WidthScores
from .slice import Selection


def importance_kept(config: HybridConfig, widths: WidthScores, selection: Selection) -> float:
    """The share of importance that a selection keeps, of 1 for the source.

    Of an axis the share is the sum of the scores that stay over the sum of all (heads and their channels, which are
    scored together, together); a layer that is gone keeps nothing, and hidden counts the norms of the layers that
    stay. Shares are averaged over the source's layers of a kind, then over the kinds of axes (hidden, FFN, attention
    heads, Mamba heads), each with the weight of `axis_weights`: with equal weights the FFN, which costs little to lose,
    counted as much as hidden, and the order was worse than that by bytes (docs/LOG.md).
    """
    weights = scored_weights(config, widths)
    kept = {kind: kept_share(config, widths, selection, kind) for kind in weights}
    return sum(kept[kind] * weight for kind, weight in weights.items()) / sum(weights.values())


def scored_weights(config: HybridConfig, widths: WidthScores) -> dict[str, int]:
    """`axis_weights` of the kinds of axes that have scores."""
    return {kind: weight for kind, weight in axis_weights(config).items() if any(a.kind == kind for a in widths)}


def axis_weights(config: HybridConfig) -> dict[str, int]:
    """Of each kind of axis, the parameters that lie on it; one that lies on two counts for both."""
    weights: dict[str, int] = {}
    for tensor in tensor_table(config).values():
        for dimension in tensor.dimensions:
            beside = tensor.numel // dimension_size(dimension)
            for segment in dimension:
                for kind in {axis.kind for axis, _ in segment if axis is not None}:
                    weights[kind] = weights.get(kind, 0) + beside * segment_size(segment)
    for own in config.kinds:  # the places in a token's order of experts stand for what they read
        chosen, experts = own.chosen(config)
        for row in (row for row in AXES.values() if row.ranked and row.width in own.fields):
            weights[row.name] = weights.get(row.name, 0) + kind_sizes(config)[own.letter].experts * chosen // experts
    return dict(sorted(weights.items()))


def kept_share(config: HybridConfig, widths: WidthScores, selection: Selection, kind: str) -> float:
    """The share of one kind of axis; see `importance_kept`."""
    if kind == HIDDEN.kind:
        scores = widths[HIDDEN][[*selection.layers, config.num_layers]].sum(0)
        return fraction(scores[list(selection.kept.get(HIDDEN, range(len(scores))))], scores)
    axes = [axis for axis in widths if axis.kind == kind]
    shares = []
    for axis in axes:
        if axis.layer in selection.layers:
            kept = scores = widths[axis]
            if axis in selection.kept:
                kept = kept[list(selection.kept[axis])]
            for columns in columns_of(axis):
                if columns in selection.kept:
                    kept = kept[:, list(selection.kept[columns])]
            shares.append(fraction(kept, scores))
    return sum(shares) / len(axes)


def fraction(kept: torch.Tensor, scores: torch.Tensor) -> float:
    """The sum of what is kept over the sum of all; the share of units where all scores are 0."""
    total = float(scores.sum())
    return float(kept.sum()) / total if total > 0 else kept.numel() / scores.numel()
