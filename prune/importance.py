"""What the units of a model are worth: calibration data goes forward, and back where a metric needs gradients.

width_metrics.py says what becomes of the activations and gradients that pass here.
Shapes: [B, T] samples and tokens, [U...] the units of an axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sized
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels.linear_kl import linear_cross_entropy
from ..kernels.norm import rms_norm
from ..models import processes
from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.hybrid import HybridLM
from ..models.multipliers import scaled
from ..models.offload import STREAM_BYTES, Layers, layers_of
from .leave_one_out import leave_one_out
from .scores import WidthScores, check_width_scores
from .width_metrics import ActivationScores, UnitMoments, WidthMetric, empty_moments

IGNORED_LABEL = -100


class TokenBatch(Protocol):
    """Packed rows: input_ids, labels (shifted; -100 = not counted) and seq_idx, each [B, T]."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def seq_idx(self) -> Tensor: ...


@torch.no_grad()
def score_widths(
    model: HybridLM | Layers,
    batches: Iterable[TokenBatch] = (),
    metric: WidthMetric | None = None,
    *,
    stream_bytes: int = STREAM_BYTES,
    on_step: Callable[[int, int | None], None] | None = None,
    uses: dict[int, Tensor] | None = None,
) -> WidthScores:
    """Scores every width by a metric (`ActivationScores()` by default); see scores.py for the shapes.

    A sample is one row of a batch, and of a row those positions count whose label counts (so neither padding nor
    the last token of a document); a row without any is skipped.
    Layer after layer runs; where weights are read from a folder, over as many batches as `stream_bytes` of residual
    streams hold (one at least), so that each group of them reads the weights once. A backward pass keeps the streams
    before every layer, and runs each layer again for its gradients: no more than one layer's graph is in memory.
    Of many processes each has batches of its own. `on_step(done, total)` counts layers times batches. `uses`, where it
    is given, is filled with how many of the counted tokens chose each expert [E], by layer, as far as activations are
    observed. Raises InputError when no position counts, and when an activation is not finite.
    """
    metric = ActivationScores() if metric is None else metric
    source = layers_of(model)
    batches = list(batches) if metric.left_out else batches
    moments = empty_moments(source.config, source.device, metric) if metric.observed else {}
    if metric.observed:
        chosen = empty_uses(source) if uses is not None else {}
        observe_batches(source, batches, metric, moments, chosen, stream_bytes, on_step)
        if uses is not None:
            uses |= {layer: processes.all_sum(counts).cpu() for layer, counts in chosen.items()}
        for moment in moments.values():
            moment.gather()
        if not all(moment.samples for moment in moments.values()):
            raise InputError("importance: the data has no counted token; expected at least one sample of two tokens")
    scores = metric.scores(source.config, source.tensor, moments)
    for kind in metric.left_out:
        counted = [(batch, (batch.labels != IGNORED_LABEL).to(source.device)) for batch in batches]
        scores |= leave_one_out(source, counted, kind, stream_bytes)
    check_width_scores(source.config, scores, "importance")
    return scores


def observe_batches(
    source: Layers,
    batches: Iterable[TokenBatch],
    metric: WidthMetric,
    moments: UnitMoments,
    uses: Mapping[int, Tensor],
    stream_bytes: int,
    on_step: Callable[[int, int | None], None] | None,
) -> None:
    """Adds what the metric makes of this process's batches to the moments, and to `uses` which experts tokens chose."""
    used = {kind.experts.use for kind in source.config.kinds if kind.experts is not None and uses}
    names = {*metric.observed, *(() if metric.needs_gradients else used)}
    layers, rounds = source.config.num_layers, 1 + metric.needs_gradients
    passes, copies = (backward_pass, layers + 1) if metric.needs_gradients else (forward_pass, 1)
    total = len(batches) * (layers * rounds + 1) if isinstance(batches, Sized) else None  # 1: the final norm
    done = 0
    with processes.together():
        for group in groups_of(batches, source, stream_bytes // copies):
            counted = [(batch.labels != IGNORED_LABEL).to(source.device) for batch in group]
            for seen in passes(source, group, names):
                mask = counted[seen.number]
                rows = mask.any(1)
                for name, activation in seen.activations.items():
                    if name in used:
                        uses[seen.layer].add_(activation[mask].sum(0, dtype=torch.float64))
                    if name not in metric.observed:
                        continue
                    kind, gradient = metric.observed[name], seen.gradients.get(name)
                    if (kind, seen.layer) not in moments:
                        continue  # the layer shows what it has no axis for
                    own = None if gradient is None else gradient[rows]
                    moments[(kind, seen.layer)].add(metric.per_sample(kind, activation[rows], own, mask[rows]))
                done += 1
                if on_step is not None:
                    on_step(done, total)


def empty_uses(source: Layers) -> dict[int, Tensor]:
    """Zeros [E] for each layer that has experts."""
    config = source.config
    layers = [layer for layer, kind in enumerate(config.kinds) if kind.experts is not None]
    sizes = {layer: config.kinds[layer].chosen(config)[1] for layer in layers}
    return {layer: torch.zeros(size, dtype=torch.float64, device=source.device) for layer, size in sizes.items()}


def groups_of(batches: Iterable[TokenBatch], source: Layers, stream_bytes: int) -> Iterator[list[TokenBatch]]:
    """Batches that run side by side: one where the weights are in memory, else as many as `stream_bytes` hold."""
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


class Sight(NamedTuple):
    """What a layer (num_layers: the final norm) showed of batch `number` of a group, by the activation's name."""

    layer: int
    number: int
    activations: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


def forward_pass(source: Layers, group: list[TokenBatch], names: Container[str]) -> Iterator[Sight]:
    """Moves the batches' streams through all layers and the final norm; layer after layer, batch after batch."""
    streams = source.embed([batch.input_ids for batch in group])
    seq_idx = [batch.seq_idx.to(source.device) for batch in group]
    for layer in source.in_turn(range(source.config.num_layers)):
        for number, stream in enumerate(streams):
            seen: dict[str, Tensor] = {}
            streams[number] = layer.forward(stream, seq_idx[number], Keeper(seen, names))
            yield Sight(layer.number, number, seen, {})
    norm = source.tensor("norm_f.weight")
    for number, stream in enumerate(streams):
        yield Sight(source.config.num_layers, number, {"hidden": rms_norm(stream, norm, source.config.norm_eps)}, {})


def backward_pass(source: Layers, group: list[TokenBatch], names: Container[str]) -> Iterator[Sight]:
    """Once forward for the streams before every layer, then back from the loss (`loss_gradients`).

    Each layer runs again from its stream, this time with a graph, and takes the gradient of what follows it on to what
    precedes it. Resident or read from a folder, the same code runs on the same numbers.
    """
    config, seq_idx = source.config, [batch.seq_idx.to(source.device) for batch in group]
    before = [source.embed([batch.input_ids for batch in group])]
    for layer in source.in_turn(range(config.num_layers)):
        before.append([])
        for number, stream in enumerate(before[-2]):
            before[-1].append(layer.forward(stream, seq_idx[number]))
            yield Sight(layer.number, number, {}, {})
    norm = source.tensor("norm_f.weight")
    head = source.tensor("embeddings.weight" if config.tie_word_embeddings else "lm_head.weight")
    gradients = []
    for number, stream in enumerate(before.pop()):
        labels = group[number].labels.to(source.device)
        normed, own, gradient = loss_gradients(stream, norm, config, head, labels)
        gradients.append(gradient)
        yield Sight(config.num_layers, number, {"hidden": normed}, {"hidden": own})
    for layer in source.in_turn(range(config.num_layers)[::-1]):
        for number, stream in enumerate(before.pop()):
            seen: dict[str, Tensor] = {}
            with torch.enable_grad():
                after = layer.forward(stream.requires_grad_(), seq_idx[number], Keeper(seen, names))
            gradients[number], *rest = torch.autograd.grad(after, [stream, *seen.values()], gradients[number])
            yield Sight(layer.number, number, seen, dict(zip(seen, rest, strict=True)))


def loss_gradients(
    stream: Tensor, norm: Tensor, config: HybridConfig, head: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the final norm gives [B, T, H], and the gradients with respect to it and to the last stream [B, T, H] of the
    sum over samples of each one's mean cross-entropy (one loss a sample, whose gradients do not touch the others')."""
    with torch.enable_grad():
        normed = rms_norm(stream.requires_grad_(), norm, config.norm_eps)
        losses = [
            linear_cross_entropy(rows, head, own).loss
            for rows, own in zip(scaled(normed, config.multipliers.logits), labels, strict=True)
            if bool((own != IGNORED_LABEL).any())
        ]
        if not losses:
            return normed, torch.zeros_like(normed), torch.zeros_like(stream)
        own, gradient = torch.autograd.grad(torch.stack(losses).sum(), (normed, stream))
    return normed, own, gradient


@dataclasses.dataclass(frozen=True)
class Keeper:
    """An observer that keeps the activations of these names."""

    seen: dict[str, Tensor]
    names: Container[str]

    def __call__(self, name: str, _: int, tensor: Tensor) -> None:
        if name in self.names:
            self.seen[name] = tensor
