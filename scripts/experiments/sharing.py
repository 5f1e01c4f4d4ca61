"""Work that several processes share, here or on other machines with the same disk: each takes what no other has.

Locks are files (filelock), so that what a process held that died is free again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from filelock import FileLock, Timeout

from ...models.processes import set_up

PATIENCE = 60.0  # seconds that a process has to save what it does, once all is to stop


class Shared:
    """A folder for what several processes make, and the locks between them. It goes when the last one leaves it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.door = FileLock(folder.with_name(f".{folder.name}.lock"))  # beside it, and outlives it

    def __enter__(self) -> Self:
        with self.door:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.mine = FileLock(self.folder / f".in-use-{uuid.uuid4().hex}")
            self.mine.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.mine.release()

    def clear(self) -> None:
        """Removes the folder, unless another process uses it."""
        with self.door:
            for path in self.folder.glob(".in-use-*"):
                if path != Path(self.mine.lock_file):
                    try:
                        with FileLock(path, timeout=0):
                            pass
                    except Timeout:
                        return
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def alone(self, name: str, *, patient: bool = True) -> Iterator[bool]:
        """No other process is in a block of that name: it is waited for, or else the block is told that one is."""
        lock = FileLock(self.folder / f".{name}.lock", timeout=-1 if patient else 0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


@contextlib.contextmanager
def in_processes(count: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> Iterator[None]:
    """`work(*arguments, alive)` in count - 1 further processes while the block runs, each process with its share of the
    threads; `alive()` says whether this one is still there. What they say is in `folder/process-N.log`."""
    threads = torch.get_num_threads()
    share = max(1, threads // count)
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=work_alone, args=(folder / f"process-{number}.log", share, os.getpid(), work, arguments))
        for number in range(1, count)
    ]
    torch.set_num_threads(share)
    try:
        for other in others:
            other.start()
        yield
        for other in others:
            other.join()
    finally:
        torch.set_num_threads(threads)
        for other in others:
            if other.pid is not None:
                other.join(PATIENCE if other.is_alive() else 0)
                other.terminate()


def work_alone(log: Path, threads: int, parent: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """A further process."""
    set_up()
    torch.set_num_threads(threads)
    with (
        log.open("a", encoding="utf-8") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        try:
            work(*arguments, lambda: os.getppid() == parent)
        except BaseException as error:  # shown where the first process comes to the same work
            traceback.print_exc()
            raise SystemExit(1) from error
