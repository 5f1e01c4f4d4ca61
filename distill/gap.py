"""The gap between a teacher and its students on held-out text, with confidence intervals over documents.

One streamed pass: the teacher's hidden states of a batch serve every student, `linear_kl` gives the per-token
figures, and what is kept are sums per document and per position. Intervals are percentile bootstraps of ratio
estimators (sums over sums) with documents resampled, the same resamples for every model, so that differences pair.
Shapes: [D] documents, [R] resamples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from ..kernels.linear_kl import linear_cross_entropy, linear_kl
from ..models.hybrid import HybridLM
from .losses import check_vocabularies

BUCKETS = 16


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class ModelGap:
    """One model's figures: cross-entropy (nats a token), perplexity, bits per byte of text, and, against the teacher,
    KL(teacher || model) in nats a token and the share of tokens whose likeliest successor is the teacher's.
    `kl_by_position`: (first position, mean KL) for each stretch of the row."""

    cross_entropy: Estimate
    perplexity: Estimate
    bits_per_byte: Estimate
    kl: Estimate
    agreement: Estimate
    kl_by_position: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class GapReport:
    """The figures of the teacher (named "teacher") and every student on the same tokens."""

    tokens: int
    text_bytes: int
    documents: int
    models: Mapping[str, ModelGap]
    recovery: Estimate | None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Sums:
    """Per-document sums of one model [4, D] (cross-entropy, KL, agreement), and KL by position."""

    def __init__(self) -> None:
        self.documents: dict[int, np.ndarray] = {}
        self.position = np.zeros((2, BUCKETS))

    def add(self, values: torch.Tensor, doc_id: torch.Tensor, counted: torch.Tensor, width: int) -> None:
        """values [3, tokens] of a batch (0 where not counted), flattened rows of `width` tokens."""
        owners, places = torch.unique(doc_id[counted], return_inverse=True)
        sums = torch.zeros(len(owners), values.shape[0], dtype=torch.float64)
        sums.index_add_(0, places, values[:, counted].T.double().cpu())
        for owner, row in zip(owners.tolist(), sums.numpy(), strict=True):
            self.documents[owner] = self.documents.get(owner, 0.0) + row
        bucket = torch.arange(values.shape[1]) % width * BUCKETS // width
        for row, numbers in enumerate((values[1].double().cpu(), counted.double().cpu())):
            found = torch.zeros(BUCKETS, dtype=torch.float64).index_add_(0, bucket, numbers)
            self.position[row] += found.numpy()


@torch.no_grad()
def measure_gap(
    teacher: HybridLM,
    students: Mapping[str, HybridLM],
    batches: Iterable[Any],
    *,
    resamples: int = 1000,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> GapReport:
    """Figures of the teacher and its students over `batches` (see `distill.data.Batch`).

    Bits per byte is the cross-entropy of every label, end of document included, over the labels' UTF-8 bytes.
    Where students are named "pruned" and "distilled", `recovery` is (CE pruned - CE distilled) / (CE pruned - CE
    teacher). `on_step(batches done)`. Raises InputError where vocabularies differ, ValueError where nothing counts.
    """
    for student in students.values():
        check_vocabularies(teacher, student)
    sums = {name: Sums() for name in ("teacher", *students)}
    sizes: dict[int, np.ndarray] = {}  # tokens and bytes a document
    width = 0
    for done, batch in enumerate(batches, 1):
        width = batch.input_ids.shape[1]
        labels, doc_id = batch.labels.flatten(), batch.doc_id.flatten()
        counted = labels >= 0
        add_sizes(sizes, doc_id[counted], batch.n_bytes.flatten()[counted])
        target = teacher.hidden_states(batch.input_ids, seq_idx=batch.seq_idx).flatten(0, 1)
        own = linear_cross_entropy(target, teacher.head_weight, labels).cross_entropy
        same = torch.stack((own, torch.zeros_like(own), counted.to(own.dtype)))
        sums["teacher"].add(same, doc_id, counted, width)
        for name, student in students.items():
            hidden = student.hidden_states(batch.input_ids, seq_idx=batch.seq_idx).flatten(0, 1)
            found = linear_kl(hidden, student.head_weight, target, teacher.head_weight, labels=labels)
            assert found.cross_entropy is not None
            values = torch.stack((found.cross_entropy, found.kl, found.agreement.to(found.kl.dtype)))
            sums[name].add(values, doc_id, counted, width)
        if on_step is not None:
            on_step(done)
    if not sizes:
        raise ValueError("measure_gap: no token counts; expected batches with labels")
    return summarise(sums, sizes, width, resamples, seed)


def add_sizes(sizes: dict[int, np.ndarray], owners: torch.Tensor, n_bytes: torch.Tensor) -> None:
    for owner in torch.unique(owners).tolist():
        mine = owners == owner
        added = np.array([int(mine.sum()), int(n_bytes[mine].sum())], dtype=np.float64)
        sizes[owner] = sizes.get(owner, 0.0) + added


def summarise(
    sums: Mapping[str, Sums], sizes: Mapping[int, np.ndarray], width: int, resamples: int, seed: int
) -> GapReport:
    """Ratios and intervals from the per-document sums."""
    owners = sorted(sizes)
    tokens, text_bytes = np.array([sizes[owner] for owner in owners]).T
    draws = np.random.default_rng(seed).multinomial(len(owners), np.full(len(owners), 1 / len(owners)), size=resamples)
    drawn_tokens, drawn_bytes = draws @ tokens, draws @ text_bytes
    models, entropy = {}, {}
    for name, found in sums.items():
        nats, kl, agree = np.array([found.documents[owner] for owner in owners]).T
        drawn = draws @ nats
        entropy[name] = (nats.sum(), drawn)
        cross_entropy = estimate(nats.sum() / tokens.sum(), drawn / drawn_tokens)
        position = found.position[0] / np.maximum(found.position[1], 1)
        models[name] = ModelGap(
            cross_entropy=cross_entropy,
            perplexity=Estimate(*(math.exp(value) for value in dataclasses.astuple(cross_entropy))),
            bits_per_byte=estimate(
                nats.sum() / math.log(2) / text_bytes.sum(), drawn / math.log(2) / np.maximum(drawn_bytes, 1)
            ),
            kl=estimate(kl.sum() / tokens.sum(), draws @ kl / drawn_tokens),
            agreement=estimate(agree.sum() / tokens.sum(), draws @ agree / drawn_tokens),
            kl_by_position=tuple((i * width // BUCKETS, float(value)) for i, value in enumerate(position)),
        )
    recovery = None
    if {"pruned", "distilled"} <= entropy.keys():
        pruned, distilled, teacher = entropy["pruned"], entropy["distilled"], entropy["teacher"]
        lost = pruned[0] - teacher[0]
        recovery = estimate((pruned[0] - distilled[0]) / lost, (pruned[1] - distilled[1]) / (pruned[1] - teacher[1]))
    return GapReport(int(tokens.sum()), int(text_bytes.sum()), len(owners), models, recovery)


def estimate(value: float, resampled: np.ndarray) -> Estimate:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))
