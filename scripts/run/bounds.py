"""What a command line may hold at all, before anyone looks what it means: lengths, and numbers of 64 bits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...models.errors import InputError

LONGEST = 10_000  # characters of an override that Hydra parses; 1,000 numbers in a list take it a second
WHOLE = 2**63  # torch's whole numbers
ODD = re.compile("[\x00\ud800-\udfff]")  # bytes of the command line that are not UTF-8 come as halves of pairs


def check_words(words: Sequence[str]) -> None:
    """Raises InputError for an override that is too long to be parsed."""
    for word in words:
        if len(word) > LONGEST:
            raise InputError(f"{word[:40]}... has {len(word):,} characters; expected {LONGEST:,} at most")


def check_content(content: Any, where: str = "") -> None:
    """Raises InputError where a whole number takes more than 64 bits, a seed is negative, or a text is none that a file
    can have as its name."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            check_content(value, f"{where}.{key}" if where else str(key))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            check_content(value, f"{where}[{number}]")
    elif isinstance(content, str):
        if ODD.search(content):
            raise InputError(f"{where} is {content[:40]!r}, which has a null byte or is not UTF-8; expected plain text")
    elif isinstance(content, int):
        seed = where.endswith("seed")
        if not (0 if seed else -WHOLE) <= content < WHOLE:
            said = str(content) if abs(content) < 10**30 else "a number of more than 30 digits"
            raise InputError(f"{where} is {said}; expected {'at least 0 and ' if seed else ''}less than 2^63")
