"""Local distillation: every weight of a layer learns from the source's stream, and a layer never ends worse."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from limbeck.models.axes import HIDDEN
from limbeck.models.config import HybridConfig
from limbeck.models.hybrid import HybridLM
from limbeck.prune import local_distill, repair
from limbeck.prune.local_distill import error, mean_error
from limbeck.prune.repair import Repair, repair_model
from limbeck.prune.slice import Selection
from limbeck.prune.streams import Streams
from limbeck.tests.helpers import assert_close, moe_config, random_model, tiny_config
from limbeck.tests.pruning_helpers import draw_rows, draw_selection
from torch import Tensor

FIT = Repair(rotate=True, least_squares=True)


def errors_of_layers(
    monkeypatch: pytest.MonkeyPatch, model: HybridLM, selection: Selection, batches: list[Any], how: Repair
) -> list[tuple[float, float, set[str]]]:
    """Of each layer its error before and after, and the weights that changed."""
    found, distill_layer = [], local_distill.distill_layer

    def watched(layer: HybridLM, own: Streams, source: Streams, kept: Tensor, *how: Any) -> None:
        weights = {name: weight for name, weight in layer.state_dict().items() if name.startswith("layers.0.")}
        errors, state = [], {name: weight.clone() for name, weight in weights.items()}
        for run in (lambda: None, lambda: distill_layer(layer, own, source, kept, *how)):
            run()
            errors.append(mean_error(layer, own, source, kept, range(len(own.hidden))))
        changed = {name for name, weight in weights.items() if not torch.equal(weight, state[name])}
        found.append((*errors, changed))

    monkeypatch.setattr(repair, "distill_layer", watched)
    repair_model(model, selection, batches, how)
    return found


def sizes(config: HybridConfig) -> Selection:
    """Three quarters of the stream's channels, and some of what the layers have."""
    drawn = draw_selection(config, ("ffn", "mamba_heads", "experts"), random.Random(1))
    return Selection(drawn.layers, {**drawn.kept, HIDDEN: tuple(range(config.hidden_size * 3 // 4))})


@pytest.mark.parametrize("make", (tiny_config, moe_config))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_each_layer_comes_nearer_to_the_source(
    make: Callable[[], HybridConfig], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By all that it has: matrices, convolution, decays, norms, the router; and by 16-bit weights, of which a single
    step moves next to none. What is no weight, as the bias of a router's choice, stays."""
    model = random_model(make(), dtype=torch.float32).to(dtype)
    batches = [draw_rows(model.config.vocab_size) for _ in range(3)]
    how = dataclasses.replace(FIT, local_steps=30)
    found = errors_of_layers(monkeypatch, model, sizes(model.config), batches, how)
    assert len(found) == model.config.num_layers
    assert all(after < 0.99 * before for before, after, _ in found), found
    weights = {name.split(".", 2)[2] for name, _ in model.named_parameters() if name.startswith("layers.")}
    assert {name.split(".", 2)[2] for *_, changed in found for name in changed} == weights


def test_a_layer_stays_where_steps_lead_away(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tiny_config(), dtype=torch.float32)
    batches, selection = [draw_rows(model.config.vocab_size)], sizes(model.config)
    wild = dataclasses.replace(FIT, local_steps=1)
    object.__setattr__(wild, "local_rate", 50.0)  # beyond what the option takes
    found = errors_of_layers(monkeypatch, model, selection, batches, wild)
    assert all(before == after and not changed for before, after, changed in found), found


def test_the_error_is_relative_to_each_token() -> None:
    """A token whose stream is a hundred times as large counts no more than another."""
    config = tiny_config(pattern="-")
    model = random_model(config)
    batch = draw_rows(config.vocab_size)
    own = Streams(config, model.state_dict().__getitem__, [batch], "cpu", torch.float64)
    with torch.no_grad():
        out = model.forward_layers(own.hidden[0], 0, 1, seq_idx=own.seq_idx[0])[own.mask[0]]
        sizes = torch.logspace(0, 2, len(out), dtype=torch.float64)[:, None]
        own.hidden[0] = own.hidden[0] * 0  # a layer of nothing gives nothing
        assert_close("error", torch.tensor(1.0), error(model, own, 0, out * sizes), 1e-6)


def test_repaired_twice_the_bytes_are_the_same_and_no_gradient_stays() -> None:
    model = random_model(tiny_config(), dtype=torch.float32)
    batches, selection = [draw_rows(model.config.vocab_size) for _ in range(2)], sizes(model.config)
    how = dataclasses.replace(FIT, local_steps=5)
    first, second = (repair_model(model, selection, batches, how).state_dict() for _ in range(2))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert all(weight.grad is None for weight in model.parameters())


def test_an_interrupted_run_goes_on_to_the_same_bytes() -> None:
    """Layers that are there already are run, not trained again; what follows sees the very numbers."""
    model = random_model(tiny_config(), dtype=torch.float32)
    config, selection = model.config, sizes(model.config)
    batches = [draw_rows(config.vocab_size)]
    get, how = model.state_dict().__getitem__, dataclasses.replace(FIT, local_steps=5)
    whole = dict(repair.repair_tensors(get, config, selection, batches, how))
    done = {name: whole.__getitem__ for name in whole if name.startswith(("layers.0.", "layers.1."))}
    again = dict(repair.repair_tensors(get, config, selection, batches, how, finished=done))
    assert list(again) == list(whole) and all(torch.equal(weight, again[name]) for name, weight in whole.items())
