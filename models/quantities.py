"""The numbers of options: shares and counts as people write them (75%, 5B, 500M, 1.5M, 8k), and between which ends they
may be."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from .errors import InputError

UNITS = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}  # G and B are both a billion
WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([kmbgt%])\s*", re.I)
SHARES = ("parameters",)  # may be a share of the source's, beside a count
COUNTS = ("tokens",)  # and whatever ends so: evaluate_tokens


def quantity(text: str, share: bool) -> float | str:
    """The number that a text writes with a unit (1.5M), or with `share` as a percentage (75%, above 0 and 100 at most);
    the text itself where it is neither. A whole number comes as an int."""
    match = WRITTEN.fullmatch(text)
    if match is None:
        return text
    digits, unit = match.groups()
    whole, _, fraction = digits.partition(".")
    if unit == "%":
        percent = float(digits)
        return percent / 100 if share and 0 < percent <= 100 else text
    scaled = int(whole + fraction or "0") * UNITS[unit.lower()]  # exact, whatever the digits
    value, rest = divmod(scaled, 10 ** len(fraction))
    return text if rest else value


def with_quantities(content: Any) -> Any:
    """The content with every number of parameters and tokens that is written with a unit as a number."""
    if isinstance(content, (list, tuple)):
        return type(content)(with_quantities(each) for each in content)
    if not isinstance(content, Mapping):
        return content
    return {key: read_option(str(key), value) for key, value in content.items()}


def counted(**given: Any) -> list[Any]:
    """Whole numbers of at least 1, by name, where they may be written as options are (1k); None stays. Raises
    InputError."""
    found = []
    for name, value in given.items():
        number = quantity(value, share=False) if isinstance(value, str) else value
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise InputError(f"{name} is {value!r}; expected a whole number of at least 1")
        found.append(number)
    return found


def check_seed(seed: Any) -> None:
    """Raises InputError where torch takes no such seed."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InputError(f"seed is {repr(seed)[:40]}; expected a whole number, at least 0 and less than 2^63")


def read_option(name: str, value: Any) -> Any:
    share, count = name in SHARES, name.endswith(COUNTS)
    if (share or count) and isinstance(value, str):
        return quantity(value, share)
    if count and isinstance(value, float) and value.is_integer():  # 1e6
        return int(value)
    return with_quantities(value)


def switch(value: Any) -> Any:
    """YAML reads a plain off or on as false or true."""
    return ("off", "on")[value] if isinstance(value, bool) else value


def check_between(
    options: Any, group: str, least: float, most: float, *names: str, above: bool = False, below: bool = False
) -> None:
    """Raises InputError where one of these options (of a `group`, as "training: ") is not from `least` to `most`;
    `above`: nor `least` itself; `below`: nor `most` itself. NaN and infinity never are, and None is no number."""
    for name in names:
        value = getattr(options, name)
        if value is None:
            continue
        fits = (value > least if above else value >= least) and (value < most if below else value <= most)
        if not fits or not math.isfinite(value):
            said = f"{'more than' if above else 'at least'} {least:g}"
            said += f" and {'less than' if below else 'at most'} {most:,g}" if most < math.inf else ""
            raise InputError(f"{group}{name} is {value}; expected {said}")
