"""Spaces, rules and budgets that cannot be are refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
from limbeck.models.errors import InputError
from limbeck.prune.patterns import Rules
from limbeck.prune.ranges import Range
from limbeck.prune.scores import LayerScores
from limbeck.prune.search import (
    Budget,
    Space,
    find_candidates,
    find_depths,
)
from limbeck.tests.helpers import tiny_config
from limbeck.tests.search_helpers import NOWHERE, candidates_of


@pytest.mark.parametrize(
    ("space", "rules", "order", "says"),
    (
        ({"layers": (5,)}, {}, None, "without scores"),
        ({"layers": (4,)}, {}, (3,), "remove_layers=2"),
        ({"layers": (7,)}, {}, (3,), "at most 6"),
        ({"layers": (4.5,)}, {}, (3, 4), "whole"),
        (
            {"layers": (5,)},
            {"min_layers": {"attention": 1}},
            (3,),
            "0 attention layers where min_layers.attention is 1",
        ),
        ({"layers": (5,)}, {"pairs": True}, (3,), "pairs"),
        ({"layers": (5,)}, {"longest_run": 1}, (1,), "2 like layers in a row"),
        ({"patterns": ("M**",)}, {}, None, "'M\\*\\*' cannot be made"),
        ({"patterns": ("",)}, {}, None, "cannot be made"),
        ({"patterns": ("M-M",)}, {"min_layers": {"attention": 1}}, None, "0 attention layers"),
        ({"hidden_size": (33,)}, {}, None, "at most 32"),
        ({"hidden_size": (0,)}, {}, None, "more than 0"),
        ({"hidden_size": ()}, {}, None, "more than 0"),
        ({"mamba_num_heads": (3,)}, {}, None, "aligned"),
        ({"intermediate_ratio": (9,)}, {}, None, "aligned"),
    ),
)
def test_spaces_that_cannot_be(space: dict[str, Any], rules: dict[str, Any], order: Any, says: str) -> None:
    config = tiny_config()
    with pytest.raises(InputError, match=says) as caught:
        chosen = Space(**space)
        depths = find_depths(config, chosen, Rules(**rules), None if order is None else LayerScores(order))
        find_candidates(config, chosen, depths, Budget(1e9, 64), NOWHERE)
    assert "\n" not in str(caught.value)


def test_options_that_contradict_each_other() -> None:
    for make, says in (
        (lambda: Space(layers=(3,), patterns=("M",)), "both given"),
        (lambda: Space(intermediate_size=(3,), intermediate_ratio=(3,)), "both given"),
        (lambda: Space(align=0), "align"),
        (lambda: Range(3, 2, 1), "min <= max"),
        (lambda: Range(1, 2, 0), "step"),
        (lambda: Rules({"experts": 1}), "mamba, attention, mlp"),
        (lambda: Rules({"mlp": -1}), "at least 0"),
        (lambda: Rules(longest_run=-1), "longest_run"),
    ):
        with pytest.raises(InputError, match=says):
            make()


def test_a_budget_that_nothing_fits_says_the_smallest() -> None:
    config = tiny_config()
    depths = find_depths(config, Space(), Rules(), None)
    with pytest.raises(InputError, match=r"none of 1 sizes fits: the smallest takes 0\.00 GiB"):
        find_candidates(config, Space(), depths, Budget(100, 64), NOWHERE)


def test_two_patterns_of_a_length_have_two_names() -> None:
    space = Space(patterns=("M-M*-", "M-M-M", "M-M*"))
    found = candidates_of(tiny_config(), space)
    assert [candidate.name.split("-H")[0] for candidate in found] == ["L5-1", "L5-2", "L4"]
    assert [candidate.target.keep_layers for candidate in found] == [(0, 1, 2, 3, 4), (0, 1, 2, 4, 5), (0, 1, 2, 3)]
    assert found[0].words() == ["target.keep_layers=[0,1,2,3,4]"]
