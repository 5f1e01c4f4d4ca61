"""The processes of a command: those that a launcher (torchrun, accelerate, Slurm) has started, joined."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ...models import processes
from ...models.device import torch_device
from .show import console


@contextlib.contextmanager
def many_processes(device: str) -> Iterator[None]:
    """Joins the processes that a launcher started, unless they are, on GPUs by nccl, else by gloo; only the first
    speaks."""
    if processes.active() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    from accelerate import PartialState

    state = PartialState(cpu=torch_device(device).type != "cuda")
    quiet, console.quiet = console.quiet, not state.is_main_process
    try:
        yield
    finally:
        console.quiet = quiet
        state.destroy_process_group()
