"""A limbeck.json that no stage of ours left (another program's, or another version's) is no reason to fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from limbeck.models.fingerprint import PROVENANCE, SAID, read_provenance
from limbeck.tests.helpers import limbeck, make_workshop

WHOLE: dict[str, Any] = {"made_by": "limbeck score", "fingerprint": "0", "inputs": {}, "options": {}, "versions": {}}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


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


@pytest.mark.parametrize("content", ({"source": "x.gguf"}, {"made_by": "limbeck prune", "run": 5}, WHOLE))
def test_a_model_with_it_is_evaluated(workshop: Path, tmp_path: Path, content: dict[str, Any]) -> None:
    model = shutil.copytree(workshop / "model", tmp_path / "model")
    (model / PROVENANCE).write_text(json.dumps(content))
    code, _, err = limbeck(
        "evaluate", f"teacher={workshop / 'model'}", f"student.x={model}", f"data={workshop / 'text'}", "tokens=64",
        "seq_len=32", "split=all", "details.new_tokens=2", "details.resamples=20", f"output={tmp_path / 'gap'}",
    )  # fmt: skip
    assert code == 0, err
    assert (tmp_path / "gap" / "gap.html").is_file()
