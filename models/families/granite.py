"""Granite 4 hybrids (`granitemoehybrid`): a block is a Mamba-2 mixer or attention, then a gated MLP, or in all blocks
experts beside a shared one; multipliers of the embedding, of what layers add, of attention's scores and of the logits.
Spelling and defaults: transformers'.

Its readers derive two sizes from others: attention's head_dim is hidden_size / num_attention_heads, and the Mamba mixer
has mamba_expand (a whole number) x hidden_size channels. So a width goes with others, which `tied` names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import attention, mamba2, mlp, moe
from ..errors import InputError
from ..multipliers import Multipliers
from .family import Family, Fused, FusedUnits
from .positions import KEYS, read_rope, write_rope
from .spelling import (
    check_router,
    read_fields,
    read_float,
    read_layers,
    read_limit,
    read_switch,
    refuse_biases,
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
    "intermediate_size": ("shared_intermediate_size",),
    "num_attention_heads": ("num_attention_heads",),
    "num_key_value_heads": ("num_key_value_heads",),
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
# What takes the place of intermediate_size where there are experts.
EXPERT_SPELLINGS: dict[str, tuple[str, ...]] = {
    "n_routed_experts": ("num_local_experts",),
    "num_experts_per_tok": ("num_experts_per_tok",),
    "moe_intermediate_size": ("intermediate_size",),
    "moe_shared_expert_intermediate_size": ("shared_intermediate_size",),
}
EXPERTS = 8  # where a file is silent
DEFAULTS: dict[str, Any] = {
    "n_groups": 1, "conv_kernel": 4, "chunk_size": 256, "norm_eps": 1e-6, "max_position_embeddings": 2048,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
EXPAND = 2  # where a file is silent
SWITCHES = {"conv_bias": ("mamba_conv_bias", True), "attention_bias": ("attention_bias", False)}
MULTIPLIERS = {
    "embedding": "embedding_multiplier",
    "residual": "residual_multiplier",
    "attention": "attention_multiplier",
    "logits_scaling": "logits_scaling",
}
MAMBA, ATTENTION, MLP, MIXTURE = (kind.KIND.letter for kind in (mamba2, attention, mlp, moe))
LAYER_TYPES = {
    "mamba": MAMBA, "attention": ATTENTION, "linear_attention": MAMBA, "full_attention": ATTENTION,
}  # fmt: skip
WRITTEN_TYPES = {letter: name for name, letter in reversed(LAYER_TYPES.items())}  # the published spelling
TYPES = ("layer_types", "layers_block_type")
LAYER = "model.layers.{block}."
SHARED = LAYER + "shared_mlp.input_linear.weight"
FIXED = {
    "activation": "silu", "gated_mlp": True, "qk_norm": False, "mamba_rms_norm": True, "norm_before_gate": False,
    "mlp_bias": False, "n_group": 1, "topk_group": 1, "moe_latent_size": 0, "routed_scaling_factor": 1.0,
}  # fmt: skip


def read_granite(hf: Mapping[str, Any]) -> dict[str, Any]:
    refuse_biases(hf, ("mamba_proj_bias",))
    if hf.get("hidden_act", "silu") != "silu":
        raise InputError(f"config: hidden_act={hf['hidden_act']!r}; granitemoehybrid has 'silu'")
    experts = hf.get("num_local_experts", EXPERTS)
    pattern = "".join(letter + (MIXTURE if experts else MLP) for letter in read_types(hf))
    spellings = spellings_of(pattern)
    known = dict(hf)
    expand, hidden, heads = hf.get("mamba_expand", EXPAND), hf.get("hidden_size"), hf.get("mamba_n_heads")
    whole = isinstance(expand, int) and isinstance(hidden, int)
    if hf.get("mamba_d_head", "auto") == "auto" and whole and isinstance(heads, int) and heads:
        known["mamba_d_head"] = expand * hidden // heads
    fields: dict[str, Any] = {"family": "granitemoehybrid", "pattern": pattern, **FIXED}
    if experts:
        known["num_local_experts"], fields["router"] = experts, "softmax"
        check_router(hf, "softmax")
    fields |= read_fields(known, spellings, pattern, fields | stated(hf, DEFAULTS)) | read_limit(hf)
    fields |= {field: read_switch(hf, *how) for field, how in SWITCHES.items()}
    for kind in (mamba2.KIND, attention.KIND):
        if kind.letter not in pattern:  # what is said of a mixer that is not there
            fields = {name: value for name, value in fields.items() if name not in kind.fields}
    if MAMBA in pattern and whole and fields["mamba_num_heads"] * fields["mamba_head_dim"] != expand * hidden:
        raise InputError(
            f"config: mamba_n_heads ({fields['mamba_num_heads']}) x mamba_d_head ({fields['mamba_head_dim']}) is not"
            f" mamba_expand ({expand}) x hidden_size ({hidden})"
        )
    turns = hf.get("position_embedding_type") == "rope"
    fields |= read_rope(hf) if turns else {"rope_theta": None}
    numbers = {field: hf.get(name) for field, name in MULTIPLIERS.items()}
    own = {field: read_float(value, MULTIPLIERS[field]) for field, value in numbers.items() if value is not None}
    # Of null transformers' attention makes its own scale, 1 / sqrt(head_dim).
    null = ATTENTION in pattern and hf.get("attention_multiplier", 1.0) is None
    fields["multipliers"] = dataclasses.replace(Multipliers(attention=None if null else 1.0), **dict[str, Any](own))
    read = [*(name for name, _ in SWITCHES.values()), *MULTIPLIERS.values(), *(KEYS if turns else ())]
    fields["extra"] = unread(
        hf, spellings, "num_hidden_layers", "hidden_act", "mamba_expand", "time_step_limit", "mamba_proj_bias",
        "position_embedding_type", "num_local_experts", *read,
    )  # fmt: skip
    return fields


def spellings_of(pattern: str) -> dict[str, tuple[str, ...]]:
    """How a config.json with experts, or without any, spells the widths."""
    if MIXTURE not in pattern:
        return SPELLINGS
    return {field: names for field, names in SPELLINGS.items() if field != "intermediate_size"} | EXPERT_SPELLINGS


def read_types(hf: Mapping[str, Any]) -> str:
    """The letter of each block's first layer. Raises InputError."""
    layers, spelled = read_layers(hf), dict[str, str]()
    for name in TYPES:
        types = hf.get(name)
        if types is None:
            continue
        for position, kind in enumerate(types):
            if kind not in LAYER_TYPES:
                known = ", ".join(LAYER_TYPES)
                raise InputError(f"config: {name}[{position}] is {kind!r}, which is not supported; known: {known}")
        spelled[name] = "".join(LAYER_TYPES[kind] for kind in types)
        if len(types) != layers:
            raise InputError(f"config: num_hidden_layers is {layers}, but {name} has {len(types)} layers")
    if len(set(spelled.values())) > 1:
        raise InputError(f"config: {' and '.join(spelled)} disagree on the layers")
    return next(iter(spelled.values()), MAMBA * layers)


def write_granite(config: HybridConfig) -> dict[str, Any]:
    own = config.multipliers
    own.refuse_others({*MULTIPLIERS}, "granitemoehybrid")
    if ATTENTION in config.pattern:
        check_attention(config)
    if MIXTURE in config.pattern:
        check_experts(config)
    kinds = config.pattern[:: config.block_size]
    hf: dict[str, Any] = {
        "num_hidden_layers": len(kinds),
        "layer_types": [WRITTEN_TYPES[letter] for letter in kinds],
        "hidden_act": "silu",
        "num_local_experts": 0,
        "position_embedding_type": "nope" if config.rope_theta is None else "rope",
        "mamba_proj_bias": False,
    }
    hf |= write_fields(config, spellings_of(config.pattern))
    if MAMBA in config.pattern:
        check_expansion(config)
        hf["mamba_expand"] = config.d_inner // config.hidden_size
    else:  # readers check the widths of a mixer that is not there
        hf |= {"mamba_n_heads": 1, "mamba_d_head": config.hidden_size, "mamba_expand": 1}
    hf |= ({} if config.rope_theta is None else write_rope(config)) | write_limit(config)
    hf |= {name: getattr(config, field) for field, (name, _) in SWITCHES.items()}
    hf |= {name: getattr(own, field) for field, name in MULTIPLIERS.items()}
    if own.attention is None:
        hf["attention_multiplier"] = config.head_dim**-0.5 if config.head_dim else 1.0
    return hf | {name: value for name, value in config.extra.items() if name not in hf}


def check_experts(config: HybridConfig) -> None:
    """Raises InputError for what the family has not: blocks that differ in it, another router, no shared expert."""
    if MLP in config.pattern:
        raise InputError(
            f"config: the pattern {config.pattern} has experts in some blocks alone, which granitemoehybrid cannot say;"
            f" expected {MIXTURE!r} in all blocks or in none"
        )
    if config.router != "softmax" or not config.moe_shared_expert_intermediate_size:
        raise InputError(
            f"config: experts with the router {config.router!r} and a shared expert"
            f" {config.moe_shared_expert_intermediate_size} wide; granitemoehybrid has 'softmax' and at least 1"
        )


def check_cut(source: HybridConfig, smaller: HybridConfig) -> None:
    """Raises InputError, with sizes that the source can be cut to, for heads that do not fit hidden_size."""
    if ATTENTION in smaller.pattern:
        check_attention(smaller, source)
    if MAMBA in smaller.pattern:
        check_expansion(smaller, source)


def check_attention(config: HybridConfig, source: HybridConfig | None = None) -> None:
    """Raises InputError, with sizes that work (of a cut: for its source), unless head_dim is what readers derive."""
    hidden, heads, size = config.hidden_size, config.num_attention_heads, config.head_dim
    if heads * size == hidden:
        return
    groups, most = config.num_key_value_heads, max(heads, hidden // size)
    if source is not None:
        per_group = source.num_attention_heads // source.num_key_value_heads
        most = min(per_group * groups, source.hidden_size // size)
    near = sorted(range(groups, most + 1, groups), key=lambda number: abs(number * size - hidden))
    ways = [(number, way) for number in near if (way := sizes_with(config, number, source))][:3]
    listed = " or ".join(way for _, way in sorted(ways)) or "another num_key_value_heads"
    raise InputError(
        f"config: hidden_size {hidden} with num_attention_heads {heads} of head_dim {size}: readers of"
        f" granitemoehybrid take hidden_size / num_attention_heads for head_dim; give {listed}"
    )


def sizes_with(config: HybridConfig, heads: int, source: HybridConfig | None) -> str | None:
    """The sizes to give for so many query heads, with Mamba heads where a cut's own do not fit the hidden_size that
    goes with them; None where none do."""
    hidden = heads * config.head_dim
    said = f"hidden_size={hidden} num_attention_heads={heads}"
    if source is None or MAMBA not in config.pattern:
        return said
    working = expanding(config, hidden, source.mamba_num_heads)
    # Who gives no Mamba heads has those that go with hidden_size, whichever they are here.
    if {config.mamba_num_heads, tied(source, hidden).get("mamba_num_heads", source.mamba_num_heads)} <= {*working}:
        return said
    near = min(working, key=lambda number: abs(number - config.mamba_num_heads), default=None)
    return None if near is None else f"{said} mamba_num_heads={near}"


def expanding(config: HybridConfig, hidden: int, most: int) -> list[int]:
    """The numbers of Mamba heads, up to `most`, whose channels are a whole number of times a hidden_size."""
    return [n for n in range(config.n_groups, most + 1, config.n_groups) if n * config.mamba_head_dim % hidden == 0]


def check_expansion(config: HybridConfig, source: HybridConfig | None = None) -> None:
    """Raises InputError, with sizes that work (of a cut: for its source), unless the mixer's channels are a whole
    number of times hidden_size."""
    hidden, heads, size = config.hidden_size, config.mamba_num_heads, config.mamba_head_dim
    if config.d_inner % hidden == 0:
        return
    most = (4 * hidden // size, 4 * hidden // heads)
    if source is not None:
        most = source.mamba_num_heads, source.mamba_head_dim
    ways = {"mamba_num_heads": (heads, expanding(config, hidden, most[0]))}
    ways["mamba_head_dim"] = size, [n for n in range(1, most[1] + 1) if heads * n % hidden == 0]
    listed = "another hidden_size"
    for name, (own, working) in ways.items():
        if working:
            near = sorted(sorted(working, key=lambda number: abs(number - own))[:3])
            listed = f"{name}={' or '.join(map(str, near))}"
            break
    raise InputError(
        f"config: mamba_num_heads {heads} x mamba_head_dim {size} is no multiple of hidden_size {hidden}, which"
        f" readers of granitemoehybrid ask for (mamba_expand); give {listed}"
    )


def tied(config: HybridConfig, hidden: int) -> dict[str, int]:
    """The heads that go with another hidden_size: as many of each kind as keep head sizes and expansion. Not whole ones
    are left as they are, so that the config of the result says what would work."""
    sizes: dict[str, int] = {}
    if ATTENTION in config.pattern and hidden % (config.head_dim * config.num_key_value_heads) == 0:
        sizes["num_attention_heads"] = hidden // config.head_dim
    if MAMBA in config.pattern:
        heads, left = divmod(config.mamba_num_heads * hidden, config.hidden_size)
        if not left and heads and heads % config.n_groups == 0:
            sizes["mamba_num_heads"] = heads
    return sizes


def tensors(stored: str, *names: str) -> dict[str, str]:
    """A mixer's tensors, which are called as ours are, and the norm before it."""
    own = {f"mixer.{name}": f"{LAYER}{stored}.{name}" for name in names}
    return {"norm.weight": LAYER + "input_layernorm.weight"} | own


FAMILY = Family(
    read_granite,
    write_granite,
    "GraniteMoeHybridForCausalLM",
    fixed=FIXED,
    outer={
        "embeddings.weight": "model.embed_tokens.weight",
        "norm_f.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    },
    layers={
        MAMBA: tensors("mamba", "in_proj.weight", "conv1d.weight", "conv1d.bias", "A_log", "D", "dt_bias",
                       "norm.weight", "out_proj.weight"),
        ATTENTION: tensors("self_attn", *(f"{x}_proj.{kind}" for x in "qkvo" for kind in ("weight", "bias"))),
        MLP: {
            "norm.weight": LAYER + "post_attention_layernorm.weight",
            "mixer.gate_proj.weight": Fused(SHARED),
            "mixer.up_proj.weight": Fused(SHARED, after=("mixer.gate_proj.weight",)),
            "mixer.down_proj.weight": LAYER + "shared_mlp.output_linear.weight",
        },
        MIXTURE: {
            "norm.weight": LAYER + "post_attention_layernorm.weight",
            "mixer.gate.weight": LAYER + "block_sparse_moe.router.layer.weight",
            "mixer.experts.gate_proj": FusedUnits(LAYER + "block_sparse_moe.input_linear.weight", 0, 2),
            "mixer.experts.up_proj": FusedUnits(LAYER + "block_sparse_moe.input_linear.weight", 1, 2),
            "mixer.experts.down_proj": LAYER + "block_sparse_moe.output_linear.weight",
            "mixer.shared_experts.gate_proj.weight": Fused(SHARED),
            "mixer.shared_experts.up_proj.weight": Fused(SHARED, after=("mixer.shared_experts.gate_proj.weight",)),
            "mixer.shared_experts.down_proj.weight": LAYER + "shared_mlp.output_linear.weight",
        },
    },
    blocks=tuple(first + second for second in (MLP, MIXTURE) for first in (MAMBA, ATTENTION)),
    ignored=(".rotary_emb.inv_freq",),
    # mamba_d_head may be "auto".
    spellings={field: names for field, names in SPELLINGS.items() if field != "mamba_head_dim"} | EXPERT_SPELLINGS
    | {field: (name,) for field, (name, _) in SWITCHES.items()},
    tied=tied,
    check_cut=check_cut,
)  # fmt: skip
