"""The ways in which a run ends that are nobody's bug: wrong input (exit code 2), a check that says no (3), a signal
(128 and its number)."""

import difflib
from collections.abc import Sequence
from typing import Any


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what, where, what would be right."""


class CheckFailed(Exception):
    """A check that the user requested says no (a memory fit, an export that does not read back alike)."""


class DiskError(InputError):
    """The disk refused to be written: full, not ours, or gone. What was finished before stays."""


class Panicked(InputError):
    """A library written in Rust panicked at what it was given, and would do so again."""


class Stopped(Exception):
    """A signal ended the work, and what was done is saved; the message says where."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


def guess(word: str, choices: Sequence[str]) -> str:
    """What was probably meant, to be put after what was wrong; nothing where no choice is near."""
    near = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def expect(where: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raises InputError where a value is of none of these types."""
    if not isinstance(value, kinds):
        raise InputError(f"{where} is {repr(value)[:80]}; expected {expected}")


def check_counts(options: Any, *names: str, least: int = 1, group: str = "") -> None:
    """Raises InputError where one of these options (of a `group`, as "details.") is less than `least`."""
    for name in names:
        if getattr(options, name) < least:
            raise InputError(f"{group}{name} is {getattr(options, name)}; expected at least {least}")


def gib(count: float) -> str:
    """Bytes as a message or a table says them."""
    return f"{count / 2**30:.2f} GiB" if abs(count) >= 2**30 / 10 else f"{count / 2**20:.2f} MiB"
