"""The gap between a teacher and its students on held-out text, with confidence intervals over documents.

One streamed pass: the teacher's hidden states of a batch serve every student, `linear_kl` gives the per-token
figures, and what is kept are sums per document and per position. Intervals are percentile bootstraps of ratio
estimators (sums over sums) with documents resampled, the same resamples for every model, so that differences pair.
Shapes: [D] documents, [R] resamples, [T] positions of a row.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from ..kernels.linear_kl import linear_cross_entropy, linear_kl
from ..models.errors import CheckFailed, InputError
from ..models.hybrid import HybridLM
from .losses import check_vocabularies

BUCKETS = 16
TEACHER = "teacher"


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
class Difference:
    """`second` minus `first`, paired: both on the same resampled documents, so that what makes a document hard for
    every model falls out of the interval."""

    first: str
    second: str
    cross_entropy: Estimate
    bits_per_byte: Estimate
    kl: Estimate
    agreement: Estimate


@dataclasses.dataclass(frozen=True)
class GapReport:
    """The figures of the teacher (named "teacher") and every student on the same tokens, and of every two of them the
    difference. `recovery` is None where nothing was pruned and distilled, or pruning lost nothing."""

    tokens: int
    text_bytes: int
    documents: int
    models: Mapping[str, ModelGap]
    differences: tuple[Difference, ...]
    recovery: Estimate | None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Sums:
    """Per-document sums of one model (cross-entropy, KL, agreement), and by position KL and tokens [2, T]."""

    def __init__(self) -> None:
        self.documents: dict[int, np.ndarray] = {}
        self.position = np.zeros((2, 0))

    def add(self, values: torch.Tensor, doc_id: torch.Tensor, counted: torch.Tensor, width: int) -> None:
        """values [3, tokens] of a batch (0 where not counted), flattened rows of `width` tokens; all on the CPU."""
        owners, places = torch.unique(doc_id[counted], return_inverse=True)
        sums = torch.zeros(len(owners), values.shape[0], dtype=torch.float64)
        sums.index_add_(0, places, values[:, counted].T.double())
        for owner, row in zip(owners.tolist(), sums.numpy(), strict=True):
            self.documents[owner] = self.documents.get(owner, 0.0) + row
        self.position = widened(self.position, width)
        for row, numbers in enumerate((values[1], counted)):
            self.position[row, :width] += numbers.double().view(-1, width).sum(0).numpy()


def widened(position: np.ndarray, width: int) -> np.ndarray:
    """Zeros behind the columns, up to `width` of them."""
    return np.pad(position, ((0, 0), (0, max(width - position.shape[1], 0))))


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
    """Figures of the teacher and its students over `batches` (see `distill.data.Batch`; moved to the models' device).

    Bits per byte is the cross-entropy of every label, end of document included, over the labels' UTF-8 bytes.
    Where students are named "pruned" and "distilled", `recovery` is (CE pruned - CE distilled) / (CE pruned - CE
    teacher). `on_step(batches done)`. Raises InputError where vocabularies differ or a student is named "teacher",
    CheckFailed where a model's figures are not finite, ValueError where nothing counts.
    """
    if TEACHER in students:
        raise InputError(f"gap: a student is named {TEACHER!r}, which stands for the teacher; give it another name")
    if resamples < 1:
        raise InputError(f"gap: {resamples} resamples; expected at least 1")
    for student in students.values():
        check_vocabularies(teacher, student)
    device = teacher.head_weight.device
    sums = {name: Sums() for name in (TEACHER, *students)}
    sizes: dict[int, np.ndarray] = {}  # tokens and bytes a document
    width = 0
    for done, batch in enumerate(batches, 1):
        width = max(width, batch.input_ids.shape[1])
        labels, doc_id = batch.labels.flatten().cpu(), batch.doc_id.flatten().cpu()
        counted = labels >= 0
        add_sizes(sizes, doc_id[counted], batch.n_bytes.flatten().cpu()[counted])
        for name, values in figures(teacher, students, batch, device):
            sums[name].add(values.cpu(), doc_id, counted, batch.input_ids.shape[1])
        if on_step is not None:
            on_step(done)
    if not sum(text_bytes for _, text_bytes in sizes.values()):
        raise ValueError("measure_gap: no token counts; expected batches with labels and n_bytes")
    return summarise(sums, sizes, width, resamples, seed)


def figures(
    teacher: HybridLM, students: Mapping[str, HybridLM], batch: Any, device: torch.device
) -> Iterable[tuple[str, torch.Tensor]]:
    """Each model's cross-entropy, KL and agreement [3, tokens] on a batch, the teacher first."""
    ids, seq_idx, labels = batch.input_ids.to(device), batch.seq_idx.to(device), batch.labels.flatten().to(device)
    target = teacher.hidden_states(ids, seq_idx=seq_idx).flatten(0, 1)
    own = linear_cross_entropy(target, teacher.head_weight, labels).cross_entropy
    yield TEACHER, torch.stack((own, torch.zeros_like(own), (labels >= 0).to(own.dtype)))
    for name, student in students.items():
        hidden = student.hidden_states(ids, seq_idx=seq_idx).flatten(0, 1)
        found = linear_kl(hidden, student.head_weight, target, teacher.head_weight, labels=labels)
        assert found.cross_entropy is not None
        yield name, torch.stack((found.cross_entropy, found.kl, found.agreement.to(found.kl.dtype)))


def add_sizes(sizes: dict[int, np.ndarray], owners: torch.Tensor, n_bytes: torch.Tensor) -> None:
    for owner in torch.unique(owners).tolist():
        mine = owners == owner
        added = np.array([int(mine.sum()), int(n_bytes[mine].sum())], dtype=np.float64)
        sizes[owner] = sizes.get(owner, 0.0) + added


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums of a quantity over all documents, and over each resample's [R]."""

    all: float
    drawn: np.ndarray

    def over(self, other: Totals, scale: float = 1.0) -> Totals:
        return Totals(self.all * scale / other.all, self.drawn * scale / np.maximum(other.drawn, 1))

    def minus(self, other: Totals) -> Totals:
        return Totals(self.all - other.all, self.drawn - other.drawn)

    def estimate(self) -> Estimate:
        low, high = np.percentile(self.drawn, [2.5, 97.5])
        return Estimate(float(self.all), float(low), float(high))


def summarise(
    sums: Mapping[str, Sums], sizes: Mapping[int, np.ndarray], width: int, resamples: int, seed: int
) -> GapReport:
    """Ratios and intervals from the per-document sums."""
    owners = sorted(sizes)
    columns = {"tokens": [sizes[owner][0] for owner in owners], "bytes": [sizes[owner][1] for owner in owners]}
    for name, found in sums.items():
        for row, kind in enumerate(("nats", "kl", "agree")):
            columns[f"{kind} {name}"] = [found.documents[owner][row] for owner in owners]
            if not np.isfinite(columns[f"{kind} {name}"]).all():
                raise CheckFailed(f"gap: the figures of {name!r} are not finite; try a wider dtype")
    drawn = resampled({name: np.array(column) for name, column in columns.items()}, resamples, seed)
    tokens, text_bytes = drawn["tokens"], drawn["bytes"]
    ratios = {
        name: {
            "cross_entropy": drawn[f"nats {name}"].over(tokens),
            "bits_per_byte": drawn[f"nats {name}"].over(text_bytes, 1 / math.log(2)),
            "kl": drawn[f"kl {name}"].over(tokens),
            "agreement": drawn[f"agree {name}"].over(tokens),
        }
        for name in sums
    }
    models = {}
    for name, found in sums.items():
        estimates = {key: ratio.estimate() for key, ratio in ratios[name].items()}
        perplexity = Estimate(*(exponential(value) for value in dataclasses.astuple(estimates["cross_entropy"])))
        models[name] = ModelGap(perplexity=perplexity, kl_by_position=stretches(found.position, width), **estimates)
    differences = tuple(
        Difference(a, b, **{key: ratios[b][key].minus(ratios[a][key]).estimate() for key in ratios[a]})
        for a, b in itertools.combinations(sums, 2)
    )
    entropy = {name: ratio["cross_entropy"] for name, ratio in ratios.items()}
    return GapReport(int(tokens.all), int(text_bytes.all), len(owners), models, differences, recovered(entropy))


def resampled(columns: Mapping[str, np.ndarray], resamples: int, seed: int) -> dict[str, Totals]:
    """The sum of each column [D], and its sums [R] with the documents drawn anew, the same draws for every column."""
    generator = np.random.default_rng(seed)
    documents = len(next(iter(columns.values())))
    drawn = {name: np.empty(resamples) for name in columns}
    for start in range(0, resamples, 64):  # a part at a time: [R, D] would not do for many documents
        rows = slice(start, min(start + 64, resamples))
        counts = generator.multinomial(documents, np.full(documents, 1 / documents), size=rows.stop - start)
        for name, column in columns.items():
            drawn[name][rows] = counts.astype(np.float64) @ column
    return {name: Totals(float(column.sum()), drawn[name]) for name, column in columns.items()}


def recovered(entropy: Mapping[str, Totals]) -> Estimate | None:
    """(CE pruned - CE distilled) / (CE pruned - CE teacher); None where a resample has nothing lost by pruning."""
    if not {"pruned", "distilled"} <= entropy.keys():
        return None
    lost = entropy["pruned"].minus(entropy[TEACHER])
    gained = entropy["pruned"].minus(entropy["distilled"])
    if not (lost.all > 0 and (lost.drawn > 0).all()):
        return None
    return Totals(gained.all / lost.all, gained.drawn / lost.drawn).estimate()


def stretches(position: np.ndarray, width: int) -> tuple[tuple[int, float], ...]:
    """(first position, mean KL) of up to BUCKETS stretches of a row; those without a token are left out."""
    count = min(BUCKETS, width)
    starts = [-(-number * width // count) for number in range(count)]
    kl, tokens = np.add.reduceat(widened(position, width), starts, axis=1)
    return tuple((start, float(kl[i] / tokens[i])) for i, start in enumerate(starts) if tokens[i])


def exponential(nats: float) -> float:
    """exp, at most the largest float: a broken model's perplexity is a number all the same."""
    return math.exp(nats) if nats < 709 else sys.float_info.max
