"""What a config costs. `count_parameters`, `memory` and `GIB` (bytes) are public, each imported when first used."""

from __future__ import annotations

import importlib
from typing import Any

HOMES = {"count_parameters": "parameters", "memory": "inference", "GIB": "hardware"}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{HOMES[name]}", __name__), name)
