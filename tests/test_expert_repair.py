"""Experts that stay take over what those that went did: on the tokens that choose them, and never for the worse."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from limbeck.models.hybrid import HybridLM
from limbeck.prune import expert_repair, repair
from limbeck.prune.choose import select
from limbeck.prune.expert_repair import refit_experts
from limbeck.prune.importance import score_widths
from limbeck.prune.repair import Repair, repair_model
from limbeck.prune.slice import slice_model
from limbeck.prune.streams import Streams
from limbeck.prune.target import Target
from limbeck.tests.helpers import moe_config, random_model
from limbeck.tests.pruning_helpers import Rows, draw_rows

CASES: tuple[dict[str, Any], ...] = (
    {},
    {"moe_latent_size": 8},
    {"moe_shared_expert_intermediate_size": 0},
    {"router": "softmax", "num_experts_per_tok": 3},
)


def one_layer_models(changes: dict[str, Any]) -> tuple[HybridLM, HybridLM, Rows]:
    model = random_model(moe_config(pattern="E", **changes))
    batch = draw_rows(97, rows=20, tokens=65)
    target = Target(n_routed_experts=4, num_experts_per_tok=2)
    selection = select(model.config, score_widths(model, [batch]), (), target)
    return model, slice_model(model, selection), batch


def errors(model: HybridLM, pruned: HybridLM, streams: Streams) -> float:
    """What is fitted: the stream after the layer, or the latent vector."""
    total = 0.0
    for number, mask in enumerate(streams.mask):
        (whole, seen), (own, own_seen) = (streams.output(each, number, ("latent_out",)) for each in (model, pruned))
        pair = (seen["latent_out"], own_seen["latent_out"]) if "latent_out" in seen else (whole[mask], own[mask])
        total += float((pair[0] - pair[1]).square().sum())
    return total


@torch.no_grad()
@pytest.mark.parametrize("sums", (2**30, 1))
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_the_error_falls_with_every_sweep(changes: dict[str, Any], sums: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether all experts are fitted at once or one by one."""
    monkeypatch.setattr(expert_repair, "SUM_BYTES", sums)
    model, pruned, batch = one_layer_models(changes)
    streams = Streams(model.config, model.state_dict().__getitem__, [batch], "cpu", torch.float64)
    kept, found = torch.arange(32), [errors(model, pruned, streams)]
    for _ in range(4):
        refit_experts(model, pruned, streams, streams, kept, 1e-9, 1.0)
        found.append(errors(model, pruned, streams))
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(found)), found
    assert found[1] < 0.97 * found[0], found


@torch.no_grad()
def test_where_nothing_lacks_nothing_changes() -> None:
    """And an expert that no token chooses is left as it is."""
    model, _, batch = one_layer_models({})
    model.get_buffer("layers.0.mixer.gate.e_score_correction_bias")[2] = -9
    same = slice_model(model, select(model.config, score_widths(model, [batch]), (), Target()))
    streams = Streams(model.config, model.state_dict().__getitem__, [batch], "cpu", torch.float64)
    refit_experts(model, same, streams, streams, torch.arange(32), 1e-3, 1.0)
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, same.state_dict()[name], rtol=1e-9, atol=1e-12), name


@torch.no_grad()
def test_repair_with_experts_comes_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of the tokens that it is fitted on; without the shared expert there is no other writer."""
    model = random_model(moe_config(moe_shared_expert_intermediate_size=0))
    batch = draw_rows(97, rows=20, tokens=65)
    selection = select(model.config, score_widths(model, [batch]), (), Target(n_routed_experts=4, hidden_size=24))
    logits, how = model(batch.input_ids, seq_idx=batch.seq_idx), Repair(True, "measured", True)

    def distance() -> float:
        smaller = repair_model(model, selection, [batch], how)
        difference = smaller(batch.input_ids, seq_idx=batch.seq_idx) - logits
        return difference[batch.labels != -100].square().mean().item()

    found = distance()
    monkeypatch.setattr(repair, "refit_experts", lambda *args: None)
    assert found < 0.97 * distance()
