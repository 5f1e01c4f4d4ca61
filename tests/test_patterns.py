"""Layer patterns that can be left of a model's: against brute force, and the published one among them."""

from __future__ import annotations

import itertools
import random

import pytest
from limbeck.prune.patterns import Rules, broken_rule, count_patterns, embed, odd_gap, patterns
from limbeck.scripts.run.resolve import model_config

LARGE, SMALL = model_config("nemotron-nano-12b-v2"), model_config("nemotron-nano-9b-v2")


def test_the_published_pattern_is_reachable() -> None:
    """56 of 62 layers with 4 attention layers: the published pattern is one of 4.6 million."""
    four, five = Rules({"attention": 4}), Rules({"attention": 5})
    with_four = count_patterns(LARGE.pattern, 56, four) - count_patterns(LARGE.pattern, 56, five)
    assert with_four == 4_572_900
    layers = embed(LARGE.pattern, SMALL.pattern, four)
    assert layers is not None and "".join(LARGE.pattern[layer] for layer in layers) == SMALL.pattern
    removed = set(range(62)) - set(layers)
    assert removed >= {7, 8, 48, 52} and len(removed) == 6
    assert SMALL.pattern.count("*") == 4
    assert embed(LARGE.pattern, SMALL.pattern, five) is None
    assert embed(LARGE.pattern, SMALL.pattern, Rules(pairs=True)) is None
    assert embed(LARGE.pattern, SMALL.pattern.replace("MM", "**", 1), four) is None


@pytest.mark.parametrize("seed", range(120))
def test_patterns_are_those_of_brute_force(seed: int) -> None:
    draw = random.Random(seed)
    source = "".join(draw.choice("M*-") for _ in range(draw.randint(1, 9)))
    layers = draw.randint(1, len(source))
    kinds = [kind for kind in ("mamba", "attention", "mlp") if draw.random() < 0.4]
    rules = Rules({kind: draw.randint(0, 2) for kind in kinds}, draw.choice((0, 0, 1, 2, 3)), draw.random() < 0.4)
    brute = set()
    for kept in itertools.combinations(range(len(source)), layers):
        pattern = "".join(source[layer] for layer in kept)
        if broken_rule(pattern, rules) is None and not (rules.pairs and odd_gap(kept, len(source))):
            brute.add(pattern)
    listed = list(patterns(source, layers, rules))
    assert len(listed) == len(brute) == count_patterns(source, layers, rules) and set(listed) == brute
    for pattern in map("".join, itertools.product("M*-", repeat=min(layers, 5))):
        kept = embed(source, pattern, rules)
        if len(pattern) == layers:
            assert (kept is not None) == (pattern in brute)
        if kept is not None:
            assert "".join(source[layer] for layer in kept) == pattern
            assert not (rules.pairs and odd_gap(kept, len(source)))


@pytest.mark.parametrize("seed", range(20))
def test_a_pattern_is_made_of_the_cheapest_layers(seed: int) -> None:
    draw = random.Random(seed)
    source = "".join(draw.choice("M*-") for _ in range(9))
    cost = {layer: draw.random() for layer in range(9)}
    kept = tuple(sorted(draw.sample(range(9), 6)))
    pattern = "".join(source[layer] for layer in kept)
    choices = [
        chosen for chosen in itertools.combinations(range(9), 6) if "".join(source[i] for i in chosen) == pattern
    ]
    best = min(choices, key=lambda chosen: sum(cost[layer] for layer in range(9) if layer not in chosen))
    assert embed(source, pattern, Rules(), cost) == best
    assert embed(source, pattern) == min(choices)


def test_pairs_may_lie_in_one_another() -> None:
    """Removing 1, 2 makes 0 and 3 neighbours: a run of any even length goes by pairs."""
    assert not odd_gap((4, 5), 6) and odd_gap((3, 4, 5), 6) and odd_gap((0, 1, 2), 6) and not odd_gap((0, 3), 4)
