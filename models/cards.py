"""The cards of conf/hardware/, and which of them a GPU is by the name that its driver gives."""

from __future__ import annotations

import itertools
import re

from .cost.hardware import Hardware
from .errors import InputError, guess
from .named import names, read_hardware

# What a name may have beside the card's own: any other word is another card (PCIe, NVL, Laptop, D, Ti), or a part of
# one (MIG 1g.10gb, the 12Q of a virtual GPU).
PLAIN = re.compile(r"nvidia|tesla|geforce|rtx|sxm\d?|hbm\d?e?")
SIZE = re.compile(r"(\d+)gb?")
NEAR = 0.05  # of the memory that a profile has, by which the size in a name may differ: 80 GB are 79.25 GiB


def profiles() -> list[str]:
    """The names of the profiles of one card each."""
    return [name for name in names("hardware") if name not in ("cpu", "custom")]


def profile(name: str, key: str = "here") -> Hardware:
    """One of `profiles`. Raises InputError, which names the option `key`."""
    if name not in profiles():
        raise InputError(f"{key}={name}: no such profile; known: {', '.join(profiles())}" + guess(name, profiles()))
    return read_hardware(name)


def card_named(device_name: str) -> Hardware | None:
    """The card that torch calls so ("NVIDIA A100-SXM4-80GB"), None where no profile is of this very card."""
    words = [SIZE.sub(r"\1g", word) for word in re.findall(r"[a-z0-9]+", device_name.lower())]
    spelled = {word: {word} for word in words} | {one + two: {one, two} for one, two in itertools.pairwise(words)}
    for name in profiles():
        parts, card = name.split("-"), read_hardware(name)
        others = set(words).difference(*(spelled.get(part, set()) for part in parts))
        if spelled.keys() >= set(parts) and all(plain(word, card) for word in others):
            return card
    return None


def plain(word: str, card: Hardware) -> bool:
    """Whether a word of a GPU's name leaves it the card that it is: a maker, a socket, or the memory that it has."""
    if (size := SIZE.fullmatch(word)) is not None:
        return abs(int(size[1]) / card.total_gib - 1) < NEAR
    return PLAIN.fullmatch(word) is not None
