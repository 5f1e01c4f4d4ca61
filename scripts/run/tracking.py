"""Training figures for Weights & Biases: offline unless asked, and never in the way of training.

A thread of its own imports, starts and feeds it, which takes seconds that training does not wait for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...models import processes
from ...models.errors import InputError
from .show import say

MODES = ("off", "offline", "online")
Record = Mapping[str, Any]


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise InputError(f"wandb is {mode!r}; known: {', '.join(MODES)}")


@contextlib.contextmanager
def journal(mode: str, folder: Path, name: str, options: Mapping[str, Any]) -> Iterator[Callable[[Record], None]]:
    """Gives what takes a step's record; `folder/wandb` holds them ("offline"), to be sent by `wandb sync`, or they go
    out as they come ("online"). In the first process alone; "off", and WANDB_MODE=disabled, do nothing."""
    if mode == "off" or processes.rank() or os.environ.get("WANDB_MODE") == "disabled":
        yield lambda record: None
        return
    if importlib.util.find_spec("wandb") is None:
        say("wandb is not installed: figures go to metrics.jsonl alone (pip install wandb, or wandb=off)")
        yield lambda record: None
        return
    line: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
    settings = {"dir": str(folder), "project": "limbeck", "name": name, "config": dict(options)}
    thread = threading.Thread(target=keep, args=(mode, settings, line), name="limbeck-wandb", daemon=True)
    thread.start()
    try:
        yield line.put
    finally:
        line.put(None)
        thread.join()


def keep(mode: str, settings: Mapping[str, Any], line: queue.SimpleQueue[Record | None]) -> None:
    """Hands records over until a None comes. What goes wrong is said once, and training goes on."""
    try:
        import wandb

        quiet = wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_git=True, disable_code=True)
        with wandb.init(mode=mode, settings=quiet, **settings) as run:  # type: ignore[arg-type]
            while (record := line.get()) is not None:
                numbers = {key: value for key, value in record.items() if isinstance(value, (int, float))}
                run.log(numbers, step=record["step"])
    except Exception as error:
        say(f"wandb stopped ({str(error).splitlines()[0] if str(error) else type(error).__name__});"
            " metrics.jsonl has every figure")  # fmt: skip
