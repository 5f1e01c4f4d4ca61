"""From scores to kept indices: rankings by hand, groups, targets that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from limbeck.models.axes import AXES, HIDDEN, Axis, axis_sizes
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.errors import InputError
from limbeck.prune.choose import best, select
from limbeck.prune.slice import slice_config
from limbeck.prune.target import Target, with_widths
from limbeck.prune.width_metrics import RandomScores
from limbeck.scripts.run.resolve import model_config
from limbeck.tests.helpers import random_config, tiny_config


def test_best_is_ascending_and_the_lower_index_wins_a_tie() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, 0.0, 2.0])
    assert best(scores, 2) == (1, 3)
    assert best(scores, 3) == (1, 2, 3)
    assert best(scores, 6) == (0, 1, 2, 3, 4, 5)
    assert best(scores, 2, groups=2) == (1, 3)
    assert best(scores, 4, groups=2) == (1, 2, 3, 5)
    assert best(torch.ones(6), 3, groups=3) == (0, 2, 4)
    assert best(torch.ones(4096), 1000) == tuple(range(1000))


def test_no_target_keeps_everything() -> None:
    config = tiny_config()
    selection = select(config, RandomScores(0).scores(config), (), Target())
    assert selection.layers == tuple(range(6)) and selection.kept == {}
    same = Target(6, **{row.width: size for row in AXES.values() if (size := getattr(config, row.width))})
    selection = select(config, RandomScores(0).scores(config), (), same)
    assert selection.kept == {axis: tuple(range(size)) for axis, size in axis_sizes(config).items()}


def test_channels_are_ranked_by_the_layers_that_stay() -> None:
    config = tiny_config()
    scores = RandomScores(0).scores(config)
    rows = torch.zeros_like(scores[HIDDEN])
    rows[4, 7] = 100  # of the layer that goes
    rows[1, 3] = rows[2, 3] = 1
    rows[2, 9] = 1.5
    rows[-1, 11] = 3  # the final norm
    scores[HIDDEN] = rows
    assert select(config, scores, (4, 2), Target(layers=5, hidden_size=3)).kept[HIDDEN] == (3, 9, 11)
    assert select(config, scores, (), Target(hidden_size=1)).kept[HIDDEN] == (7,)


def test_layers_go_in_their_order() -> None:
    config = tiny_config()
    selection = select(config, RandomScores(0).scores(config), (4, 3, 0), Target(layers=4, intermediate_size=10))
    assert selection.layers == (0, 1, 2, 5)
    selection = select(config, RandomScores(0).scores(config), (4, 0, 2), Target(layers=4, intermediate_size=10))
    assert list(selection.kept) == [Axis("ffn", 1)]


@pytest.mark.parametrize("share", (0.9, 0.75, 0.5))
@pytest.mark.parametrize("name", ("zoo", "nemotron-nano-12b-v2", "qwen3-8b", "smollm2-135m"))
def test_widths_for_a_share_of_the_parameters(name: str, share: float) -> None:
    config = model_config(name)
    found = with_widths(config, config.pattern, Target(parameters=share))
    requested = {key: getattr(found, key) or getattr(config, key) for key in ("hidden_size", "intermediate_size")}
    smaller = config.replace(**requested)
    smaller.to_hf()
    least = 0.87 if name == "smollm2-135m" else 0.98  # llama's hidden is a multiple of its 9 heads
    assert least * share <= count_parameters(smaller) / count_parameters(config) <= share
    assert found == Target(**{k: v for k, v in requested.items() if v != getattr(config, k)})


@pytest.mark.parametrize("share", (0.95, 0.98, 0.99, 0.995))
def test_widths_near_all_parameters_of_experts(share: float) -> None:
    config = model_config("zoo-moe")
    found = with_widths(config, config.pattern, Target(parameters=share)).widths
    assert 0.995 * share < count_parameters(config.replace(**found)) / count_parameters(config) <= share


def test_the_published_widths_follow_from_the_published_number_of_parameters() -> None:
    config, student = (model_config(f"nemotron-nano-{size}-v2") for size in ("12b", "9b"))
    pattern = "".join(config.pattern[layer] for layer in range(62) if layer not in (7, 8, 17, 18, 48, 52))
    assert pattern == student.pattern
    for requested in ({}, {"hidden_size": 4480}, {"intermediate_size": 15680}):
        found = with_widths(config, pattern, Target(parameters=8_888_227_328, **requested))
        assert (found.hidden_size, found.intermediate_size) == (student.hidden_size, student.intermediate_size)


def test_parameters_in_a_target() -> None:
    config = tiny_config()
    own = count_parameters(config)
    for target in (
        Target(parameters=0.6),
        Target(parameters=0.8 * own, hidden_size=24),
        Target(layers=4, parameters=0.5),
    ):
        smaller = slice_config(config, select(config, RandomScores(0).scores(config), (4, 1), target))
        assert target.parameters is not None
        goal = target.parameters * (own if target.parameters < 1 else 1)
        assert 0.75 * goal < count_parameters(smaller) <= goal
        assert smaller.hidden_size in (target.hidden_size, *range(8, 32, 8))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    (
        ({"parameters": 0.0}, "parameters is 0"),
        ({"parameters": -1}, "parameters is -1"),
        ({"parameters": 1e9}, "a share of the model's"),
        ({"parameters": 0.01}, "no widths leave as few"),
        ({"parameters": 0.5, "hidden_size": 16, "intermediate_size": 8}, "leave one of them out"),
        ({"parameters": 0.5, "hidden_size": 16, "keep_layers": (0, 2)}, "leave one of them out"),
    ),
)
def test_parameters_that_cannot_be(changes: dict[str, Any], complaint: str) -> None:
    config = tiny_config()
    with pytest.raises(InputError, match=complaint):
        select(config, RandomScores(0).scores(config), (), Target(**changes))


def test_named_layers_stay_whatever_the_order() -> None:
    config = tiny_config()
    selection = select(config, RandomScores(0).scores(config), (4, 3), Target(keep_layers=(0, 3, 4), hidden_size=8))
    assert selection.layers == (0, 3, 4)
    assert slice_config(config, selection).pattern == "M*-"


def test_mamba_heads_are_scored_on_the_kept_channels_only() -> None:
    """Two groups of two heads, three channels. Channel 2 is loud in head 1 alone, and goes with head_dim 2; the
    choice between heads 0 and 1 then turns."""
    config = tiny_config(pattern="M", mamba_num_heads=4, mamba_head_dim=3)
    scores = RandomScores(0).scores(config)
    scores[Axis("mamba_heads", 0)] = torch.tensor(
        [[3.0, 3.0, 0.0], [1.0, 1.0, 4.5], [5.0, 5.0, 0.0], [4.0, 4.0, 0.0]], dtype=torch.float64
    )
    heads, channels = Axis("mamba_heads", 0), Axis("mamba_head_dim", 0)
    assert select(config, scores, (), Target(mamba_num_heads=2)).kept == {heads: (1, 2)}
    both = select(config, scores, (), Target(mamba_num_heads=2, mamba_head_dim=2)).kept
    assert both == {heads: (0, 2), channels: (0, 1)}
    assert select(config, scores, (), Target(mamba_head_dim=1)).kept == {channels: (0,)}


def test_query_heads_are_ranked_inside_their_group() -> None:
    config = tiny_config(pattern="*", num_attention_heads=6, num_key_value_heads=2)
    scores = RandomScores(0).scores(config)
    heads = Axis("attn_heads", 0)
    scores[heads] = torch.tensor([1.0, 2.0, 3.0, 30.0, 20.0, 10.0], dtype=torch.float64)
    assert select(config, scores, (), Target(num_attention_heads=4)).kept[heads] == (1, 2, 3, 4)


@pytest.mark.parametrize("seed", range(30))
def test_every_selection_is_one_that_slices(seed: int) -> None:
    """Random targets on random models: the config comes out with just the widths requested."""
    config = random_config(seed)
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, step: int = 1) -> int:
        return step * int(torch.randint(1, high // step + 1, (), generator=generator))

    order = torch.randperm(config.num_layers, generator=generator).tolist()
    layers = draw(config.num_layers)
    left = {
        config.pattern[layer] for layer in range(config.num_layers) if layer not in order[: config.num_layers - layers]
    }
    widths = {"hidden_size": draw(config.hidden_size)}
    if "-" in left:
        widths["intermediate_size"] = draw(config.intermediate_size)
    if "*" in left:
        widths["num_attention_heads"] = draw(config.num_attention_heads, config.num_key_value_heads)
    if "M" in left:
        widths["mamba_num_heads"] = draw(config.mamba_num_heads, config.n_groups)
        widths["mamba_head_dim"] = draw(config.mamba_head_dim)
    selection = select(config, RandomScores(seed).scores(config), order, Target(layers=layers, **widths))
    smaller = slice_config(config, selection)
    assert smaller.num_layers == layers
    assert {name: getattr(smaller, name) for name in widths} == widths


@pytest.mark.parametrize(
    ("target", "said"),
    (
        (Target(hidden_size=33), "hidden_size is 33; expected a whole number of 1..32"),
        (Target(hidden_size=0), "1..32"),
        (Target(intermediate_size=0), "intermediate_size is 0; expected a whole number of 1..48"),
        (Target(intermediate_size=-4), "1..48"),
        (Target(intermediate_size=True), "1..48"),
        (Target(num_attention_heads=3), "multiple of num_key_value_heads"),
        (Target(mamba_num_heads=7), "multiple of n_groups"),
        (Target(mamba_num_heads=5), "multiple of n_groups"),
        (Target(mamba_head_dim=9), "1..8"),
        (Target(layers=0), "expected 1..6"),
        (Target(layers=7), "expected 1..6"),
        (Target(layers=3), r"remove_layers=3"),
        (Target(layers=5, num_attention_heads=2), "no layer of the pruned model"),
        (Target(keep_layers=()), "keep_layers"),
        (Target(keep_layers=(1, 0)), "ascending numbers within 0..5"),
        (Target(keep_layers=(1, 6)), "ascending numbers within 0..5"),
        (Target(layers=5, keep_layers=(0, 1)), "names 2 layers, but layers is 5"),
    ),
)
def test_targets_that_cannot_be(target: Target, said: str) -> None:
    config = tiny_config()
    with pytest.raises(InputError, match=said) as caught:
        select(config, RandomScores(0).scores(config), (3, 1), target)
    assert "\n" not in str(caught.value)


def test_scores_of_another_model_are_refused() -> None:
    config = tiny_config()
    for changes in ({"hidden_size": 40}, {"pattern": "M-M*-"}, {"mamba_num_heads": 4}, {"pattern": "MMM*-M"}):
        with pytest.raises(InputError, match="expected the scores of this very model"):
            select(config, RandomScores(0).scores(tiny_config(**changes)), (), Target(hidden_size=8))
    scores = RandomScores(0).scores(config)
    scores[Axis("ffn", 1)][3] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        select(config, scores, (), Target(hidden_size=8))
