"""The two ways in which a run ends that are nobody's bug: wrong input (exit code 2) and a check that says no (3)."""


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what, where, what would be right."""


class CheckFailed(Exception):
    """A check that the user asked for says no (a memory fit, an export that does not read back alike)."""


class DiskError(InputError):
    """The disk refused to be written: full, not ours, or gone. What was finished before stays."""
