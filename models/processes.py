"""How a process computes, and what the processes of one run tell each other; alone, or where torch.distributed is not
set up, nothing is sent.

Sums are float64, gathered and added in the order of the ranks, so that every process holds the same bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from .errors import InputError

PATIENCE = datetime.timedelta(days=7)  # a backend's own time to wait is minutes
DRAIN = 10.0  # seconds at most for gloo's threads to come to rest
_alone = False


def active() -> bool:
    return not _alone and distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """The number of this process; 0 is the first, which alone writes and speaks."""
    return distributed.get_rank() if active() else 0


def count() -> int:
    return distributed.get_world_size() if active() else 1


def all_sum(values: Tensor) -> Tensor:
    """The sum of every process's float64 values of one shape."""
    assert values.dtype == torch.float64, values.dtype
    if count() == 1:
        return values
    mine = values.to("cuda" if distributed.get_backend() == "nccl" else "cpu").contiguous()
    parts = [torch.zeros_like(mine) for _ in range(count())]
    distributed.all_gather(parts, mine)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.to(values.device)


def gather(value: Any) -> list[Any]:
    """Every process's value, in the order of the ranks."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """The first process's value, in all of them."""
    return gather(value)[0]


def leave() -> None:
    """Ends torch.distributed in this process, if it has been set up, so that the interpreter may end after it.

    gloo's threads drop the tensors of the last exchange some time after it is over. One that does so while the
    interpreter ends finds no lock of it to take, is ended within C++, and aborts the process
    (https://github.com/pytorch/pytorch/pull/179291). The groups' own end would wait for them, but DTensor's caches hold
    the groups; so they are given time until all of them sleep, twice in a row: one that still has something to drop
    runs, or waits for its turn on a busy processor, since nobody holds the lock meanwhile.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    idle, end = 0, time.monotonic() + DRAIN
    while idle < 2 and time.monotonic() < end and (states := gloo_states()):
        time.sleep(0.01)
        idle = idle + 1 if set(states) == {"S"} else 0


def gloo_states() -> list[str]:
    """The state of each of gloo's threads here, "S" for one that sleeps; none where there are none, or no /proc."""
    states = []
    for task in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            name, _, rest = task.read_text().partition("(")[2].rpartition(")")
            if name.startswith("pt_gloo_runloo"):
                states.append(rest.split()[0])
    return states


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around what a process does between two exchanges: where it fails in one, it fails in all.

    The first process raises the InputError of whichever failed, the others an InputError without a text, since it is
    said already; a defect keeps its traceback where it happened.
    """
    if count() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    told = gather(None if error is None else (isinstance(error, InputError), str(error)))
    failed = [(number, *failure) for number, failure in enumerate(told) if failure is not None]
    if not failed:
        return
    if error is not None and (rank() == 0 or not isinstance(error, InputError)):
        raise error
    number, expected, text = failed[0]
    raise InputError("" if rank() else text if expected else f"process {number} failed: {text}")


def in_first(work: Callable[[], None]) -> None:
    """Runs `work` in the first process, for which it is alone meanwhile, while the others wait, however long it takes.
    Where it fails, it fails in all, as in `together`."""
    global _alone
    if count() == 1:
        return work()
    done = distributed.new_group(backend="gloo", timeout=PATIENCE)
    try:
        with together():
            first = rank() == 0
            try:
                if first:
                    _alone = True
                    work()
            finally:
                _alone = False
                distributed.barrier(group=done)
    finally:
        distributed.destroy_process_group(done)


def compute_alone() -> None:
    """Has the calling thread, which works beside the first one, compute without OpenMP's threads.

    Those that it would start for itself count: where a process has more of them than there are processors, libgomp has
    all of them, the first thread's too, wait for 100 turns in place of 300,000 (gcc, libgomp/config/linux/wait.h and
    env.c), and every operator begins by waking threads that sleep.
    """
    torch.set_num_threads(1)


@contextlib.contextmanager
def computing_beside() -> Iterator[Callable[[], None]]:
    """Around a thread that calls `compute_alone`; gives what is to be called once it has. The calling thread keeps its
    number of threads, and so do those that begin later: torch gives them what was set last, by whichever thread."""
    number = torch.get_num_threads()

    def keep() -> None:
        torch.set_num_threads(number)

    try:
        yield keep
    finally:
        keep()


def set_up() -> None:
    """How this process computes, whichever command it runs."""
    # Decays underflow, and arithmetic on denormal numbers is many times slower on CPUs: they count as zero, in this
    # thread and in those that torch starts from it.
    torch.set_flush_denormal(True)
    keep_memory()


def keep_memory() -> None:
    """Tells glibc to keep freed memory for the next step: by default buffers of some megabytes go back to the system
    and are fetched again page by page, in every operator. Elsewhere nothing happens."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    mallopt(mmap_threshold, 32 * 2**20)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 * 2**20)
