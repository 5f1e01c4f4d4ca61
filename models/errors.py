"""The ways in which a run ends that are nobody's bug: wrong input (exit code 2), a check that says no (3), a signal
(128 and its number)."""


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what, where, what would be right."""


class CheckFailed(Exception):
    """A check that the user asked for says no (a memory fit, an export that does not read back alike)."""


class DiskError(InputError):
    """The disk refused to be written: full, not ours, or gone. What was finished before stays."""


class Stopped(Exception):
    """A signal ended the work, and what was done is saved; the message says where."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal
