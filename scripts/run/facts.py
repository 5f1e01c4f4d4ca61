"""Who did a piece of work, where, when, and how long it took: for result.json, and for the part of limbeck.json that is
not hashed. (Equal work differs in nothing else.)"""

from __future__ import annotations

import datetime
import os
import shlex
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_started = time.time()
_words: list[str] = []  # of the command line


def note_command(words: Sequence[str]) -> None:
    """A command begins: its time counts from here."""
    global _started, _words
    _started, _words = time.time(), list(words)


def run_facts(
    folder: Path, *, output: Path | None = None, inputs: Mapping[str, Path | str] | None = None,
    begun: float | None = None, resumed: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """What is to be told of the work that left `folder`: command, host, hardware, versions and commit; when it began
    (seconds since 1970; None: the command's start), and the seconds it has taken, of a `resumed` one those of its last
    part; where its inputs lie and where it has its place (`output`, where that is not `folder`); the bytes of what it
    left, by name."""
    from ...models import processes
    from ...models.provenance import provenance

    begun = _started if begun is None else begun
    moment = datetime.datetime.fromtimestamp(begun, datetime.UTC).isoformat(timespec="seconds")
    return {
        "command": shlex.join(["limbeck", *_words]) if _words else "",
        "host": socket.gethostname(),
        "began": moment,
        "seconds": round(time.time() - begun, 3),
        **({"resumed": True} if resumed else {}),
        "processes": processes.count(),
        **provenance(),
        "inputs": {key: os.path.abspath(value) for key, value in (inputs or {}).items() if isinstance(value, Path)},
        "output": os.path.abspath(folder if output is None else output),
        "bytes": sizes(folder),
    }


def sizes(folder: Path) -> dict[str, int]:
    """The bytes of everything in a folder, of a folder in it all that it holds."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        found[path.name] = sum(file.stat().st_size for file in files)
    return found
