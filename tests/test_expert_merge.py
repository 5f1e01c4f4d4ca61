"""Experts that go are taken in by those that stay: equal ones without a trace, the best part untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from limbeck.models.axes import Axis
from limbeck.models.errors import InputError
from limbeck.models.hybrid import HybridLM
from limbeck.prune.expert_merge import Members, alignment, likeness, mean_expert, merged_experts, uses
from limbeck.prune.repair import Repair, RepairOptions, repair_model
from limbeck.prune.slice import Selection, slice_model
from limbeck.prune.streams import Streams
from limbeck.tests.helpers import assert_close, moe_config, random_model
from limbeck.tests.pruning_helpers import Rows, draw_rows
from torch import Tensor

CASES: tuple[dict[str, Any], ...] = ({}, {"moe_latent_size": 8}, {"gated_mlp": True, "activation": "silu"})


def streams_of(model: HybridLM, batch: Rows) -> Streams:
    return Streams(model.config, model.state_dict().__getitem__, [batch], "cpu", torch.float64)


def stacks(model: HybridLM) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".experts." in name}


@torch.no_grad()
def shuffled(model: HybridLM, source: int, target: int) -> None:
    """Makes one expert another with its neurons in another order."""
    order = torch.randperm(12)
    for name, stack in stacks(model).items():
        stack[target] = stack[source][:, order] if "down" in name else stack[source][order]


def test_neurons_are_aligned_whatever_their_order() -> None:
    like = torch.randn(40, 7, dtype=torch.float64)
    order = torch.randperm(40)
    assert torch.equal(like[order][alignment(like, like[order])], like)
    assert sorted(alignment(torch.zeros(5, 2), torch.zeros(5, 2)).tolist()) == list(range(5))
    assert sorted(alignment(torch.randn(30, 4), torch.randn(30, 4)).tolist()) == list(range(30))


@torch.no_grad()
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_twins_find_each_other_and_merge_into_the_same(changes: dict[str, Any]) -> None:
    model, batch = random_model(moe_config(pattern="E", **changes)), draw_rows(97, rows=20, tokens=65)
    for source, target in ((1, 4), (2, 5)):
        shuffled(model, source, target)
    streams, own = streams_of(model, batch), stacks(model)
    found = merged_experts(model, streams, (0, 1, 2, 3), 0.0)
    assert len(found) == len(own) == 2 + bool(changes.get("gated_mlp"))
    for name, tensor in found.items():
        assert_close(name, own[f"layers.0.mixer.{name}"], tensor, 1e-9)
    assert merged_experts(model, streams, (0, 1, 2, 3), 1.0) == {}
    assert merged_experts(model, streams, range(6), 0.0) == {}


@torch.no_grad()
def test_the_best_stay_whole_and_the_others_are_means() -> None:
    model, batch = random_model(moe_config(pattern="E")), draw_rows(97, rows=20, tokens=65)
    streams, own, kept = streams_of(model, batch), stacks(model), (0, 2, 3, 5)
    up, down = (own[f"layers.0.mixer.experts.{name}_proj"] for name in ("up", "down"))
    use = uses(model, streams, 6)
    hosts = sorted(sorted(kept, key=lambda expert: -float(use.score[expert]))[2:])
    found = merged_experts(model, streams, kept, 0.5)["experts.up_proj"]
    for expert in range(6):
        if expert not in hosts:
            assert torch.equal(found[expert], up[expert])
    assert any(not torch.equal(found[host], up[host]) for host in hosts)
    # By hand: the first that goes, on the tokens that chose it.
    experts = [Members(up[e], down[e], None) for e in range(6)]
    cosines = likeness(model, streams, experts, (1, 4), hosts)
    seen = streams.output(model, 0, ("expert_in", "expert_choice", "expert_weights"))[1]
    rows, places = (seen["expert_choice"] == 1).nonzero(as_tuple=True)
    x, weights = seen["expert_in"][rows], seen["expert_weights"][rows, places, None]
    outputs = [(x @ up[e].T).relu().square() @ down[e].T * weights for e in (1, *hosts)]
    for place in range(2):
        expected = torch.cosine_similarity(outputs[0].flatten(), outputs[place + 1].flatten(), dim=0)
        assert float(cosines[0, place]) == pytest.approx(float(expected), rel=1e-6)
    assert float(use.weight[1]) == pytest.approx(float(weights.sum()), rel=1e-6)
    merged = mean_expert(experts, 0, [1], torch.tensor([3.0, 1.0]))
    order = alignment(experts[0].neurons(), experts[1].neurons())
    assert_close("up", 0.75 * up[0] + 0.25 * up[1][order], merged.up, 1e-9)
    assert_close("down", 0.75 * down[0] + 0.25 * down[1][:, order], merged.down, 1e-9)
    assert mean_expert(experts, 0, [], torch.ones(6)) is experts[0]


@torch.no_grad()
@pytest.mark.parametrize("rotate", (False, True))
def test_repair_merges_where_it_is_told_to(rotate: bool) -> None:
    """Twins of which one goes: dropped and merged are the same, and beside other means it works as well."""
    model, batch = random_model(moe_config()), draw_rows(97, rows=8, tokens=33)
    kept: dict[Axis, tuple[int, ...]] = {Axis("experts", layer): (0, 1, 2, 3) for layer in (1, 3, 5)}
    kept[Axis("hidden")] = tuple(range(24))
    selection = Selection(tuple(range(6)), kept)
    dropped, merged = (
        repair_model(model, selection, [batch], Repair(rotate, "count", False, whole_experts=whole))
        for whole in (None, 0.5)
    )
    assert dropped.config == merged.config
    moved = {
        name for name, weight in dropped.state_dict().items() if not torch.allclose(weight, merged.state_dict()[name])
    }
    assert moved and all(".experts." in name for name in moved)
    both = repair_model(model, selection, [batch], Repair(rotate, "measured", True, whole_experts=0.5))
    assert both(batch.input_ids).isfinite().all()
    same = repair_model(model, Selection(tuple(range(6))), [batch], Repair(whole_experts=0.5))
    assert all(torch.equal(weight, same.state_dict()[name]) for name, weight in model.state_dict().items())
    assert slice_model(model, selection).config == merged.config


def test_what_it_asks_for() -> None:
    assert Repair(whole_experts=0.5).needs_data and not Repair().needs_data
    assert RepairOptions(whole_experts=0.25).repair(with_data=False).whole_experts == 0.25
    with pytest.raises(InputError, match="whole_experts"):
        RepairOptions(whole_experts=1.5)
