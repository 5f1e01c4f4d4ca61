"""What is in a folder that no stage of ours left, another program's or the user's, is no reason to fail or to err."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from limbeck.models.checkpoint import load_config
from limbeck.models.fingerprint import PROVENANCE, SAID, read_provenance
from limbeck.models.named import model_config, model_folder, quantisation
from limbeck.tests.helpers import limbeck

WHOLE: dict[str, Any] = {"made_by": "limbeck score", "fingerprint": "0", "inputs": {}, "options": {}, "versions": {}}


@pytest.mark.parametrize("content", ({}, [], None, "x", {"source": "x.gguf"}, {"made_by": "limbeck prune"}))
def test_what_no_stage_left_says_nothing(tmp_path: Path, content: Any) -> None:
    (tmp_path / PROVENANCE).write_text(json.dumps(content))
    assert read_provenance(tmp_path) == {}


def test_every_part_has_its_type(tmp_path: Path) -> None:
    assert WHOLE.keys() == SAID.keys()
    (tmp_path / PROVENANCE).write_text(json.dumps(WHOLE))
    assert read_provenance(tmp_path) == WHOLE
    for name in WHOLE:
        (tmp_path / PROVENANCE).write_text(json.dumps(WHOLE | {name: 5}))
        assert read_provenance(tmp_path) == {}, name


SLOW = pytest.mark.slow  # as long as the first, and of its kind


@pytest.mark.parametrize(
    "content",
    (
        pytest.param({"source": "x.gguf"}, marks=SLOW),
        {"made_by": "limbeck prune", "run": 5},
        pytest.param(WHOLE, marks=SLOW),
    ),
)
def test_a_model_with_it_is_evaluated(workshop: Path, tmp_path: Path, content: dict[str, Any]) -> None:
    model = shutil.copytree(workshop / "model", tmp_path / "model")
    (model / PROVENANCE).write_text(json.dumps(content))
    code, _, err = limbeck(*evaluate(workshop, tmp_path), f"student.x={model}")
    assert code == 0, err
    assert (tmp_path / "gap" / "gap.html").is_file()


@pytest.mark.parametrize(
    "line",
    (
        pytest.param('{"epoch": 1, "loss": 2.0, "step": 3}', marks=SLOW),
        '{"step": 1, "tokens": 64, "loss": "nan"}',
        *(pytest.param(line, marks=SLOW) for line in ("no JSON", "[1]")),
    ),
)
def test_another_tool_s_metrics_are_left_out_of_the_page(workshop: Path, tmp_path: Path, line: str) -> None:
    model = shutil.copytree(workshop / "model", tmp_path / "model")
    (model / "metrics.jsonl").write_text(line + "\n")
    code, _, err = limbeck(*evaluate(workshop, tmp_path), f"student.x={model}")
    assert code == 0, err
    assert "Training loss" not in (tmp_path / "gap" / "gap.html").read_text()


def test_a_student_is_none_of_the_other_inputs(workshop: Path, tmp_path: Path) -> None:
    """Their sums would stand for each other in limbeck.json."""
    for name in ("teacher", "data", "scores"):
        code, _, err = limbeck(*evaluate(workshop, tmp_path), f"student.{name}={workshop / 'model'}")
        assert code == 2 and f"student.{name}" in err and not (tmp_path / "gap").exists(), err


@pytest.mark.parametrize("name", ("zoo", "smollm2-135m"))
def test_a_folder_here_goes_before_a_name(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Everywhere alike: the weights of one model and the size of another make no figures of either."""
    monkeypatch.chdir(tmp_path)
    elsewhere = model_config(name)
    shutil.copytree(workshop / "model", tmp_path / name)
    config = load_config(workshop / "model")
    assert model_config(name) == load_config(model_folder(name)) == config != elsewhere
    assert model_config(f"./{name}") == config and quantisation(name) == {}
    shutil.rmtree(tmp_path / name)
    (tmp_path / name).mkdir()  # no model
    assert model_config(name) == elsewhere


def evaluate(workshop: Path, folder: Path) -> list[str]:
    return [
        "evaluate", f"teacher={workshop / 'model'}", f"data={workshop / 'text'}", "tokens=64", "seq_len=32",
        "split=all", "details.new_tokens=2", "details.resamples=20", f"output={folder / 'gap'}",
    ]  # fmt: skip
