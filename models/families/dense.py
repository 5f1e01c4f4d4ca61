"""Dense Transformers, llama (SmolLM2 among them) and qwen3: a block of attention and MLP is two of our layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import attention, mlp
from ..errors import InputError
from .family import PLAIN, Family
from .nemotron_h import SPELLINGS
from .positions import KEYS, read_rope, write_rope
from .spelling import read_fields, read_layers, read_switch, refuse_biases, stated, unread, write_fields

if TYPE_CHECKING:
    from ..config import HybridConfig

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
# Which projections may have biases; Qwen3's MLP has none.
BIASES = {"llama": ("attention_bias", "mlp_bias"), "qwen3": ("attention_bias",)}
ATTENTION, MLP = (kind.KIND.letter for kind in (attention, mlp))
BLOCK = ATTENTION + MLP
LAYER = "model.layers.{block}."


def read_dense(hf: Mapping[str, Any]) -> dict[str, Any]:
    name = hf["model_type"]
    refuse_biases(hf, tuple({"attention_bias", "mlp_bias"} - {*BIASES[name]}))
    if hf.get("use_sliding_window") or set(hf.get("layer_types") or ()) - {"full_attention"}:
        raise InputError(f"config: {name} with sliding windows (use_sliding_window, layer_types) is not supported")
    if hf.get("hidden_act", "silu") != "silu":
        raise InputError(f"config: hidden_act={hf['hidden_act']!r}; {name} has 'silu'")
    pattern = BLOCK * read_layers(hf)
    fields = {"family": name, "pattern": pattern, **read_rope(hf), **fixed(name)}
    fields |= read_fields(hf, DENSE, pattern, stated(hf, DENSE_DEFAULTS[name]))
    fields |= {bias: read_switch(hf, bias) for bias in BIASES[name]}
    biases = [bias for bias in BIASES[name] if fields[bias]]  # that there is none goes along, where it is said
    fields["extra"] = unread(hf, DENSE, "num_hidden_layers", "hidden_act", *biases, *KEYS)
    return fields


def fixed(name: str) -> dict[str, Any]:
    """The fields that are the same in every model of the family."""
    own = {"activation": "silu", "gated_mlp": True, "qk_norm": name == "qwen3", **PLAIN}
    return own if "mlp_bias" in BIASES[name] else own | {"mlp_bias": False}


def write_dense(config: HybridConfig) -> dict[str, Any]:
    if config.rope_theta is None:
        raise InputError(f"config: {config.family} has rotary positions; expected a rope_theta")
    hf: dict[str, Any] = {"num_hidden_layers": config.num_layers // len(BLOCK), "hidden_act": "silu"}
    hf |= write_fields(config, DENSE)
    hf |= {bias: True for bias in BIASES[config.family] if getattr(config, bias)} | write_rope(config)
    return hf | {name: value for name, value in config.extra.items() if name not in hf}


def write_llama(config: HybridConfig) -> dict[str, Any]:
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"config: hidden_size {config.hidden_size} is no multiple of num_attention_heads"
            f" {config.num_attention_heads}, which transformers refuses for llama; take a multiple"
        )
    return write_dense(config)


LLAMA = Family(
    read_dense,
    write_llama,
    "LlamaForCausalLM",
    fixed=fixed("llama"),
    outer={
        "embeddings.weight": "model.embed_tokens.weight",
        "norm_f.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    },
    layers={
        ATTENTION: {
            "norm.weight": LAYER + "input_layernorm.weight",
            "mixer.q_proj.weight": LAYER + "self_attn.q_proj.weight",
            "mixer.k_proj.weight": LAYER + "self_attn.k_proj.weight",
            "mixer.v_proj.weight": LAYER + "self_attn.v_proj.weight",
            "mixer.o_proj.weight": LAYER + "self_attn.o_proj.weight",
            "mixer.q_proj.bias": LAYER + "self_attn.q_proj.bias",
            "mixer.k_proj.bias": LAYER + "self_attn.k_proj.bias",
            "mixer.v_proj.bias": LAYER + "self_attn.v_proj.bias",
            "mixer.o_proj.bias": LAYER + "self_attn.o_proj.bias",
            "mixer.q_norm.weight": LAYER + "self_attn.q_norm.weight",
            "mixer.k_norm.weight": LAYER + "self_attn.k_norm.weight",
        },
        MLP: {
            "norm.weight": LAYER + "post_attention_layernorm.weight",
            "mixer.gate_proj.weight": LAYER + "mlp.gate_proj.weight",
            "mixer.up_proj.weight": LAYER + "mlp.up_proj.weight",
            "mixer.down_proj.weight": LAYER + "mlp.down_proj.weight",
            "mixer.gate_proj.bias": LAYER + "mlp.gate_proj.bias",
            "mixer.up_proj.bias": LAYER + "mlp.up_proj.bias",
            "mixer.down_proj.bias": LAYER + "mlp.down_proj.bias",
        },
    },
    blocks=(BLOCK,),
    ignored=(".rotary_emb.inv_freq",),
    spellings=DENSE,
)
QWEN3 = dataclasses.replace(LLAMA, write=write_dense, architecture="Qwen3ForCausalLM", fixed=fixed("qwen3"))
