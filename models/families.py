"""How each model family spells its config.json and names its tensors: a dict each.

`nemotron_h`: Nemotron-H and Nemotron Nano 2, as published on the hub and as transformers (>= 5) writes them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from .config import HybridConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """`read` and `write` turn a config.json into HybridConfig's arguments and back; `prefixes` are what the tensors
    of the body may begin with in a checkpoint, the published one first. `head` is the name outside that body."""

    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[HybridConfig], dict[str, Any]]
    prefixes: tuple[str, ...]
    head: str = "lm_head.weight"


# Field of HybridConfig -> its spellings in the wild, the published one first.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("intermediate_size",),
    "num_attention_heads": ("num_attention_heads",),
    "num_key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", "attention_head_dim"),
    "mamba_num_heads": ("mamba_num_heads",),
    "mamba_head_dim": ("mamba_head_dim",),
    "n_groups": ("n_groups", "mamba_num_groups", "mamba_n_groups"),
    "ssm_state_size": ("ssm_state_size", "mamba_state_dim"),
    "conv_kernel": ("conv_kernel", "mamba_d_conv"),
    "chunk_size": ("chunk_size", "mamba_chunk_size"),
    "norm_eps": ("layer_norm_epsilon", "rms_norm_eps"),
    "conv_bias": ("use_conv_bias", "mamba_conv_bias"),
    "tie_word_embeddings": ("tie_word_embeddings",),
    "max_position_embeddings": ("max_position_embeddings",),
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id",),
    "pad_token_id": ("pad_token_id",),
}
REQUIRED = ("vocab_size", "hidden_size")
NEEDED = {
    "M": ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size"),
    "*": ("num_attention_heads", "num_key_value_heads"),
    "-": ("intermediate_size",),
}
LAYER_TYPES = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-"}
TIME_STEP_LIMIT = ("time_step_limit", "mamba_dt_limit")
BIASES = ("use_bias", "mlp_bias", "attention_bias", "mamba_proj_bias")
# Code that a folder brings along is never run, so that a rewritten folder does not point at it either.
DROPPED = ("auto_map", "architectures", "model_type", "layers_block_type", "layer_types", "hybrid_override_pattern")


def read_nemotron_h(hf: Mapping[str, Any]) -> dict[str, Any]:
    pattern = read_pattern(hf)
    fields: dict[str, Any] = {"family": "nemotron_h", "pattern": pattern}
    used = {"num_hidden_layers", *DROPPED, *TIME_STEP_LIMIT}
    for field, spellings in SPELLINGS.items():
        present = [name for name in spellings if hf.get(name) is not None]
        used.update(spellings)
        if len({repr(hf[name]) for name in present}) > 1:
            said = ", ".join(f"{name}={hf[name]!r}" for name in present)
            raise InputError(f"config: {said} say different things of one width")
        if present:
            fields[field] = hf[present[0]]
    needed = [*REQUIRED, *(name for letter in NEEDED if letter in pattern for name in NEEDED[letter])]
    for name in needed:
        if name not in fields:
            raise InputError(f"config: {' or '.join(SPELLINGS[name])} is missing; the layer pattern needs it")
    if "*" in pattern and "head_dim" not in fields:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    if isinstance(fields.get("eos_token_id"), list):
        fields["eos_token_id"] = tuple(fields["eos_token_id"])
    for name in BIASES:
        if hf.get(name):
            raise InputError(f"config: {name}={hf[name]!r}; biases of projections are not supported, expected false")
    for name, expected in (("mlp_hidden_act", "relu2"), ("mamba_hidden_act", "silu")):
        if hf.get(name, expected) != expected:
            raise InputError(f"config: {name}={hf[name]!r}; nemotron_h has {expected!r}")
    for name in TIME_STEP_LIMIT:
        if hf.get(name) is not None:
            fields["dt_limit"] = tuple(read_float(value, name) for value in hf[name])
    fields["extra"] = {name: value for name, value in hf.items() if name not in used}
    return fields


def read_pattern(hf: Mapping[str, Any]) -> str:
    """The layer pattern, from either spelling; where both are there they have to agree."""
    found: dict[str, str] = {}
    text = hf.get("hybrid_override_pattern")
    if text is not None:
        if not isinstance(text, str):
            raise InputError(f"config: hybrid_override_pattern is {text!r}; expected a text such as 'M-M*-'")
        if "E" in text:
            raise InputError("config: hybrid_override_pattern has 'E' (mixture of experts), which is not supported")
        found["hybrid_override_pattern"] = text
    for name in ("layers_block_type", "layer_types"):
        kinds = hf.get(name)
        if kinds is None:
            continue
        for position, kind in enumerate(kinds):
            if kind not in LAYER_TYPES:
                known = ", ".join(LAYER_TYPES)
                raise InputError(f"config: {name}[{position}] is {kind!r}, which is not supported; known: {known}")
        found[name] = "".join(LAYER_TYPES[kind] for kind in kinds)
    if not found:
        raise InputError("config: no layer pattern; expected hybrid_override_pattern, layers_block_type or layer_types")
    if len(set(found.values())) > 1:
        raise InputError(f"config: {' and '.join(found)} disagree on the layers")
    (pattern,) = set(found.values())
    layers = hf.get("num_hidden_layers")
    if layers is not None and layers != len(pattern):
        raise InputError(f"config: num_hidden_layers is {layers}, but the pattern has {len(pattern)} layers")
    return pattern


def read_float(value: Any, name: str) -> float:
    """A number, or transformers' `{"__float__": "Infinity"}`."""
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        value = value["__float__"]
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"config: {name} holds {value!r}, expected a number") from None


def write_nemotron_h(config: HybridConfig) -> dict[str, Any]:
    hf: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": config.pattern,
        "num_hidden_layers": config.num_layers,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
    }
    for name in BIASES:
        hf[name] = False
    for field, spellings in SPELLINGS.items():
        value = getattr(config, field)
        # A width that the pattern does not use is left to the reader's default: 0 heads would not be valid there.
        if value != 0 or isinstance(value, bool) or field.endswith("token_id"):
            hf[spellings[0]] = list(value) if isinstance(value, tuple) else value
    # (0, inf) is every reader's default, and plain JSON has no infinity; a finite upper limit is written.
    low, high = config.dt_limit
    if (low, high) != (0.0, math.inf):
        hf[TIME_STEP_LIMIT[0]] = [low, {"__float__": "Infinity"} if high == math.inf else high]
    return hf | {name: value for name, value in config.extra.items() if name not in hf}


FAMILIES: dict[str, Family] = {
    "nemotron_h": Family(read_nemotron_h, write_nemotron_h, ("backbone.", "model.")),
}


def read_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """HybridConfig's arguments from the contents of a config.json. Raises InputError."""
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise InputError(f"config: model_type is {kind!r}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[kind].read(hf)


def write_config(config: HybridConfig) -> dict[str, Any]:
    """The contents of a config.json in the family's published spelling."""
    return FAMILIES[config.family].write(config)


def to_checkpoint_name(config: HybridConfig, name: str) -> str:
    """A checkpoint's name of one of `axes.tensor_table`'s tensors."""
    family = FAMILIES[config.family]
    return family.head if name == "lm_head.weight" else family.prefixes[0] + name


def from_checkpoint_name(config: HybridConfig, name: str) -> str | None:
    """The table's name of a checkpoint's tensor; None where no prefix of the family fits."""
    family = FAMILIES[config.family]
    if name == family.head:
        return "lm_head.weight"
    for prefix in family.prefixes:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return None
