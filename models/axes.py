"""THE table: for every tensor of a config, which axis each of its dimensions lies on, and what the tensor is.

A dimension is a run of segments, a segment is a row-major product of factors, and a factor is an axis (or None
where the size is fixed) with its size. The rows of Mamba's `in_proj`, z | x | B, C | dt, read

    (mamba_heads x mamba_head_dim) + (mamba_heads x mamba_head_dim) + ssm_state + ssm_state + mamba_heads

The tensors of a layer are listed by its kind (mamba2.py, attention.py, mlp.py, ...); embedding, final norm and head
here. Shapes, the parameter count, memory, validation and slicing are read from the table, and nowhere else.
Names are those of `HybridLM.state_dict()`; families/ maps them to a checkpoint's.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from .config import HybridConfig


@dataclasses.dataclass(frozen=True)
class AxisRow:
    """A row of `AXES`: one prunable width.

    `width` is the config field that counts its units, `title` its name in tables and plots. Units that live in groups
    of equal size keep equally many in each; `groups` is the config field that counts those, and with `per_group` the
    width counts the units of one group. An axis `within` another is ranked by the columns of that axis's scores
    [units, columns], once for all of its units. Where a row's width counts the groups of another's units (key-value
    heads), its units go with all that live in them, and are worth what those are. `letter` stands for a width in the
    names of candidates that have another than the source, where no label of a kind does. No tensor has a `ranked` one:
    its units are the places in an order (of a token's experts), of which the first stay.
    """

    name: str
    width: str
    title: str
    groups: str | None = None
    within: str | None = None
    per_group: bool = False
    letter: str = ""
    ranked: bool = False


AXES: dict[str, AxisRow] = {
    row.name: row
    for row in (
        AxisRow("hidden", "hidden_size", "residual channels"),
        AxisRow("ffn", "intermediate_size", "FFN neurons"),
        AxisRow("kv_groups", "num_key_value_heads", "key-value heads", letter="K"),
        AxisRow("attn_heads", "num_attention_heads", "attention heads", groups="num_key_value_heads"),
        AxisRow("mamba_heads", "mamba_num_heads", "Mamba heads", groups="n_groups"),
        AxisRow("mamba_head_dim", "mamba_head_dim", "Mamba head channels", within="mamba_heads"),
        AxisRow("ssm_state", "ssm_state_size", "SSM state indices", groups="n_groups", per_group=True, letter="N"),
        AxisRow("experts", "n_routed_experts", "experts", groups="n_group"),
        AxisRow("expert_ffn", "moe_intermediate_size", "expert neurons"),
        AxisRow("top_k", "num_experts_per_tok", "experts a token", letter="T", ranked=True),
        AxisRow("shared_ffn", "moe_shared_expert_intermediate_size", "shared expert neurons"),
    )
}


class Axis(NamedTuple):
    """An axis of a model: `hidden` of all of it (layer None), or one that belongs to a layer. `kind` names its row."""

    kind: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}({self.layer})"

    @property
    def row(self) -> AxisRow:
        return AXES[self.kind]

    def groups(self, config: HybridConfig) -> int:
        """How many groups its units live in."""
        return 1 if self.row.groups is None else getattr(config, self.row.groups)

    def units(self, config: HybridConfig, width: int) -> int:
        """How many units its layer has at a width."""
        return width * self.groups(config) if self.row.per_group else width


class Factor(NamedTuple):
    axis: Axis | None
    size: int


Segment = tuple[Factor, ...]
Dimension = tuple[Segment, ...]

HIDDEN = Axis("hidden")


class Role(enum.Enum):
    """What a tensor is for. A matrix [outputs, inputs] multiplies activations, a table is looked up by token, a norm's
    weight scales what it has normalised; expert stacks are matrices [experts, outputs, inputs], a router the matrix
    [experts, inputs] that chooses among them. A buffer is carried along, and neither counted nor trained."""

    MATRIX = "matrix"
    NORM = "norm"
    VECTOR = "vector"
    TABLE = "table"
    CONVOLUTION = "convolution"
    EXPERTS = "experts"
    ROUTER = "router"
    BUFFER = "buffer"


# Multiply activations, or are looked up in: they decay in training.
MATRICES = (Role.MATRIX, Role.TABLE, Role.EXPERTS, Role.ROUTER)
STACKED = (Role.MATRIX, Role.EXPERTS, Role.ROUTER)  # [..., outputs, inputs]
PRECISE = (Role.ROUTER, Role.BUFFER)  # float32 at least, wherever they are: a choice between near scores hangs on it
WHOLE = (Role.NORM, Role.VECTOR, *PRECISE)  # float32 in training, and whole in every process


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor: its dimensions, its role, and the layer that it belongs to (None for embedding, final norm, head, and
    multi-token prediction, of whose layers `ahead` is the number)."""

    name: str
    dimensions: tuple[Dimension, ...]
    role: Role
    layer: int | None = None
    ahead: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(dimension_size(dimension) for dimension in self.dimensions)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def part(self) -> str:
        """The name within its layer, such as "norm.weight" or "mixer.in_proj.weight"."""
        if self.ahead is not None:
            return self.name.split(".", 3)[3]
        return self.name if self.layer is None else self.name.split(".", 2)[2]

    @property
    def reads_stream(self) -> bool:
        """Whether its inputs are the normed residual stream: a matrix with columns on hidden."""
        return self.role in STACKED and on_hidden(self.dimensions[-1])

    @property
    def writes_stream(self) -> bool:
        """Whether its outputs are added to the residual stream: a layer's matrix with rows on hidden."""
        return self.role in STACKED and on_hidden(self.dimensions[-2])

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that it has in a model, or a folder, of `dtype`."""
        import torch  # not above: the options of a command are the widths of this table, and are read without it

        return torch.promote_types(dtype, torch.float32) if self.is_precise else dtype

    @property
    def is_precise(self) -> bool:
        return self.role in PRECISE


Parts = dict[str, tuple[Role, tuple[Dimension, ...]]]  # a layer's tensors by their names below `mixer.`


def columns_of(axis: Axis) -> list[Axis]:
    """The axes that are ranked by the columns of this one's scores."""
    return [Axis(row.name, axis.layer) for row in AXES.values() if row.within == axis.kind]


def group_row(row: AxisRow) -> AxisRow | None:
    """The row whose units are the groups of this one's, where there is one."""
    return next((other for other in AXES.values() if other.width == row.groups), None)


def group_axis(axis: Axis) -> Axis | None:
    """The axis whose units are the groups of this one's, where there is one."""
    row = group_row(axis.row)
    return None if row is None else Axis(row.name, axis.layer)


def holds_units(row: AxisRow) -> bool:
    """Whether the row's units are groups of another's."""
    return any(other.groups == row.width for other in AXES.values())


def segment_size(segment: Segment) -> int:
    return math.prod(factor.size for factor in segment)


def dimension_size(dimension: Dimension) -> int:
    return sum(segment_size(segment) for segment in dimension)


def on_hidden(dimension: Dimension) -> bool:
    return dimension[0][0].axis == HIDDEN


def fixed(size: int) -> Dimension:
    return ((Factor(None, size),),)


def axis_sizes(config: HybridConfig) -> dict[Axis, int]:
    """Every prunable axis of a config with its size, in the order of layers; read off the table itself, and those that
    no tensor has last."""
    sizes: dict[Axis, int] = {}
    for tensor in tensor_table(config).values():
        for dimension in tensor.dimensions:
            for segment in dimension:
                for axis, size in segment:
                    if axis is not None:
                        assert sizes.setdefault(axis, size) == size, (tensor.name, axis)
    for row in AXES.values():
        layers = [layer for layer, kind in enumerate(config.kinds) if row.ranked and row.width in kind.fields]
        sizes |= {Axis(row.name, layer): getattr(config, row.width) for layer in layers}
    return sizes


def tensor_table(config: HybridConfig) -> dict[str, TensorSpec]:
    """Every tensor of a model of this config by its name in `HybridLM.state_dict()`."""
    hidden: Dimension = ((Factor(HIDDEN, config.hidden_size),),)
    vocabulary = fixed(config.vocab_size)
    rows = [TensorSpec("embeddings.weight", (vocabulary, hidden), Role.TABLE)]
    for layer, kind in enumerate(config.kinds):
        rows.append(TensorSpec(f"layers.{layer}.norm.weight", (hidden,), Role.NORM, layer))
        for name, (role, dimensions) in kind.tensors(config, layer, hidden).items():
            rows.append(TensorSpec(f"layers.{layer}.mixer.{name}", dimensions, role, layer))
    rows.append(TensorSpec("norm_f.weight", (hidden,), Role.NORM))
    if not config.tie_word_embeddings:
        rows.append(TensorSpec("lm_head.weight", (vocabulary, hidden), Role.MATRIX))
    if config.mtp_steps:
        from .mtp import mtp_table  # which knows of axes

        rows += mtp_table(config, hidden)
    return {row.name: row for row in rows}
