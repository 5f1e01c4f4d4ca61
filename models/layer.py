"""The record that a layer kind fills in, and what a layer is given when it runs.

A layer is x + mixer(RMSNorm(x)). Everything that is particular to a kind of mixer stands in its record, in one file
a kind (mamba2.py, attention.py, mlp.py); kinds.py lists them. Shapes: [B, T] batch and tokens, [B] sequences.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from ..kernels.norm import add_rms_norm
from ..kernels.products import project
from .axes import AXES, Dimension, Parts

if TYPE_CHECKING:
    from .config import HybridConfig
    from .row_split import RowPart

Observe = Callable[[str, int, Tensor], None]  # (name of the activation, layer, tensor)
RoundInput = Callable[[nn.Module, Tensor], Tensor]
Once = TypeVar("Once")


class NormWeight(nn.Module):
    """The weight of a norm."""

    def __init__(self, size: int, **place: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, **place))


class LayerState(Protocol):
    """What a layer keeps of a batch of sequences from token to token, a row each, in place."""

    def rows(self, start: int, count: int) -> Self:
        """A view of some rows."""
        ...

    def clear(self, row: int) -> None:
        """Empties a row, as far as anything would read what it held."""
        ...

    def move(self, source: int, target: int, length: int) -> None:
        """Copies a row of `length` tokens into another row's place, bit for bit."""
        ...

    def recurrent(self) -> tuple[Tensor, ...]:
        """The tensors that a step overwrites with something else: all but what is only appended to."""
        ...


class StateBytes(NamedTuple):
    """Bytes of a layer's state for one sequence: for each token, and whatever its length (the SSM state and the last
    inputs of the convolution)."""

    token: int = 0
    ssm: int = 0
    conv: int = 0


@dataclasses.dataclass
class Context:
    """What a layer is given beside the stream.

    `seq_idx` [B, T] changes where a new document begins. With states, `past` tokens a row precede these, as many in
    each; for a decoding step of one token a row `lengths` [B] says how many precede in each, read where it lies, so
    that the call can be captured and replayed, in caches of `max_length` tokens. `states` are by layer. `shared` holds
    what the layers of a kind share in this call, by the function that made it (`LayerKind.share`). `bound` is a
    decoder's: what does not change from step to step, made once. `round_input` changes what a module's matrices read,
    where a model learns to be quantised. Where rows are split over processes, these tokens are the `part` of theirs
    that is this one's. `added` is what the last layer gave, until a norm adds it to the stream (`join`).
    """

    seq_idx: Tensor | None = None
    past: int = 0
    lengths: Tensor | None = None
    max_length: int = 0
    states: Sequence[Any] | Mapping[int, Any] | None = None
    observe: Observe | None = None
    shared: dict[Callable[..., Any], Any] = dataclasses.field(default_factory=dict)
    bound: Bound | None = None
    round_input: RoundInput | None = None
    part: RowPart | None = None
    added: Tensor | None = None

    def state(self, layer: int) -> Any:
        return None if self.states is None else self.states[layer]

    def note(self, name: str, layer: int, tensor: Tensor) -> None:
        """Shows an activation to whoever observes."""
        if self.observe is not None:
            self.observe(name, layer, tensor)

    def wants(self, name: str) -> bool:
        """Whether the observer names that activation: what nothing else needs is computed for such observers alone."""
        return name in getattr(self.observe, "names", ())

    def project(self, module: nn.Linear, x: Tensor) -> Tensor:
        """x [B, T, K] times a module's weight [N, K] transposed, and its bias [N] added where it has one."""
        x = self.input_of(module, x)
        y = project(x, module.weight) if self.bound is None else self.bound.project(module, x)
        # In training biases are float32, as all vectors are; the stream keeps its dtype.
        return y if module.bias is None else y + module.bias.to(y.dtype)

    def input_of(self, module: nn.Module, x: Tensor) -> Tensor:
        """x [..., K] as the matrices of a module read it."""
        return x if self.round_input is None else self.round_input(module, x)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The RMSNorm of x [B, T, H], to which what the last layer adds is added first where `join` has left it."""
        added, self.added = self.added, None
        return (add_rms_norm if self.bound is None else self.bound.norm)(x, added, weight, eps)

    def join(self, hidden: Tensor, added: Tensor) -> Tensor:
        """The stream after a layer. In a decoding step the next norm adds, in place, while it reads the stream."""
        if self.lengths is None:
            return hidden + added
        self.added = added
        return hidden

    def once(self, key: Hashable, make: Callable[[], Once]) -> Once:
        """What `make` gives; a decoder asks for it once, and keeps it for its next steps."""
        return make() if self.bound is None else self.bound.once(key, make)


class Bound(Protocol):
    """What a decoder makes ready once for many steps (generate/decode.py)."""

    def project(self, module: nn.Linear, x: Tensor) -> Tensor: ...

    norm: Callable[[Tensor, Tensor | None, Tensor, float], Tensor]

    def once(self, key: Hashable, make: Callable[[], Once]) -> Once: ...


@dataclasses.dataclass(frozen=True)
class ScoreSource:
    """Which activations can score an axis, by the values of `option` among score's options: the first by default, the
    last is what the matrix that writes the residual stream reads. With `reduce`, a unit has several numbers, in the
    last dimension. The activations `per_use` are averaged over the positions that use a unit, and NaN at the others.
    `left_out` is the value of the option by which the model runs without each of the units in turn
    (`LayerKind.without`)."""

    observed: Mapping[str, str]
    option: str | None = None
    reduce: bool = False
    per_use: tuple[str, ...] = ()
    left_out: str | None = None

    @property
    def read_last(self) -> str:
        return list(self.observed.values())[-1]


@dataclasses.dataclass(frozen=True)
class ExpertStacks:
    """The matrices of a kind's experts, and what is shown of them: the `inputs` [.., D] that they read, the `choice`
    and `weights` [.., k] of a token, what `down` has `read` [.., I, k] and `given` [.., k, D], and, where they do not
    write the stream themselves, the `total` of that. `use` [.., E] is 1 for the chosen, to those who name it."""

    up: str
    down: str
    gate: str
    inputs: str
    choice: str
    weights: str
    read: str
    given: str
    total: str
    use: str


@dataclasses.dataclass(frozen=True)
class NormSource:
    """A norm within a mixer whose channels can be cut: the activation that it gives, and the config field that counts
    the groups that it normalises in."""

    observed: str
    groups: str


class Sharing(enum.Enum):
    """How tensor parallelism shares out the units that a config field counts: as many to each rank, or else one that
    all have a copy of, or else fewer than ranks, each copied to as many of them (cost/ranks.py)."""

    EQUAL = "equal"
    ONE_COPIED = "one copied"
    FEWER_COPIED = "fewer copied"

    def each(self, units: int, ranks: int) -> int | None:
        """The units of one of the ranks; None where they cannot be shared out so."""
        if units % ranks == 0:
            return units // ranks
        copied = {Sharing.EQUAL: False, Sharing.ONE_COPIED: units == 1, Sharing.FEWER_COPIED: ranks % units == 0}
        return 1 if copied[self] else None


def zeros(weight: Tensor, generator: torch.Generator, config: HybridConfig) -> None:
    """How biases begin."""
    weight.zero_()


def no_check(config: HybridConfig) -> None:
    """For kinds whose fields are right whatever the others are."""


def no_bytes(config: HybridConfig, kv: int, ssm: int, conv: int) -> StateBytes:
    return StateBytes()


def no_work(config: HybridConfig, context: int) -> float:
    return 0.0


def all_of_them(config: HybridConfig) -> tuple[int, int]:
    return 1, 1


def no_label(config: HybridConfig) -> str:
    return ""


@dataclasses.dataclass(frozen=True, eq=False)
class LayerKind:
    """One kind of layer. Tensors go by their names below `mixer.`, axes by those of axes.AXES.

    `letter` stands for it in patterns, `name` in tables, `key` in options (min_layers) and metrics. `fields` are the
    whole numbers of at least 1 that it needs of a config, `optional` those that are 0 where a part is not there;
    `check` raises InputError where they contradict each other.
    """

    letter: str
    name: str
    key: str
    fields: tuple[str, ...]
    tensors: Callable[[HybridConfig, int, Dimension], Parts]  # (config, layer, the hidden dimension)
    build: Callable[..., nn.Module]  # (config, layer, device=, dtype=) -> forward(u [B, T, hidden], context)
    writers: Mapping[str, str]  # tensor that writes the residual stream -> activation that it reads
    scores: Mapping[str, ScoreSource]  # axis -> what scores it; an axis within another has no row here
    optional: tuple[str, ...] = ()
    like: str | None = None  # the letter under which families have its tensors, where that is another
    multipliers: Mapping[str, Callable[[HybridConfig], float]] = dataclasses.field(default_factory=dict)
    norms: Mapping[str, NormSource] = dataclasses.field(default_factory=dict)
    # tensor -> how it is filled at first, where its role does not say
    initial: Mapping[str, Callable[[Tensor, torch.Generator, HybridConfig], None]] = dataclasses.field(
        default_factory=dict
    )
    check: Callable[[HybridConfig], None] = no_check
    # What the layers of the kind share in a call: (config, context, tokens, device, dtype).
    share: Callable[[HybridConfig, Context, int, torch.device, torch.dtype], Any] | None = None
    # State of (config, rows, max_length, device=, dtype=, ssm_dtype=); None: the kind keeps nothing.
    new_state: Callable[..., LayerState] | None = None
    state_bytes: Callable[[HybridConfig, int, int, int], StateBytes] = no_bytes  # (config, bytes of kv, ssm, conv)
    work: Callable[[HybridConfig, int], float] = no_work  # multiply-adds of a token beside its matrices, at a context
    # Of its expert stacks a token uses so many, and there are so many: (experts chosen, experts).
    chosen: Callable[[HybridConfig], tuple[int, int]] = all_of_them
    ranks: Mapping[str, Sharing] = dataclasses.field(default_factory=dict)  # field -> how vLLM's ranks share its units
    aligned: tuple[tuple[str, ...], ...] = ()  # products of config fields that kernels like to be multiples of 8
    # axis -> (a mixer, a unit) -> the mixer without the unit, as long as the context is open
    without: Mapping[str, Callable[[Any, int], AbstractContextManager[None]]] = dataclasses.field(default_factory=dict)
    experts: ExpertStacks | None = None
    size_label: Callable[[HybridConfig], str] = no_label  # its widths in a few letters, for the names of candidates

    def widths(self) -> tuple[str, ...]:
        """Its config fields that count the units of an axis."""
        return tuple(row.width for row in AXES.values() if row.width in (*self.fields, *self.optional))
