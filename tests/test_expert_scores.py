"""What experts are worth, by loops over tokens; how many a token takes; and searches that count what is active."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models.axes import Axis
from limbeck.models.checkpoint import save_model
from limbeck.models.cost.hardware import Hardware
from limbeck.models.cost.parameters import count_active, count_parameters
from limbeck.models.errors import InputError
from limbeck.models.offload import open_layers
from limbeck.prune.candidates import best_rows, candidate_json
from limbeck.prune.choose import select
from limbeck.prune.importance import score_widths
from limbeck.prune.kept import axis_weights, importance_kept
from limbeck.prune.leave_one_out import Without
from limbeck.prune.patterns import Rules
from limbeck.prune.scores import LayerScores
from limbeck.prune.search import Budget, Requests, Space, find_candidates, find_depths, with_importance
from limbeck.prune.slice import Selection, filled, slice_config, slice_model
from limbeck.prune.streams import one_layer
from limbeck.prune.target import Target
from limbeck.prune.width_metrics import ActivationScores, MagnitudeScores, RandomScores
from limbeck.tests.helpers import assert_close, moe_config, random_model
from limbeck.tests.pruning_helpers import draw_rows
from torch import Tensor

LAYER = 3


class Seen:
    """Keeps what a layer shows."""

    names = ()

    def __init__(self) -> None:
        self.of: dict[str, Tensor] = {}

    def __call__(self, name: str, layer: int, tensor: Tensor) -> None:
        if layer == LAYER:
            self.of[name] = tensor.detach()


@pytest.mark.parametrize(
    "changes", ({}, {"moe_latent_size": 8}, {"norm_topk_prob": False}, {"router": "softmax"}), ids=str
)
def test_scores_of_experts_are_their_definitions(changes: dict[str, Any]) -> None:
    config = moe_config(**changes)
    model, batch, seen = random_model(config), draw_rows(config.vocab_size, rows=5), Seen()
    model.hidden_states(batch.input_ids, seq_idx=batch.seq_idx, observe=seen)
    sums: dict[str, list[float]] = {name: [0.0] * 6 for name in ("reap", "norm", "uses")}
    use = torch.zeros(5, 6, dtype=torch.float64)
    for row, token in (batch.labels != -100).nonzero().tolist():
        weights, outs = seen.of["expert_weights"][row, token], seen.of["expert_out"][row, token]
        for place, expert in enumerate(seen.of["expert_choice"][row, token].tolist()):
            norm = float((outs[place] / weights[place]).square().sum().sqrt())
            sums["reap"][expert] += float(weights[place] / weights.sum()) * norm
            sums["norm"][expert] += norm
            sums["uses"][expert] += 1
            use[row, expert] += 1 / float((batch.labels[row] != -100).sum())
    uses = torch.tensor(sums["uses"]).double().clamp(min=1)
    axis = Axis("experts", LAYER)
    for source in ("reap", "norm"):
        found = score_widths(model, [batch.take([0, 3]), batch.take([1, 2, 4])], ActivationScores(expert_source=source))
        assert_close(source, torch.tensor(sums[source]).double() / uses, found[axis], 1e-6)
    found = score_widths(model, [batch], ActivationScores(expert_source="frequency"))
    assert_close("frequency", use.square().sum(0).sqrt(), found[axis], 1e-9)
    with pytest.raises(InputError, match="reap, frequency, norm, routing, logits"):
        ActivationScores(expert_source="luck")


def test_what_the_output_loses_is_not_multiplied() -> None:
    """`times_output` is of activations; experts scored by the logits keep their scores beside it."""
    model, batch = random_model(moe_config()), draw_rows(97)
    plain = ActivationScores(expert_source="logits")
    alone, times = (score_widths(model, [batch], how) for how in (plain, dataclasses.replace(plain, times_output=True)))
    same = {axis.kind for axis, scores in alone.items() if torch.equal(scores, times[axis])}
    assert "experts" in same and not same & {"moe_ffn", "mamba_heads", "attn_heads"} and alone.keys() == times.keys()


@torch.no_grad()
def test_experts_that_are_seldom_chosen_rank_last_in_layers_of_their_own() -> None:
    config = moe_config()
    model, batch = random_model(config), draw_rows(config.vocab_size)
    for layer, unused in ((1, (0, 3)), (3, (2, 5)), (5, (1, 4))):
        model.get_buffer(f"layers.{layer}.mixer.gate.e_score_correction_bias")[list(unused)] = -9
        for source in ("reap", "frequency", "norm", "routing"):
            scores = score_widths(model, [batch], ActivationScores(expert_source=source))
            assert tuple((scores[Axis("experts", layer)] == 0).nonzero().flatten().tolist()) == unused
    selection = select(config, scores, (), Target(n_routed_experts=4))
    assert selection.kept[Axis("experts", 1)] == (1, 2, 4, 5) and selection.kept[Axis("experts", 5)] == (0, 2, 3, 5)
    smaller = slice_model(model, selection)
    assert_close("logits", model(batch.input_ids), smaller(batch.input_ids), 1e-9)


@torch.no_grad()
def test_fewer_experts_a_token_is_a_change_of_the_config() -> None:
    config = moe_config(num_experts_per_tok=3)
    model, batch = random_model(config), draw_rows(config.vocab_size)
    scores = score_widths(model, [batch])
    assert scores[Axis("top_k", 1)].shape == (3,) and float(scores[Axis("top_k", 1)].min()) > 0
    for widths in (
        scores,
        MagnitudeScores().scores(config, model.state_dict().__getitem__),
        RandomScores(0).scores(config),
    ):
        selection = select(config, widths, (), Target(num_experts_per_tok=2))
        assert selection.kept == {Axis("top_k", layer): (0, 1) for layer in (1, 3, 5)}
    smaller = slice_model(model, selection)
    assert smaller.config == config.replace(num_experts_per_tok=2)
    assert all(torch.equal(weight, smaller.state_dict()[name]) for name, weight in model.state_dict().items())
    assert count_parameters(smaller.config) == count_parameters(config)
    assert count_active(config) - count_active(smaller.config) == 3 * 2 * 12 * 32
    assert axis_weights(config)["top_k"] == 3 * 3 * 2 * 12 * 32
    assert importance_kept(config, scores, selection) < importance_kept(config, scores, Selection(selection.layers))
    with pytest.raises(InputError, match="first places"):
        slice_config(config, Selection(tuple(range(6)), {Axis("top_k", layer): (0, 2) for layer in (1, 3, 5)}))
    with pytest.raises(InputError, match=r"1\.\.3"):
        select(config, scores, (), Target(num_experts_per_tok=4))
    with pytest.raises(InputError, match="more than the experts to choose from"):
        slice_config(config, select(config, scores, (), Target(n_routed_experts=2)))


def test_a_search_counts_what_is_active() -> None:
    config = moe_config(num_experts_per_tok=3)
    space = Space(n_routed_experts=(2, 4, 6), num_experts_per_tok=(1, 2, 3), moe_intermediate_size=(8, 12))
    depths = find_depths(config, space, Rules(), LayerScores())
    card = Hardware("testcard", 2.0, 1.0, 600.0, 70.0)
    found = find_candidates(config, space, depths, Budget(1e12, 64), card, Requests(8, 8))
    assert found.combinations == 18 and len(found.candidates) == 16  # not 3 of 2
    assert len({candidate.name for candidate in found.candidates}) == 16
    scores = RandomScores(0).scores(config)
    speeds = {}
    for candidate in with_importance(config, scores, found.candidates):
        smaller = candidate.config
        assert slice_config(config, candidate.selection(config, scores)) == smaller
        content = json.loads(json.dumps(candidate_json(candidate, 1)))
        assert (content["parameters"], content["active"]) == (count_parameters(smaller), count_active(smaller))
        rows = best_rows({"budget_bytes": 2**40, "candidates": [content]}, 1)[1]
        whole = smaller.num_experts_per_tok == smaller.n_routed_experts
        assert (" active" in rows[0][0]) == (not whole)
        speeds[smaller.n_routed_experts, smaller.num_experts_per_tok, smaller.moe_intermediate_size] = (
            candidate.throughput
        )
    one, three = (speeds[6, k, 12] for k in (1, 3))
    assert one is not None and three is not None and one.tokens_per_second > three.tokens_per_second


@torch.no_grad()
@pytest.mark.parametrize("changes", ({}, {"router": "softmax", "moe_latent_size": 8}), ids=str)
def test_what_the_logits_lose_without_an_expert(changes: dict[str, Any], tmp_path: Path) -> None:
    """Against models from which it was cut; the same whatever fits side by side, and read from a folder."""
    config = moe_config(pattern="ME*E", **changes)
    model, batch = random_model(config, dtype=torch.float32), draw_rows(config.vocab_size, rows=4)
    metric, mask = ActivationScores(expert_source="logits"), batch.labels != -100
    scores = score_widths(model, [batch.take([0, 2]), batch.take([1, 3])], metric)
    logits = model(batch.input_ids, seq_idx=batch.seq_idx)[mask]
    for layer in (1, 3):
        expected = []
        for expert in range(6):
            alone = filled(config, model.state_dict().items(), model)
            left = [other for other in range(6) if other != expert]
            parts = {Axis("experts", 0): tuple(left)}
            one = one_layer(config, layer, model.state_dict().__getitem__, "cpu", torch.float32)
            alone.layers[layer] = slice_model(one, Selection((0,), parts)).layers[0]
            expected.append((alone(batch.input_ids, seq_idx=batch.seq_idx)[mask] - logits).square().mean())
        assert_close(str(layer), torch.stack(expected).double(), scores[Axis("experts", layer)], 1e-4)
    if config.router == "softmax":  # of no family with folders of this spelling
        return
    save_model(model, tmp_path / "model")
    layers = open_layers(tmp_path / "model", torch.float32, torch.device("cpu"), offload="disk")
    streamed = score_widths(layers, [batch.take([0, 2]), batch.take([1, 3])], metric, stream_bytes=50000)
    assert all(torch.equal(values, streamed[axis]) for axis, values in scores.items())
    run = Without(layers, [])  # a process whose rows the others have
    layer = next(iter(layers.in_turn(range(1, 2))))
    assert [float(cost) for cost in run.costs(layer, "experts", range(6), [], [])] == [0.0] * 6
