"""What a command says of errors that are neither its user's nor ours: too little memory, processes that are gone."""

from __future__ import annotations

import re
import sys

MEMORY = re.compile(r"can't allocate memory|out of memory|unable to allocate|not enough memory", re.I)
# What gloo and nccl say where another process of the run has ended, been killed, or does not come.
LOST = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|socket timeout|timed out|broken pipe|no route to host|"
    r"DistNetworkError|store",
    re.I,
)


def explained_failure(error: BaseException) -> tuple[int, str] | None:
    """Exit code and line for such an error, or None for what is a defect of ours."""
    first = next(iter(str(error).strip().splitlines()), "")[:300]
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and MEMORY.search(str(error))):
        said = f" ({first})" if first else ""
        return 2, f"this takes more memory than there is{said}; give fewer tokens or rows at once, or a smaller model"
    if of_torch_distributed(error) and LOST.search(f"{type(error).__name__} {error}"):
        return 1, (
            f"another process of this run is gone or does not answer ({first}); see what it said last, and run the same"
            " command again: where work can be resumed, it is"
        )
    return None


def of_torch_distributed(error: BaseException) -> bool:
    """Whether an error comes from what the processes tell each other."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None:
        return False
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").startswith("torch.distributed"):
            return True
        trace = trace.tb_next
    return False


def lenient_streams() -> None:
    """What the terminal's encoding does not have is written as an escape (PYTHONIOENCODING=ascii, odd locales)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
