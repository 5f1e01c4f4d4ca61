"""Key-value heads as an axis: whole groups of attention heads go, and heads within those that stay."""

from __future__ import annotations

import pytest
import torch
from limbeck.models.axes import HIDDEN, Axis
from limbeck.models.config import HybridConfig
from limbeck.models.cost.hardware import Hardware
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.errors import InputError
from limbeck.prune.choose import best_in_groups, select
from limbeck.prune.importance import score_widths
from limbeck.prune.kept import importance_kept
from limbeck.prune.patterns import Rules
from limbeck.prune.repair import Repair, repair_model
from limbeck.prune.scores import LayerScores
from limbeck.prune.search import Budget, Space, find_candidates, find_depths, with_importance
from limbeck.prune.slice import Selection, slice_config, slice_model
from limbeck.prune.target import Target, with_widths
from limbeck.prune.width_metrics import RandomScores
from limbeck.tests.helpers import assert_close, dense_config, random_model, tiny_config
from limbeck.tests.pruning_helpers import draw_rows

HEADS, GROUPS = Axis("attn_heads", 3), Axis("kv_groups", 3)


def test_the_best_groups_by_the_heads_that_stay() -> None:
    scores = torch.tensor([[5.0, 0.0, 0.0], [3.0, 3.0, 3.0], [4.0, 4.0, 0.0], [0.0, 1.0, 2.0]])
    assert best_in_groups(scores, 2, 6) == ((1, 2), (3, 4, 5, 6, 7, 8))  # sqrt(27), sqrt(32) against 5
    assert best_in_groups(scores, 2, 2) == ((0, 2), (0, 6))  # of one head each
    assert best_in_groups(scores, 3, 6) == ((0, 1, 2), (0, 1, 3, 4, 6, 7))
    assert best_in_groups(scores, 4, 4) == ((0, 1, 2, 3), (0, 3, 6, 11))


def test_targets() -> None:
    """Heads go with their key-value head unless the target says how many stay; both are widths of the config."""
    config = tiny_config(num_attention_heads=12, num_key_value_heads=4)
    scores = RandomScores(0).scores(config)
    scores[HEADS] = torch.arange(12).double()
    kept = select(config, scores, (), Target(num_key_value_heads=2)).kept
    assert kept == {GROUPS: (2, 3), HEADS: (6, 7, 8, 9, 10, 11)}
    smaller = slice_config(config, Selection(tuple(range(6)), kept))
    assert (smaller.num_attention_heads, smaller.num_key_value_heads) == (6, 2)
    kept = select(config, scores, (), Target(num_key_value_heads=2, num_attention_heads=2)).kept
    assert kept == {GROUPS: (2, 3), HEADS: (8, 11)}
    assert select(config, scores, (), Target(num_attention_heads=8)).kept == {HEADS: (1, 2, 4, 5, 7, 8, 10, 11)}
    for wrong, said in (
        ({"num_key_value_heads": 5}, r"1\.\.4"),
        ({"num_key_value_heads": 0}, r"1\.\.4"),
        ({"num_key_value_heads": 2, "num_attention_heads": 8}, "at most 6"),
        ({"num_key_value_heads": 2, "num_attention_heads": 3}, r"multiple of num_key_value_heads \(2\)"),
        ({"num_attention_heads": 6}, "or another num_key_value_heads as well"),
    ):
        with pytest.raises(InputError, match=said):
            select(config, scores, (), Target(**wrong))  # type: ignore[arg-type]
    # Widths for a number of parameters count what goes with a key-value head.
    found = with_widths(config, config.pattern, Target(parameters=0.7, num_key_value_heads=1))
    assert found.num_attention_heads == 3
    assert 0.6 < count_parameters(config.replace(**found.widths)) / count_parameters(config) <= 0.7


@torch.no_grad()
def test_heads_that_each_have_their_own() -> None:
    """No head could go before: now the silent ones do, and the logits stay."""
    config = dense_config(1, "qwen3").replace(num_attention_heads=6, num_key_value_heads=6)
    model, batch = random_model(config), draw_rows(config.vocab_size)
    gone = {layer: {layer % 6, 5} for layer in config.layers_of(config.kinds[0])}
    for layer, heads in gone.items():
        values = model.get_parameter(f"layers.{layer}.mixer.v_proj.weight").unflatten(0, (6, -1))
        values[sorted(heads)] = 0
    scores = score_widths(model, [batch])
    with pytest.raises(InputError, match="num_key_value_heads as well"):
        select(config, scores, (), Target(num_attention_heads=4))
    selection = select(config, scores, (), Target(num_key_value_heads=4))
    for layer, heads in gone.items():
        stays = selection.kept[Axis("kv_groups", layer)]
        assert stays == selection.kept[Axis("attn_heads", layer)] and not set(stays) & heads
    smaller = slice_model(model, selection)
    assert (smaller.config.num_attention_heads, smaller.config.num_key_value_heads) == (4, 4)
    assert_close("logits", model(batch.input_ids), smaller(batch.input_ids), 1e-9)


@torch.no_grad()
def test_repair_and_rotation_take_it_along() -> None:
    config = tiny_config()
    model, batch = random_model(config), draw_rows(config.vocab_size, rows=20, tokens=65)
    selection = select(config, score_widths(model, [batch]), (), Target(num_key_value_heads=1, hidden_size=24))
    assert len(selection.kept[HIDDEN]) == 24
    logits, distances = model(batch.input_ids, seq_idx=batch.seq_idx), []
    for repair in (Repair(norms="none"), Repair(rotate=True, norms="measured", least_squares=True)):
        smaller = repair_model(model, selection, [batch], repair)
        difference = smaller(batch.input_ids, seq_idx=batch.seq_idx) - logits
        distances.append(difference[batch.labels != -100].square().mean().item())
    assert distances[1] < 0.8 * distances[0], distances


def candidates(config: HybridConfig, space: Space) -> dict[str, HybridConfig]:
    depths = find_depths(config, space, Rules(), LayerScores())
    found = find_candidates(config, space, depths, Budget(1e12, 64), Hardware("none", 1, 1, 0, 0))
    scores = RandomScores(3).scores(config)
    for candidate in with_importance(config, scores, found.candidates):
        selection = candidate.selection(config, scores)
        assert slice_config(config, selection) == candidate.config
        assert candidate.importance == pytest.approx(importance_kept(config, scores, selection))
    return {candidate.name: candidate.config for candidate in found.candidates}


def test_a_search_over_it() -> None:
    config = tiny_config(num_attention_heads=8, num_key_value_heads=4)
    found = candidates(config, Space(num_key_value_heads=(2, 3, 4), ssm_state_size=(8, 12, 16)))
    sizes = {(own.num_key_value_heads, own.num_attention_heads, own.ssm_state_size) for own in found.values()}
    assert sizes == {(k, 2 * k, n) for k in (2, 3, 4) for n in (8, 16)}  # 12 is no multiple of 8
    assert "L6-H32-F48-A4-M8x8-K2-N8" in found and "L6-H32-F48-A8-M8x8" in found
    found = candidates(config, Space(num_key_value_heads=(2, 4), num_attention_heads=(2, 4, 8)))
    sizes = {(own.num_key_value_heads, own.num_attention_heads, 0) for own in found.values()}
    assert sizes == {(2, 2, 0), (2, 4, 0), (4, 4, 0), (4, 8, 0)}
