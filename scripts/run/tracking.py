"""What is said of a training: a bar, the share of the card's peak, and figures for Weights & Biases and TensorBoard,
never in the way of training: a thread of their own imports, starts and feeds each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator

from ...distill.speed import speed_figures
from ...models import processes
from ...models.cards import card_named
from ...models.config import HybridConfig
from ...models.matmul import Multiplied
from ...models.quantities import switch
from .show import progress, say

Record = Mapping[str, Any]
Line = queue.SimpleQueue  # of records, and a None at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tracked(Multiplied):
    """Where a command that trains sends its figures, beside metrics.jsonl; nothing of it is part of the result."""

    wandb: Annotated[Literal["off", "offline", "online"], BeforeValidator(switch)] = "off"
    wandb_project: str = "limbeck"
    wandb_entity: str | None = None
    tensorboard: Annotated[Literal["off", "on"], BeforeValidator(switch)] = "off"

    @property
    def tracking(self) -> dict[str, Any]:
        """These options by their names."""
        return {name: getattr(self, name) for name in Tracked.__annotations__}


@contextlib.contextmanager
def training_bar(
    what: str, steps: int, also: Callable[[Record], None] | None = None, before: Mapping[str, int] | None = None
) -> Iterator[Callable[[Record], None]]:
    """Gives what shows a step's record on a bar; `also` takes it, too, with numbers that are counted on from those
    `before`."""
    with progress(what, steps) as bar:

        def on_step(record: Record) -> None:
            bar.set(record["step"], note=note_of(record))
            if also is not None:
                also({**record, **{name: record[name] + count for name, count in (before or {}).items()}})

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
    """Dense bfloat16 TFLOP/s of a GPU that conf/hardware/ knows, None for others."""
    card = card_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if card is None else card.bf16_tflops


@contextlib.contextmanager
def journal(how: Tracked, folder: Path, name: str, options: Mapping[str, Any]) -> Iterator[Callable[[Record], None]]:
    """Gives what takes a step's record. `folder/wandb` holds them for Weights & Biases ("offline"; `wandb sync` sends
    them), or they go out as they come ("online"); `folder/tensorboard` for TensorBoard. In the first process alone;
    WANDB_MODE=disabled is wandb=off."""
    keepers: dict[str, Callable[[Line[Record | None]], None]] = {}
    if how.wandb != "off" and os.environ.get("WANDB_MODE") != "disabled" and is_there("wandb", "wandb"):
        settings = {"dir": str(folder), "project": how.wandb_project, "entity": how.wandb_entity, "name": name,
                    "config": dict(options)}  # fmt: skip
        keepers["wandb"] = functools.partial(keep_wandb, how.wandb, settings)
    if how.tensorboard == "on" and is_there("tensorboard", "limbeck[tensorboard]"):
        keepers["tensorboard"] = functools.partial(keep_tensorboard, folder / "tensorboard")
    lines: list[Line[Record | None]] = [queue.SimpleQueue() for _ in keepers]
    threads = [threading.Thread(target=kept, args=(which, keeper, line), name=f"limbeck-{which}", daemon=True)
               for (which, keeper), line in zip(keepers.items(), lines, strict=True)]  # fmt: skip
    for thread in threads:
        thread.start()

    def note_down(record: Record | None) -> None:
        for line in lines:
            line.put(record)

    try:
        yield note_down
    finally:
        note_down(None)
        for thread in threads:
            thread.join()


def is_there(package: str, wanted: str) -> bool:
    """Whether this process is the first, and has a package; says how to come by it where it has not."""
    if processes.rank():
        return False
    if importlib.util.find_spec(package) is None:
        say(f"{package} is not installed: figures go to metrics.jsonl alone (pip install '{wanted}', or {package}=off)")
        return False
    return True


def kept(which: str, keeper: Callable[[Line[Record | None]], None], line: Line[Record | None]) -> None:
    """Hands records over until a None comes. What goes wrong is said once, and training continues."""
    try:
        keeper(line)
    except Exception as error:
        say(f"{which} stopped ({str(error).splitlines()[0] if str(error) else type(error).__name__});"
            " metrics.jsonl has every figure")  # fmt: skip


def keep_wandb(mode: str, settings: Mapping[str, Any], line: Line[Record | None]) -> None:
    import wandb

    quiet = wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_git=True, disable_code=True)
    with wandb.init(mode=mode, settings=quiet, **settings) as run:  # type: ignore[arg-type]
        while (record := line.get()) is not None:
            run.log(numbers_of(record), step=record["step"])


def keep_tensorboard(folder: Path, line: Line[Record | None]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        while (record := line.get()) is not None:
            for name, value in numbers_of(record).items():
                writer.add_scalar(name, value, record["step"])


def numbers_of(record: Record) -> dict[str, float]:
    return {key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "step"}
