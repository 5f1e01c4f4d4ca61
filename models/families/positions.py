"""Rotary positions in a config.json, in transformers 5's spelling (`rope_parameters`) or the older one (`rope_theta`
and `rope_scaling`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..rope import ROPE_SCALINGS, RopeScaling
from .spelling import read_float

if TYPE_CHECKING:
    from ..config import HybridConfig

ROPE = ("rope_parameters", "rope_scaling")
LENGTH = "original_max_position_embeddings"
KEYS = ("rope_theta", *ROPE, LENGTH)  # all that a config.json says of them
THETA = 10000.0  # what transformers takes where a config.json is silent


def read_rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a HybridConfig. Raises InputError for positions that are partial, stretched in
    a way that is not known, or not the same in all layers, and where two spellings contradict each other."""
    spelled = {} if hf.get("rope_theta") is None else {"rope_theta": hf["rope_theta"]}
    scalings: dict[str, RopeScaling | None] = {}
    for name in ROPE:
        parameters = hf.get(name)
        if parameters is None:
            continue
        if not isinstance(parameters, Mapping) or any(isinstance(value, Mapping) for value in parameters.values()):
            raise InputError(f"config: {name} is {parameters!r}; expected one set of numbers for all layers")
        if parameters.get("rope_theta") is not None:
            spelled[f"{name}.rope_theta"] = parameters["rope_theta"]
        if parameters.get("partial_rotary_factor", 1) != 1:
            raise InputError(f"config: {name} turns a part of each head, which is not supported; expected the whole")
        scalings[name] = read_scaling(parameters, name, hf)
    thetas = {name: read_float(value, name) for name, value in spelled.items()}
    if len(set(thetas.values())) > 1 or len(set(scalings.values())) > 1:
        said = ", ".join(f"{name}={value!r}" for name, value in spelled.items())
        raise InputError(f"config: {said or ' and '.join(scalings)} say different things of the rotary positions")
    return {"rope_theta": next(iter(thetas.values()), THETA), "rope_scaling": next(iter(scalings.values()), None)}


def read_scaling(parameters: Mapping[str, Any], name: str, hf: Mapping[str, Any]) -> RopeScaling | None:
    """How one of `ROPE` stretches; None where it does not. As in transformers an original_max_position_embeddings
    beside it comes before the one in it, and where there is neither it is max_position_embeddings. Raises InputError.
    """
    how = parameters.get("rope_type", parameters.get("type", "default"))
    if how == "default":
        return None
    if how not in ROPE_SCALINGS:
        known = ", ".join(map(repr, ("default", *ROPE_SCALINGS)))
        raise InputError(f"config: {name} has the rope type {how!r}, which is not supported; known: {known}")
    kind = ROPE_SCALINGS[how]
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name != "others"}
    lengths: list[dict[str, Any]] = [
        {} if hf.get(key) is None else {LENGTH: hf[key]} for key in ("max_position_embeddings", LENGTH)
    ]
    stated = lengths[0] | {key: value for key, value in parameters.items() if value is not None} | lengths[1]
    missing = [field for field, row in fields.items() if row.default is dataclasses.MISSING and field not in stated]
    if missing:
        raise InputError(f"config: {name} of type {how!r} has no {' and no '.join(missing)}; expected a number")
    values: dict[str, Any] = {}
    for field in fields:
        if field in stated:
            value: Any = stated[field]
            values[field] = value if isinstance(value, bool) else read_float(value, f"{name}.{field}")
    if not math.isfinite(values[LENGTH]):
        raise InputError(f"config: {LENGTH} is {values[LENGTH]}; expected a whole number")
    values[LENGTH] = int(values[LENGTH])
    read = {*fields, "rope_type", "type", "rope_theta", "partial_rotary_factor"}
    others = {key: value for key, value in parameters.items() if key not in read}
    return kind(**values, others=others)


def write_rope(config: HybridConfig) -> dict[str, Any]:
    """The older spelling, which every reader knows; what is beyond the known numbers goes along."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_theta}
    stated = {field.name: getattr(scaling, field.name) for field in dataclasses.fields(scaling)}
    others = stated.pop("others")
    numbers = {name: value for name, value in stated.items() if value is not None}
    return {"rope_theta": config.rope_theta, "rope_scaling": {"rope_type": scaling.rope_type} | numbers | others}
