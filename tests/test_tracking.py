"""Where a training's figures go beside metrics.jsonl, and what is told of a run apart from what is hashed."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from limbeck.models import provenance
from limbeck.models.errors import InputError
from limbeck.models.fingerprint import fingerprint_of, read_run
from limbeck.scripts import compress, distill
from limbeck.scripts.run import tracking
from limbeck.scripts.run.compose import build, compose_config
from limbeck.scripts.run.facts import note_command, sizes
from limbeck.scripts.run.show import result
from limbeck.scripts.run.stage import stage
from limbeck.scripts.run.tracking import Tracked, journal
from limbeck.tests.helpers import lasting, limbeck

RECORDS = [{"step": 1, "loss": 2.0, "note": "x"}, {"step": 2, "loss": 1.5}]


class Journal:
    """Stands for wandb and for torch.utils.tensorboard: notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: Any) -> None:
        self.told.append(("closed",))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.told.append((name, value, step))

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.told.append((numbers, step))


def installed(monkeypatch: pytest.MonkeyPatch, **there: bool) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(tracking.importlib.util, "find_spec",  # type: ignore[attr-defined]
                        lambda name: (there[name] or None) if name in there else real(name))  # fmt: skip


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Journal()
    module: Any = types.ModuleType("torch.utils.tensorboard")
    places: list[str] = []
    module.SummaryWriter = lambda place: places.append(place) or writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    installed(monkeypatch, tensorboard=True)
    with journal(Tracked(tensorboard="on"), tmp_path, "run", {}) as note_down:
        for record in RECORDS:
            note_down(record)
    assert places == [str(tmp_path / "tensorboard")]
    assert writer.told == [("loss", 2.0, 1), ("loss", 1.5, 2), ("closed",)]


def test_tensorboard_writes_a_file_of_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with journal(Tracked(tensorboard="on"), tmp_path, "run", {}) as note_down:
        for record in RECORDS:
            note_down(record)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.stat().st_size > 100 and b"loss" in events.read_bytes()


def test_a_package_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    installed(monkeypatch, tensorboard=False, wandb=False)
    with journal(Tracked(tensorboard="on", wandb="offline"), tmp_path, "run", {}) as note_down:
        note_down(RECORDS[0])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "pip install 'limbeck[tensorboard]'" in lines[1] and "pip install 'wandb'" in lines[0]
    assert not list(tmp_path.iterdir())


def test_wandb_s_project_and_entity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, begun = Journal(), {}
    module: Any = types.ModuleType("wandb")
    module.Settings = dict
    module.init = lambda **given: begun.update(given) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    installed(monkeypatch, wandb=True)
    with journal(Tracked(wandb="online", wandb_project="p", wandb_entity="e"), tmp_path, "run", {"a": 1}) as note_down:
        note_down(RECORDS[0])
    assert (begun["project"], begun["entity"], begun["mode"], begun["name"]) == ("p", "e", "online", "run")
    assert run.told == [({"loss": 2.0}, 1), ("closed",)]


def test_what_goes_wrong_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda place: 1 / 0
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    installed(monkeypatch, tensorboard=True)
    with journal(Tracked(tensorboard="on"), tmp_path, "run", {}) as note_down:
        note_down(RECORDS[0])
    assert "tensorboard stopped (division by zero)" in capsys.readouterr().out


def test_compress_tracks_its_distillations(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["recipe=tiny", "output=x", "wandb=offline", "wandb_project=p", "wandb_entity=e", "tensorboard=on"]
    options = build(compress.Options, compose_config("compress", words))
    seen: list[distill.Options] = []
    monkeypatch.setattr(distill, "run", seen.append)
    compress.distill_round(options, "zoo", Path("pruned"), options.plan()[0], Path("distilled"))
    assert seen[0].tracking == {"wandb": "offline", "wandb_project": "p", "wandb_entity": "e", "tensorboard": "on"}
    assert "wandb" not in seen[0].fingerprint and "tensorboard" not in seen[0].fingerprint
    assert build(compress.Options, compose_config("compress", ["recipe=tiny", "output=x"])).wandb == "off"
    code, _, err = limbeck("compress", "recipe=tiny", "output=x", "tensorboard=yes")
    assert code == 2 and "tensorboard is 'yes'; known: off, on" in err


def test_a_folder_says_who_made_it_where_and_when(tmp_path: Path) -> None:
    """In limbeck.json's `run`, which no sum of the work has in it, and in result.json."""
    (tmp_path / "text").write_text("x")
    note_command(["test", f"output={tmp_path / 'one'}", "prompt=a b"])
    for name in ("one", "two"):
        with stage(tmp_path / name, "test", inputs={"text": tmp_path / "text"}, options={}) as work:
            (work.folder / "weights").write_text("12345")
            (work.folder / "gap.html").write_text(name)  # a page, with times in it
    one, two = (read_run(tmp_path / name) for name in ("one", "two"))
    assert one["command"] == f"limbeck test output={tmp_path / 'one'} 'prompt=a b'" and one["host"] and one["cpu"]
    assert one["output"] == str(tmp_path / "one") and one["inputs"] == {"text": str(tmp_path / "text")}
    assert one["bytes"]["weights"] == 5 and one["seconds"] >= 0 and one["began"].endswith("+00:00")
    assert one["commit"] and one["processes"] == 1 and "resumed" not in one and one != two
    assert lasting(tmp_path / "one" / "limbeck.json") == lasting(tmp_path / "two" / "limbeck.json")
    assert fingerprint_of(tmp_path / "one") == fingerprint_of(tmp_path / "two")
    result(tmp_path / "one", {"figure": 1})
    told = json.loads((tmp_path / "one" / "result.json").read_text())
    assert told["figure"] == 1 and told["run"]["command"] == one["command"]
    (tmp_path / "one" / "result.json").unlink()
    assert told["run"]["bytes"] == sizes(tmp_path / "one")
    result(tmp_path / "one", {"figure": 1})
    result(tmp_path, {})
    assert set(json.loads((tmp_path / "result.json").read_text())["run"]["stages"]) == {"one", "two"}
    text = (tmp_path / "one" / "limbeck.json").read_text()
    (tmp_path / "one" / "limbeck.json").write_text(text.replace('"seconds": ', '"seconds": 1'))
    with pytest.raises(InputError, match=r"limbeck\.json is damaged"):
        fingerprint_of(tmp_path / "one")


def test_resumed_work_says_so(tmp_path: Path) -> None:
    for fails in (True, False):
        try:
            with stage(tmp_path / "out", "test", inputs={}, options={}, scratch="work") as work:
                (work.folder / "work").mkdir(exist_ok=True)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            continue
    assert read_run(tmp_path / "out")["resumed"] and "work" not in read_run(tmp_path / "out")["bytes"]


def test_the_commit_is_of_limbeck_s_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a user's repository in which it is installed."""
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "site-packages" / "limbeck" / "models" / "x.py"))
    (tmp_path / "site-packages" / "limbeck" / "models").mkdir(parents=True)
    provenance.subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    provenance.commit.cache_clear()
    try:
        assert provenance.commit() == "unknown"
    finally:
        provenance.commit.cache_clear()
