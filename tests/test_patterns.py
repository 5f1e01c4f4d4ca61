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


@pytest.mark.parametrize("seed", range(60))
def test_blocks_come_and_go_together(seed: int) -> None:
    """Patterns, their number and the layers of one, where a family's layers are blocks of two or three."""
    draw, size = random.Random(seed), 2 + seed % 2
    known = ["M-", "*-", "ME"] if size == 2 else ["M*-", "M--"]
    blocks = [draw.choice(known) for _ in range(draw.randint(1, 6))]
    source, number = "".join(blocks), draw.randint(1, len(blocks))
    rules = Rules({"attention": draw.randint(0, 2)}, draw.choice((0, 0, 2)), draw.random() < 0.4)
    cost = {layer: draw.random() for layer in range(len(source))}
    brute: dict[str, float] = {}
    for kept in itertools.combinations(range(len(blocks)), number):
        layers = tuple(block * size + part for block in kept for part in range(size))
        pattern = "".join(source[layer] for layer in layers)
        if broken_rule(pattern, rules) is None and not (rules.pairs and odd_gap(layers, len(source))):
            gone = sum(cost[layer] for layer in range(len(source)) if layer not in layers)
            brute[pattern] = min(gone, brute.get(pattern, gone))
    assert set(patterns(source, number * size, rules, size=size)) == set(brute)
    assert count_patterns(source, number * size, rules, size=size) == len(brute)
    for pattern, least in brute.items():
        layers = embed(source, pattern, rules, cost, size=size) or ()
        assert "".join(source[layer] for layer in layers) == pattern
        assert all(layers[n] == layers[n - n % size] + n % size and layers[n - n % size] % size == 0
                   for n in range(len(layers)))  # fmt: skip
        assert sum(cost[layer] for layer in range(len(source)) if layer not in layers) == pytest.approx(least)


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


def test_layers_like_one_another_count_together() -> None:
    """Letters of variants of experts, beside those of experts."""
    rules = Rules({"moe": 3})
    assert broken_rule("Ma*bMa", rules) is None and "2 moe layers" in (broken_rule("Ma*b", rules) or "")
    assert list(patterns("Ma*bMa", 4, rules)) == ["Maba", "a*ba", "abMa"]
    assert count_patterns("Ma*bMa", 4, rules) == 3 and embed("Ma*bMa", "aba", rules) == (1, 3, 5)


def test_deep_patterns() -> None:
    assert len(next(patterns("M-" * 1500, 2996))) == 2996 and count_patterns("M-" * 1500, 2998) > 0


def test_pairs_may_lie_in_one_another() -> None:
    """Removing 1, 2 makes 0 and 3 neighbours: a run of any even length goes by pairs."""
    assert not odd_gap((4, 5), 6) and odd_gap((3, 4, 5), 6) and odd_gap((0, 1, 2), 6) and not odd_gap((0, 3), 4)
