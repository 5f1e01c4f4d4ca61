"""How much each unit of each width matters: from activations on calibration data, or from two baselines.

Sources: Minitron (arXiv 2407.14679, section 2) for neurons, channels and attention heads; Minitron-SSM
(2504.11409, section 3) for Mamba heads and head channels; the digest of both in Nemotron Nano 2 (2508.14444).
Shapes: [B, T] samples and tokens, [U...] the units of an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Protocol

import torch
from torch import Tensor

from ..models.axes import HIDDEN, Axis, segment_size, tensor_table
from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.hybrid import HybridLM, Observe
from .scores import WidthScores, check_width_scores, width_score_shapes

AGGREGATES = ("mean", "l2", "var")
MAMBA_SOURCES = {"x": "mamba_x", "z": "mamba_z", "out": "mamba_out"}
FFN_SOURCES = {"pre": "ffn", "act": "ffn_act"}
IGNORED_LABEL = -100


class TokenBatch(Protocol):
    """Packed rows: input_ids, labels (shifted; -100 = not counted) and seq_idx, each [B, T]."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def seq_idx(self) -> Tensor: ...


class Moments:
    """Sums of per-sample values [U...] in float64: the order of samples and the size of batches do not matter."""

    def __init__(self) -> None:
        self.samples = 0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        """values [samples, U...], float64"""
        self.samples += values.shape[0]
        self.total = self.total + values.sum(0)
        self.squares = self.squares + values.square().sum(0)

    def result(self, aggregate: str) -> Tensor:
        """The aggregate over samples, [U...], on the CPU."""
        total, squares = torch.as_tensor(self.total).cpu(), torch.as_tensor(self.squares).cpu()
        if aggregate == "mean":
            return total / self.samples
        if aggregate == "l2":
            return squares.sqrt()
        return (squares / self.samples - (total / self.samples).square()).clamp(min=0)


@torch.no_grad()
def score_widths(
    model: HybridLM,
    batches: Iterable[TokenBatch],
    *,
    aggregate_batch: str = "l2",
    aggregate_sequence: str = "mean",
    mamba_source: str = "x",
    ffn_source: str = "pre",
    times_output: bool = False,
    on_step: Callable[[int, int | None], None] | None = None,
) -> WidthScores:
    """Scores every width by the size of its activations; see scores.py for the shapes.

    A sample is one row of a batch, and of a row those positions count whose label counts (so neither padding nor
    the last token of a document); a row without any is skipped. Each activation is aggregated over the positions
    of its sample, then over samples: "mean" (of absolute values), "l2" or "var". Activations: RMSNorm outputs
    (hidden), X W_up or what down_proj reads (ffn_source "pre" or "act"; in a gated MLP only "act" sees the gate), the
    L2 norm over head_dim of the attention output (attn_heads), and the x part of in_proj's output, z, or out_proj's
    input (mamba_source).
    With `times_output` the scores of neurons, attention and Mamba heads are multiplied by the L2 norm of the
    weights that read the unit, so that a unit nobody reads scores zero.
    `on_step(done, total)` is called after each batch. Raises InputError for an unknown option, when no position
    counts, and when an activation is not finite.
    """
    for value, known in (
        (aggregate_batch, AGGREGATES),
        (aggregate_sequence, AGGREGATES),
        (mamba_source, tuple(MAMBA_SOURCES)),
        (ffn_source, tuple(FFN_SOURCES)),
    ):
        if value not in known:
            raise InputError(f"importance: {value!r} is unknown; known: {', '.join(known)}")
    sources = {"hidden": "hidden", "attn_heads": "attn_heads"}
    sources |= {FFN_SOURCES[ffn_source]: "ffn", MAMBA_SOURCES[mamba_source]: "mamba_heads"}
    moments: dict[tuple[str, int], Moments] = {}
    device = model.head_weight.device
    total = len(batches) if isinstance(batches, Sized) else None
    for done, batch in enumerate(batches, 1):
        counted = (batch.labels != IGNORED_LABEL).to(device)
        observe = observer(moments, sources, counted, aggregate_sequence)
        model.hidden_states(batch.input_ids.to(device), seq_idx=batch.seq_idx.to(device), observe=observe)
        if on_step is not None:
            on_step(done, total)
    if not any(moment.samples for moment in moments.values()):
        raise InputError("importance: the data has no counted token; expected at least one sample of two tokens")
    results = {key: moment.result(aggregate_batch) for key, moment in moments.items()}
    norms = [results[("hidden", row)] for row in range(model.config.num_layers + 1)]
    scores = {HIDDEN: torch.stack(norms)}
    scores |= {Axis(kind, layer): value for (kind, layer), value in results.items() if kind != "hidden"}
    if times_output:
        readers = unit_weights(model.config, model.state_dict().__getitem__, only_dimension=1)
        for axis in scores.keys() - {HIDDEN}:
            scores[axis] = scores[axis] * readers[axis]
    check_width_scores(model.config, scores, "importance")
    return scores


def observer(
    moments: dict[tuple[str, int], Moments], sources: Mapping[str, str], counted: Tensor, aggregate: str
) -> Observe:
    """What adds the activations of one batch, of the kinds in `sources`, to the moments of (axis kind, layer)."""
    rows = counted.any(1)

    def observe(kind: str, layer: int, tensor: Tensor) -> None:
        if kind in sources:
            values = torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float64) if kind == "attn_heads" else tensor
            key = (sources[kind], layer)
            moments.setdefault(key, Moments()).add(over_sequence(values[rows], counted[rows], aggregate))

    return observe


def over_sequence(values: Tensor, counted: Tensor, aggregate: str) -> Tensor:
    """Per-sample aggregates [B, U...] (float64) of values [B, T, U...] over the positions with counted [B, T]."""
    mask = counted.reshape(counted.shape + (1,) * (values.dim() - 2))
    values = torch.where(mask, values, 0)
    tokens = mask.sum(1)
    if aggregate == "mean":
        return values.abs().sum(1, dtype=torch.float64) / tokens
    squares = values.double().square().sum(1)
    if aggregate == "l2":
        return squares.sqrt()
    return (squares / tokens - (values.sum(1, dtype=torch.float64) / tokens).square()).clamp(min=0)


@torch.no_grad()
def score_magnitude(config: HybridConfig, get_tensor: Callable[[str], Tensor]) -> WidthScores:
    """A baseline that needs no data: the L2 norm of the weight matrices' entries that belong to the unit."""
    scores = unit_weights(config, get_tensor)
    check_width_scores(config, scores, "importance")
    return scores


def unit_weights(
    config: HybridConfig, get_tensor: Callable[[str], Tensor], *, only_dimension: int | None = None
) -> WidthScores:
    """The L2 norm of each unit's entries in the tensors of two or more dimensions, shaped as scores.

    With `only_dimension`, in those tensors alone where the axis is that dimension (1: the columns that read it).
    What belongs to a Mamba head as a whole is spread evenly over its channels.
    """
    shapes = width_score_shapes(config)
    squares = {axis: torch.zeros(shape, dtype=torch.float64) for axis, shape in shapes.items()}
    for tensor in tensor_table(config).values():
        if len(tensor.dimensions) < 2:
            continue
        entries = get_tensor(tensor.name).float().square().cpu()
        for number, dimension in enumerate(tensor.dimensions):
            if only_dimension not in (None, number):
                continue
            others = [other for other in range(entries.dim()) if other != number]
            segments = entries.sum(others, dtype=torch.float64).split([segment_size(segment) for segment in dimension])
            for segment, values in zip(dimension, segments, strict=True):
                axis = next((axis for axis, _ in segment if axis is not None), None)
                if axis is None:
                    continue
                target = squares[axis]
                if axis == HIDDEN:
                    target = target[config.num_layers if tensor.layer is None else tensor.layer]
                factors = values.reshape([size for _, size in segment])
                if factors.dim() > target.dim():  # heads x (fixed) head_dim of attention
                    factors = factors.sum(-1)
                elif factors.dim() < target.dim():  # Mamba heads without their channels: dt
                    factors = factors[:, None] / target.shape[1]
                target += factors
    return {axis: value.sqrt() for axis, value in squares.items()}


def score_random(config: HybridConfig, seed: int) -> WidthScores:
    """The baseline that everything has to beat: uniform random scores."""
    generator = torch.Generator().manual_seed(seed)
    return {
        axis: torch.rand(shape, generator=generator, dtype=torch.float64)
        for axis, shape in width_score_shapes(config).items()
    }
