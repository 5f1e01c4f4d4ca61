"""SIGINT and SIGTERM while a model trains: the step is finished, its state saved, and the run ends with a line."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from ..models import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopper:
    """While entered, notes the first of `SIGNALS` in `.signal`; a second one does what it does otherwise, at once.

    Outside of the main thread, where Python handles no signals, it notes nothing."""

    def __init__(self) -> None:
        self.signal = 0
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.restore()
        if processes.rank() == 0:
            text = "limbeck: finishing the step and saving its state; once more to leave at once\n"
            os.write(2, text.encode())
