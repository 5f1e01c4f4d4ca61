"""Progress: lines with the time where there is no terminal and in the output's log, a bar where there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from limbeck.scripts.run import show
from limbeck.scripts.run.stage import stage
from limbeck.tests.helpers import limbeck

LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "


def test_lines_come_while_the_work_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(show, "EVERY", 0.05)
    with show.logged(tmp_path), show.progress("training", 400) as bar:
        bar.set(100, note="loss 2.500")
        deadline = time.monotonic() + 60
        while not (tmp_path / show.LOG).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        bar.set(400, note="loss 2.250")
    lines = (tmp_path / show.LOG).read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    assert re.fullmatch(LINE + r"training  100 of 400  \d+:\d\d (left|taken)  loss 2.500", lines[0]), lines
    assert re.fullmatch(LINE + r"training  400 of 400  \d+:\d\d taken  loss 2.250", lines[-1]), lines


def test_bytes_and_unknown_totals() -> None:
    bar = show.Bar("reading", None, in_bytes=True)
    assert re.fullmatch(r"reading  \d+:\d\d taken", bar.line())
    bar.set(3 * 2**20, 8 * 2**20)
    assert re.fullmatch(r"reading  3 of 8 MiB  \d+:\d\d left", bar.line())
    counting = show.Bar("reading", None, in_bytes=False)
    counting.add(7)
    assert re.fullmatch(r"reading  7  \d+:\d\d taken", counting.line())


def test_time_left_is_told_from_what_this_run_did() -> None:
    """A resumed training that stands at 900 of 1,000 has not done those in no time."""
    bar = show.Bar("training", 1000, in_bytes=False)
    bar.begun -= 100
    bar.set(901)
    assert "taken" in bar.line()
    bar.set(951)
    assert "1:38 left" in bar.line()  # 50 steps in 100 seconds, 49 to go
    assert show.duration(3727) == "1:02:07"


def test_a_stage_leaves_its_log_outside_of_what_is_hashed(tmp_path: Path) -> None:
    from limbeck.models.fingerprint import fingerprint_of

    sums = []
    for name in ("one", "other"):
        with stage(tmp_path / name, "test", inputs={}, options={}) as work:
            (work.folder / "weights").write_text("w")
            with show.progress(name):
                pass
        assert name in (tmp_path / name / show.LOG).read_text()
        sums.append(fingerprint_of(tmp_path / name))
    assert sums[0] == sums[1]
    (tmp_path / "one" / show.LOG).write_text("another time")
    assert fingerprint_of(tmp_path / "one") == sums[0]


@pytest.mark.parametrize("columns", ("0", "20", "80"))
def test_tables_cut_nothing_off_where_there_is_no_terminal(columns: str) -> None:
    names = ["student-" + letter * 90 for letter in "ab"]
    code = f"from limbeck.scripts.run.show import table; table('', ('name', 'bytes'), [(n, 10**30) for n in {names}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"COLUMNS": columns})  # fmt: skip
    cells = "".join(line.split("│")[1].strip() for line in done.stdout.splitlines() if line.startswith("│"))
    assert cells == "".join(names) and "…" not in done.stdout, done.stdout + done.stderr
    assert {len(line) for line in done.stdout.splitlines()} == {80}


def test_quiet() -> None:
    words = [sys.executable, "-m", "limbeck.scripts.run.main", "memory-fit", "model=zoo", "fit.context=512", "--quiet"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    code, out, err = limbeck(*words[3:-2], "fit.batch=0", "--quiet")
    assert code == 2 and not out and "batch" in err
