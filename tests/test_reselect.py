"""Neurons chosen by what least squares lose without them, and not by their scores."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from limbeck.models.axes import Axis
from limbeck.models.errors import InputError
from limbeck.models.hybrid import HybridLM
from limbeck.prune.repair import Repair, RepairOptions, kept_units, repair_model, repair_tensors
from limbeck.prune.reselect import AT_ONCE, least_lost, reselected
from limbeck.prune.ridge import RidgeFit, products
from limbeck.prune.slice import Selection, slice_config
from limbeck.tests.helpers import random_model, tiny_config
from limbeck.tests.pruning_helpers import draw_rows
from torch import Tensor

FIT = Repair(least_squares=True)
RESELECT = dataclasses.replace(FIT, reselect=True)


def refit_error(moments: Tensor, weights: Tensor, kept: list[int], damp: float) -> float:
    """Squared error, over inputs of these damped moments, of the best matrix on the kept ones."""
    damped = moments + damp * torch.eye(len(moments), dtype=moments.dtype)
    cross = weights @ damped[:, kept]
    fitted = torch.linalg.solve(damped[kept][:, kept], cross.T).T
    return float(((weights @ damped) * weights).sum() - (fitted * cross).sum())


@pytest.mark.parametrize("seed", range(4))
def test_each_that_goes_costs_least(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, 14, generator=generator, dtype=torch.float64) @ torch.randn(
        14, 14, generator=generator, dtype=torch.float64
    )
    moments, weights = inputs.T @ inputs, torch.randn(5, 14, generator=generator, dtype=torch.float64)
    damp = 0.05 * float(moments.diagonal().mean())
    kept = list(range(14))
    for count in range(13, 4, -1):
        errors = {unit: refit_error(moments, weights, [k for k in kept if k != unit], damp) for unit in kept}
        kept.remove(min(errors, key=lambda unit: errors[unit]))
        assert least_lost(moments, weights, count, 0.05) == tuple(kept)


def test_many_at_once_lose_hardly_more_than_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    size, count = 8 * AT_ONCE, 3 * AT_ONCE
    mixed = torch.randn(size, size, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, size)
    inputs = torch.randn(2000, size, generator=generator, dtype=torch.float64) @ mixed.T
    moments, weights = inputs.T @ inputs, torch.randn(40, size, generator=generator, dtype=torch.float64)
    damp = 0.1 * float(moments.diagonal().mean())
    exact = list(range(size))
    for _ in range(size - count):  # what least_lost does, a column at a time
        inverse = torch.linalg.inv((moments + damp * torch.eye(size, dtype=torch.float64))[exact][:, exact])
        cross = (weights @ (moments + damp * torch.eye(size, dtype=torch.float64)))[:, exact]
        costs = (cross @ inverse).square().sum(0) / inverse.diagonal()
        exact.pop(int(costs.argmin()))
    largest = (weights.square().sum(0) * moments.diagonal()).topk(count).indices.tolist()
    found = refit_error(moments, weights, list(least_lost(moments, weights, count, 0.1)), damp)
    assert found < 1.02 * refit_error(moments, weights, exact, damp)
    assert found < 0.9 * refit_error(moments, weights, largest, damp)


def with_copies(model: HybridLM) -> Selection:
    """Gives every MLP each of its neurons twice, the copies larger in what they read and smaller in what they give;
    a selection that keeps pairs of the first half."""
    kept = {}
    for layer, letter in enumerate(model.config.pattern):
        if letter == "-":
            up, down = (model.get_parameter(f"layers.{layer}.mixer.{name}_proj.weight").data for name in ("up", "down"))
            half = len(up) // 2
            up[half:], down[:, half:] = up[:half], down[:, :half]
            kept[Axis("ffn", layer)] = tuple(unit + part for part in (0, half) for unit in range(half // 2))
    return Selection(tuple(range(model.config.num_layers)), kept)


def test_neurons_that_say_the_same_go_without_loss() -> None:
    model, fits = random_model(tiny_config()), [dataclasses.replace(how, ridge=1e-8) for how in (RESELECT, FIT)]
    selection, batches = with_copies(model), [draw_rows(model.config.vocab_size) for _ in range(4)]
    told: list[Selection] = []
    get, place = model.state_dict().__getitem__, {"dtype": torch.float64, "on_selection": told.append}
    small = dict(repair_tensors(get, model.config, selection, batches, fits[0], **place))
    half = model.config.intermediate_size // 2
    for kept in told[0].kept.values():
        assert sorted(unit % half for unit in kept) == list(range(half)) and list(kept) == sorted(kept)
    fitted = HybridLM(slice_config(model.config, selection), dtype=torch.float64)
    fitted.load_state_dict(small)
    with torch.no_grad():
        expected, *others = (
            torch.cat([each(batch.input_ids, seq_idx=batch.seq_idx) for batch in batches])
            for each in (model, fitted, repair_model(model, selection, batches, fits[1]))
        )
    errors = [float((other - expected).square().mean() / expected.square().mean()) for other in others]
    assert errors[0] < 1e-3 * errors[1], errors


@pytest.mark.parametrize("rotate", [False, True])
def test_repaired_again_or_after_a_stop_the_bytes_are_the_same(rotate: bool) -> None:
    model = random_model(tiny_config(), dtype=torch.float32)
    config, batches = model.config, [draw_rows(model.config.vocab_size)]
    kept = {Axis("ffn", layer): tuple(range(8)) for layer, letter in enumerate(config.pattern) if letter == "-"}
    selection = Selection(tuple(range(config.num_layers)), kept | {Axis("hidden"): tuple(range(24))})
    get, how = model.state_dict().__getitem__, dataclasses.replace(RESELECT, rotate=rotate)
    steps: list[tuple[int, int]] = []
    whole = dict(repair_tensors(get, config, selection, batches, how, on_step=lambda *step: steps.append(step)))
    assert [done for done, _ in steps] == list(range(1, 2 * config.num_layers + 1)) and steps[-1][0] == steps[-1][1]
    done = {name: whole.__getitem__ for name in whole if name.startswith(("layers.0.", "layers.1."))}
    told: list[Selection] = []
    again = dict(repair_tensors(get, config, selection, batches, how, finished=done, on_selection=told.append))
    assert list(again) == list(whole) and all(torch.equal(weight, again[name]) for name, weight in whole.items())
    assert {axis: len(units) for axis, units in told[0].kept.items()} == {
        axis: len(units) for axis, units in selection.kept.items()
    }
    assert told[0].kept[Axis("hidden")] == selection.kept[Axis("hidden")]


def test_what_lives_in_groups_is_left_to_the_scores() -> None:
    config = tiny_config()
    layers = {letter: config.pattern.index(letter) for letter in config.pattern}
    kept = {Axis("mamba_heads", layers["M"]): (0, 2), Axis("attn_heads", layers["*"]): (0, 2)}
    everything = tuple(range(config.num_layers))
    assert not reselected(config, Selection(everything, kept))
    whole = {Axis("ffn", layers["-"]): tuple(range(config.intermediate_size))}
    assert not reselected(config, Selection(everything, whole))  # nothing goes
    found = reselected(config, Selection(everything, kept | {Axis("ffn", layers["-"]): (1, 2)}))
    assert [axis for places in found.values() for axis, _ in places.values()] == [Axis("ffn", layers["-"])]


def test_sums_are_not_of_the_activations_range() -> None:
    """Products of float16 are summed in more than float16; of activations that are beyond it nothing is made."""
    rows = 300 * torch.rand(64, 8, generator=torch.Generator().manual_seed(0)).half()
    found = products(rows, rows)
    assert float(found.max()) > torch.finfo(torch.float16).max and found.dtype == torch.float64
    assert torch.allclose(found, rows.double().T @ rows.double(), rtol=1e-5)
    model = random_model(tiny_config(pattern="M-*"), 0, torch.float32)
    model.get_parameter("layers.1.mixer.up_proj.weight").data[3] = torch.inf
    selection = Selection((0, 1, 2), {Axis("ffn", 1): tuple(range(5))})
    for repair in (RESELECT, FIT):
        with pytest.raises(InputError, match="not finite in the dtype"):
            repair_model(model, selection, [draw_rows(model.config.vocab_size)], repair)


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("last", (False, True), ids=("first", "last"))
@pytest.mark.parametrize(
    "repair",
    (Repair(norms="measured"), FIT, RESELECT, Repair(local_steps=2)),
    ids=("norms", "fit", "reselect", "local"),
)
def test_no_repair_takes_what_is_beyond_its_dtype(repair: Repair, last: bool, tied: bool) -> None:
    """Wherever it begins: a tied head has no fit of its own that would notice it."""
    model = random_model(tiny_config(tie_word_embeddings=tied), 0, torch.float32)
    last_mixer = f"layers.{model.config.num_layers - 1 if last else 0}.mixer.out_proj.weight"
    model.get_parameter(last_mixer).data *= 1e5
    places = [layer for layer, letter in enumerate(model.config.pattern) if letter == "-"]
    selection = Selection(tuple(range(model.config.num_layers)), {Axis("ffn", layer): (0, 1) for layer in places})
    tensors = repair_tensors(
        model.state_dict().__getitem__, model.config, selection, [draw_rows(97)], repair, dtype=torch.float16
    )
    with pytest.raises(InputError, match="not finite in the dtype"):
        list(tensors)


def test_inputs_that_are_all_zero_leave_the_weights() -> None:
    for width in range(1, 10):
        fit, weights = RidgeFit(), torch.ones(3, width)
        fit.add(torch.randn(5, 3), torch.zeros(5, width))
        assert torch.equal(fit.solve(weights, 0.1), weights.double())


def test_a_stream_of_which_all_stays_is_said_to_have_its_channels() -> None:
    config = tiny_config()
    for size, turned in ((config.hidden_size, False), (config.hidden_size - 8, True)):
        selection = Selection((0, 1), {Axis("hidden"): tuple(range(size))})
        content = kept_units(selection, config, Repair(rotate=True))
        assert ("principal_directions" in content) is turned and ("hidden" in content["kept"]) is not turned


def test_options() -> None:
    with pytest.raises(InputError, match=r"repair\.reselect chooses .* give repair\.least_squares=true beside it"):
        Repair(reselect=True)
    assert RepairOptions().repair(with_data=True).reselect and not RepairOptions().repair(with_data=False).reselect
    assert not RepairOptions(least_squares=False).repair(with_data=True).reselect
    assert not RepairOptions(reselect=False).repair(with_data=True).reselect
    given = RepairOptions(reselect=True)  # by itself, since with data least squares refit
    assert given.repair(with_data=True).reselect
    for wrong in (lambda: given.repair(with_data=False), lambda: RepairOptions(reselect=True, least_squares=False)):
        with pytest.raises(InputError, match=r"repair\.reselect chooses"):
            wrong()
