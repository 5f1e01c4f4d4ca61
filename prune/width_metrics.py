"""How the units of every width are scored, one class a metric; importance.py shows them activations and gradients.

Sources: Minitron (arXiv 2407.14679, section 2) for activations of neurons, channels and attention heads; Minitron-SSM
(2504.11409, section 3) for Mamba heads and head channels; the digest of both in Nemotron Nano 2 (2508.14444). Molchanov
et al. (1611.06440, section 2.2) for the first-order Taylor term; LLM-Pruner (2305.11627) takes it to language models.
Shapes: [S, T] samples and tokens, [U...] the units of an axis (scores.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..models import processes
from ..models.axes import HIDDEN, MATRICES, Axis, Role, TensorSpec, segment_size, tensor_table
from ..models.checkpoint import row_blocks
from ..models.config import HybridConfig
from ..models.kinds import check_sources, score_sources
from .scores import WidthScores, check_width_scores, width_score_shapes

GetTensor = Callable[[str], Tensor]
AGGREGATES = ("mean", "l2", "var")
AGGREGATED = dict.fromkeys(("aggregate_batch", "aggregate_sequence"), AGGREGATES)


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


UnitMoments = Mapping[tuple[str, int], Moments]  # by axis kind and layer; each row of hidden has its own


class WidthMetric:
    """A way to score the units of every width.

    One that needs data names the activations that it `observed`, each with the kind of axis that it scores; with
    `needs_gradients` it is shown the gradient of the loss with respect to each of them as well.
    """

    needs_gradients: ClassVar[bool] = False

    @property
    def observed(self) -> Mapping[str, str]:
        """Names of activations (`HybridLM`) -> axis kinds; empty where no data is needed."""
        return {}

    @property
    def left_out(self) -> tuple[str, ...]:
        """The axis kinds whose units are left out one at a time instead (leave_one_out.py)."""
        return ()

    def moment_shape(self, kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the values of a sample of an axis kind whose scores have that shape."""
        return shape

    def per_sample(self, kind: str, activation: Tensor, gradient: Tensor | None, counted: Tensor) -> Tensor:
        """Values [S, U...] (float64) of an activation [S, T, U...] of an axis kind; counted [S, T] says at which
        positions a label counts, at one of each sample at least."""
        raise NotImplementedError(f"{type(self).__name__} needs no data")

    def scores(self, config: HybridConfig, get_tensor: GetTensor, moments: UnitMoments) -> WidthScores:
        """The scores of a model whose tensors `get_tensor` reads; the moments are those of `per_sample`'s values."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ActivationScores(WidthMetric):
    """The size of a unit's activations, aggregated over the positions whose label counts, then over samples.

    Aggregates are "mean" (of absolute values), "l2" and "var". Activations: RMSNorm outputs (hidden), X W_up or what
    down_proj reads (`ffn_source` "pre" or "act"; in a gated MLP only "act" sees the gate), the L2 norm over head_dim of
    the attention output (attn_heads), the x part of in_proj's output, z, or out_proj's input (`mamba_source`), and what
    an index of the SSM state adds to the output ("now"), to all outputs "to_come", or C (`state_source`; see
    kernels/state_energy.py). Experts are scored by `expert_source`: "reap" the weight times the L2 norm of the output,
    or that "norm" alone, both averaged over the tokens that chose the expert whatever the aggregates, how many those
    are ("frequency"), the weight that it has ("routing"), or what the logits lose without it ("logits"). With
    `times_output` the scores of neurons, attention and Mamba heads, and experts, are multiplied by the L2 norm of the
    weights that read the unit, so that a unit nobody reads scores zero. Raises InputError for an unknown option.
    """

    aggregate_batch: str = "l2"
    aggregate_sequence: str = "mean"
    mamba_source: str = "x"
    ffn_source: str = "pre"
    state_source: str = "now"
    expert_source: str = "reap"
    times_output: bool = False

    def __post_init__(self) -> None:
        check_sources(self, "importance.", **AGGREGATED)

    @property
    def observed(self) -> Mapping[str, str]:
        names = {"hidden": "hidden"}
        for axis, source in score_sources().items():
            value = getattr(self, source.option or "", next(iter(source.observed)))
            if value in source.observed:
                names[source.observed[value]] = axis
        return names

    @property
    def left_out(self) -> tuple[str, ...]:
        return tuple(
            axis
            for axis, source in score_sources().items()
            if source.left_out and getattr(self, str(source.option)) == source.left_out
        )

    def is_per_use(self, kind: str) -> bool:
        """Whether the axis kind's scores are means over the positions that use a unit."""
        source = None if kind == HIDDEN.kind else score_sources()[kind]
        if source is None or not source.per_use:
            return False
        return source.observed.get(getattr(self, str(source.option))) in source.per_use

    def moment_shape(self, kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape, 2) if self.is_per_use(kind) else shape

    def per_sample(self, kind: str, activation: Tensor, gradient: Tensor | None, counted: Tensor) -> Tensor:
        if self.is_per_use(kind):  # sums over the uses, and how many those were
            uses = counted[..., None] & ~activation.isnan()
            return torch.stack([torch.where(uses, activation, 0).sum(1, dtype=torch.float64), uses.sum(1)], -1)
        if kind != HIDDEN.kind and score_sources()[kind].reduce:
            activation = torch.linalg.vector_norm(activation, dim=-1, dtype=torch.float64)
        mask = counted.reshape(counted.shape + (1,) * (activation.dim() - 2))
        values = torch.where(mask, activation, 0)
        tokens = mask.sum(1)
        if self.aggregate_sequence == "mean":
            return values.abs().sum(1, dtype=torch.float64) / tokens
        squares = values.double().square().sum(1)
        if self.aggregate_sequence == "l2":
            return squares.sqrt()
        return (squares / tokens - (values.sum(1, dtype=torch.float64) / tokens).square()).clamp(min=0)

    def scores(self, config: HybridConfig, get_tensor: GetTensor, moments: UnitMoments) -> WidthScores:
        scores = aggregated(config, moments, self.aggregate_batch)
        for axis in scores:
            if self.is_per_use(axis.kind) and axis.layer is not None:
                total, uses = moments[(axis.kind, axis.layer)].total.cpu().unbind(-1)
                scores[axis] = total / uses.clamp(min=1)
        if self.times_output:
            readers = unit_weights(config, get_tensor, only_readers=True)
            for axis in (readers.keys() & scores.keys()) - {HIDDEN}:  # others are scored by what the output loses
                scores[axis] = scores[axis] * readers[axis]
        return scores


@dataclasses.dataclass(frozen=True)
class TaylorScores(WidthMetric):
    """What the loss of a sample would change by if the unit were gone, to first order.

    A gate z = 1 on the unit's activation a turns it off at z = 0, and to first order the loss changes by
    |dL/dz| = |sum_t a_t dL/da_t| (Molchanov et al., equation 8, with the sum over a unit's entries and positions inside
    the absolute value as there). L is the mean cross-entropy of the sample's labels, and the score the mean of |dL/dz|
    over samples: summed over all data with their signs the terms of a trained unit cancel, because dL/dz is a
    derivative along its own weights. Activations are what enters the matrices that read a unit last: the outputs of
    the norms (hidden), and what the matrix that writes into the stream reads.
    """

    needs_gradients: ClassVar[bool] = True

    @property
    def observed(self) -> Mapping[str, str]:
        return {"hidden": "hidden"} | {source.read_last: axis for axis, source in score_sources().items()}

    def per_sample(self, kind: str, activation: Tensor, gradient: Tensor | None, counted: Tensor) -> Tensor:
        assert gradient is not None
        # All positions, whether their own label counts or not: later ones may read them through the mixers.
        terms = (activation.double() * gradient.double()).sum(1)
        return (terms.sum(-1) if kind != HIDDEN.kind and score_sources()[kind].reduce else terms).abs()

    def scores(self, config: HybridConfig, get_tensor: GetTensor, moments: UnitMoments) -> WidthScores:
        return aggregated(config, moments, "mean")


@dataclasses.dataclass(frozen=True)
class MagnitudeScores(WidthMetric):
    """A baseline that needs no data: the L2 norm of the weight matrices' entries that belong to the unit."""

    @torch.no_grad()
    def scores(self, config: HybridConfig, get_tensor: GetTensor, moments: UnitMoments | None = None) -> WidthScores:
        scores = unit_weights(config, get_tensor)
        for axis, (size, *_) in width_score_shapes(config).items():
            if axis.row.ranked:  # by the place alone
                scores[axis] = torch.arange(size, 0, -1, dtype=torch.float64)
        check_width_scores(config, scores, "importance")
        return scores


@dataclasses.dataclass(frozen=True)
class RandomScores(WidthMetric):
    """The baseline that everything has to beat: uniform random scores."""

    seed: int

    def scores(
        self, config: HybridConfig, get_tensor: GetTensor | None = None, moments: UnitMoments | None = None
    ) -> WidthScores:
        generator = torch.Generator().manual_seed(self.seed)
        # Those of the groups' own widths last: a seed draws what it did before they could be cut.
        shapes = sorted(width_score_shapes(config).items(), key=lambda item: item[0].row.per_group)
        return {axis: torch.rand(shape, generator=generator, dtype=torch.float64) for axis, shape in shapes}


def empty_moments(config: HybridConfig, device: torch.device, metric: WidthMetric) -> dict[tuple[str, int], Moments]:
    moments: dict[tuple[str, int], Moments] = {}
    for axis, shape in width_score_shapes(config).items():
        if axis.kind in metric.left_out:
            continue
        if axis == HIDDEN:
            moments |= {("hidden", row): Moments(shape[1:], device) for row in range(shape[0])}
        else:
            assert axis.layer is not None
            moments[(axis.kind, axis.layer)] = Moments(metric.moment_shape(axis.kind, shape), device)
    return moments


def aggregated(config: HybridConfig, moments: UnitMoments, aggregate: str) -> WidthScores:
    results = {key: moment.result(aggregate) for key, moment in moments.items()}
    norms = [results[("hidden", row)] for row in range(config.num_layers + 1)]
    scores = {HIDDEN: torch.stack(norms)}
    return scores | {Axis(kind, layer): value for (kind, layer), value in results.items() if kind != "hidden"}


def unit_weights(config: HybridConfig, get_tensor: GetTensor, *, only_readers: bool = False) -> WidthScores:
    """The L2 norm of each unit's entries in the tensors of two or more dimensions, shaped as scores.

    With `only_readers`, the columns of matrices alone, which read it; axes that none has are left out.
    What belongs to a Mamba head as a whole is spread evenly over its channels.
    """
    shapes = width_score_shapes(config)
    squares = {axis: torch.zeros(shape, dtype=torch.float64) for axis, shape in shapes.items()}
    met = set()
    for tensor in tensor_table(config).values():
        if len(tensor.dimensions) < 2 or tensor.ahead is not None:
            continue
        sums = square_sums(get_tensor(tensor.name))
        for number, dimension in enumerate(tensor.dimensions):
            if only_readers and not reads_units(tensor, number):
                continue
            segments = sums[number].split([segment_size(segment) for segment in dimension])
            for segment, values in zip(dimension, segments, strict=True):
                axis = next((axis for axis, _ in segment if axis is not None), None)
                if axis is None or axis not in squares:  # what all heads of a key-value head share ranks none of them
                    continue
                target = squares[axis]
                met.add(axis)
                if axis == HIDDEN:
                    target = target[config.num_layers if tensor.layer is None else tensor.layer]
                factors = values.reshape([size for _, size in segment])
                if factors.dim() > target.dim():  # heads x (fixed) head_dim of attention
                    factors = factors.sum(-1)
                elif factors.dim() < target.dim():  # Mamba heads without their channels: dt
                    factors = factors[:, None] / target.shape[1]
                target += factors
    return {axis: value.sqrt() for axis, value in squares.items() if axis in met}


def reads_units(tensor: TensorSpec, number: int) -> bool:
    """Whether a tensor reads the units along its dimension `number`: a matrix those of its columns, and the last stack
    of experts the experts."""
    own = tensor.dimensions[-1][0][0].axis
    last = tensor.role is Role.EXPERTS and own is not None and own != HIDDEN
    return tensor.role in MATRICES and (number == len(tensor.dimensions) - 1 or (last and number == 0))


def square_sums(tensor: Tensor) -> list[Tensor]:
    """For each dimension the sums of squares over all others, float64 on the CPU; a piece of rows at a time."""
    sums = [torch.zeros(size, dtype=torch.float64) for size in tensor.shape]
    for start, stop in row_blocks(tuple(tensor.shape), torch.float32):
        squares = tensor[start:stop].float().square()
        for number, total in enumerate(sums):
            others = [other for other in range(tensor.dim()) if other != number]
            own = squares.sum(others, dtype=torch.float64).cpu()
            if number == 0:
                total[start:stop] = own
            else:
                total += own
    return sums
