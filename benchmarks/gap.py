"""What the figures of `limbeck evaluate` are worth: against dense float64, and how often an interval holds the truth.

    python -m limbeck.benchmarks.gap    a minute on a CPU; the shipped model and synthetic draws, no data

Prints the shipped model against itself, against itself with one layer disturbed, and the coverage of 95% intervals.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from limbeck.distill.gap.measure import figures, measure_gap
from limbeck.distill.gap.statistics import resampled
from limbeck.distill.text.packing import Batch
from limbeck.distill.text.resolve import sample
from limbeck.models.checkpoint import load_model
from limbeck.models.hybrid import HybridLM
from limbeck.models.named import SHIPPED
from limbeck.models.provenance import provenance

ZOO = SHIPPED["zoo"]
DRAWS, RESAMPLES = 1000, 1000
CPU = torch.device("cpu")


def disturbed(model: HybridLM) -> HybridLM:
    """A copy, one layer of which has noise of 0.3 of each weight's spread."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.layers[5].parameters():
            if weight.numel() > 1:
                weight.add_(0.3 * weight.std() * torch.randn_like(weight))
    return other


@torch.no_grad()
def farthest(dtype: torch.dtype, batches: list[Batch]) -> tuple[float, float, float]:
    """The mean KL of a disturbed layer, and how far it is from dense float64: the worst token, and the worst mean of a
    position of the rows (nats)."""
    teacher = load_model(ZOO, dtype)
    student = disturbed(teacher)
    wide = [copy.deepcopy(model).double() for model in (teacher, student)]
    worst, apart, tokens, total = 0.0, torch.zeros(0), torch.zeros(0), 0.0
    for batch in batches:
        p, q = (torch.log_softmax(model(batch.input_ids, seq_idx=batch.seq_idx), -1) for model in wide)
        counted = batch.labels >= 0
        kl = (p.exp() * (p - q)).sum(-1) * counted
        found = figures(teacher, {"disturbed": student}, batch, CPU)[1].kl.view_as(kl).double()
        worst = max(worst, float((found - kl).abs().max()))
        sums = (found - kl).sum(0)
        apart, tokens = (sums, counted.sum(0)) if not len(apart) else (apart + sums, tokens + counted.sum(0))
        total += float(kl.sum())
    return total / float(tokens.sum()), worst, float((apart / tokens.clamp_min(1)).abs().max())


def coverage(documents: int) -> Iterator[str]:
    """The share of draws whose 95% interval holds the true mean, of one model and of the difference of two, and of
    plain percentiles: documents have lengths and levels of their own."""
    draw = np.random.default_rng(documents)
    tokens = draw.integers(20, 400, (DRAWS, documents)).astype(float)
    level = draw.normal(2.0, 0.5, (DRAWS, documents))
    first, second = (tokens * (level + shift + draw.normal(0, 0.1, level.shape)) for shift in (0, 0.3))
    columns = {f"{name}{i}": values[i] for name, values in (("tokens", tokens), ("a", first), ("b", second))
               for i in range(DRAWS)}  # fmt: skip
    drawn = resampled(columns, RESAMPLES, 0)
    one, two = ([drawn[f"{name}{i}"].over(drawn[f"tokens{i}"]) for i in range(DRAWS)] for name in "ab")
    alone = [found.estimate() for found in one]
    paired = [b.minus(a).estimate() for a, b in zip(one, two, strict=True)]
    plain = [np.percentile(found.drawn, (2.5, 97.5)) for found in one]
    yield f"{np.mean([found.holds(2.0) for found in alone]):.1%}"
    yield f"{np.mean([found.holds(0.3) for found in paired]):.1%}"
    yield f"{np.mean([low <= 2.0 <= high for low, high in plain]):.1%}"


def main() -> None:
    torch.manual_seed(0)
    batches = list(sample("stdlib", "test", ZOO, tokens=1024, seq_len=128, batch=4, seed=0))
    own = measure_gap(load_model(ZOO), {"itself": load_model(ZOO)}, batches, resamples=50).models["itself"]
    print(f"itself: KL {own.kl.value}, agreement {own.agreement.value}\n")
    print("| dtype | KL of the disturbed layer | worst token | worst position |\n|---|---|---|---|")
    for dtype in (torch.float64, torch.float32):
        mean, token, position = farthest(dtype, batches)
        print(f"| {dtype} | {mean:.4f} | {token:.1e} | {position:.1e} |")
    print("\n| documents | one model | a paired difference | plain percentiles |\n|---|---|---|---|")
    for documents in (15, 50, 150):
        print(f"| {documents} | {' | '.join(coverage(documents))} |")
    print(provenance(), flush=True)


if __name__ == "__main__":
    main()
