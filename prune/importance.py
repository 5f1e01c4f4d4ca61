"""How much each unit of each width matters: from activations on calibration data, or from two baselines.

Sources: Minitron (arXiv 2407.14679, section 2) for neurons, channels and attention heads; Minitron-SSM
(2504.11409, section 3) for Mamba heads and head channels; the digest of both in Nemotron Nano 2 (2508.14444).
Shapes: [B, T] samples and tokens, [U...] the units of an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.norm import rms_norm
from ..models import processes
from ..models.axes import HIDDEN, Axis, segment_size, tensor_table
from ..models.checkpoint import row_blocks
from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.hybrid import HybridLM, Observe
from ..models.offload import STREAM_BYTES, Layers, layers_of
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

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.samples = 0
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.total)

    def add(self, values: Tensor) -> None:
        """values [samples, U...], float64"""
        self.samples += values.shape[0]
        self.total += values.sum(0)
        self.squares += values.square().sum(0)

    def gather(self) -> None:
        """Takes in what every other process has summed up."""
        sums = torch.cat([self.total.flatten(), self.squares.flatten(), self.total.new_tensor([self.samples])])
        *sums, samples = processes.all_sum(sums).split([self.total.numel(), self.total.numel(), 1])
        self.total, self.squares = (part.view_as(self.total) for part in sums)
        self.samples = int(samples)

    def result(self, aggregate: str) -> Tensor:
        """The aggregate over samples, [U...], on the CPU."""
        total, squares = self.total.cpu(), self.squares.cpu()
        if aggregate == "mean":
            return total / self.samples
        if aggregate == "l2":
            return squares.sqrt()
        return (squares / self.samples - (total / self.samples).square()).clamp(min=0)


@torch.no_grad()
def score_widths(
    model: HybridLM | Layers,
    batches: Iterable[TokenBatch],
    *,
    aggregate_batch: str = "l2",
    aggregate_sequence: str = "mean",
    mamba_source: str = "x",
    ffn_source: str = "pre",
    times_output: bool = False,
    stream_bytes: int = STREAM_BYTES,
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
    Layer after layer runs; where weights are read from a folder, over as many batches as `stream_bytes` of residual
    streams hold (one at least), so that each group of them reads the weights once. Of many processes each has batches
    of its own. `on_step(done, total)` counts layers times batches. Raises InputError for an unknown option, when no
    position counts, and when an activation is not finite.
    """
    for value, known in (
        (aggregate_batch, AGGREGATES),
        (aggregate_sequence, AGGREGATES),
        (mamba_source, tuple(MAMBA_SOURCES)),
        (ffn_source, tuple(FFN_SOURCES)),
    ):
        if value not in known:
            raise InputError(f"importance: {value!r} is unknown; known: {', '.join(known)}")
    source = layers_of(model)
    config = source.config
    kinds = {"hidden": "hidden", "attn_heads": "attn_heads"}
    kinds |= {FFN_SOURCES[ffn_source]: "ffn", MAMBA_SOURCES[mamba_source]: "mamba_heads"}
    moments = empty_moments(config, source.device)
    total = len(batches) * config.num_layers if isinstance(batches, Sized) else None
    done = 0
    with processes.together():
        for group in groups_of(batches, source, stream_bytes):
            observers = [
                observer(moments, kinds, (batch.labels != IGNORED_LABEL).to(source.device), aggregate_sequence)
                for batch in group
            ]
            for layer_batches in walk(source, group, observers):
                done += layer_batches
                if on_step is not None:
                    on_step(done, total)
    for moment in moments.values():
        moment.gather()
    if not all(moment.samples for moment in moments.values()):
        raise InputError("importance: the data has no counted token; expected at least one sample of two tokens")
    results = {key: moment.result(aggregate_batch) for key, moment in moments.items()}
    norms = [results[("hidden", row)] for row in range(config.num_layers + 1)]
    scores = {HIDDEN: torch.stack(norms)}
    scores |= {Axis(kind, layer): value for (kind, layer), value in results.items() if kind != "hidden"}
    if times_output:
        readers = unit_weights(config, source.tensor, only_dimension=1)
        for axis in scores.keys() - {HIDDEN}:
            scores[axis] = scores[axis] * readers[axis]
    check_width_scores(config, scores, "importance")
    return scores


def empty_moments(config: HybridConfig, device: torch.device) -> dict[tuple[str, int], Moments]:
    """By axis kind and layer; a row of hidden is a kind of its own for each norm."""
    moments: dict[tuple[str, int], Moments] = {}
    for axis, shape in width_score_shapes(config).items():
        for row in range(shape[0]) if axis == HIDDEN else ():
            moments[("hidden", row)] = Moments(shape[1:], device)
        if axis.layer is not None:
            moments[(axis.kind, axis.layer)] = Moments(shape, device)
    return moments


def groups_of(batches: Iterable[TokenBatch], source: Layers, stream_bytes: int) -> Iterator[list[TokenBatch]]:
    """Batches that are walked at once: one where the weights are in memory, else as many as `stream_bytes` hold."""
    group: list[TokenBatch] = []
    held = 0
    for batch in batches:
        size = batch.input_ids.numel() * source.config.hidden_size * source.dtype.itemsize
        if group and (not source.streamed or held + size > stream_bytes):
            yield group
            group, held = [], 0
        group.append(batch)
        held += size
    if group:
        yield group


def walk(source: Layers, group: list[TokenBatch], observers: list[Observe]) -> Iterator[int]:
    """Moves the batches' streams through all layers and the final norm, and yields their number after each layer."""
    hidden = source.embed([batch.input_ids for batch in group])
    seq_idx = [batch.seq_idx.to(source.device) for batch in group]
    for layer in source.walk(range(source.config.num_layers)):
        for number, observe in enumerate(observers):
            hidden[number] = layer.run(hidden[number], seq_idx[number], observe)
        yield len(group)
    norm = source.tensor("norm_f.weight")
    for observe, stream in zip(observers, hidden, strict=True):
        observe("hidden", source.config.num_layers, rms_norm(stream, norm, source.config.norm_eps))


def observer(
    moments: Mapping[tuple[str, int], Moments], kinds: Mapping[str, str], counted: Tensor, aggregate: str
) -> Observe:
    """What adds the activations of one batch, of the kinds named, to the moments of (axis kind, layer)."""
    rows = counted.any(1)

    def observe(kind: str, layer: int, tensor: Tensor) -> None:
        if kind in kinds:
            values = torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float64) if kind == "attn_heads" else tensor
            moments[(kinds[kind], layer)].add(over_sequence(values[rows], counted[rows], aggregate))

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
        sums = square_sums(get_tensor(tensor.name))
        for number, dimension in enumerate(tensor.dimensions):
            if only_dimension not in (None, number):
                continue
            segments = sums[number].split([segment_size(segment) for segment in dimension])
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


def square_sums(tensor: Tensor) -> list[Tensor]:
    """For each dimension the sums of squares over all others, float64 on the CPU; a piece of rows at a time."""
    sums = [torch.zeros(size, dtype=torch.float64) for size in tensor.shape]
    for start, stop in row_blocks(tuple(tensor.shape), torch.float32):
        squares = tensor[start:stop].float().square()
        for number, total in enumerate(sums):
            others = [other for other in range(tensor.dim()) if other != number]
            found = squares.sum(others, dtype=torch.float64).cpu()
            if number == 0:
                total[start:stop] = found
            else:
                total += found
    return sums


def score_random(config: HybridConfig, seed: int) -> WidthScores:
    """The baseline that everything has to beat: uniform random scores."""
    generator = torch.Generator().manual_seed(seed)
    return {
        axis: torch.rand(shape, generator=generator, dtype=torch.float64)
        for axis, shape in width_score_shapes(config).items()
    }
