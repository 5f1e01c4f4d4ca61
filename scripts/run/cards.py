"""The cards of conf/hardware/, and which of them a GPU is by the name that its driver gives."""

from __future__ import annotations

import itertools
import re
from typing import Any

from ...models.cost.hardware import Hardware
from ...models.errors import InputError, guess
from .compose import CONF

OTHERS = {"pcie", "nvl", "laptop"}  # slower cards, or with other memory, than the ones that are known by the rest


def profiles() -> list[str]:
    """The names of the profiles of one card each."""
    return sorted(path.stem for path in (CONF / "hardware").glob("*.yaml") if path.stem not in ("cpu", "custom"))


def profile(name: str, key: str = "here") -> Hardware:
    """A profile of conf/hardware/. Raises InputError, which names the option `key`."""
    from omegaconf import OmegaConf

    if name not in profiles():
        raise InputError(f"{key}={name}: no such profile; known: {', '.join(profiles())}" + guess(name, profiles()))
    content: Any = OmegaConf.to_container(OmegaConf.load(CONF / "hardware" / f"{name}.yaml"))
    return Hardware(**content)


def card_named(device_name: str) -> Hardware | None:
    """The card that torch calls so ("NVIDIA A100-SXM4-80GB"), None where no profile is of this very card."""
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    if OTHERS & set(words):
        return None
    words += [one + other for one, other in itertools.pairwise(words)] + [word.removesuffix("b") for word in words]
    known = [name for name in profiles() if set(name.split("-")) <= set(words)]
    return profile(known[0]) if known else None
