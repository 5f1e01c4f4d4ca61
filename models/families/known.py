"""The families there are, by the model_type of their config.json. A new family is a file, and an entry here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..foreign import shown
from . import dense, falcon_h1, granite, nemotron_h, puzzle
from .family import Family

FAMILIES: dict[str, Family] = {
    "nemotron_h": nemotron_h.FAMILY,
    puzzle.NAME: puzzle.FAMILY,
    "granitemoehybrid": granite.FAMILY,
    "falcon_h1": falcon_h1.FAMILY,
    "llama": dense.LLAMA,
    "qwen3": dense.QWEN3,
}


def read_config(hf: Mapping[str, Any], config: type) -> dict[str, Any]:
    """The arguments of HybridConfig, which is `config`, from the contents of a config.json. Raises InputError."""
    from ..schema import check_config

    name = hf.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(f"config: model_type is {shown(name)}; supported: {', '.join(FAMILIES)}")
    check_config(hf, FAMILIES[name], FAMILIES[name].config or config)
    return FAMILIES[name].read(hf)
