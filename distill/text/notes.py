"""What is left out while text is read, to be said in the end."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator

from ...models import processes

SAID: set[str] = set()
log = logging.getLogger("limbeck")


def say(notes: Iterable[str], what: str) -> None:
    """Says notes of what was read, each once in a run: several splits and stages read it."""
    for note in (f"{what}: {note}" for note in notes):
        if note not in SAID and processes.rank() == 0:
            SAID.add(note)
            log.warning("%s", note)


def printable(name: str) -> str:
    r"""A file's name for what is hashed and written in UTF-8: bytes that are none are spelled \xff. The backslashes
    of such a name are doubled, so that no two of them become one; other names stay."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name.replace("\\", "\\\\")).decode("utf-8", "backslashreplace")
    return name


class Notes:
    """What was left out while text was read, counted by its kind, with where it came first."""

    def __init__(self) -> None:
        self.counts: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, where: str) -> None:
        count, first = self.counts.get(kind, (0, printable(where)))
        self.counts[kind] = (count + 1, first)

    def __iter__(self) -> Iterator[str]:
        return (f"{count:,} {kind} (the first: {first})" for kind, (count, first) in self.counts.items())
