"""Models that wait elsewhere come to a device and are back where they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from limbeck.distill.gap import continuation, evaluation, probes
from limbeck.distill.gap import measure as gap
from limbeck.distill.gap.measure import measure_gap
from limbeck.models.errors import InputError
from limbeck.models.hybrid import HybridLM
from limbeck.models.placement import is_on, placed
from limbeck.scripts.run.resolve import ZOO
from limbeck.tests.helpers import random_model, tiny_config
from limbeck.tests.training_helpers import draw_long_documents

CPU, AWAY = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("tied", (True, False))
def test_a_model_comes_and_goes(tied: bool) -> None:
    model = random_model(tiny_config(tie_word_embeddings=tied), 0, torch.float32)
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()}
    with placed(model, AWAY) as there:
        assert there is model and all(tensor.is_meta for tensor in model.state_dict().values())
        assert there.hidden_states(torch.zeros(1, 3, dtype=torch.long, device=AWAY)).is_meta
    with pytest.raises(ZeroDivisionError), placed(model, AWAY):
        _ = 1 / 0
    with placed(model, None), placed(model, CPU):
        pass
    after = model.state_dict(keep_vars=True)
    assert {name: (tensor, tensor.data_ptr()) for name, tensor in after.items()} == before


def test_a_device_without_a_number_is_any_of_its_kind() -> None:
    tensor = torch.zeros(1)
    assert is_on(tensor, CPU) and not is_on(tensor, torch.device("cuda")) and not is_on(tensor, AWAY)


def test_one_model_at_a_time_is_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `device` does when text is read, for probes and continuations, told by what is placed."""
    models = {
        name: random_model(tiny_config(), seed, torch.float32) for seed, name in enumerate(("teacher", "student"))
    }
    here: list[HybridLM] = []
    came: list[HybridLM] = []

    @contextmanager
    def watched(model: HybridLM, device: torch.device | None) -> Iterator[HybridLM]:
        assert device == CPU and not here
        here.append(model)
        came.append(model)
        yield model
        here.pop()

    for module in (gap, probes, continuation):
        monkeypatch.setattr(module, "placed", watched)
    students = {"student": models["student"]}
    found = measure_gap(
        models["teacher"], students, [draw_long_documents(0), draw_long_documents(1)], resamples=2, device=CPU
    )
    assert came == [*models.values()] * 2
    probe = probes.Probe(torch.tensor([5, 6, 7, 8]), 1)
    probes.retrieve(models, [probe], resamples=2, seed=0, device=CPU)
    assert came[4:] == [*models.values()]
    continuation.continuations(models["teacher"], students, torch.tensor([[5, 6]]), 2, resamples=2, device=CPU)
    assert came[6:] == [*models.values()]
    monkeypatch.undo()
    assert found == measure_gap(
        models["teacher"], students, [draw_long_documents(0), draw_long_documents(1)], resamples=2
    )


def test_models_wait_in_main_memory_where_a_gpu_is_too_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places: list[Any] = []
    said: list[str] = []
    monkeypatch.setattr(evaluation, "load_served", lambda path, dtype, device: places.append(device))
    folders = {"teacher": ZOO, "student": ZOO}
    needed = 2 * 7_130_096 * 4
    cuda = torch.device("cuda")
    for free, home, away in ((needed / evaluation.SHARE + 1, cuda, None), (needed / evaluation.SHARE - 1, CPU, cuda)):
        monkeypatch.setattr(evaluation, "free_memory", lambda device, free=free: int(free))
        _, found = evaluation.load_models(folders, torch.float32, cuda, said.append)
        assert places[-2:] == [home, home] and found == away
    assert len(said) == 1 and "wait in main memory" in said[0]
    monkeypatch.setattr(evaluation, "free_memory", lambda device: 1)
    with pytest.raises(InputError, match=r"takes 27.20 MiB in .*, cuda has 0.00 MiB free"):
        evaluation.load_models(folders, torch.float32, cuda, said.append)
    assert evaluation.load_models(folders, torch.float32, CPU, said.append)[1] is None and places[-1] == CPU


@pytest.mark.gpu
def test_the_figures_of_models_that_wait_are_those_of_models_on_the_device() -> None:
    models = [random_model(tiny_config(), seed, torch.float32) for seed in range(2)]
    found = measure_gap(models[0], {"x": models[1]}, [draw_long_documents(0)], resamples=2, device=torch.device("cuda"))
    assert all(tensor.device == CPU for model in models for tensor in model.parameters())
    there = [model.cuda() for model in models]
    assert measure_gap(there[0], {"x": there[1]}, [draw_long_documents(0)], resamples=2) == found
