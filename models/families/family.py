"""What a model family is: how it spells its config.json, and a flat map of its tensors' names.

The map goes from our full names to the checkpoint's. Where a checkpoint stores a tensor otherwise, the value is a
transform: `Fused`, rows of a matrix that holds several of ours, `FusedUnits`, of a stack of such; `Units`, the first
dimension of ours as tensors of their own; `Scaled`, ours is the stored tensor times a number of the config. Every one
of them says which rows of a stored tensor are which rows of ours (`Piece`), and is read in both directions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..axes import TensorSpec, tensor_table
from ..errors import InputError
from ..multipliers import ONES

if TYPE_CHECKING:
    from ..config import HybridConfig
    from ..layer import LayerKind


# What most families cannot say otherwise.
PLAIN: dict[str, Any] = {"multipliers": ONES, "mamba_rms_norm": True, "norm_before_gate": False}


@dataclasses.dataclass(frozen=True)
class Fused:
    """Rows of `name`, after the rows of the layer's tensors `after`."""

    name: str
    after: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class FusedUnits:
    """A stack [units, ...] of ours whose every unit is in a unit of the stack `name`: run number `part` of the `parts`
    runs, of equally many rows, that are there."""

    name: str
    part: int
    parts: int


@dataclasses.dataclass(frozen=True)
class Units:
    """A stack [units, ...] of ours whose every unit is a tensor of its own, `name` with `{unit}`."""

    name: str


@dataclasses.dataclass(frozen=True)
class Scaled:
    """`name` times a number of the config is ours."""

    name: str
    by: Callable[[HybridConfig], float]


Transform = str | Fused | FusedUnits | Units | Scaled


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """`read` and `write` turn a config.json into HybridConfig's arguments and back. `outer` maps the tensors around the
    layers, `layers` those of a layer by its letter, `ahead` those of a layer of multi-token prediction; `{block}` in a
    stored name is the number of the layer's block, or of the layer where each stands for itself.

    `architecture` is transformers' class; `fixed` are the fields that are the same in every model of the family.
    `blocks` are the patterns of the blocks of several layers, all of one length, that come and go together only; none:
    each layer stands for itself. `prefixes` are what a stored name's first part may be called, the published one first.
    `ignored` are endings of tensors that old checkpoints hold though they follow from the config. Without `ties`
    transformers has a head of its own whatever `tie_word_embeddings` says: it is written out. `spellings` are the
    names in a config.json of HybridConfig's fields, which say what types those have to be of. `config` is the class
    of its configs where a kind of its layers needs fields of its own. `tied` names the widths that go with another
    hidden_size, where the family's readers derive sizes from it. `check_cut`, of a source and what is cut from it,
    refuses as `write` does, with sizes that this source can be cut to. Where transformers has no class of that name,
    `transformers` is false.
    """

    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[HybridConfig], dict[str, Any]]
    architecture: str
    fixed: Mapping[str, Any]
    outer: Mapping[str, Transform]
    layers: Mapping[str, Mapping[str, Transform]]
    ahead: Mapping[str, Mapping[str, Transform]] = dataclasses.field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)
    ignored: tuple[str, ...] = ()
    ties: bool = True
    spellings: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    config: type[HybridConfig] | None = None
    tied: Callable[[HybridConfig, int], Mapping[str, int]] = lambda config, hidden: {}
    check_cut: Callable[[HybridConfig, HybridConfig], None] = lambda source, smaller: None
    transformers: bool = True

    @property
    def block_size(self) -> int:
        return len(self.blocks[0]) if self.blocks else 1

    def has_blocks(self, pattern: str) -> bool:
        """Whether a pattern is made of whole blocks."""
        size = self.block_size
        parts = [pattern[start : start + size] for start in range(0, len(pattern), size)]
        return not self.blocks or all(part in self.blocks for part in parts)

    def blocks_in_words(self) -> str:
        return " or ".join(repr(block) for block in self.blocks)


class Piece(NamedTuple):
    """`rows` rows of `ours` from row `start` on are those of `stored` from row `begin` on, times `scale`. Rows are
    counted with all dimensions but the last flattened; the numbers of a vector are its rows."""

    ours: str
    start: int
    stored: str
    begin: int
    rows: int
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: its shape, and what of ours lies in it."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@functools.lru_cache(maxsize=16)
def pieces_of(config: HybridConfig) -> Mapping[str, tuple[Piece, ...]]:
    """Of every tensor of the table the pieces that make it up, in the order of its rows."""
    family, table = config.family_record, tensor_table(config)
    return {name: tuple(pieces_of_tensor(config, family, table, spec)) for name, spec in table.items()}


def stored_as(kind: LayerKind) -> str:
    """The letter of a kind's tensors in `Family.layers`."""
    return kind.letter if kind.like is None else kind.like


def pieces_of_tensor(
    config: HybridConfig, family: Family, table: Mapping[str, TensorSpec], spec: TensorSpec
) -> Iterator[Piece]:
    names = family.outer
    place: dict[str, int] = {}
    if spec.ahead is not None:
        ahead = config.mtp_layers
        assert ahead is not None
        names, place = family.ahead[stored_as(ahead.kinds[spec.ahead])], {"block": spec.ahead}
    elif spec.layer is not None:
        names = family.layers[stored_as(config.kinds[spec.layer])]
        # A block's layers are told apart by their names; the number is the block's.
        place = {"block": spec.layer // family.block_size}
    how = names[spec.part]
    rows = flat_rows(spec.shape)
    if isinstance(how, Units):
        each = rows // spec.shape[0]
        for unit in range(spec.shape[0]):
            yield Piece(spec.name, unit * each, how.name.format(unit=unit, **place), 0, each)
    elif isinstance(how, FusedUnits):
        each = rows // spec.shape[0]
        for unit in range(spec.shape[0]):
            yield Piece(spec.name, unit * each, how.name.format(**place), (unit * how.parts + how.part) * each, each)
    elif isinstance(how, Fused):
        before = [table[f"layers.{spec.layer}.{part}"] for part in how.after]
        begin = sum(flat_rows(other.shape) for other in before)
        yield Piece(spec.name, 0, how.name.format(**place), begin, rows)
    elif isinstance(how, Scaled):
        yield Piece(spec.name, 0, how.name.format(**place), 0, rows, how.by(config))
    else:
        yield Piece(spec.name, 0, how.format(**place), 0, rows)


@functools.lru_cache(maxsize=16)
def stored_tensors(config: HybridConfig) -> Mapping[str, StoredTensor]:
    """Every tensor of a checkpoint of this config by its published name, in the order of the table."""
    table = tensor_table(config)
    found: dict[str, list[Piece]] = {}
    for pieces in pieces_of(config).values():
        for piece in pieces:
            found.setdefault(piece.stored, []).append(piece)
    return {name: StoredTensor(stored_shape(table, pieces), tuple(pieces)) for name, pieces in found.items()}


def stored_shape(table: Mapping[str, TensorSpec], pieces: list[Piece]) -> tuple[int, ...]:
    shape, rows = table[pieces[0].ours].shape, sum(piece.rows for piece in pieces)
    if len(pieces) == 1 and rows == flat_rows(shape):
        return shape
    if len(shape) > 2 and len(pieces) > 1:  # units of fused rows
        return (shape[0], rows // shape[0], shape[-1])
    return (rows, *shape[-1:]) if len(shape) > 1 else (rows,)


def flat_rows(shape: tuple[int, ...]) -> int:
    """Rows of a tensor of that shape, as `Piece` counts them."""
    return math.prod(shape[:-1]) if len(shape) > 1 else shape[0]


def assembled(
    config: HybridConfig, name: str, start: int, stop: int, read: Callable[[str, int, int], Tensor]
) -> Tensor:
    """Rows start..stop-1, along its first dimension, of one of our tensors; `read(stored name, begin, end)` gives rows
    of a stored one, counted as in `Piece`."""
    shape = tensor_table_of(config)[name].shape
    each = flat_rows(shape) // shape[0]
    first, last = start * each, stop * each
    parts = []
    for piece in pieces_of(config)[name]:
        low, high = max(first, piece.start), min(last, piece.start + piece.rows)
        if low < high:
            begin = piece.begin - piece.start
            part = read(piece.stored, begin + low, begin + high)
            parts.append(part if piece.scale == 1 else part * piece.scale)
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.reshape(stop - start, *shape[1:])


def scattered(config: HybridConfig, name: str, start: int, rows: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """What rows of one of our tensors, from row `start` of its first dimension on, are in a checkpoint: (stored name,
    row there, rows), counted as in `Piece`."""
    shape = tensor_table_of(config)[name].shape
    each = flat_rows(shape) // shape[0]
    flat = rows.flatten(0, -2) if rows.dim() > 1 else rows
    first, last = start * each, start * each + len(flat)
    for piece in pieces_of(config)[name]:
        low, high = max(first, piece.start), min(last, piece.start + piece.rows)
        if low < high:
            part = flat[low - first : high - first]
            yield piece.stored, piece.begin + low - piece.start, part if piece.scale == 1 else part / piece.scale


@functools.lru_cache(maxsize=16)
def tensor_table_of(config: HybridConfig) -> Mapping[str, TensorSpec]:
    """`axes.tensor_table`, kept: it is needed with every block of rows."""
    return tensor_table(config)


def published_name(config: HybridConfig, name: str) -> str:
    """A stored tensor's name with the published first part, whichever it was written with."""
    first, *others = config.family_record.prefixes
    for other in others:
        if name.startswith(other):
            return first + name.removeprefix(other)
    return name


def is_ignored(config: HybridConfig, name: str) -> bool:
    """Whether a stored tensor says nothing that the config does not."""
    return name.endswith(config.family_record.ignored)


def write_config(config: HybridConfig) -> dict[str, Any]:
    """The contents of a config.json in the family's published spelling. Raises InputError for what it cannot say."""
    family = config.family_record
    for field, value in family.fixed.items():
        if getattr(config, field) != value:
            raise InputError(
                f"config: {field} is {getattr(config, field)!r}, which a config.json of {config.family}"
                f" cannot say; expected {value!r}"
            )
    if not family.has_blocks(config.pattern):
        raise InputError(
            f"config: the pattern {config.pattern} cannot be written as {config.family}, which has whole blocks"
            f" {family.blocks_in_words()}; remove layers in whole blocks"
        )
    return {"architectures": [family.architecture], "model_type": config.family} | family.write(config)
