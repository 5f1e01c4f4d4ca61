"""How each model family spells its config.json and names its tensors: a dict each.

`nemotron_h`: Nemotron-H and Nemotron Nano 2, as published on the hub and as transformers (>= 5) writes them.
`llama`, `qwen3`: dense Transformers, whose block of attention and MLP is two of our layers, the pattern `*-`.
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
    of the body may begin with in a checkpoint, the published one first. `head` is the name outside that body.

    `architecture` is transformers' class; `fixed` are the fields that are the same in every model of the family.
    `outer` and `layers` name modules as the checkpoint does: those around the layers, and "norm" and "mixer" of each
    layer of a block. `block` is the pattern of a block of several layers, which come and go together only.
    `ignored` are endings of tensors that old checkpoints hold though they follow from the config.
    """

    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[HybridConfig], dict[str, Any]]
    architecture: str
    fixed: Mapping[str, Any]
    prefixes: tuple[str, ...]
    outer: Mapping[str, str]
    layers: tuple[Mapping[str, str], ...]
    block: str = ""
    ignored: tuple[str, ...] = ()
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
DROPPED = ("auto_map", "architectures", "model_type", "layers_block_type", "layer_types", "hybrid_override_pattern",
           "dtype", "torch_dtype")  # fmt: skip
DENSE = {
    field: SPELLINGS[field]
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
                  "head_dim", "tie_word_embeddings", "max_position_embeddings", "bos_token_id", "eos_token_id",
                  "pad_token_id")
} | {"norm_eps": ("rms_norm_eps",)}  # fmt: skip
# What transformers takes where a config.json is silent.
DENSE_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"norm_eps": 1e-6, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "qwen3": {"norm_eps": 1e-6, "max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None,
              "head_dim": 128},
}  # fmt: skip
DENSE_ROPE_THETA = 10000.0
ROPE = ("rope_parameters", "rope_scaling")


def read_nemotron_h(hf: Mapping[str, Any]) -> dict[str, Any]:
    pattern = read_pattern(hf)
    fields: dict[str, Any] = {"family": "nemotron_h", "pattern": pattern}
    used = {"num_hidden_layers", *DROPPED, *TIME_STEP_LIMIT, *(name for names in SPELLINGS.values() for name in names)}
    fields |= read_fields(hf, SPELLINGS, pattern, {})
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
    needed = [*REQUIRED, *(name for letter in NEEDED if letter in pattern for name in NEEDED[letter])]
    for name in needed:
        if name not in fields:
            raise InputError(f"config: {' or '.join(known[name])} is missing; the layer pattern needs it")
    hidden, heads = fields["hidden_size"], fields.get("num_attention_heads")
    if "*" in pattern and "head_dim" not in fields and isinstance(hidden, int) and isinstance(heads, int) and heads:
        fields["head_dim"] = hidden // heads
    if isinstance(fields.get("eos_token_id"), list):
        fields["eos_token_id"] = tuple(fields["eos_token_id"])
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


def read_dense(hf: Mapping[str, Any]) -> dict[str, Any]:
    """llama and qwen3."""
    kind, layers = hf["model_type"], hf.get("num_hidden_layers")
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise InputError(f"config: num_hidden_layers is {layers!r}; expected a whole number of at least 1")
    for name in ("attention_bias", "mlp_bias"):
        if hf.get(name):
            raise InputError(f"config: {name}={hf[name]!r}; biases of projections are not supported, expected false")
    if hf.get("use_sliding_window") or set(hf.get("layer_types") or ()) - {"full_attention"}:
        raise InputError(f"config: {kind} with sliding windows (use_sliding_window, layer_types) is not supported")
    if hf.get("hidden_act", "silu") != "silu":
        raise InputError(f"config: hidden_act={hf['hidden_act']!r}; {kind} has 'silu'")
    pattern = FAMILIES[kind].block * layers
    defaults = dict(DENSE_DEFAULTS[kind])
    if hf.get("num_attention_heads") is not None:
        defaults["num_key_value_heads"] = hf["num_attention_heads"]
    # A token that is null is none, and not the default.
    defaults |= {name: None for name in defaults if name.endswith("token_id") and name in hf}
    fields = {"family": kind, "pattern": pattern, "rope_theta": read_rope_theta(hf), **FAMILIES[kind].fixed}
    fields |= read_fields(hf, DENSE, pattern, defaults)
    used = {"num_hidden_layers", "hidden_act", "rope_theta", *ROPE, *DROPPED}
    used |= {name for spellings in DENSE.values() for name in spellings}
    fields["extra"] = {name: value for name, value in hf.items() if name not in used}
    return fields


def read_rope_theta(hf: Mapping[str, Any]) -> float:
    """The base of rotary positions, in transformers 5's spelling or the older one. Raises InputError for those that
    are scaled, partial, or not the same in all layers."""
    found = {} if hf.get("rope_theta") is None else {"rope_theta": hf["rope_theta"]}
    for name in ROPE:
        parameters = hf.get(name)
        if parameters is None:
            continue
        if not isinstance(parameters, Mapping) or any(isinstance(value, Mapping) for value in parameters.values()):
            raise InputError(f"config: {name} is {parameters!r}; expected one set of numbers for all layers")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default":
            raise InputError(f"config: {name} has the rope type {kind!r}, which is not supported; known: 'default'")
        if parameters.get("rope_theta") is not None:
            found[f"{name}.rope_theta"] = parameters["rope_theta"]
        if parameters.get("partial_rotary_factor", 1) != 1:
            raise InputError(f"config: {name} turns a part of each head, which is not supported; expected the whole")
    thetas = {name: read_float(value, name) for name, value in found.items()}
    if len(set(thetas.values())) > 1:
        said = ", ".join(f"{name}={value!r}" for name, value in found.items())
        raise InputError(f"config: {said} say different things of the rotary positions")
    return next(iter(thetas.values()), DENSE_ROPE_THETA)


def write_dense(config: HybridConfig) -> dict[str, Any]:
    if config.rope_theta is None:
        raise InputError(f"config: {config.family} has rotary positions; expected a rope_theta")
    if config.family == "llama" and config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"config: hidden_size {config.hidden_size} is no multiple of num_attention_heads"
            f" {config.num_attention_heads}, which transformers refuses for llama; take a multiple"
        )
    hf: dict[str, Any] = {"num_hidden_layers": config.num_layers // 2, "hidden_act": "silu"}
    for field, spellings in DENSE.items():
        value = getattr(config, field)
        hf[spellings[0]] = list(value) if isinstance(value, tuple) else value
    hf["rope_theta"] = config.rope_theta
    return hf | {name: value for name, value in config.extra.items() if name not in hf}


LLAMA = Family(
    read_dense,
    write_dense,
    "LlamaForCausalLM",
    fixed={"activation": "silu", "gated_mlp": True, "qk_norm": False},
    prefixes=("model.",),
    outer={"embeddings": "embed_tokens", "norm_f": "norm"},
    layers=(
        {"norm": "input_layernorm", "mixer": "self_attn"},
        {"norm": "post_attention_layernorm", "mixer": "mlp"},
    ),
    block="*-",
    ignored=(".rotary_emb.inv_freq",),
)
FAMILIES: dict[str, Family] = {
    "nemotron_h": Family(
        read_nemotron_h,
        write_nemotron_h,
        "NemotronHForCausalLM",
        fixed={"activation": "relu2", "gated_mlp": False, "qk_norm": False, "rope_theta": None},
        prefixes=("backbone.", "model."),
        outer={"embeddings": "embeddings", "norm_f": "norm_f"},
        layers=({"norm": "norm", "mixer": "mixer"},),
    ),
    "llama": LLAMA,
    "qwen3": dataclasses.replace(LLAMA, architecture="Qwen3ForCausalLM", fixed={**LLAMA.fixed, "qk_norm": True}),
}


def read_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """HybridConfig's arguments from the contents of a config.json. Raises InputError."""
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise InputError(f"config: model_type is {kind!r}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[kind].read(hf)


def write_config(config: HybridConfig) -> dict[str, Any]:
    """The contents of a config.json in the family's published spelling. Raises InputError for what it cannot say."""
    family = FAMILIES[config.family]
    for field, value in family.fixed.items():
        if getattr(config, field) != value:
            raise InputError(
                f"config: {field} is {getattr(config, field)!r}, which a config.json of {config.family}"
                f" cannot say; expected {value!r}"
            )
    if family.block and config.pattern != family.block * (config.num_layers // len(family.block)):
        raise InputError(
            f"config: the pattern {config.pattern} cannot be written as {config.family}, which has whole blocks"
            f" {family.block!r}; remove layers in pairs"
        )
    return {"architectures": [family.architecture], "model_type": config.family} | family.write(config)


def to_checkpoint_name(config: HybridConfig, name: str) -> str:
    """A checkpoint's name of one of `axes.tensor_table`'s tensors."""
    family = FAMILIES[config.family]
    if name == "lm_head.weight":
        return family.head
    module, _, rest = name.partition(".")
    if module != "layers":
        return f"{family.prefixes[0]}{family.outer[module]}.{rest}"
    layer, module, rest = rest.split(".", 2)
    block, place = divmod(int(layer), len(family.layers))
    return f"{family.prefixes[0]}layers.{block}.{family.layers[place][module]}.{rest}"


def from_checkpoint_name(config: HybridConfig, name: str) -> str | None:
    """The table's name of a checkpoint's tensor; None where the family has none of that name."""
    family = FAMILIES[config.family]
    if name == family.head:
        return "lm_head.weight"
    prefix = next((prefix for prefix in family.prefixes if name.startswith(prefix)), None)
    if prefix is None:
        return None
    module, _, rest = name.removeprefix(prefix).partition(".")
    if module != "layers":
        return next((f"{ours}.{rest}" for ours, theirs in family.outer.items() if theirs == module), None)
    block, module, rest = (*rest.split(".", 2), "", "")[:3]
    for place, names in enumerate(family.layers):
        for ours, theirs in names.items():
            if theirs == module and block.isdecimal():
                return f"layers.{int(block) * len(family.layers) + place}.{ours}.{rest}"
    return None


def is_ignored(config: HybridConfig, name: str) -> bool:
    """Whether a checkpoint's tensor says nothing that the config does not."""
    return name.endswith(FAMILIES[config.family].ignored)
