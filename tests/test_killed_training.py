"""`limbeck distill` killed, and run again: the same loss curve and the same weights, bit by bit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from limbeck.distill.state import states
from limbeck.tests.helpers import lasting, make_pair

STEPS = 60


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student that has something to learn, and a text."""
    return make_pair(tmp_path_factory.mktemp("workshop"))


def command(work: Path, output: Path, processes: int, **options: Any) -> list[str]:
    chosen = {
        "distill.train.steps": STEPS, "distill.train.learning_rate": 0.01, "distill.train.optimizer": "muon",
        "distill.train.save_every": 4, "distill.train.log_every": 1, "distill.train.evaluate_every": 7,
        "distill.train.keep": "best", "distill.train.ema_decay": 0.9, "distill.train.micro_batch": 1,
        "distill.seq_len": 32, "distill.batch": 4, "distill.evaluate_tokens": 128, "device": "cpu", "wandb": "off",
    } | options  # fmt: skip
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    places = [f"teacher={work / 'model'}", f"student={work / 'student'}", f"data={work / 'text'}", f"output={output}"]
    return [*launcher, "limbeck.scripts.distill", *places, *(f"{key}={value}" for key, value in chosen.items())]


def start(words: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    return subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, start_new_session=True
    )


def finish(words: list[str]) -> None:
    process = start(words)
    _, err = process.communicate(timeout=500)
    assert process.returncode == 0, err.decode()[-3000:]


def training(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial") / "training"


def wait_for(process: subprocess.Popen[bytes], output: Path, step: int, before: int = 0) -> None:
    """Until a run has logged a step, or ended. `before` is the number of the metrics file that an earlier run left; one
    that resumes writes the part that counts anew."""
    metrics = training(output) / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.stat().st_ino != before:
            lines = metrics.read_bytes().split(b"\n")[:-1]
            if lines and json.loads(lines[-1])["step"] >= step:
                return
        time.sleep(0.002)


def descendants(parent: int) -> list[int]:
    """The processes that one has started, and theirs; torchrun's are in sessions of their own."""
    of: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            of.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found, queue = [], [parent]
    while queue:
        children = of.get(queue.pop(), [])
        found += children
        queue += children
    return found


def curve(output: Path) -> list[tuple[float, ...]]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "tokens", "loss", "gradient_norm", "validation_kl")
    return [tuple(record[name] for name in names if name in record) for record in records]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes as Linux lists them")
@pytest.mark.parametrize(("processes", "kills", "parts"), [(1, 20, 1), (2, 5, 1), (2, 3, 2)])
def test_killed_at_random_steps(processes: int, kills: int, parts: int, workshop: Path, tmp_path: Path) -> None:
    """`parts`: into so many a row is split."""
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    options = {"distill.train.context_parallel": parts}
    finish(command(workshop, calm, processes, **options))
    draw = random.Random(0)
    for _ in range(kills):
        left = training(rough) / "metrics.jsonl"
        before = left.stat().st_ino if left.exists() else 0
        saved = max((int(state.name.removeprefix("state-")) for state in states(training(rough))), default=0)
        process = start(command(workshop, rough, processes, **options))
        wait_for(process, rough, min(saved + draw.randint(1, 9), STEPS - 5), before)
        time.sleep(draw.uniform(0, 0.05))
        assert process.poll() is None, "it got through before it was killed"
        for found in (*descendants(process.pid), process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(found, signal.SIGKILL)
        process.communicate()
    finish(command(workshop, rough, processes, **options))
    assert len(curve(calm)) == STEPS and curve(rough) == curve(calm)
    assert (rough / "model.safetensors").read_bytes() == (calm / "model.safetensors").read_bytes()
    assert lasting(rough / "limbeck.json") == lasting(calm / "limbeck.json")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_stopped_politely_and_resumed_by_others(first: int, then: int, workshop: Path, tmp_path: Path) -> None:
    """SIGTERM: the step's state is saved, the exit code says so; another number of processes resumes from there."""
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    options = {"distill.train.save_every": 1000}
    finish(command(workshop, calm, 1, **options))
    process = start(command(workshop, rough, first, **options))
    wait_for(process, rough, 17)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    said = [line for line in err.decode().splitlines() if line.startswith("limbeck: stopped after step")]
    assert process.returncode != 0 and len(said) == 1 and "saved at step" in said[0], err.decode()[-3000:]
    if first == 1:
        assert process.returncode == 128 + signal.SIGTERM
    finish(command(workshop, rough, then, **options))
    expected, found = curve(calm), curve(rough)
    assert [values[0] for values in found] == list(range(1, STEPS + 1))
    for one, other in zip(expected, found, strict=True):
        assert other[2] == pytest.approx(one[2], rel=1e-5)  # the loss
        assert other[3:] == pytest.approx(one[3:], rel=1e-3)  # the gradient's norm, and the held-out KL of the average
