"""Falcon-H1: in every block attention beside a Mamba-2 mixer on one norm, then a gated MLP; multipliers everywhere.
Spelling and defaults: transformers' `falcon_h1`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import mlp, parallel
from ..errors import InputError
from ..multipliers import Multipliers
from .family import Family
from .positions import KEYS, read_rope, write_rope
from .spelling import (
    read_fields,
    read_float,
    read_layers,
    read_limit,
    read_switch,
    refuse_biases,
    same_in_all,
    stated,
    unread,
    write_fields,
    write_limit,
)

if TYPE_CHECKING:
    from ..config import HybridConfig

SPELLINGS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("intermediate_size",),
    "num_attention_heads": ("num_attention_heads",),
    "num_key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "mamba_num_heads": ("mamba_n_heads",),
    "mamba_head_dim": ("mamba_d_head",),
    "n_groups": ("mamba_n_groups",),
    "ssm_state_size": ("mamba_d_state",),
    "conv_kernel": ("mamba_d_conv",),
    "chunk_size": ("mamba_chunk_size",),
    "norm_eps": ("rms_norm_eps",),
    "tie_word_embeddings": ("tie_word_embeddings",),
    "max_position_embeddings": ("max_position_embeddings",),
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id",),
    "pad_token_id": ("pad_token_id",),
}
DEFAULTS: dict[str, Any] = {
    "n_groups": 1, "conv_kernel": 4, "chunk_size": 256, "norm_eps": 1e-5, "max_position_embeddings": 8192,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# Fields that are true or false, with what holds where a file is silent.
SWITCHES = {
    "conv_bias": ("mamba_conv_bias", True),
    "mamba_rms_norm": ("mamba_rms_norm", False),
    "norm_before_gate": ("mamba_norm_before_gate", True),
    "attention_bias": ("attention_bias", False),
    "mlp_bias": ("mlp_bias", False),
}
MULTIPLIERS = {
    "embedding": "embedding_multiplier",
    "head": "lm_head_multiplier",
    "key": "key_multiplier",
    "attention_in": "attention_in_multiplier",
    "attention_out": "attention_out_multiplier",
    "mamba_in": "ssm_in_multiplier",
    "mamba_out": "ssm_out_multiplier",
}
MLP_MULTIPLIERS, SSM_MULTIPLIERS = "mlp_multipliers", "ssm_multipliers"
BIASES = ("mamba_proj_bias", "projectors_bias")
PARALLEL, MLP = (kind.KIND.letter for kind in (parallel, mlp))
BLOCK = PARALLEL + MLP
LAYER = "model.layers.{block}."
FIXED = {"activation": "silu", "gated_mlp": True, "qk_norm": False}


def read_falcon_h1(hf: Mapping[str, Any]) -> dict[str, Any]:
    pattern = BLOCK * read_layers(hf)
    refuse_biases(hf, BIASES)
    same_in_all(hf, {"hybrid"})
    if hf.get("hidden_act", "silu") != "silu":
        raise InputError(f"config: hidden_act={hf['hidden_act']!r}; falcon_h1 has 'silu'")
    known = dict(hf)
    inner = inner_width(hf)
    heads = hf.get("mamba_n_heads")
    if hf.get("mamba_d_head") in (None, "auto") and isinstance(inner, int) and isinstance(heads, int) and heads:
        known["mamba_d_head"] = inner // heads
    fields: dict[str, Any] = {"family": "falcon_h1", "pattern": pattern, **FIXED}
    fields |= read_fields(known, SPELLINGS, pattern, stated(hf, DEFAULTS)) | read_rope(hf) | read_limit(hf)
    fields |= {field: read_switch(hf, *how) for field, how in SWITCHES.items()}
    if inner is not None and inner != fields["mamba_num_heads"] * fields["mamba_head_dim"]:
        raise InputError(
            f"config: mamba_d_ssm is {inner}, but mamba_n_heads ({fields['mamba_num_heads']}) x mamba_d_head"
            f" ({fields['mamba_head_dim']}) is {fields['mamba_num_heads'] * fields['mamba_head_dim']}"
        )
    fields["multipliers"] = read_multipliers(hf)
    read = (*(name for name, _ in SWITCHES.values()), *MULTIPLIERS.values(), MLP_MULTIPLIERS, SSM_MULTIPLIERS)
    fields["extra"] = unread(
        hf, SPELLINGS, "num_hidden_layers", "hidden_act", "mamba_d_ssm", "time_step_limit", *KEYS, *read, *BIASES
    )
    return fields


def inner_width(hf: Mapping[str, Any]) -> Any:
    """Channels of the Mamba mixer that the file states, or that follow from its `mamba_expand`; None: neither."""
    if hf.get("mamba_d_ssm") is not None:
        return hf["mamba_d_ssm"]
    expand, hidden = hf.get("mamba_expand"), hf.get("hidden_size")
    return int(expand * hidden) if isinstance(expand, (int, float)) and isinstance(hidden, int) else None


def read_multipliers(hf: Mapping[str, Any]) -> Multipliers:
    one = {field: read_float(hf[name], name) for field, name in MULTIPLIERS.items() if hf.get(name) is not None}
    several: dict[str, tuple[float, ...]] = {}
    for name, count in ((MLP_MULTIPLIERS, 2), (SSM_MULTIPLIERS, 5)):
        values = [1.0] * count if hf.get(name) is None else hf[name]
        if not isinstance(values, list) or len(values) != count:
            raise InputError(f"config: {name} is {values!r}; expected {count} numbers")
        several[name] = tuple(read_float(value, name) for value in values)
    gate, out = several[MLP_MULTIPLIERS]
    return Multipliers(**one, mlp_gate=gate, mlp_out=out, mamba_parts=several[SSM_MULTIPLIERS])


def write_falcon_h1(config: HybridConfig) -> dict[str, Any]:
    if config.rope_theta is None:
        raise InputError("config: falcon_h1 has rotary positions; expected a rope_theta")
    own = config.multipliers
    sayable = {*MULTIPLIERS, "mlp_gate", "mlp_out", "mamba_parts"}
    own.refuse_others(sayable, "falcon_h1")
    hf: dict[str, Any] = {"num_hidden_layers": config.num_layers // len(BLOCK), "hidden_act": "silu"}
    hf |= write_fields(config, SPELLINGS)
    hf |= {"mamba_d_ssm": config.d_inner} | write_rope(config) | write_limit(config) | dict.fromkeys(BIASES, False)
    hf |= {name: getattr(config, field) for field, (name, _) in SWITCHES.items()}
    hf |= {name: getattr(own, field) for field, name in MULTIPLIERS.items()}
    hf |= {MLP_MULTIPLIERS: [own.mlp_gate, own.mlp_out], SSM_MULTIPLIERS: list(own.mamba_parts)}
    return hf | {name: value for name, value in config.extra.items() if name not in hf}


def tensors(stored: str, ours: str, *names: str) -> dict[str, str]:
    """A part's tensors, which are called as ours are."""
    return {f"mixer.{ours}{name}": f"{LAYER}{stored}.{name}" for name in names}


PROJECTIONS = tuple(f"{x}_proj.{kind}" for x in "qkvo" for kind in ("weight", "bias"))
FAMILY = Family(
    read_falcon_h1,
    write_falcon_h1,
    "FalconH1ForCausalLM",
    fixed=FIXED,
    outer={
        "embeddings.weight": "model.embed_tokens.weight",
        "norm_f.weight": "model.final_layernorm.weight",
        "lm_head.weight": "lm_head.weight",
    },
    layers={
        PARALLEL: {
            "norm.weight": LAYER + "input_layernorm.weight",
            **tensors("mamba", "mamba.", "in_proj.weight", "conv1d.weight", "conv1d.bias", "A_log", "D", "dt_bias",
                      "norm.weight", "out_proj.weight"),
            **tensors("self_attn", "attention.", *PROJECTIONS),
        },
        MLP: {
            "norm.weight": LAYER + "pre_ff_layernorm.weight",
            **tensors("feed_forward", "", *(f"{x}_proj.{kind}" for x in ("gate", "up", "down")
                                            for kind in ("weight", "bias"))),
        },
    },
    blocks=(BLOCK,),
    ignored=(".rotary_emb.inv_freq", ".mamba.mup_vector"),
    # mamba_d_head may be "auto".
    spellings={field: names for field, names in SPELLINGS.items() if field != "mamba_head_dim"}
    | {field: (name,) for field, (name, _) in SWITCHES.items()},
)  # fmt: skip
