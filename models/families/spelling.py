"""What the families' config.json files have in common: fields in several spellings, numbers, defaults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..foreign import without_code
from ..kinds import kinds_of

if TYPE_CHECKING:
    from ..config import HybridConfig

TIME_STEP_LIMIT = "time_step_limit"
REQUIRED = ("vocab_size", "hidden_size")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Code that a folder brings along is never run, so that a rewritten folder does not point at it either; and weights that
# could be read are plain, whatever was done to those that config.json was first written for.
DROPPED = ("auto_map", "quantization_config", "compression_config", "architectures", "model_type", "layers_block_type",
           "layer_types", "hybrid_override_pattern", "dtype", "torch_dtype")  # fmt: skip
# What a config.json may call the function of a router's scores: as DeepSeek's does, and as Megatron's option.
ROUTERS = ("scoring_func", "moe_router_score_function")


def read_fields(
    hf: Mapping[str, Any], known: Mapping[str, tuple[str, ...]], pattern: str, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields that a config.json states in any of the `known` spellings, `defaults` where it is silent. Raises
    InputError where spellings contradict each other, and where a field is missing that the pattern needs."""
    fields = dict(defaults)
    for field, spellings in known.items():
        present = [name for name in spellings if hf.get(name) is not None]
        if len({repr(hf[name]) for name in present}) > 1:
            said = ", ".join(f"{name}={hf[name]!r}" for name in present)
            raise InputError(f"config: {said} say different things of one width")
        if present:
            fields[field] = hf[present[0]]
    # What a HybridConfig has no default for, and head_dim, which follows from the others.
    needed = [*REQUIRED, *(name for kind in dict.fromkeys(kinds_of(pattern)) for name in kind.fields)]
    for name in needed:
        if name not in fields and name not in ("head_dim", "conv_kernel", "chunk_size"):
            raise InputError(f"config: {' or '.join(known[name])} is missing; the layer pattern needs it")
    hidden, heads = fields["hidden_size"], fields.get("num_attention_heads")
    if "head_dim" in needed and "head_dim" not in fields and isinstance(hidden, int) and isinstance(heads, int):
        fields["head_dim"] = hidden // heads if heads else 0
    if isinstance(fields.get("eos_token_id"), list):
        fields["eos_token_id"] = tuple(fields["eos_token_id"])
    return fields


def write_fields(config: HybridConfig, known: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The fields of a config in the first of their spellings. A width that the pattern does not use is left to the
    reader's default: 0 heads would not be valid there. A number whose default is another one is written, 0 or not."""
    hf, defaults = {}, {field.name: field.default for field in dataclasses.fields(config)}
    for field, spellings in known.items():
        value = getattr(config, field)
        if value != 0 or defaults[field] != 0 or isinstance(value, bool):
            hf[spellings[0]] = list(value) if isinstance(value, tuple) else value
    return hf


def stated(hf: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of a family, as transformers has them: as many key-value heads as heads, and a token that is null is
    none."""
    own = dict(defaults)
    if hf.get("num_attention_heads") is not None:
        own["num_key_value_heads"] = hf["num_attention_heads"]
    return own | null_tokens(hf)


def null_tokens(hf: Mapping[str, Any]) -> dict[str, None]:
    """The special tokens that a config.json names as none."""
    return {field: None for field in TOKENS if field in hf and hf[field] is None}


def read_layers(hf: Mapping[str, Any]) -> int:
    """`num_hidden_layers`. Raises InputError."""
    layers = hf.get("num_hidden_layers")
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise InputError(f"config: num_hidden_layers is {layers!r}; expected a whole number of at least 1")
    return layers


def same_in_all(hf: Mapping[str, Any], known: set[str]) -> None:
    """Raises InputError where a list of the layers' types names one that is not known."""
    for name in ("layer_types", "layers_block_type"):
        others = set(hf.get(name) or ()) - known
        if others:
            raise InputError(f"config: {name} names {sorted(others)[0]!r}, which is not supported; known: {min(known)}")


def read_limit(hf: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """`dt_limit` where a file states it, by any of the names."""
    for name in names or (TIME_STEP_LIMIT,):
        if hf.get(name) is not None:
            return {"dt_limit": tuple(read_float(value, name) for value in hf[name])}
    return {}


def write_limit(config: HybridConfig) -> dict[str, Any]:
    """(0, inf) is every reader's default, and plain JSON has no infinity; a finite upper limit is written."""
    low, high = config.dt_limit
    if (low, high) == (0.0, math.inf):
        return {}
    return {TIME_STEP_LIMIT: [low, {"__float__": "Infinity"} if high == math.inf else high]}


def unread(hf: Mapping[str, Any], known: Mapping[str, tuple[str, ...]], *others: str) -> dict[str, Any]:
    """What a config.json says beyond the fields that were read, and may be written again."""
    used = {*others, *DROPPED, *(name for spellings in known.values() for name in spellings)}
    return without_code({name: value for name, value in hf.items() if name not in used})


def read_switch(hf: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """True or false. Raises InputError for anything else."""
    value = default if hf.get(name) is None else hf[name]
    if not isinstance(value, bool):
        raise InputError(f"config: {name} is {value!r}; expected true or false")
    return value


def refuse_biases(hf: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if hf.get(name):
            raise InputError(f"config: {name}={hf[name]!r}; biases of projections are not supported, expected false")


def check_router(hf: Mapping[str, Any], kind: str) -> None:
    """Raises InputError where a config.json with experts names another kind of router than its family's."""
    for name in ROUTERS:
        if hf.get(name) not in (None, kind):
            raise InputError(f"config: {name} is {hf[name]!r}; experts of {hf.get('model_type')} have {kind!r} alone")


def read_float(value: Any, name: str) -> float:
    """A number, or transformers' `{"__float__": "Infinity"}`."""
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        value = value["__float__"]
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"config: {name} holds {value!r}, expected a number") from None
