"""Cases of a benchmark one by one: guarded, written at once, within a budget, in a process of their own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from limbeck.benchmarks import guarded
from limbeck.benchmarks.guarded import Budget, Case, CaseProcess, Report, run_benchmark, run_cases

NAMES = ("first", "second", "third", "fourth")
CASES: list[Case] = [{"kind": "check", "op": name} for name in NAMES]
# A worker as a benchmark's: what it is given says what becomes of it. It needs no torch.
WORKER = """
import os, sys, time
from limbeck.benchmarks.guarded import serve
def work(case):
    print("at", case["op"], flush=True)
    if case["op"] == "raises":
        raise RuntimeError("no such kernel\\nand more")
    if case["op"] == "dies":
        print("illegal memory access", file=sys.stderr, flush=True)
        os._exit(7)
    if case["op"] == "hangs":
        time.sleep(600)
    return {"pid": os.getpid(), "value": float("nan")}
broken = {"raises": "CUDA error"}
sys.exit(serve(work, int(sys.argv[1]), lambda: sys.argv[2] if len(sys.argv) > 2 else BROKEN))
"""


def describe(row: Case) -> str:
    return f"value {row['value']}"


def rows_of(path: Path) -> list[Case]:
    return json.loads(path.read_text())["rows"]  # type: ignore[no-any-return]


def test_an_error_costs_its_own_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All rows are in the JSON before the next case begins; numbers that are none are told by name."""
    path, seen = tmp_path / "new" / "x.json", []

    def work(case: Case) -> Case:
        seen.append([row["op"] for row in rows_of(path)])
        if case["op"] == "second":
            raise ValueError("wrong\nin detail")
        return {"value": float("nan")} if case["op"] == "first" else {} if case["op"] == "third" else {"value": 1.0}

    runner = guarded.in_this_process(work, lambda: "")
    fails = lambda row: "error" in row  # noqa: E731
    assert run_benchmark(path, {"of": "x"}, lambda rows: CASES, runner, Budget(60, {}), describe, fails) == 3
    assert seen == [list(NAMES[:number]) for number in range(4)]
    content = json.loads(path.read_text())
    assert content["ended"] == "finished" and content["of"] == "x" and content["rows"][0]["value"] == "nan"
    assert content["rows"][1]["error"] == "ValueError: wrong"
    out, err = capsys.readouterr()
    assert "| check first | value nan |" in out and "KeyError: 'value'" in out and "FAILS: check second" in err


def test_a_device_that_is_lost_ends_a_run_in_one_process(tmp_path: Path) -> None:
    def work(case: Case) -> Case:
        raise RuntimeError("illegal memory access")

    report = Report(tmp_path / "x.json", {}, describe)
    runner = guarded.in_this_process(work, lambda: "RuntimeError: CUDA error")
    assert run_cases(CASES, runner, report, Budget(60, {})) == "stopped: RuntimeError: CUDA error"
    assert len(report.rows) == 1 and report.left_out == ["check second", "check third", "check fourth"]


def test_a_budget_leaves_out_what_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case begins where as much is left as the last one like it took, within its kind's share; the limit that it gets
    is what is left."""
    clock, limits = [0.0], []
    monkeypatch.setattr(guarded, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    seconds = {"a": 8.0, "b": 1.0}

    def runner(case: Case, limit: float) -> Case:
        limits.append(limit)
        clock[0] += seconds[case["op"]]
        return case | {"case": guarded.name_of(case), "value": 1.0, "seconds": seconds[case["op"]]}

    cases = [{"kind": kind, "op": op} for kind in ("check", "sweep") for op in ("a", "b", "a", "b", "a", "b")]
    report = Report(tmp_path / "x.json", {}, describe)
    ended = run_cases(cases, runner, report, Budget(40, {"sweep": 0.25}, longest=30))
    assert ended == "the budget ended before the cases did"
    done = [row["case"] for row in report.rows]
    assert done == ["check a", "check b"] * 3 + ["sweep a"] and limits == [30, 30, 30, 23, 22, 14, 13]
    assert json.loads((tmp_path / "x.json").read_text())["left_out"] == []  # until it ends
    report.end(ended)
    assert json.loads((tmp_path / "x.json").read_text())["left_out"] == ["sweep b", *["sweep a", "sweep b"] * 2]


@pytest.mark.parametrize(("longest", "rows", "left"), ((15.0, 1, 3), (50.0, 0, 4)))
def test_a_case_that_never_ends(
    longest: float, rows: int, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error after so many seconds; where the budget ends before, it is left out as the others are."""
    clock = [0.0]
    monkeypatch.setattr(guarded, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def runner(case: Case, limit: float) -> Case:
        clock[0] += limit
        return guarded.failed(case, f"stopped after {limit:.0f} s", limit)

    report = Report(tmp_path / "x.json", {}, describe)
    run_cases(CASES, runner, report, Budget(20, {}, longest))
    assert len(report.rows) == rows and len(report.left_out) == left
    assert report.left_out[0] == ("check second" if rows else "check first, which had begun")


def started(tmp_path: Path, broken: str = "") -> CaseProcess:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.replace("else BROKEN", f"else {broken!r}"))
    return CaseProcess([sys.executable, str(script)], {**guarded.os.environ}, tmp_path / "x.log")


def test_a_process_that_dies_or_hangs_costs_one_row(tmp_path: Path) -> None:
    process = started(tmp_path)
    row: Callable[[str, float], Case] = lambda op, limit: process({"kind": "check", "op": op}, limit)  # noqa: E731
    first, second = row("fine", 60), row("raises", 60)
    assert first["value"] == "nan" and second["error"] == "RuntimeError: no such kernel"
    assert row("hangs", 0.1)["error"] == "stopped after 0 s"
    died = row("dies", 60)
    assert died["error"] == "the process ended with exit code 7: illegal memory access"
    last = row("fine", 60)
    assert last["pid"] != first["pid"] and guarded.UNUSABLE not in last
    process.close()
    assert "at raises" in (tmp_path / "x.log").read_text()


def test_a_process_that_loses_its_device_is_replaced_until_that_does_not_help(tmp_path: Path) -> None:
    process = started(tmp_path, "CUDA error: gone")
    case = {"kind": "check", "op": "raises"}
    row = process(case, 60)
    assert row["error"].startswith("RuntimeError") and guarded.UNUSABLE not in row and process.process is None
    process.command = [sys.executable, "-c", "raise SystemExit('no torch here')"]
    rows = [process(case, 60) for _ in range(guarded.ATTEMPTS)]
    assert all("no torch here" in row["error"] for row in rows)
    assert [guarded.UNUSABLE in row for row in rows] == [False, False, True]


def test_a_killed_run_leaves_its_rows(tmp_path: Path) -> None:
    """Killed in the midst of a case, without a word."""
    code = """
import sys, time
from pathlib import Path
from limbeck.benchmarks import guarded
def work(case):
    if case["op"] == "third":
        print("now", flush=True)
        time.sleep(600)
    return {"value": 1.0}
cases = [{"kind": "check", "op": name} for name in ("first", "second", "third", "fourth")]
runner, budget = guarded.in_this_process(work, lambda: ""), guarded.Budget(600, {})
guarded.run_benchmark(Path(sys.argv[1]), {}, lambda rows: cases, runner, budget, str, lambda row: False)
"""
    path = tmp_path / "x.json"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line == "now\n" for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    content = json.loads(path.read_text())
    assert [row["op"] for row in content["rows"]] == ["first", "second"] and content["ended"] is None
