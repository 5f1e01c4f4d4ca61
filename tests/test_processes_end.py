"""Processes that have exchanged tensors end with what they return: gloo's threads have dropped what they held."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from limbeck.models import processes
from limbeck.tests.processes_helpers import launch
from torch import distributed

PROGRAM = """
from limbeck.tests.test_processes_end import exchange_and_end
exchange_and_end()
"""
KEPT = []  # as DTensor's caches do


def exchange_and_end() -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    KEPT.append(distributed.group.WORLD)
    exchange()
    assert processes.gloo_states(), "gloo's threads have another name in this torch"
    processes.leave()
    assert not processes.active()


def exchange() -> None:
    """Nobody else refers to the last exchange's tensors once it is over: gloo's threads drop them."""
    count = distributed.get_world_size()
    for _ in range(4):
        parts = [torch.zeros(1000) for _ in range(count)]
        work = distributed.all_gather(parts, torch.ones(1000), async_op=True)
    work.wait()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the system does not list a process's threads")
def test_processes_end_after_their_last_exchange(tmp_path: Path) -> None:
    """Without `processes.leave` one of the four aborts in most runs."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = launch([str(script)], processes=4)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_process_alone_has_nothing_to_leave() -> None:
    processes.leave()
    assert not processes.active()
