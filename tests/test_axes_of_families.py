"""Key-value heads and state indices of every family with multipliers, biases, parallel mixers: silent ones leave no
trace, and every metric scores them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from limbeck.models.axes import Axis, axis_sizes, segment_size, tensor_table
from limbeck.models.config import HybridConfig
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.hybrid import HybridLM
from limbeck.prune.importance import score_widths
from limbeck.prune.repair import Repair, repair_model
from limbeck.prune.scores import width_score_shapes
from limbeck.prune.slice import Selection, slice_model
from limbeck.prune.width_metrics import ActivationScores, MagnitudeScores, TaylorScores
from limbeck.tests.family_draws import falcon_config, granite_config
from limbeck.tests.helpers import assert_close, dense_config, random_model
from limbeck.tests.pruning_helpers import draw_rows, draw_selection

DRAWS: dict[str, Callable[[int], HybridConfig]] = {
    "falcon_h1": falcon_config,
    "granite": granite_config,
    "granite with experts": lambda seed: granite_config(seed, experts=True),
    "dense": dense_config,
}


@torch.no_grad()
def silence(model: HybridLM, selection: Selection) -> None:
    """What goes gives nothing: values of a key-value head, and what B writes at an index."""
    weights = model.state_dict()
    for name, spec in tensor_table(model.config).items():
        start, met = 0, set[Axis]()
        for segment in spec.dimensions[0]:
            axis, size = segment[0].axis, segment_size(segment)
            cut = axis is not None and axis in selection.kept and axis not in met
            if axis is not None and cut and (axis.kind == "ssm_state" or ".v_proj." in name):
                rows = weights[name][start : start + size].unflatten(0, (segment[0].size, -1))
                rows[[unit for unit in range(segment[0].size) if unit not in selection.kept[axis]]] = 0
                met.add(axis)  # B stands before C
            start += size


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", DRAWS)
def test_what_is_silent_goes_unnoticed(family: str, seed: int) -> None:
    config = DRAWS[family](seed)
    model = random_model(config, seed)
    selection = draw_selection(config, ("kv_groups", "ssm_state"), random.Random(seed))
    silence(model, selection)
    smaller = slice_model(model, selection)
    assert count_parameters(smaller.config) == sum(weight.numel() for weight in smaller.parameters())
    ids = torch.randint(config.vocab_size, (2, 9))
    with torch.no_grad():
        assert_close("logits", model(ids), smaller(ids), 1e-8)
    scores = score_widths(model, [draw_rows(config.vocab_size, rows=4)])
    for axis, kept in selection.kept.items():
        if axis.kind == "ssm_state":
            gone = [unit for unit in range(axis_sizes(config)[axis]) if unit not in kept]
            assert not scores[axis][gone].any() and scores[axis][list(kept)].all()


@torch.no_grad()
@pytest.mark.parametrize("family", DRAWS)
def test_every_metric_scores_them_and_repair_takes_them_along(family: str) -> None:
    config = DRAWS[family](3)
    model, batch = random_model(config), draw_rows(config.vocab_size, rows=4)
    for metric in (ActivationScores(state_source="to_come"), TaylorScores(), MagnitudeScores()):
        scores = score_widths(model, [batch], metric)
        assert {axis: tuple(values.shape) for axis, values in scores.items()} == width_score_shapes(config)
    selection = draw_selection(config, ("kv_groups", "ssm_state", "hidden", "shared_ffn"), random.Random(3))
    repaired = repair_model(model, selection, [batch], Repair(True, "measured", True))
    assert repaired(batch.input_ids).isfinite().all()
