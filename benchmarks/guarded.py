"""Cases of a benchmark, one by one: each guarded, its row printed and written at once, within a budget of seconds.

A case is a dict of what it runs, its row the same with what came of it. On a GPU cases run in a process of their own:
a kernel that leaves the device unusable, or never ends, costs its own row, and the next case gets a new process. Cases
are given in the order of their worth; one is begun only where as much time is left as the last one like it took.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..models.folder import write_json

Case = dict[str, Any]
Runner = Callable[[Case, float], Case]  # with the most seconds that it may take

UNKNOWN = 5.0  # seconds that the first case of its kind is thought to take
SECONDS, SHORT_SECONDS = 520.0, 165.0  # of a run; with what Python takes to start, within 9 and 3 minutes
LONGEST = 150.0  # seconds after which a case counts as one that never ends
ATTEMPTS = 3  # processes that may end one after the other before they have given a row
STOPPED = "stopped"  # in the row of a case that took too long
UNUSABLE = "unusable"  # in the row after which no operation on the device works


def plain(value: Any) -> Any:
    """As JSON has it: numbers that are none become their names."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def name_of(case: Case) -> str:
    """A case in a line: "time ssd_scan 1 x 8192 limbeck"."""
    apart = ("batch", "tokens", "into")
    shown = {key: value for key, value in case.items() if key not in apart and not isinstance(value, dict)}
    words = [" ".join(map(str, value)) if isinstance(value, list) else str(value) for value in shown.values()]
    if "batch" in case:
        words.insert(2, f"{case['batch']} x {case['tokens']}")
    return " ".join(words)


def guarded(work: Callable[[Case], Case], case: Case) -> Case:
    """The row of a case; what it raises is in the row."""
    begin = time.monotonic()
    try:
        found = work(case)
    except Exception as error:  # whatever a kernel, a compiler or another package does: one row
        found = {"error": first_line(error)}
    return plain({"case": name_of(case)} | case | found | {"seconds": round(time.monotonic() - begin, 3)})


def failed(case: Case, error: str, seconds: float) -> Case:
    stopped = {STOPPED: True} if error.startswith(STOPPED) else {}
    return plain({"case": name_of(case)} | case | {"error": error, **stopped, "seconds": round(seconds, 3)})


class Report:
    """Rows, printed as they come, and the JSON that has them all at any time."""

    def __init__(self, path: Path, facts: Case, describe: Callable[[Case], str]) -> None:
        self.path, self.describe = path, describe
        self.rows: list[Case] = []
        self.left_out: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self.content = {**plain(facts), "rows": self.rows, "left_out": self.left_out, "ended": None}
        self.write()
        print("| case | result | s |\n|---|---|---|", flush=True)

    def add(self, row: Case) -> None:
        self.rows.append(row)
        self.write()
        try:
            said = row["error"] if "error" in row else self.describe(row)
        except (KeyError, TypeError, ValueError) as error:  # a row that lacks something costs no other row
            said = f"{first_line(error)} in {row}"
        print(f"| {row['case']} | {said} | {row['seconds']:.1f} |", flush=True)

    def end(self, how: str) -> None:
        self.content["ended"] = how
        self.write()
        if self.left_out:
            print(f"\nleft out, {len(self.left_out)}: {'; '.join(self.left_out)}")
        print(f"\n{how}; {len(self.rows)} rows in {self.path}", flush=True)

    def write(self) -> None:
        write_json(self.path, self.content)

    def seconds_like(self, case: Case) -> float:
        """What a case will take: as long as the last one of its kind and operator, or as such cases take mostly."""
        alike = [row for row in self.rows if row["kind"] == case["kind"]]
        same = [row["seconds"] for row in alike if row.get("op") == case.get("op")]
        if same:
            return same[-1]
        return sorted(row["seconds"] for row in alike)[len(alike) // 2] if alike else UNKNOWN


class Budget:
    """Seconds for all cases together, and shares of them that a kind of case may take at most."""

    def __init__(self, seconds: float, shares: dict[str, float], longest: float = LONGEST) -> None:
        self.seconds, self.shares, self.longest, self.begin = seconds, shares, longest, time.monotonic()

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begin)

    def allows(self, case: Case, report: Report) -> bool:
        wanted = report.seconds_like(case)
        spent = sum(row["seconds"] for row in report.rows if row["kind"] == case["kind"])
        return wanted <= min(self.left(), self.shares.get(case["kind"], 1.0) * self.seconds - spent)


def run_cases(cases: Iterable[Case], runner: Runner, report: Report, budget: Budget) -> str:
    """Runs what the budget allows, names the rest in the report, and says how it ended."""
    unusable = ""
    for case in cases:
        if unusable or not budget.allows(case, report):
            report.left_out.append(name_of(case))
            continue
        row = runner(case, min(budget.longest, max(1.0, budget.left())))
        if STOPPED in row and budget.left() <= 0:
            report.left_out.append(f"{name_of(case)}, which had begun")
            continue
        report.add(row)
        unusable = row.get(UNUSABLE, "")
    if unusable:
        return f"stopped: {unusable}"
    return "the budget ended before the cases did" if report.left_out else "finished"


def run_benchmark(
    path: Path, facts: Case, cases: Callable[[list[Case]], Iterable[Case]], runner: Runner, budget: Budget,
    describe: Callable[[Case], str], fails: Callable[[Case], bool],
) -> int:  # fmt: skip
    """All of it; `cases` gets the rows, which grow, and `fails` says of a row whether ours is wrong. The exit code."""
    seconds = budget.seconds if math.isfinite(budget.seconds) else None
    report = Report(path, facts | {"arguments": sys.argv[1:], "budget": seconds}, describe)
    report.end(run_cases(cases(report.rows), runner, report, budget))
    wrong = [row for row in report.rows if fails(row)]
    for row in wrong:
        print(f"FAILS: {row['case']}: {row.get('error') or describe(row)}", file=sys.stderr)
    return 3 if wrong else 0


def interpreter_refusal() -> str:
    """Why Triton's interpreter cannot run here; "" where it can. Before 3.7 it makes integers of arrays of one element,
    which numpy 2.5 refuses."""
    import numpy
    import triton

    versions = [[int(number) for number in re.findall(r"\d+", of.__version__)[:2]] for of in (triton, numpy)]
    if versions[0] < [3, 7] and versions[1] >= [2, 5]:
        return (
            f"triton {triton.__version__}'s interpreter does not run with numpy {numpy.__version__}: it takes"
            " numpy < 2.5, or triton >= 3.7"
        )
    return ""


def script_options(description: str, path: str, short: str, interpret: str) -> argparse.ArgumentParser:
    """What the scripts have in common; where the figures go, and what `--short` and `--interpret` are of each."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, default=Path(path), help="where the figures go")
    parser.add_argument("--short", action="store_true", help=short)
    budget = f"{SECONDS:.0f}, with --short {SHORT_SECONDS:.0f}; interpreted: no end"
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=budget)
    parser.add_argument("--interpret", action="store_true", help=interpret)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser


def is_refused(options: argparse.Namespace) -> bool:
    """Whether it cannot run here, which is said; sets up Triton's interpreter where that is wanted."""
    import torch

    refusal = ""
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read where triton is imported and kernels are defined
        refusal = interpreter_refusal()
    elif options.worker is None and not torch.cuda.is_available():
        refusal = "no CUDA device here; --interpret runs the kernels on the CPU"
    if refusal:
        print(refusal, file=sys.stderr)
    return bool(refusal)


def budget_of(options: argparse.Namespace, shares: dict[str, float], longest: float = LONGEST) -> Budget:
    seconds = math.inf if options.interpret else SHORT_SECONDS if options.short else SECONDS
    return Budget(options.budget or seconds, shares, longest)


def device_error() -> str:
    """What the simplest operation on the device raises; "" where it works."""
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.ones(1, device="cuda").add_(1).item()
    except Exception as error:
        return first_line(error)
    return ""


def in_this_process(work: Callable[[Case], Case], device_error: Callable[[], str] = device_error) -> Runner:
    """Cases one after the other; what leaves the device unusable ends them."""

    def runner(case: Case, limit: float) -> Case:
        row = guarded(work, case)
        broken = device_error() if "error" in row else ""
        return row | ({UNUSABLE: broken} if broken else {})

    return runner


class CaseProcess:
    """Runs cases in a process started by a command, and in a new one where that ended or took too long. What it prints
    goes to a log file, whose last line says why it ended."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.command, self.environment, self.log = command, environment, log
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.Queue[str] = queue.Queue()
        self.ended = 0  # processes in a row that gave no answer

    def start(self) -> subprocess.Popen[str]:
        reading, writing = os.pipe()
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*self.command, str(writing)], stdin=subprocess.PIPE, stdout=log, stderr=log, text=True,
                env=self.environment, pass_fds=[writing],
            )  # fmt: skip
        os.close(writing)
        answers = self.answers = queue.Queue()

        def read() -> None:
            with os.fdopen(reading) as stream:
                for line in stream:
                    answers.put(line)
            answers.put("")

        threading.Thread(target=read, daemon=True).start()
        return self.process

    def __call__(self, case: Case, limit: float) -> Case:
        begin = time.monotonic()
        process = self.process or self.start()
        answer = ""
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
            answer = self.answers.get(timeout=limit)
            error = "" if answer else self.last_words()
        except queue.Empty:
            error = f"{STOPPED} after {limit:.0f} s"
        except OSError:
            error = self.last_words()
        row = json.loads(answer) if answer else failed(case, error, time.monotonic() - begin)
        self.ended = 0 if answer else self.ended + 1
        if not answer or row.pop(UNUSABLE, ""):
            self.close()
        return row | ({UNUSABLE: f"{ATTEMPTS} processes in a row gave no row"} if self.ended >= ATTEMPTS else {})

    def last_words(self) -> str:
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        code = self.process.returncode
        said = self.log.read_text(errors="replace").strip().splitlines()[-1:] if self.log.exists() else []
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return f"the process ended with {how}: {said[0][:160] if said else 'it said nothing'}"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(OSError):
                self.process.communicate()  # waits, and closes its standard input
            self.process = None


def case_process(script: str, path: Path, environment: dict[str, str]) -> CaseProcess:
    """The script itself as the process that runs its cases, with a log beside the JSON."""
    log = path.with_suffix(".log")
    log.unlink(missing_ok=True)
    return CaseProcess([sys.executable, str(Path(script).resolve()), "--worker"], environment, log)


def serve(work: Callable[[Case], Case], answers: int, device_error: Callable[[], str] = device_error) -> int:
    """The other side of `CaseProcess`: cases from standard input, rows to an open file; ends with who started it."""
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    runner = in_this_process(work, device_error)
    with os.fdopen(answers, "w", buffering=1) as stream:
        for line in sys.stdin:
            row = runner(json.loads(line), math.inf)
            stream.write(json.dumps(row) + "\n")
            if UNUSABLE in row:
                return 1
    return 0
