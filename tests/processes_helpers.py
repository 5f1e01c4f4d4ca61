"""Shared by the tests of several processes: a command, or a function of a test, in every one of them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from limbeck.models import processes


def processor_seconds(children: bool = False) -> float:
    """Processor time so far of this process, or of its children that have ended: a busy machine does not change it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def launch(words: Sequence[str], processes: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    """Several processes of one command, as torchrun starts them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([*launcher, *words], capture_output=True, text=True, env=variables, timeout=300)


def run_workers(function: Callable[..., None], *arguments: Any, count: int = 2, **environment: str) -> None:
    """Calls a function of a test file in every one of some processes; the first argument is a folder to work in."""
    name, module = function.__name__, f"limbeck.tests.{Path(function.__code__.co_filename).stem}"
    code = f"import {module} as m; from limbeck.tests.processes_helpers import worker\n"
    code += f"worker(m.{name}, *{[str(a) for a in arguments]!r})"
    script = Path(arguments[0]) / f"{name}.py"
    script.write_text(code)
    done = launch([str(script)], processes=count, **environment)
    assert done.returncode == 0, done.stderr[-4000:]


def worker(function: Callable[..., None], *arguments: str) -> None:
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    try:
        function(*arguments)
    finally:
        processes.leave()
