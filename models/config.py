"""What a hybrid model is: the layer pattern and every width. A pruned model is just another config.

The pattern has one letter a layer (kinds.py), `M` a Mamba-2 mixer, `*` attention, `-` an MLP, `E` experts; each is
x + mixer(RMSNorm(x)). A dense Transformer block is the pattern `*-`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from .axes import HIDDEN, Factor, dimension_size
from .errors import InputError
from .families.family import Family, write_config
from .families.known import FAMILIES, read_config
from .kinds import kinds_of
from .layer import LayerKind
from .multipliers import ONES, Multipliers
from .rope import RopeScaling

ACTIVATIONS = ("relu2", "silu")
MOST_EXPERTS = 2**18  # of all layers; the largest public models have 2**15
MOST_NUMBERS = 2**40  # of a tensor: 2 TB in bfloat16


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """Every number that shapes a model; the names are the field's (nemotron_h's where it has one).

    Widths that a pattern does not use stay 0. The biases are those of all projections of attention, and of the MLP.
    Without `mamba_rms_norm` a Mamba mixer has the gate alone; with it the norm stands after the gate, unless told.
    `dt_limit` clamps the step after softplus; `router` is how experts are chosen (moe.ROUTERS); `variants` are
    (letter, width of an expert, experts a token) of layers of experts that differ in these (variants.py);
    `mtp_pattern` has the layers of one of `mtp_steps` steps of multi-token prediction (mtp.py); `extra` carries what
    the source's config.json says beyond the fields here, so that a rewritten folder keeps it.

    Raises InputError from the constructor when the numbers contradict each other.
    """

    pattern: str
    vocab_size: int
    hidden_size: int
    family: str = "nemotron_h"
    intermediate_size: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    n_groups: int = 0
    ssm_state_size: int = 0
    conv_kernel: int = 4
    chunk_size: int = 128
    norm_eps: float = 1e-5
    activation: str = "relu2"
    gated_mlp: bool = False
    conv_bias: bool = True
    qk_norm: bool = False
    mamba_rms_norm: bool = True
    norm_before_gate: bool = False
    multipliers: Multipliers = ONES
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    moe_latent_size: int = 0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    router: str = "sigmoid"
    variants: tuple[tuple[str, int, int], ...] = ()
    mtp_pattern: str = ""
    mtp_steps: int = 0
    tie_word_embeddings: bool = False
    dt_limit: tuple[float, float] = (0.0, math.inf)
    max_position_embeddings: int = 131072
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise InputError(f"config: family {self.family!r} is unknown; known: {', '.join(sorted(FAMILIES))}")
        if not self.pattern:
            raise InputError("config: the layer pattern is empty; expected a letter for each layer, such as 'M-M*-'")
        kinds = dict.fromkeys(self.kinds)
        for name in dict.fromkeys(["vocab_size", "hidden_size", *(name for kind in kinds for name in kind.fields)]):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"config: {name} is {value!r}; the pattern needs a whole number of at least 1")
        for name in (name for kind in kinds for name in kind.optional):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"config: {name} is {value!r}; expected a whole number, 0 for none")
        for kind in kinds:
            kind.check(self)
        if isinstance(self.mtp_steps, bool) or not isinstance(self.mtp_steps, int) or self.mtp_steps < 0:
            raise InputError(f"config: {self.mtp_steps!r} steps of multi-token prediction; expected a whole number")
        if self.mtp_steps and not self.mtp_pattern:
            raise InputError("config: multi-token prediction has no layers; expected a pattern of them, such as '*E'")
        _ = self.mtp_layers  # which is checked like any other
        if self.rope_theta is not None and self.head_dim % 2:
            raise InputError(f"config: rotary positions need an even head_dim, found {self.head_dim}")
        if self.rope_theta is not None and not 0 < self.rope_theta < math.inf:
            raise InputError(f"config: rope_theta is {self.rope_theta}; expected a number above 0")
        if self.rope_scaling is not None and self.rope_theta is None:
            raise InputError("config: rope_scaling stretches rotary positions; expected a rope_theta beside it")
        if not 0 <= self.norm_eps < 1:
            raise InputError(f"config: norm_eps is {self.norm_eps}; expected a number from 0 to 1")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"config: activation {self.activation!r} is unknown; known: {', '.join(ACTIVATIONS)}")
        low, high = self.dt_limit
        if not 0 <= low < high:
            raise InputError(f"config: dt_limit is ({low}, {high}); expected 0 <= low < high")

    @functools.cached_property
    def mtp_layers(self) -> HybridConfig | None:
        """A config whose layers are those of multi-token prediction, all steps one after the other; None without."""
        return self.replace(pattern=self.mtp_pattern * self.mtp_steps, mtp_steps=0) if self.mtp_steps else None

    @property
    def num_layers(self) -> int:
        return len(self.pattern)

    @property
    def d_inner(self) -> int:
        """Channels of a Mamba mixer: heads x head_dim (not expand x hidden)."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels that the short convolution runs over: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.ssm_state_size

    @functools.cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer. Raises InputError for a letter that no kind has."""
        return kinds_of(self.pattern, "".join(letter for letter, *_ in self.variants))

    @property
    def family_record(self) -> Family:
        return FAMILIES[self.family]

    @property
    def block_size(self) -> int:
        """How many layers come and go together only, as one of the family's blocks."""
        return self.family_record.block_size

    @property
    def num_hidden_layers(self) -> int:
        """What a config.json counts by that name, and options and tables with it: blocks, where several of our layers
        make one."""
        return self.num_layers // self.block_size

    def layers_of(self, kind: LayerKind) -> tuple[int, ...]:
        """Indices of the layers of one kind."""
        return tuple(layer for layer, own in enumerate(self.kinds) if own == kind)

    def replace(self, **changes: Any) -> HybridConfig:
        """A copy with some fields changed, checked like any other."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> HybridConfig:
        """Reads the contents of a config.json, in any spelling that `families` knows. Raises InputError."""
        fields = read_config(config, HybridConfig)
        read = (FAMILIES[fields["family"]].config or cls)(**fields)
        check_size(read)
        return read

    def to_hf(self) -> dict[str, Any]:
        """The contents of a config.json in the published spelling of the family."""
        return write_config(self)


def check_size(config: HybridConfig) -> None:
    """Raises InputError where a tensor has more numbers than a disk holds, or a model more tensors than an index names:
    a layer of each kind is counted."""
    hidden = ((Factor(HIDDEN, config.hidden_size),),)
    first = {kind: layer for layer, kind in reversed(tuple(enumerate(config.kinds)))}
    sizes = {"embeddings.weight": config.vocab_size * config.hidden_size}
    for kind, layer in first.items():
        for name, (_, dimensions) in kind.tensors(config, layer, hidden).items():
            sizes[f"layers.{layer}.mixer.{name}"] = math.prod(map(dimension_size, dimensions))
    if config.num_layers * config.n_routed_experts > MOST_EXPERTS:
        raise InputError(
            f"config: {config.num_layers} layers of {config.n_routed_experts:,} experts; expected {MOST_EXPERTS:,}"
            " experts in all at most"
        )
    name, size = max(sizes.items(), key=lambda item: item[1])
    if size > MOST_NUMBERS:
        raise InputError(f"config: {name} has {size:,} numbers; expected {MOST_NUMBERS:,} at most")
