"""An evaluation that is stopped measures the rest when it is run again, and says the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill.gap import evaluation, measure
from limbeck.distill.gap.kept import Kept
from limbeck.models.hybrid import HybridLM
from limbeck.scripts import evaluate as command
from limbeck.tests.helpers import limbeck, moe_config, random_model
from limbeck.tests.training_helpers import draw_batch


@pytest.fixture(scope="module")
def models() -> tuple[HybridLM, dict[str, HybridLM]]:
    teacher, *students = (random_model(moe_config(pattern="ME*E"), seed, torch.float32) for seed in range(3))
    return teacher, dict(zip(("a/b", "c"), students, strict=True))


class Counted:
    """`figures`, which counts its calls, and stops like Ctrl-C at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int = 0) -> None:
        self.calls, self.stop, self.figures = 0, stop, measure.figures
        monkeypatch.setattr(measure, "figures", self)

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return self.figures(*args)


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def report(models: Any, kept: Kept | None) -> Any:
    batches = [draw_batch(seed, 3, 20, 97) for seed in range(4)]
    return measure.measure_gap(*models, batches, resamples=20, worst=2, kept=kept).to_json()


def test_what_is_kept_is_not_measured_again(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = report(models, None)
    assert sum(map(sum, expected["expert_uses"]["c"].values())) > 0
    counted = Counted(monkeypatch, stop=3)
    with pytest.raises(KeyboardInterrupt):
        report(models, Kept(tmp_path / "kept"))
    assert report(models, Kept(tmp_path / "kept")) == expected and counted.calls == 3 + 2
    assert report(models, Kept(tmp_path / "kept")) == expected and counted.calls == 5


@pytest.mark.parametrize("damage", ("flip", "cut", "empty"))
def test_what_is_damaged_is_measured_anew(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    expected, counted = report(models, None), Counted(monkeypatch)
    assert report(models, Kept(tmp_path)) == expected and counted.calls == 4
    path = next(tmp_path.glob("2-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-20] ^= 64
    path.write_bytes({"flip": content, "cut": content[:-9], "empty": b""}[damage])
    assert report(models, Kept(tmp_path)) == expected and counted.calls == 5


def test_values_are_kept_with_their_sums(tmp_path: Path) -> None:
    kept, made = Kept(tmp_path / "kept"), iter(range(9))
    assert kept.value("x", lambda: [next(made), (0.1,)]) == kept.value("x", lambda: next(made)) == [0, [0.1]]
    path = tmp_path / "kept" / "x.json"
    for text in (path.read_text().replace("0.1", "0.2"), "{", "[]", '{"value": 3}', '{"value": 3, "sum": 5}'):
        path.write_text(text)
        number = kept.value("x", lambda: next(made))
        assert number == kept.value("x", lambda: next(made)) and isinstance(number, int)


@pytest.mark.parametrize(
    "place", ("figures", *(pytest.param(place, marks=pytest.mark.slow) for place in ("continuation", "page")))
)
def test_a_stopped_evaluation_ends_as_another(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    words = [
        "evaluate", f"teacher={workshop / 'model'}", f"student.x={workshop / 'model'}", f"data={workshop / 'text'}",
        "tokens=256", "seq_len=32", "batch=2", "split=all", "details.new_tokens=2", "details.resamples=20",
    ]  # fmt: skip
    assert limbeck(*words, f"output={tmp_path / 'whole'}")[0] == 0
    with monkeypatch.context() as patched:
        counted = Counted(patched, stop=3 if place == "figures" else 0)
        if place != "figures":
            patched.setattr(*((evaluation, "agreement") if place == "continuation" else (command, "write_page")), stop)
        assert limbeck(*words, f"output={tmp_path / 'parts'}")[0] not in (0, 2)
        first = counted.calls
    counted = Counted(monkeypatch)
    code, _, err = limbeck(*words, f"output={tmp_path / 'parts'}")
    assert code == 0, err
    assert (first, counted.calls) == ((3, 2) if place == "figures" else (4, 0))
    assert (tmp_path / "whole" / "gap.json").read_text() == (tmp_path / "parts" / "gap.json").read_text()
    whole, parts = ({path.name for path in (tmp_path / name).iterdir()} for name in ("whole", "parts"))
    assert whole == parts
    assert json.loads((tmp_path / "parts" / "limbeck.json").read_text())["run"]["resumed"]
