"""A stage's folder: made once, appears whole, resumes what is its own, and leaves alone what is not."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from limbeck.models.errors import InputError
from limbeck.models.fingerprint import Fingerprint, check_files, fingerprint_of, look_of
from limbeck.models.tensors import refusal
from limbeck.scripts.run.stage import stage
from limbeck.tests.helpers import lasting


def made(
    folder: Path, source: Path, seed: int = 0, scratch: str | None = None, fail: BaseException | None = None
) -> bool:
    """A stage that counts its runs in the source's neighbour, and leaves one file; whether it had to be made."""
    with stage(folder, "test", inputs={"source": source}, options={"seed": seed}, scratch=scratch) as work:
        if work.finished:
            return False
        with (source.parent / "runs").open("a") as stream:
            stream.write("x")
        if scratch is not None and not isinstance(fail, InputError):
            (work.folder / scratch).mkdir(exist_ok=True)
            with (work.folder / scratch / "steps").open("a") as stream:
                stream.write("s")
        if fail is not None:
            raise fail
        (work.folder / "weights").write_text("w")
    return True


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    (path / "a").write_text("1")
    return path


@pytest.mark.parametrize("scratch", [None, "work"])
def test_a_finished_stage_is_not_done_again(scratch: str | None, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert made(out, source, scratch=scratch)
    assert sorted(path.name for path in out.iterdir()) == ["limbeck.json", "weights"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert not made(out, source, scratch=scratch) and (tmp_path / "runs").read_text() == "x"
    with pytest.raises(InputError, match=r"made otherwise \(seed was 0, now 5\)"):
        made(out, source, seed=5, scratch=scratch)
    (source / "a").write_text("2")
    with pytest.raises(InputError, match=r"inputs\.source has changed"):
        made(out, source, scratch=scratch)


def test_equal_work_gives_equal_bytes(source: Path, tmp_path: Path) -> None:
    made(tmp_path / "one", source)
    made(tmp_path / "two", source, scratch="work")
    for name in ("limbeck.json", "weights"):
        assert lasting(tmp_path / "one" / name) == lasting(tmp_path / "two" / name)


INTERRUPT: Any = KeyboardInterrupt()


def test_unfinished_work_is_found_again_if_it_is_of_the_same_facts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work of other facts is refused, whatever the other command keeps itself, and stays; so it does where an input
    turns out wrong. Inputs are the same by their look while their sums are not known."""
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    monkeypatch.setattr(Fingerprint, "begin", lambda *_: None)  # its thread would have the sums, or not
    for error in (INTERRUPT, INTERRUPT, InputError("wrong")):
        with pytest.raises(type(error)):
            made(out, source, scratch="work", fail=error)
    assert not out.exists() and (partial / "work" / "steps").read_text() == "ss"
    for scratch in ("work", None):
        with pytest.raises(InputError, match=r"out\.partial was begun otherwise \(seed was 0, now 1\); remove it, or"):
            made(out, source, seed=1, scratch=scratch)
    before = (source / "a").stat()
    os.utime(source / "a", (0, 0))
    with pytest.raises(InputError, match=r"begun otherwise \(its inputs have changed\)"):
        made(out, source, scratch="work")
    os.utime(source / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (partial / "work" / "steps").read_text() == "ss" and (tmp_path / "runs").read_text() == "xxx"
    assert made(out, source, scratch="work") and [path.name for path in out.parent.glob("*out*")] == ["out"]


def test_pieces_outlive_an_input_that_turns_out_wrong(source: Path, tmp_path: Path) -> None:
    """Of a stage without a folder of its own for them: those of a run before; a first run's own go with its error."""
    for error, left in ((InputError("wrong"), False), (INTERRUPT, True), (InputError("wrong"), True)):
        with pytest.raises(type(error)), stage(tmp_path / "out", "test", inputs={}, options={}, resumes=True) as work:
            (work.folder / "shard").write_text("x")
            raise error
        assert (tmp_path / ".out.partial" / "shard").exists() == left


def test_unfinished_work_is_found_again_by_the_sums_of_its_inputs(source: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", {"seed": 0}
    with (
        pytest.raises(KeyboardInterrupt),
        stage(out, "test", inputs={"source": source}, options=options, scratch="work") as work,
    ):
        work.content()
        assert work.made_of.thread is not None
        work.made_of.thread.join()
        (work.folder / "work").mkdir()
        raise KeyboardInterrupt
    os.utime(source / "a", (0, 0))
    with stage(out, "test", inputs={"source": source}, options=options, scratch="work") as work:
        assert (work.folder / "work").is_dir()


@pytest.mark.parametrize("name", ["log.txt", "training/metrics.jsonl", "training/speed.jsonl", "wandb/run/files",
                                  ".distilled.writing", "rows-00001.safetensors.partial"])  # fmt: skip
def test_an_unfinished_folder_without_work_is_replaced(name: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), stage(tmp_path / "out", "test", inputs={}, options={}, resumes=True) as work:
        (work.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (work.folder / name).write_text("x")
        raise KeyboardInterrupt
    assert (tmp_path / ".out.partial" / name).exists()
    assert made(tmp_path / "out", source, seed=1) and len(list((tmp_path / "out").iterdir())) == 2


def test_what_is_made_anew_with_late_options_replaces_unfinished_work_and_says_so(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        made(out, source, scratch="work", fail=INTERRUPT)
    with stage(out, "test", inputs={"source": source}, options={"seed": 1}, replaces=True) as work:
        assert not (work.folder / "work").exists()
    assert "was begun otherwise (seed was 0, now 1); it is made anew" in caplog.text


@pytest.mark.parametrize("place", ["scratch", "rename", "begun"])
def test_killed_while_the_folder_gets_its_name(
    place: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its scratch folder goes, before the rename, and after: the same command finds it finished."""
    out, calls = tmp_path / "out", {"scratch": (shutil, "rmtree"), "rename": (os, "rename"), "begun": (Path, "unlink")}
    called = getattr(*calls[place])

    def killed(path: Path, *rest: Any, **named: Any) -> None:
        if path.name in ("work", ".out.partial", "begun.json"):
            raise KeyboardInterrupt
        called(path, *rest, **named)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(*calls[place], killed)
        made(out, source, scratch="work")
    assert out.exists() == (place == "begun")
    with pytest.raises(InputError, match=r"(begun|made) otherwise \(seed was 0, now 5\)"):
        made(out, source, seed=5, scratch="work")
    assert not made(out, source, scratch="work") and (tmp_path / "runs").read_text() == "x"
    assert sorted(path.name for path in out.iterdir()) == ["limbeck.json", "weights"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs", "source"]


def test_a_folder_that_is_seen_has_nothing_that_goes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the moment that it has its name; a reader that meets its files going is told."""
    out, rename, seen = tmp_path / "out", os.rename, []

    def watched(temporary: Path, folder: Path) -> None:
        rename(temporary, folder)
        seen.append((sorted(path.name for path in folder.iterdir()), fingerprint_of(folder)))

    monkeypatch.setattr(os, "rename", watched)
    assert made(out, source, scratch="work")
    assert seen == [(["begun.json", "limbeck.json", "weights"], fingerprint_of(out))]
    monkeypatch.setattr("limbeck.models.fingerprint.files_of", lambda folder: [folder / "weights", folder / "gone"])
    monkeypatch.setattr(
        "limbeck.models.fingerprint.content_files", lambda folder: [folder / "weights", folder / "gone"]
    )
    for read in (fingerprint_of, look_of, check_files):
        with pytest.raises(InputError, match=r"out changed while it was read \(\S+gone is gone\); run the same"):
            read(out)


def test_an_input_that_cannot_be_read_is_found_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "a" and access(path, mode))
    with pytest.raises(InputError, match=r"source/a cannot be read: Permission denied; change its permissions"):
        made(tmp_path / "out", source)
    assert not (tmp_path / "runs").exists()

    def refused(path: Path, like: str | None = None) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("limbeck.models.folder.file_sum", refused)
    with pytest.raises(InputError, match=r"source/a cannot be read"):
        fingerprint_of(source)


def test_what_helps_where_the_system_refuses() -> None:
    forbidden, full = (OSError(number, os.strerror(number), "x") for number in (errno.EACCES, errno.ENOSPC))
    assert refusal(full).startswith("x cannot be written: No space left on device; free some space, and run the same")
    for path, done in ((Path("x"), "written"), (None, "read or written")):
        said = refusal(forbidden, path)
        assert said.startswith(f"x cannot be {done}: Permission denied; change its permissions") and "space" not in said


@pytest.mark.parametrize("scratch", [None, "work"])
def test_refused_input_leaves_nothing(scratch: str | None, source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="no"):
        made(tmp_path / "out", source, scratch=scratch, fail=InputError("no"))
    (tmp_path / "runs").unlink()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_foreign_folder_is_left_alone(content: str | None, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if content is not None:
        (out / "limbeck.json").write_text(content)
    with pytest.raises(InputError, match="not of limbeck"):
        made(out, source)
    assert len(list(out.iterdir())) == (content is not None)


def test_fingerprint_of_our_folder_is_of_its_contents(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(out, source)
    before = fingerprint_of(out)
    (out / "result.json").write_text(json.dumps({"path": str(out)}))
    assert fingerprint_of(out) == before
    (out / "weights").write_text("v")
    with pytest.raises(InputError, match="weights is not as it was left"):
        fingerprint_of(out)
    (out / "limbeck.json").unlink()  # taken as it is
    assert fingerprint_of(out) != before
    plain = fingerprint_of(source)
    (source / "result.json").write_text("data of the user's own")
    assert fingerprint_of(source) != plain


def test_a_text_may_grow_once_it_has_been_read(tmp_path: Path) -> None:
    """Work that takes days is not lost to it; a change before, and one of another input, still is."""
    for name in ("text", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.txt").write_text("one")
    inputs = {"data": tmp_path / "text", "teacher": tmp_path / "model"}
    with stage(tmp_path / "out", "distill", inputs=inputs, options={}, scratch="training") as work:
        known = work.made_of.settle("data")["inputs"]
        (tmp_path / "text" / "two.txt").write_text("two")
    assert json.loads((tmp_path / "out" / "limbeck.json").read_text())["inputs"] == known
    with (
        pytest.raises(InputError, match=r"changed while it was read \(data=\S+text\); run the same"),
        stage(tmp_path / "late", "distill", inputs=inputs, options={}, scratch="training") as work,
    ):
        (tmp_path / "text" / "three.txt").write_text("three")
        work.made_of.settle("data")
    with (
        pytest.raises(InputError, match=r"changed while it was read \(teacher=\S+model\); run the same"),
        stage(tmp_path / "other", "distill", inputs=inputs, options={}, scratch="training") as work,
    ):
        work.made_of.settle("data")
        (tmp_path / "model" / "two.txt").write_text("two")
