"""Layers are what a config.json counts as num_hidden_layers, in every family: a block of llama is one."""

from __future__ import annotations

import pytest
from limbeck.models.config import HybridConfig
from limbeck.models.errors import InputError
from limbeck.prune.choose import kept_layers, named_layers, numbered_layers, select
from limbeck.prune.depth import random_layers
from limbeck.prune.rounds import Cut, plan_cuts
from limbeck.prune.scoring import Importance
from limbeck.prune.slice import slice_config
from limbeck.prune.target import Target
from limbeck.prune.width_metrics import RandomScores
from limbeck.scripts.run.resolve import model_config, model_names
from limbeck.tests.helpers import any_config

CONFIGS = [*range(0, 100, 7), *model_names()]


def config_of(name: int | str) -> HybridConfig:
    return any_config(name) if isinstance(name, int) else model_config(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_count_is_config_json_s(name: int | str) -> None:
    config = config_of(name)
    total, size = config.num_hidden_layers, config.block_size
    assert total == config.to_hf()["num_hidden_layers"]
    if total < 3:
        return
    order = random_layers(config, remove=2 * size, seed=0).order
    layers = kept_layers(config, order, total - 2)
    assert len(layers) == (total - 2) * size and named_layers(config, numbered_layers(config, layers), None) == layers
    for target in (Target(layers=total - 2), Target(keep_layers=numbered_layers(config, layers))):
        small = slice_config(config, select(config, RandomScores(0).scores(config), order, target))
        assert small.num_hidden_layers == total - 2 == small.to_hf()["num_hidden_layers"]
    cut = Cut("", 0, Target(layers=total - 1), None, False, {})
    assert cut.removed(config) == 1
    assert next(plan_cuts(config, [cut])).after.num_hidden_layers == total - 1
    how = Importance("random", None, False, {})
    assert how.settled(config).remove_layers == 1 and how.settled(config, 2).remove_layers == 2
    with pytest.raises(InputError, match=rf"expected 1\.\.{total}, the model's {total} layers"):
        kept_layers(config, order, total + 1)
    with pytest.raises(InputError, match="importance.remove_layers=3 or more" if total > 3 else "expected 1"):
        kept_layers(config, order, total - 3)


def test_qwen3_8b_keeps_28_of_its_36_layers() -> None:
    """Which were 14 when half blocks were counted."""
    config = model_config("qwen3-8b")
    (step,) = plan_cuts(config, [Cut("", 0, Target(layers=28), None, False, {})])
    assert step.after.num_layers == 56 and step.after.to_hf()["num_hidden_layers"] == 28


def test_half_blocks_are_refused() -> None:
    config = model_config("qwen3-8b")
    with pytest.raises(InputError, match="are not whole blocks"):
        numbered_layers(config, (0, 3))
