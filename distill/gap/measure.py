"""The gap between a teacher and its students on held-out text, with confidence intervals over documents.

One streamed pass: the teacher's hidden states of a batch serve every student, `linear_figures` gives the per-token
figures, and what is kept are sums (`gap_sums`), from which `gap_statistics` makes ratios and their intervals.
Shapes: [D] documents, [R] resamples, [T] positions of a row, [V] vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels.linear_figures import LinearFigures, linear_figures
from ...models.errors import CheckFailed, InputError
from ...models.hybrid import HybridLM
from ...models.placement import placed
from ...models.row_split import RowSplit
from ..losses import check_vocabularies
from ..row_parts import whole_states
from ..text.conversations import PARTS, TEXT
from .examples import Window, Worst
from .expert_uses import Uses, counting_uses
from .kept import Kept
from .statistics import Estimate, Totals, calibration_error, resampled
from .sums import BINNED, BINS, GROUPED, QUANTITIES, Sums, add_sizes, widened
from .token_groups import CLASSES, CONTEXTS, TokenGroups, context_name, contexts

BUCKETS = 16
PAGE = 4096  # documents whose bits lie together
TEACHER = "teacher"
PROMPT = "prompt"  # what each of the samples has beside the models' texts
TAKEN = {TEACHER: "the teacher", PROMPT: "the prompts of samples"}


@dataclasses.dataclass(frozen=True)
class GroupGap:
    """The figures of some of the tokens; of one document alone there is no interval."""

    tokens: int
    documents: int
    cross_entropy: Estimate
    kl: Estimate
    agreement: Estimate


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Expected calibration error of the argmax over 15 equal bins of its probability (arXiv 1706.04599), and
    of each bin that has any: tokens, mean probability, share that were right."""

    ece: Estimate
    bins: tuple[tuple[int, float, float], ...]


@dataclasses.dataclass(frozen=True)
class ModelGap:
    """One model's figures: cross-entropy (nats a token), perplexity, bits per byte of text, and, against the teacher,
    KL(teacher || model) and KL(model || teacher) in nats a token, the share of tokens whose argmax is the
    teacher's, how many of the teacher's top five are among its own, the rank of the teacher's argmax (mean, and
    median over all tokens), and the probability mass kept: sum_v min(p_v, q_v).
    `by_part` of conversations: text beside them, prompts, answers and thoughts.
    `kl_by_position`: (first position, mean KL) for each stretch of the row; `by_context`: by the tokens of the
    document seen so far in the row."""

    cross_entropy: Estimate
    perplexity: Estimate
    bits_per_byte: Estimate
    kl: Estimate
    agreement: Estimate
    kl_by_position: tuple[tuple[int, float], ...]
    reverse_kl: Estimate
    top5_agreement: Estimate
    mean_rank: Estimate
    median_rank: int
    mass_kept: Estimate
    calibration: Calibration
    by_context: Mapping[str, GroupGap]
    by_class: Mapping[str, GroupGap]
    by_domain: Mapping[str, GroupGap]
    by_part: Mapping[str, GroupGap] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Difference:
    """`second` minus `first`, paired: both on the same resampled documents, so that what makes a document hard for
    every model falls out of the interval. `p`: of each figure, how likely a difference as large would be if there were
    none (two-sided, by the same resamples)."""

    first: str
    second: str
    cross_entropy: Estimate
    bits_per_byte: Estimate
    kl: Estimate
    agreement: Estimate
    reverse_kl: Estimate
    top5_agreement: Estimate
    mean_rank: Estimate
    mass_kept: Estimate
    p: Mapping[str, float | None]


@dataclasses.dataclass(frozen=True)
class GapReport:
    """The figures of the teacher (named "teacher") and every student on the same tokens, and of every two of them the
    difference. `recovery` is None where nothing was pruned and distilled, or pruning lost nothing. `worst`: the
    windows where each student is furthest from the teacher. `expert_uses`: of a model with experts, by layer how many
    tokens chose each (not counted where rows went through the models in parts)."""

    tokens: int
    text_bytes: int
    documents: int
    models: Mapping[str, ModelGap]
    differences: tuple[Difference, ...]
    recovery: Estimate | None
    worst: Mapping[str, Sequence[Window]]
    expert_uses: Mapping[str, Mapping[str, list[int]]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


RATIOS = {  # each over the tokens
    "cross_entropy": "nats",
    "kl": "kl",
    "agreement": "agree",
    "reverse_kl": "reverse_kl",
    "top5_agreement": "top5",
    "mean_rank": "rank",
    "mass_kept": "overlap",
}


@torch.no_grad()
def measure_gap(
    teacher: HybridLM,
    students: Mapping[str, HybridLM],
    batches: Iterable[Any],
    *,
    resamples: int = 1000,
    seed: int = 0,
    groups: TokenGroups | None = None,
    worst: int = 0,
    device: torch.device | None = None,
    on_step: Callable[[int], None] | None = None,
    split: RowSplit | None = None,
    kept: Kept | None = None,
) -> GapReport:
    """Figures of the teacher and its students over `batches` (see `distill.data.Batch`; moved to the models' device).

    With a `device` models that wait elsewhere come to it one at a time, for each batch anew. With a `split` rows go
    through the models in parts. Figures that are `kept` of the same models and batches are not computed again, and
    those of the other batches are kept there.

    Bits per byte is the cross-entropy of every label, end of document included, over the labels' UTF-8 bytes.
    Where students are named "pruned" and "distilled", `recovery` is (CE pruned - CE distilled) / (CE pruned - CE
    teacher). `groups` splits the figures by domain and token class; `worst` windows are kept of each student.
    `on_step(batches done)`. Raises InputError where vocabularies differ, a student has a name of TAKEN or
    nothing counts, CheckFailed where a model's figures are not finite.
    """
    check_names(students)
    if resamples < 1 or worst < 0:
        raise InputError(f"gap: {resamples} resamples (at least 1), {worst} worst windows (at least 0)")
    for student in students.values():
        check_vocabularies(teacher, student)
    sums = {name: Sums() for name in (TEACHER, *students)}
    windows = {name: Worst(worst) for name in students}
    sizes: dict[int, np.ndarray] = {}  # tokens and bytes a document
    seen = Seen()
    uses: dict[str, Uses] = {name: {} for name in sums}
    width = 0
    for done, batch in enumerate(batches, 1):
        width = max(width, batch.input_ids.shape[1])
        labels, doc_id = batch.labels.cpu(), batch.doc_id.cpu()
        counted = labels >= 0
        seen.add(torch.unique(doc_id[counted]).tolist())
        add_sizes(sizes, doc_id[counted], batch.n_bytes.cpu()[counted])
        measure = functools.partial(figures, teacher, students, batch, device, split)
        results = measure(uses) if kept is None else kept.figures(done, list(sums), measure, uses)
        grouping = groupings(batch, groups)
        for name, values in zip(sums, results, strict=True):
            sums[name].add(values, results[0], labels.flatten(), doc_id.flatten(), labels.shape[1], grouping)
            if name in windows:
                windows[name].add(values, results[0], labels, doc_id)
        if on_step is not None:
            on_step(done)
    if not sum(text_bytes for _, text_bytes in sizes.values()):
        raise InputError("gap: no token counts: no label of these rows stands for text; give more or longer text")
    report = summarise(sums, sizes, width, resamples, seed, () if groups is None else groups.domains)
    furthest = {name: tuple(worst.windows) for name, worst in windows.items()}
    chosen = {name: {str(layer): counts.long().tolist() for layer, counts in own.items()} for name, own in uses.items()}
    chosen = {name: own for name, own in chosen.items() if own}
    return dataclasses.replace(report, documents=len(seen), worst=furthest, expert_uses=chosen)


def check_names(students: Iterable[str]) -> None:
    """Raises InputError where a student has a name that stands for something else in gap.json."""
    for name in students:
        if name in TAKEN:
            raise InputError(f"gap: a student is named {name!r}, which stands for {TAKEN[name]}; give it another name")


class Seen:
    """Which documents have come, in any order: a bit for each."""

    def __init__(self) -> None:
        self.pages: dict[int, int] = {}

    def add(self, documents: Iterable[int]) -> None:
        for document in documents:
            page, place = divmod(document, PAGE)
            self.pages[page] = self.pages.get(page, 0) | 1 << place

    def __len__(self) -> int:
        return sum(page.bit_count() for page in self.pages.values())


def figures(
    teacher: HybridLM,
    students: Mapping[str, HybridLM],
    batch: Any,
    device: torch.device | None,
    split: RowSplit | None = None,
    uses: Mapping[str, Uses] | None = None,
) -> list[LinearFigures]:
    """Each model's per-token figures on a batch, on the CPU, the teacher's first; of whole rows `uses` has the choices
    of experts added to it."""
    where = device or teacher.head_weight.device
    ids, seq_idx, labels = batch.input_ids.to(where), batch.seq_idx.to(where), batch.labels.flatten().to(where)
    sides = []
    for name, model in {TEACHER: teacher, **students}.items():
        with contextlib.ExitStack() as stack:
            stack.enter_context(placed(model, device))  # the head stays for the figures, which need all of them
            if uses is not None and split is None:
                stack.enter_context(counting_uses(model, uses[name], batch.labels >= 0))
            hidden = whole_states(model, ids, seq_idx, split).flatten(0, 1)
            sides.append((hidden, model.head_weight))
    results = linear_figures(sides[1:], *sides[0], labels)
    return [LinearFigures(*(column.cpu() for column in model)) for model in results]


def groupings(batch: Any, groups: TokenGroups | None) -> dict[str, tuple[Tensor, int]]:
    """The group of each token of a batch [tokens] in each grouping, and the number of groups."""
    numbered = {"context": (contexts(batch.seq_idx.cpu()).flatten(), CONTEXTS)}
    parts = getattr(batch, "parts", None)
    own = torch.full_like(batch.labels, TEXT) if parts is None else parts
    numbered["part"] = (own.flatten().cpu().long(), len(PARTS))
    if groups is not None:
        labels, doc_id = batch.labels.flatten().cpu().clamp_min(0), batch.doc_id.flatten().cpu().clamp_min(0)
        numbered["class"] = (groups.class_of[labels], len(CLASSES))
        numbered["domain"] = (groups.domain_of[doc_id].long(), len(groups.domains))
    return numbered


def summarise(
    sums: Mapping[str, Sums],
    sizes: Mapping[int, np.ndarray],
    width: int,
    resamples: int,
    seed: int,
    domains: Sequence[str] = (),
) -> GapReport:
    """Ratios and intervals from the sums; the columns of a model are named MODEL/WHAT."""
    owners = sorted(sizes)
    columns = {"tokens": np.array([sizes[owner][0] for owner in owners])}
    columns["bytes"] = np.array([sizes[owner][1] for owner in owners])
    for name, one in sums.items():
        table = np.stack([one.documents[owner] for owner in owners])
        if not np.isfinite(table).all():
            raise CheckFailed(f"gap: the figures of {name!r} are not finite; try a wider dtype")
        columns |= {f"{name}/{kind}": table[:, place] for place, kind in enumerate(QUANTITIES)}
        columns |= spread(f"{name}/bins", one.bins, owners, BINNED)
        for grouping, values in one.groups.items():
            columns |= spread(f"{name}/{grouping}", values, owners, GROUPED)
    drawn = resampled(columns, resamples, seed)
    tokens, text_bytes = drawn["tokens"], drawn["bytes"]
    ratios = {
        name: {key: drawn[f"{name}/{kind}"].over(tokens) for key, kind in RATIOS.items()}
        | {"bits_per_byte": drawn[f"{name}/nats"].over(text_bytes, 1 / math.log(2))}
        for name in sums
    }
    names = {
        "context": [context_name(power) for power in range(CONTEXTS)],
        "class": CLASSES,
        "domain": domains,
        "part": PARTS,
    }
    models = {}
    for name, one in sums.items():
        estimates = {key: ratio.estimate() for key, ratio in ratios[name].items()}
        nats = estimates["cross_entropy"]
        ends = (None if end is None else exponential(end) for end in (nats.low, nats.high))
        perplexity = Estimate(exponential(nats.value), *ends)
        split = {key: grouped(drawn, f"{name}/{key}", groups) for key, groups in names.items()}
        models[name] = ModelGap(
            perplexity=perplexity, kl_by_position=stretches(one.position, width), median_rank=one.median_rank(),
            calibration=calibrated(drawn, f"{name}/bins", tokens), by_context=split["context"],
            by_class=split["class"], by_domain=split["domain"],
            by_part={} if split["part"].keys() == {PARTS[TEXT]} else split["part"], **estimates,
        )  # fmt: skip
    differences = tuple(difference(a, b, ratios[a], ratios[b]) for a, b in itertools.combinations(sums, 2))
    entropy = {name: ratio["cross_entropy"] for name, ratio in ratios.items()}
    recovery = recovered(entropy)
    return GapReport(int(tokens.all), int(text_bytes.all), len(owners), models, differences, recovery, {})


def spread(
    prefix: str, tables: Mapping[int, np.ndarray], owners: Sequence[int], kinds: Sequence[str]
) -> dict[str, np.ndarray]:
    """A column [D] for each group and kind of the owners' tables [G, K], of the groups that have a token."""
    if not tables:
        return {}
    stacked = np.stack([tables[owner] for owner in owners])
    return {
        f"{prefix}/{group}/{kind}": stacked[:, group, place]
        for group in np.flatnonzero(stacked[:, :, 0].sum(0))
        for place, kind in enumerate(kinds)
    }


def grouped(drawn: Mapping[str, Totals], prefix: str, names: Sequence[str]) -> dict[str, GroupGap]:
    """The figures of each group that has a token, by its name."""
    results = {}
    for number, name in enumerate(names):
        tokens = drawn.get(f"{prefix}/{number}/tokens")
        if tokens is not None:
            values = (drawn[f"{prefix}/{number}/{kind}"].over(tokens).estimate() for kind in GROUPED[1:])
            results[name] = GroupGap(int(tokens.all), tokens.documents, *values)
    return results


def calibrated(drawn: Mapping[str, Totals], prefix: str, tokens: Totals) -> Calibration:
    filled = [number for number in range(BINS) if f"{prefix}/{number}/tokens" in drawn]
    count, confidence, correct = ([drawn[f"{prefix}/{number}/{kind}"] for number in filled] for kind in BINNED)
    excess = [right.minus(sure) for right, sure in zip(correct, confidence, strict=True)]
    bins = tuple((int(n.all), sure.all / n.all, right.all / n.all)
                 for n, sure, right in zip(count, confidence, correct, strict=True))  # fmt: skip
    return Calibration(calibration_error(excess, tokens).estimate(), bins)


def difference(first: str, second: str, a: Mapping[str, Totals], b: Mapping[str, Totals]) -> Difference:
    apart = {key: b[key].minus(a[key]) for key in a}
    p = {key: ratio.p_value() for key, ratio in apart.items()}
    return Difference(first, second, p=p, **{key: ratio.estimate() for key, ratio in apart.items()})


def recovered(entropy: Mapping[str, Totals]) -> Estimate | None:
    """(CE pruned - CE distilled) / (CE pruned - CE teacher); None where the interval of what pruning lost holds 0."""
    if not {"pruned", "distilled"} <= entropy.keys():
        return None
    lost = entropy["pruned"].minus(entropy[TEACHER])
    gained = entropy["pruned"].minus(entropy["distilled"])
    if not lost.estimate().above_zero:
        return None
    shares = np.divide(gained.drawn, lost.drawn, out=np.full(len(lost.drawn), np.nan), where=lost.drawn > 0)
    return Totals(gained.all / lost.all, shares, lost.documents).estimate()


def stretches(position: np.ndarray, width: int) -> tuple[tuple[int, float], ...]:
    """(first position, mean KL) of up to BUCKETS stretches of a row; those without a token are left out."""
    count = min(BUCKETS, width)
    starts = [-(-number * width // count) for number in range(count)]
    kl, tokens = np.add.reduceat(widened(position, width), starts, axis=1)
    return tuple((start, float(kl[i] / tokens[i])) for i, start in enumerate(starts) if tokens[i])


def exponential(nats: float) -> float:
    """exp, at most the largest float: a broken model's perplexity is a number all the same."""
    return math.exp(nats) if nats < 709 else sys.float_info.max
