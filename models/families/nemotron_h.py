"""Nemotron-H, Nemotron Nano 2 and Nemotron 3, as published on the hub and as transformers (>= 5) writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import attention, mamba2, mlp, moe
from ..errors import InputError
from .family import PLAIN, Family, Transform, Units
from .spelling import (
    TIME_STEP_LIMIT,
    check_router,
    null_tokens,
    read_fields,
    read_limit,
    refuse_biases,
    unread,
    write_fields,
    write_limit,
)

if TYPE_CHECKING:
    from ..config import HybridConfig

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
# What a config.json has of experts.
EXPERT_SPELLINGS: dict[str, tuple[str, ...]] = {
    "n_routed_experts": ("n_routed_experts", "num_local_experts"),
    "num_experts_per_tok": ("num_experts_per_tok",),
    "moe_intermediate_size": ("moe_intermediate_size",),
    "moe_shared_expert_intermediate_size": ("moe_shared_expert_intermediate_size",),
    "moe_latent_size": ("moe_latent_size",),
    "n_group": ("n_group",),
    "topk_group": ("topk_group",),
    "norm_topk_prob": ("norm_topk_prob",),
    "routed_scaling_factor": ("routed_scaling_factor",),
}
MAMBA, ATTENTION, DENSE, MIXTURE = (kind.KIND.letter for kind in (mamba2, attention, mlp, moe))
LAYER_TYPES = {
    "mamba": MAMBA, "linear_attention": MAMBA, "attention": ATTENTION, "full_attention": ATTENTION, "mlp": DENSE,
    "moe": MIXTURE,
}  # fmt: skip
# And what else only such a model, or one with a head for further tokens, has. Readers take a config.json with any of it
# for one with experts (llama.cpp's converter does), so that no other says it.
EXPERT_FIELDS = (
    *(name for names in EXPERT_SPELLINGS.values() for name in names), "n_shared_experts", "moe_shared_expert_overlap",
    "output_router_logits", "num_nextn_predict_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern",
)  # fmt: skip
TIME_STEP_LIMITS = (TIME_STEP_LIMIT, "mamba_dt_limit")
BIASES = ("use_bias", "mlp_bias", "attention_bias", "mamba_proj_bias")
LAYER, AHEAD = "backbone.layers.{block}.", "mtp.layers.{block}."
STEPS, STEP_PATTERN, STEP_TYPES = "num_nextn_predict_layers", "mtp_hybrid_override_pattern", "mtp_layers_block_type"
DEFAULT_STEP, NORM_EPS = "*E", 1e-5  # as transformers has them


def read_nemotron_h(hf: Mapping[str, Any]) -> dict[str, Any]:
    pattern = read_pattern(hf)
    fields: dict[str, Any] = {"family": "nemotron_h", "pattern": pattern, **read_steps(hf)}
    every = pattern + fields.get("mtp_pattern", "")
    known, defaults = dict(SPELLINGS), dict[str, Any](null_tokens(hf))
    if MIXTURE in every:
        known |= EXPERT_SPELLINGS
        defaults |= {"n_group": 1, "topk_group": 1}
        check_shared(hf)
        check_router(hf, "sigmoid")
    fields |= read_fields(hf, known, every, defaults)
    check_norms(hf, fields)
    refuse_biases(hf, BIASES)
    for name, expected in (("mlp_hidden_act", "relu2"), ("mamba_hidden_act", "silu")):
        if hf.get(name, expected) != expected:
            raise InputError(f"config: {name}={hf[name]!r}; nemotron_h has {expected!r}")
    fields |= read_limit(hf, *TIME_STEP_LIMITS)
    used = (STEPS, STEP_PATTERN, STEP_TYPES) if fields.get("mtp_steps") else ()
    fields["extra"] = unread(hf, known, "num_hidden_layers", *TIME_STEP_LIMITS, *used)
    return fields


def check_norms(hf: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Raises InputError where the norms' epsilon is said in the second spelling alone, which transformers does not
    read, and is not what that takes instead."""
    name, other = SPELLINGS["norm_eps"]
    if hf.get(name) is None and fields.get("norm_eps", NORM_EPS) != NORM_EPS:
        raise InputError(
            f"config: {other} is {hf[other]!r} and {name} is missing, for which transformers takes {NORM_EPS:g}; give"
            f" {name} the right one"
        )


def check_shared(hf: Mapping[str, Any]) -> None:
    """Raises InputError unless there is one shared expert: of several, readers make different widths (transformers
    one's, vLLM that times their number)."""
    count, width = hf.get("n_shared_experts", 1), hf.get("moe_shared_expert_intermediate_size")
    if count != 1:
        raise InputError(f"config: n_shared_experts is {count!r}; expected 1, a single one of their whole width")
    if not width:
        raise InputError(
            f"config: moe_shared_expert_intermediate_size is {width!r}; nemotron_h's shared expert needs a width"
        )


def read_pattern(hf: Mapping[str, Any]) -> str:
    """The layer pattern, from either spelling; where both are there they have to agree."""
    spelled: dict[str, str] = {}
    text = hf.get("hybrid_override_pattern")
    if text is not None:
        if not isinstance(text, str):
            raise InputError(f"config: hybrid_override_pattern is {text!r}; expected a text such as 'M-M*-'")
        spelled["hybrid_override_pattern"] = text
    for name in ("layers_block_type", "layer_types"):
        if hf.get(name) is not None:
            spelled[name] = pattern_of(name, hf[name])
    if not spelled:
        raise InputError("config: no layer pattern; expected hybrid_override_pattern, layers_block_type or layer_types")
    if len(set(spelled.values())) > 1:
        raise InputError(f"config: {' and '.join(spelled)} disagree on the layers")
    (pattern,) = set(spelled.values())
    layers = hf.get("num_hidden_layers")
    if layers is not None and layers != len(pattern):
        raise InputError(f"config: num_hidden_layers is {layers}, but the pattern has {len(pattern)} layers")
    return pattern


def pattern_of(name: str, types: Any) -> str:
    """The pattern of a list of the layers' types. Raises InputError."""
    for position, kind in enumerate(types):
        if kind not in LAYER_TYPES:
            known = ", ".join(LAYER_TYPES)
            raise InputError(f"config: {name}[{position}] is {kind!r}, which is not supported; known: {known}")
    return "".join(LAYER_TYPES[kind] for kind in types)


def read_steps(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The steps of multi-token prediction, and the pattern of one; nothing without. Raises InputError."""
    steps = hf.get(STEPS)
    if not steps:
        return {}
    spelled = [hf[STEP_PATTERN]] if hf.get(STEP_PATTERN) is not None else []
    if hf.get(STEP_TYPES) is not None:
        spelled.append(pattern_of(STEP_TYPES, hf[STEP_TYPES]))
    if len(set(spelled)) > 1:
        raise InputError(f"config: {STEP_PATTERN} and {STEP_TYPES} disagree on the layers of multi-token prediction")
    pattern = next(iter(spelled), DEFAULT_STEP)
    if not isinstance(pattern, str):
        raise InputError(f"config: {STEP_PATTERN} is {pattern!r}; expected a text such as {DEFAULT_STEP!r}")
    return {"mtp_steps": steps, "mtp_pattern": pattern}


def write_nemotron_h(config: HybridConfig) -> dict[str, Any]:
    hf: dict[str, Any] = {
        "hybrid_override_pattern": config.pattern,
        "num_hidden_layers": config.num_layers,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
    }
    hf |= dict.fromkeys(BIASES, False)
    known, every = dict(SPELLINGS), config.pattern
    if config.mtp_steps:
        hf |= {STEPS: config.mtp_steps, STEP_PATTERN: config.mtp_pattern}
        every += config.mtp_pattern
    if MIXTURE in every:
        known |= EXPERT_SPELLINGS
        hf["n_shared_experts"] = 1
        if not config.moe_shared_expert_intermediate_size:
            raise InputError(
                "config: moe_shared_expert_intermediate_size is 0; nemotron_h has a shared expert in each layer of"
                " experts, expected at least 1"
            )
    hf |= write_fields(config, known)
    hf |= write_limit(config)
    hf |= {name: value for name, value in config.extra.items() if name not in hf}
    ahead = (STEPS, STEP_PATTERN) if config.mtp_steps else ()
    absent = () if MIXTURE in every else EXPERT_FIELDS
    return {name: value for name, value in hf.items() if name not in absent or name in ahead}


def layers_at(place: str) -> dict[str, dict[str, Transform]]:
    """A layer's tensors by its letter, which are called as ours are; experts are stored one by one."""
    names = {
        MAMBA: ("in_proj.weight", "conv1d.weight", "conv1d.bias", "A_log", "D", "dt_bias", "norm.weight",
                "out_proj.weight"),
        ATTENTION: ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
        DENSE: ("up_proj.weight", "down_proj.weight"),
        MIXTURE: ("gate.weight", "gate.e_score_correction_bias", "shared_experts.up_proj.weight",
                  "shared_experts.down_proj.weight", "fc1_latent_proj.weight", "fc2_latent_proj.weight"),
    }  # fmt: skip
    maps: dict[str, dict[str, Transform]] = {
        letter: {part: place + part for part in ("norm.weight", *(f"mixer.{name}" for name in own))}
        for letter, own in names.items()
    }
    for end in ("up", "down"):
        maps[MIXTURE][f"mixer.experts.{end}_proj"] = Units(f"{place}mixer.experts.{{unit}}.{end}_proj.weight")
    return maps


BETWEEN = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "final_layernorm.weight")
FAMILY = Family(
    read_nemotron_h,
    write_nemotron_h,
    "NemotronHForCausalLM",
    fixed={
        "activation": "relu2",
        "gated_mlp": False,
        "qk_norm": False,
        "rope_theta": None,
        "attention_bias": False,
        "mlp_bias": False,
        "router": "sigmoid",
        **PLAIN,
    },
    prefixes=("backbone.", "model."),
    ties=False,
    spellings=SPELLINGS | EXPERT_SPELLINGS,
    outer={
        "embeddings.weight": "backbone.embeddings.weight",
        "norm_f.weight": "backbone.norm_f.weight",
        "lm_head.weight": "lm_head.weight",
    },
    layers=layers_at(LAYER),
    ahead={letter: own | {part: AHEAD + part for part in BETWEEN} for letter, own in layers_at(AHEAD).items()},
)
