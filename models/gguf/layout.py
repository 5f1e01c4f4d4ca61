"""Which tensor of a GGUF file is which of ours, and in which form llama.cpp reads it; which numbers it needs beside.

Names are those of the `gguf` package's MODEL_TENSORS, forms and numbers what llama.cpp's loaders of the architectures
take (its src/models/). Shapes are those of PyTorch, which a GGUF file says in the opposite order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import attention, mamba2, mlp, moe
from ..axes import Role, TensorSpec, tensor_table
from ..errors import InputError
from ..rope import Llama3Rope, YarnRope

if TYPE_CHECKING:
    from ..config import HybridConfig

MAMBA, ATTENTION, DENSE, EXPERTS = (kind.KIND.letter for kind in (mamba2, attention, mlp, moe))
SIGNED, UNSIGNED, FLOAT32 = 2**31 - 1, 2**32 - 1, torch.finfo(torch.float32).max  # the largest numbers of a file
LEAST = 2**-150  # up to it float32 has 0
Reform = Callable[["HybridConfig", Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Form:
    """How a tensor of ours becomes one of the file, and back; both are of a whole tensor."""

    written: Reform
    read: Reform


def halves_interleaved(heads: str) -> Form:
    """Rows of queries and keys: llama's rotary positions turn channels 2i and 2i + 1 there, i and i + D/2 here."""

    def written(config: HybridConfig, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (getattr(config, heads), 2, -1)).transpose(1, 2).reshape(rows.shape)

    def read(config: HybridConfig, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (getattr(config, heads), -1, 2)).transpose(1, 2).reshape(rows.shape)

    return Form(written, read)


QUERIES, KEYS = halves_interleaved("num_attention_heads"), halves_interleaved("num_key_value_heads")
CONVOLUTION = Form(lambda config, weight: weight.squeeze(1), lambda config, weight: weight.unsqueeze(1))
# A itself, and not its logarithm; a column, as D is.
DECAY = Form(lambda config, a_log: -a_log.float().exp().unsqueeze(1), lambda config, a: (-a.squeeze(1)).log())
COLUMN = Form(lambda config, vector: vector.unsqueeze(1), lambda config, column: column.squeeze(1))
GROUPS = Form(
    lambda config, weight: weight.unflatten(0, (config.n_groups, -1)), lambda config, weight: weight.flatten()
)

Place = str | tuple[str, Form]
OUTER: dict[str, Place] = {
    "embeddings.weight": "token_embd.weight",
    "norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
MAMBA_LAYER: dict[str, Place] = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": ("ssm_conv1d.weight", CONVOLUTION),
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.A_log": ("ssm_a", DECAY),
    "mixer.D": ("ssm_d", COLUMN),
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.norm.weight": ("ssm_norm.weight", GROUPS),
    "mixer.out_proj.weight": "ssm_out.weight",
}
ATTENTION_LAYER: dict[str, Place] = {
    "norm.weight": "attn_norm.weight",
    "mixer.q_proj.weight": "attn_q.weight",
    "mixer.k_proj.weight": "attn_k.weight",
    "mixer.v_proj.weight": "attn_v.weight",
    "mixer.o_proj.weight": "attn_output.weight",
    "mixer.q_proj.bias": "attn_q.bias",
    "mixer.k_proj.bias": "attn_k.bias",
    "mixer.v_proj.bias": "attn_v.bias",
    "mixer.o_proj.bias": "attn_output.bias",
    "mixer.q_norm.weight": "attn_q_norm.weight",
    "mixer.k_norm.weight": "attn_k_norm.weight",
}
INTERLEAVED: dict[str, Place] = ATTENTION_LAYER | {
    "mixer.q_proj.weight": ("attn_q.weight", QUERIES),
    "mixer.k_proj.weight": ("attn_k.weight", KEYS),
    "mixer.q_proj.bias": ("attn_q.bias", QUERIES),
    "mixer.k_proj.bias": ("attn_k.bias", KEYS),
}
MLP_LAYER: dict[str, Place] = {
    "norm.weight": "ffn_norm.weight",
    "mixer.gate_proj.weight": "ffn_gate.weight",
    "mixer.up_proj.weight": "ffn_up.weight",
    "mixer.down_proj.weight": "ffn_down.weight",
    "mixer.gate_proj.bias": "ffn_gate.bias",
    "mixer.up_proj.bias": "ffn_up.bias",
    "mixer.down_proj.bias": "ffn_down.bias",
}

EXPERT_LAYER: dict[str, Place] = {
    "norm.weight": "attn_norm.weight",
    "mixer.gate.weight": "ffn_gate_inp.weight",
    "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mixer.experts.up_proj": "ffn_up_exps.weight",
    "mixer.experts.down_proj": "ffn_down_exps.weight",
    "mixer.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mixer.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "mixer.fc1_latent_proj.weight": "ffn_latent_down.weight",
    "mixer.fc2_latent_proj.weight": "ffn_latent_up.weight",
}

GATED_EXPERT_LAYER: dict[str, Place] = EXPERT_LAYER | {
    "norm.weight": "ffn_norm.weight",
    "mixer.experts.gate_proj": "ffn_gate_exps.weight",
    "mixer.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
}


def common_numbers(config: HybridConfig) -> dict[str, Any]:
    """What every architecture needs; keys without the architecture's name."""
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers // config.block_size,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
    }


def attention_numbers(config: HybridConfig) -> dict[str, Any]:
    return {
        "attention.head_count": config.num_attention_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }


def hybrid_numbers(config: HybridConfig) -> dict[str, Any]:
    """Layer by layer: without key-value heads and MLP it is a Mamba layer, without an MLP attention. Raises InputError
    for what llama.cpp has no word for."""
    if not config.layers_of(mamba2.KIND):
        raise InputError(
            "config: no layer is Mamba-2, and llama.cpp aborts on a nemotron_h without their states; keep one Mamba-2"
            " layer, or take format=hf"
        )
    widths = [0] * config.num_layers
    for layer in config.layers_of(mlp.KIND):
        widths[layer] = config.intermediate_size
    return common_numbers(config) | attention_numbers(config) | mamba_numbers(config) | {"feed_forward_length": widths}


def mamba_numbers(config: HybridConfig) -> dict[str, Any]:
    """Of the Mamba layers, and the key-value heads of each block, which say where they are. Raises InputError."""
    if config.dt_limit[0] > 0 or config.dt_limit[1] < float("inf"):
        raise InputError(
            f"config: time_step_limit is {list(config.dt_limit)}, and llama.cpp clamps no step; expected [0, infinity]"
        )
    if not config.layers_of(attention.KIND):
        raise InputError(
            "config: no layer is attention, and llama.cpp aborts on a cache without keys and values; keep one attention"
            " layer, or take format=hf"
        )
    heads = [0] * (config.num_layers // config.block_size)
    for layer in config.layers_of(attention.KIND):
        heads[layer // config.block_size] = config.num_key_value_heads
    return {
        "attention.head_count_kv": heads,
        "attention.layer_norm_epsilon": config.norm_eps,  # some versions read this one, too
        "ssm.conv_kernel": config.conv_kernel,
        "ssm.inner_size": config.d_inner,
        "ssm.state_size": config.ssm_state_size,
        "ssm.time_step_rank": config.mamba_num_heads,
        "ssm.group_count": config.n_groups,
    }


def expert_numbers(config: HybridConfig) -> dict[str, Any]:
    """Raises InputError for MLP layers beside those with experts, where llama.cpp would look for experts, too."""
    if config.layers_of(mlp.KIND):
        raise InputError(
            "config: the pattern has MLP layers beside layers of experts, which llama.cpp's nemotron_h_moe has not;"
            " take format=hf"
        )
    numbers = hybrid_numbers(config)
    for layer in config.layers_of(moe.KIND):
        numbers["feed_forward_length"][layer] = config.moe_intermediate_size
    own = {
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.moe_shared_expert_intermediate_size,
        "expert_shared_count": 1,
        "expert_weights_norm": config.norm_topk_prob,
        "expert_weights_scale": float(config.routed_scaling_factor),
    }
    if config.topk_group < config.n_group:  # where it has to choose among groups, which llama.cpp does of several alone
        own |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    return numbers | own | ({"moe_latent_size": config.moe_latent_size} if config.moe_latent_size else {})


def granite_numbers(config: HybridConfig) -> dict[str, Any]:
    """With Mamba layers, with experts, or with neither; `rope.scaling.finetuned` says whether there are positions.
    Raises InputError for a multiplier of 0, which llama.cpp takes for one that was not said."""
    own, experts = config.multipliers, config.layers_of(moe.KIND)
    scales = {"embedding_scale": own.embedding, "residual_scale": own.residual, "logit_scale": own.logits_scaling}
    if own.attention is not None:
        scales["attention.scale"] = own.attention
    for name, value in scales.items():
        if abs(value) <= LEAST:
            raise InputError(
                f"config: {name} is {value:g}, 0 in float32, which llama.cpp takes for none; take format=hf"
            )
    numbers = common_numbers(config) | attention_numbers(config)
    if config.layers_of(mamba2.KIND):
        numbers |= mamba_numbers(config)
    else:
        numbers["attention.head_count_kv"] = config.num_key_value_heads
    if experts:
        numbers |= {
            "expert_count": config.n_routed_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_shared_feed_forward_length": config.moe_shared_expert_intermediate_size,
        }
    return (
        numbers
        | scales
        | {
            "feed_forward_length": config.moe_intermediate_size if experts else config.intermediate_size,
            "rope.dimension_count": config.head_dim,
            "rope.freq_base": float(config.rope_theta or 10000),
            "rope.scaling.finetuned": config.rope_theta is not None,
        }
    )


def dense_numbers(config: HybridConfig) -> dict[str, Any]:
    """Raises InputError for positions that llama.cpp stretches in another way."""
    numbers = (
        common_numbers(config)
        | attention_numbers(config)
        | {
            "attention.head_count_kv": config.num_key_value_heads,
            "feed_forward_length": config.intermediate_size,
            "rope.dimension_count": config.head_dim,
            "rope.freq_base": float(config.rope_theta or 0),
        }
    )
    scaling = config.rope_scaling
    if isinstance(scaling, YarnRope):
        usual = dataclasses.replace(scaling, attention_factor=None, mscale=None, mscale_all_dim=None).sharpness
        if scaling.truncate is False or scaling.sharpness != usual:
            raise InputError(
                "config: rope_scaling of type 'yarn' with truncate or an attention factor of its own is another one in"
                " llama.cpp; leave both out"
            )
        fast, slow = scaling.betas
        numbers |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling.factor),
            "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
            "rope.scaling.yarn_beta_fast": float(fast),
            "rope.scaling.yarn_beta_slow": float(slow),
        }
    return numbers


def missing_biases(config: HybridConfig) -> dict[str, Tensor]:
    """llama.cpp's convolution crashes without a bias: where a model has none, it is zero."""
    layers = () if config.conv_bias else config.layers_of(mamba2.KIND)
    return {f"blk.{layer // config.block_size}.ssm_conv1d.bias": torch.zeros(config.conv_dim) for layer in layers}


def turn_factors(config: HybridConfig) -> dict[str, Tensor]:
    """llama3's stretched positions: what each turn is divided by, a tensor of its own [D / 2]."""
    scaling = config.rope_scaling
    if not isinstance(scaling, Llama3Rope) or config.rope_theta is None:
        return {}
    turns = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    return {"rope_freqs.weight": (turns / scaling.slowed(turns, config.rope_theta)[0]).float()}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A family in GGUF: the architecture's name, our tensors' places by the letter of their layer (below `blk.N.`), the
    numbers, and tensors that no checkpoint has."""

    architecture: str
    layers: Mapping[str, Mapping[str, Place]]
    numbers: Callable[[HybridConfig], dict[str, Any]]
    extra: Callable[[HybridConfig], dict[str, Tensor]] = lambda config: {}


HYBRID_LAYERS: dict[str, dict[str, Place]] = {
    MAMBA: MAMBA_LAYER,
    ATTENTION: ATTENTION_LAYER,
    DENSE: MLP_LAYER | {"norm.weight": "attn_norm.weight"},
    EXPERTS: EXPERT_LAYER,
}
GRANITE_LAYERS: dict[str, dict[str, Place]] = {
    MAMBA: MAMBA_LAYER,
    ATTENTION: INTERLEAVED,
    DENSE: MLP_LAYER,
    EXPERTS: GATED_EXPERT_LAYER,
}
GRANITE = "granitemoehybrid"
LAYOUTS = {  # by family; with experts, and without Mamba layers, there are others
    "nemotron_h": Layout("nemotron_h", HYBRID_LAYERS, hybrid_numbers, missing_biases),
    "nemotron_h, experts": Layout("nemotron_h_moe", HYBRID_LAYERS, expert_numbers, missing_biases),
    "llama": Layout("llama", {ATTENTION: INTERLEAVED, DENSE: MLP_LAYER}, dense_numbers, turn_factors),
    GRANITE: Layout("granitehybrid", GRANITE_LAYERS, granite_numbers, missing_biases),
    f"{GRANITE}, experts": Layout("granitehybrid", GRANITE_LAYERS, granite_numbers, missing_biases),
    f"{GRANITE}, no Mamba": Layout("granite", GRANITE_LAYERS, granite_numbers),
    f"{GRANITE}, experts, no Mamba": Layout("granitemoe", GRANITE_LAYERS, granite_numbers),
    "qwen3": Layout("qwen3", {ATTENTION: ATTENTION_LAYER, DENSE: MLP_LAYER}, dense_numbers),
}


def layout_of(config: HybridConfig) -> Layout:
    """Raises InputError for a family, or a thing of it, that llama.cpp cannot run."""
    experts = any(spec.role is Role.EXPERTS for spec in tensor_table(config).values())
    name = f"{config.family}, experts" if experts else config.family
    name += ", no Mamba" if config.family == GRANITE and not config.layers_of(mamba2.KIND) else ""
    if name not in LAYOUTS:
        raise InputError(f"format=gguf knows no {name}; known: {'; '.join(LAYOUTS)}")
    if config.mtp_steps:
        raise InputError(
            "config: the layers of multi-token prediction have no place in the file that format=gguf writes; leave them"
            " out with limbeck prune target.drop_mtp=true, or take format=hf"
        )
    if config.family == "qwen3" and config.attention_bias:
        raise InputError(
            "config: attention_bias is true, and llama.cpp's qwen3 has no bias after attention; take format=hf"
        )
    stretched = {"llama": (Llama3Rope, YarnRope), "qwen3": (YarnRope,)}.get(config.family, ())
    if config.rope_scaling is not None and not isinstance(config.rope_scaling, stretched):
        how = config.rope_scaling.rope_type
        raise InputError(f"config: llama.cpp has no positions of type {how!r} in {config.family}; take format=hf")
    return LAYOUTS[name]


def numbers_of(config: HybridConfig) -> dict[str, Any]:
    """The numbers of a file. Raises InputError as `layout_of` does, and where one is beyond the type that it has."""
    numbers = layout_of(config).numbers(config)
    for key, value in numbers.items():
        whole = SIGNED if isinstance(value, list) else UNSIGNED
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int) and not 0 <= each <= whole:
                raise InputError(f"config: {key} is {each:,}; a GGUF file holds up to {whole:,}; take format=hf")
            if isinstance(each, float) and abs(each) > FLOAT32:
                raise InputError(f"config: {key} is {each:g}; a GGUF file holds up to {FLOAT32:.3g}; take format=hf")
    return numbers


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of a GGUF file: its name and shape there, what it is of ours, and its form (None: as it is)."""

    name: str
    shape: tuple[int, ...]
    spec: TensorSpec
    form: Form | None


def entries(config: HybridConfig) -> Iterator[Entry]:
    """The tensors of a file, in the order of our table. Raises InputError."""
    layers = layout_of(config).layers
    for spec in tensor_table(config).values():
        if spec.layer is None:
            place, prefix = OUTER[spec.part], ""
        else:
            place = layers[config.pattern[spec.layer]][spec.part]
            prefix = f"blk.{spec.layer // config.block_size}."
        name, form = (place, None) if isinstance(place, str) else place
        shape = spec.shape
        if form is not None:
            shape = tuple(form.written(config, torch.empty(shape, device="meta")).shape)
        yield Entry(prefix + name, shape, spec, form)
