"""What stands around a command: the environment, the terminal's encoding, little memory, processes that are gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from limbeck.scripts.run.failures import explained_failure
from limbeck.tests.helpers import limbeck


def score(workshop: Path, output: Path) -> list[str]:
    sizes = ["importance.tokens=64", "importance.depth_tokens=64", "seq_len=32", "device=cpu"]
    return ["score", f"model={workshop / 'model'}", f"data={workshop / 'text'}", f"output={output}", *sizes]


@pytest.mark.parametrize(
    ("environment", "says"),
    (
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many'; expected a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK='-1'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK, LOCAL_RANK, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}, "a rank below the size"),
        ({"LIMBECK_CACHE": "~nobody-of-that-name/x"}, "~nobody-of-that-name is no user here"),
        ({"LIMBECK_CACHE": "/dev/null/x"}, "/dev/null"),
    ),
)
def test_an_odd_environment(
    environment: dict[str, str], says: str, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, _, err = limbeck(*score(workshop, tmp_path / "out"))
    assert code == 2 and says in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ("~nobody-of-that-name/x", "a\x00b", "/proc/self/mem", "x" * 5000))
def test_paths_that_are_none(path: str, workshop: Path, tmp_path: Path) -> None:
    for word in ("model", "data", "output"):
        words = [f"{word}={path}" if each.startswith(f"{word}=") else each for each in score(workshop, tmp_path / "o")]
        if word == "output" and path.startswith("~"):
            continue  # a folder of that name
        code, _, err = limbeck(*words)
        assert code == 2 and len(err.splitlines()) == 1, (word, err)


def test_an_ascii_terminal(workshop: Path) -> None:
    """Tables and texts are written whatever the terminal's encoding has."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    words = ["generate", f"model={workshop / 'model'}", "prompt=na\N{LATIN SMALL LETTER I WITH DIAERESIS}f"]
    done = subprocess.run(
        [sys.executable, "-m", "limbeck", *words, "max_new_tokens=1"], env=environment, capture_output=True, timeout=300
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert done.stdout.startswith(b"na\\xeff"), done.stdout


def test_what_takes_more_memory_than_there_is(workshop: Path, tmp_path: Path) -> None:
    words = score(workshop, tmp_path / "out")
    code, _, err = limbeck(*words, "seq_len=1000000000000")
    assert code == 2 and "expected 1,048,576 at most" in err and len(err.splitlines()) == 1, err
    for change, says in (
        ("hardware.usable_gib=1000000000000", "usable_gib is 1e+12"),
        (f"fit.batch={10**12}", "batch is"),
    ):
        code, _, err = limbeck("memory-fit", f"model={workshop / 'model'}", change)
        assert code == 2 and says in err and len(err.splitlines()) == 1, err
    failure = explained_failure(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"))
    assert failure is not None and failure[0] == 2 and "more memory than there is" in failure[1]
    assert explained_failure(RuntimeError("shapes do not match")) is None
    assert explained_failure(RuntimeError("Connection closed by peer")) is None  # not of torch.distributed


GONE = """
import os, sys
from accelerate import PartialState
PartialState(cpu=True)
os._exit(9)
"""


def test_a_process_that_is_gone(workshop: Path, tmp_path: Path) -> None:
    """The one that is left says so in one line beside the backend's own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    commands = ([sys.executable, "-m", "limbeck", *score(workshop, tmp_path / "out")], [sys.executable, "-c", GONE])
    left, gone = (
        subprocess.Popen(command, env=shared | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank, command in zip("01", commands, strict=True)
    )
    try:
        said = left.communicate(timeout=120)[1]
    finally:
        gone.kill()
        gone.communicate()
        left.kill()
    lines = [line for line in said.splitlines() if line.startswith("limbeck: ")]
    assert left.returncode == 1 and len(lines) == 1 and "another process of this run is gone" in lines[0], said
    assert "Traceback" not in said and not (tmp_path / "out").exists(), said
