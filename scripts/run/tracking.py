"""What is said of a training: a bar, the share of the card's peak, and figures for Weights & Biases, offline unless
told otherwise, and never in the way of training: a thread of its own imports, starts and feeds it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from ...distill.speed import speed_figures
from ...models import processes
from ...models.config import HybridConfig
from .compose import CONF
from .show import progress, say

Mode = Literal["off", "offline", "online"]
Record = Mapping[str, Any]


@contextlib.contextmanager
def training_bar(
    what: str, steps: int, also: Callable[[Record], None] | None = None
) -> Iterator[Callable[[Record], None]]:
    """Gives what shows a step's record on a bar; `also` takes it, too."""
    with progress(what, steps) as bar:

        def on_step(record: Record) -> None:
            bar.set(record["step"], note=note_of(record))
            if also is not None:
                also(record)

        yield on_step


def note_of(record: Record) -> str:
    """What the bar says of a step."""
    loss = f"loss {record['loss']:.3f}" if "loss" in record else "skipped: not finite"
    used = f"{record['mfu']:.1%} of peak" if "mfu" in record else f"{record['model_tflops']:.2g} TFLOP/s"
    held = f"  validation {record['validation_loss']:.3f}" if "validation_loss" in record else ""
    return f"{loss}  {record['tokens_per_second']:,.0f} tokens/s  {used}  {record['memory_gib']:.1f} GiB{held}"


def speed_of(
    student: HybridConfig, teacher: HybridConfig | None, seq_len: int, device: torch.device
) -> Callable[[float], dict[str, float]]:
    """From the tokens a second what the log says of them, see `speed_figures`."""
    return functools.partial(speed_figures, student, teacher, seq_len, device, card_tflops(device))


def card_tflops(device: torch.device) -> float | None:
    """Dense bfloat16 TFLOP/s of a GPU that conf/hardware/ knows, None for others (PCIe cards are slower)."""
    if device.type != "cuda":
        return None
    from omegaconf import OmegaConf

    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    words += [one + other for one, other in itertools.pairwise(words)] + [word.removesuffix("b") for word in words]
    for profile in sorted((CONF / "hardware").glob("*.yaml")):
        if "pcie" not in words and set(profile.stem.split("-")) <= set(words):
            content = OmegaConf.to_container(OmegaConf.load(profile), resolve=False)
            assert isinstance(content, dict)
            return float(content["bf16_tflops"])
    return None


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
    """Hands records over until a None comes. What goes wrong is said once, and training continues."""
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
