"""The gap by hand: in dense float64, its intervals and paired differences, and what it says of odd input."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from limbeck.distill.gap.measure import GapReport, measure_gap, summarise
from limbeck.distill.gap.statistics import resampled
from limbeck.distill.gap.sums import QUANTITIES, Sums
from limbeck.distill.text.packing import Batch
from limbeck.models.errors import CheckFailed, InputError
from limbeck.models.hybrid import HybridLM
from limbeck.tests.helpers import random_model, tiny_config
from limbeck.tests.training_helpers import draw_long_documents
from torch.nn import functional as F


def models() -> dict[str, HybridLM]:
    """Students of other widths and depth than the teacher's, one of them itself."""
    teacher = random_model(tiny_config(), 0, torch.float32)
    pruned = random_model(tiny_config(hidden_size=24, pattern="M-*M"), 1, torch.float32)
    distilled = random_model(tiny_config(), 0, torch.float32)
    with torch.no_grad():
        distilled.lm_head.weight += 0.05 * torch.randn(distilled.lm_head.weight.shape)
    return {"teacher": teacher, "pruned": pruned, "distilled": distilled, "itself": teacher}


def by_document(batches: list[Batch], found: dict[str, HybridLM]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Dense float64: for each model and document the nats, KL and agreements, and for each document tokens, bytes."""
    wide = {name: type(model)(model.config, dtype=torch.float64).eval() for name, model in found.items()}
    for name, model in found.items():
        wide[name].load_state_dict(model.state_dict())
    owners = sorted({int(i) for batch in batches for i in batch.doc_id[batch.labels >= 0]})
    sums = {name: np.zeros((len(owners), 3)) for name in found}
    sizes = np.zeros((len(owners), 2))
    for batch in batches:
        counted = batch.labels >= 0
        labels = batch.labels[counted]
        places = torch.tensor([owners.index(int(i)) for i in batch.doc_id[counted]])
        with torch.no_grad():
            logs = {
                name: F.log_softmax(model(batch.input_ids, seq_idx=batch.seq_idx)[counted], -1)
                for name, model in wide.items()
            }
        p = logs["teacher"]
        for name, q in logs.items():
            figures = (
                -q.gather(1, labels[:, None])[:, 0],
                (p.exp() * (p - q)).sum(-1),
                (p.argmax(-1) == q.argmax(-1)).double(),
            )
            for column, values in enumerate(figures):
                np.add.at(sums[name][:, column], places.numpy(), values.numpy())
        np.add.at(sizes[:, 0], places.numpy(), 1)
        np.add.at(sizes[:, 1], places.numpy(), batch.n_bytes[counted].numpy())
    return sums, sizes


def report_of(found: dict[str, HybridLM], batches: list[Batch], **options: int) -> GapReport:
    students = {name: model for name, model in found.items() if name != "teacher"}
    return measure_gap(found["teacher"], students, batches, **options)


def test_every_figure_is_the_dense_float64_one() -> None:
    found, batches = models(), [draw_long_documents(seed) for seed in range(3)]
    for batch in batches:  # what the teacher would say: pruning has to lose something
        said = found["teacher"](batch.input_ids, seq_idx=batch.seq_idx).argmax(-1)
        batch.labels.copy_(torch.where(batch.labels >= 0, said, -100))
    sums, sizes = by_document(batches, found)
    report = report_of(found, batches)
    assert (report.documents, report.tokens, report.text_bytes) == (len(sizes), *sizes.sum(0).astype(int))
    assert list(report.models) == ["teacher", "pruned", "distilled", "itself"]
    for name, model in report.models.items():
        nats, kl, agree = sums[name].sum(0)
        assert model.cross_entropy.value == pytest.approx(nats / report.tokens, rel=1e-6)
        assert model.perplexity.value == pytest.approx(math.exp(nats / report.tokens), rel=1e-5)
        assert model.bits_per_byte.value == pytest.approx(nats / math.log(2) / report.text_bytes, rel=1e-6)
        assert model.kl.value == pytest.approx(kl / report.tokens, rel=1e-5, abs=1e-9)
        assert model.agreement.value == pytest.approx(agree / report.tokens, abs=1e-12)
    for name in ("teacher", "itself"):
        exact = report.models[name]
        assert all(abs(value) <= 1e-9 for value in (exact.kl.value, exact.kl.low, exact.kl.high))
        assert exact.agreement.value == exact.agreement.low == 1
        assert exact.cross_entropy == report.models["teacher"].cross_entropy
    nats = {name: sums[name][:, 0].sum() for name in sums}
    expected = (nats["pruned"] - nats["distilled"]) / (nats["pruned"] - nats["teacher"])
    assert report.recovery is not None and report.recovery.value == pytest.approx(expected, rel=1e-5)
    assert report.recovery.low < expected < report.recovery.high
    json.dumps(report.to_json(), allow_nan=False)


def test_intervals_are_of_the_resampled_documents_and_differences_pair() -> None:
    """Against a plain bootstrap, document by document, and its paired differences."""
    found, batches = models(), [draw_long_documents(seed) for seed in range(3)]
    sums, sizes = by_document(batches, found)
    report = report_of(found, batches, resamples=400)
    generator = np.random.default_rng(7)
    draws = generator.integers(0, len(sizes), (4000, len(sizes)))
    drawn = {name: sums[name][draws].sum(1)[:, 0] / sizes[draws].sum(1)[:, 0] for name in sums}
    kl = {name: sums[name][draws].sum(1)[:, 1] / sizes[draws].sum(1)[:, 0] for name in sums}

    def near(values: np.ndarray, low: float, high: float) -> None:
        expected = np.percentile(values, [2.5, 97.5])
        assert np.abs(np.array([low, high]) - expected).max() < 0.15 * (expected[1] - expected[0])

    for name in ("pruned", "distilled"):
        near(drawn[name], report.models[name].cross_entropy.low, report.models[name].cross_entropy.high)
    pairs = {(found.first, found.second): found for found in report.differences}
    assert len(pairs) == 6
    pair = pairs["pruned", "distilled"]
    difference = drawn["distilled"] - drawn["pruned"]
    near(difference, pair.cross_entropy.low, pair.cross_entropy.high)
    near(kl["distilled"] - kl["pruned"], pair.kl.low, pair.kl.high)
    near(drawn["distilled"] - drawn["teacher"], *(getattr(pairs["teacher", "distilled"].cross_entropy, end)
                                                  for end in ("low", "high")))  # fmt: skip
    paired = pairs["teacher", "distilled"].cross_entropy
    alone = report.models["distilled"].cross_entropy
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low), "pairing has to narrow the interval"
    same = pairs["teacher", "itself"]
    assert (same.cross_entropy.low, same.cross_entropy.high, same.agreement.value) == (0, 0, 0)


def test_the_same_twice_and_in_any_batches() -> None:
    found, batches = models(), [draw_long_documents(seed) for seed in range(2)]
    first, again, other = (report_of(found, batches, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.models["pruned"].cross_entropy.value == other.models["pruned"].cross_entropy.value
    assert first.models["pruned"].cross_entropy.low != other.models["pruned"].cross_entropy.low
    single = report_of(found, [batch.rows(i, i + 1) for batch in batches for i in range(4)], seed=3)
    assert single.models["pruned"].kl.value == pytest.approx(first.models["pruned"].kl.value, rel=1e-6)
    assert single.models["pruned"].kl.high == pytest.approx(first.models["pruned"].kl.high, rel=1e-6)
    steps: list[int] = []
    measure_gap(found["teacher"], {}, iter(batches), on_step=steps.append)
    assert steps == [1, 2]


def test_parts_of_the_resamples_are_the_whole() -> None:
    """More resamples than are drawn at a time, from the one stream of random numbers."""
    column = np.arange(1.0, 12.0)
    found = resampled({"x": column}, 150, 5)["x"]
    counts = np.random.default_rng(5).multinomial(11, np.full(11, 1 / 11), size=150)
    assert found.all == column.sum() and np.allclose(found.drawn, counts @ column, rtol=1e-12)


@pytest.mark.parametrize("length", (1, 5, 16, 20, 37))
def test_kl_by_position(length: int) -> None:
    found = models()
    batches = [draw_long_documents(seed, length=length, count=9) for seed in range(2)]
    for batch in batches:
        batch.labels[-1, -3:] = 5  # the padding of a row of one token would leave none
        batch.n_bytes[-1, -3:] = 1
    pruned = measure_gap(found["teacher"], {"pruned": found["pruned"]}, batches).models["pruned"]
    sums, tokens = np.zeros(length), np.zeros(length)
    for batch in batches:
        with torch.no_grad():
            p, q = (F.log_softmax(found[name](batch.input_ids, seq_idx=batch.seq_idx), -1).double()
                    for name in ("teacher", "pruned"))  # fmt: skip
        counted = batch.labels >= 0
        sums += ((p.exp() * (p - q)).sum(-1) * counted).sum(0).numpy()
        tokens += counted.sum(0).numpy()
    starts = [start for start, _ in pruned.kl_by_position]
    assert starts[0] == 0 and starts == sorted(set(starts)) and len(starts) <= 16
    for (start, value), stop in zip(pruned.kl_by_position, [*starts[1:], length], strict=True):
        assert value == pytest.approx(sums[start:stop].sum() / tokens[start:stop].sum(), rel=1e-5)


def test_rows_of_several_lengths_share_positions() -> None:
    found = models()
    short, long = draw_long_documents(0, length=6), draw_long_documents(1, length=12)
    report = measure_gap(found["teacher"], {"pruned": found["pruned"]}, [long, short])
    assert report == measure_gap(found["teacher"], {"pruned": found["pruned"]}, [short, long])
    assert [start for start, _ in report.models["pruned"].kl_by_position] == list(range(12))


def made(figures: dict[str, list[tuple[float, float, float]]]) -> GapReport:
    """A report of documents of 10 tokens and 40 bytes with given sums."""
    sums = {name: Sums() for name in figures}
    for name, documents in figures.items():
        for number, values in enumerate(documents):
            sums[name].documents[number] = np.pad(values, (0, len(QUANTITIES) - 3))
    sizes = {number: np.array([10.0, 40.0]) for number in range(len(next(iter(figures.values()))))}
    return summarise(sums, sizes, 16, 100, 0)


def test_recovery_only_where_pruning_lost_something() -> None:
    teacher = [(20.0, 0.0, 10.0), (30.0, 0.0, 10.0)]
    worse = [(24.0, 1.0, 8.0), (32.0, 1.0, 8.0)]
    middle = [(21.0, 1.0, 9.0), (30.5, 1.0, 9.0)]
    report = made({"teacher": teacher, "pruned": worse, "distilled": middle})
    assert report.recovery is not None and report.recovery.value == pytest.approx(0.75)
    assert (report.recovery.low, report.recovery.high) == pytest.approx((0.75, 0.75))
    assert made({"teacher": teacher, "pruned": teacher, "distilled": middle}).recovery is None
    mixed = [(24.0, 1.0, 8.0), (29.0, 1.0, 8.0)]  # lost in one document, won in the other
    assert made({"teacher": teacher, "pruned": mixed, "distilled": middle}).recovery is None
    assert made({"teacher": teacher, "pruned": worse}).recovery is None


def test_odd_input_is_refused() -> None:
    found = models()
    teacher = found["teacher"]
    for name in ("teacher", "prompt"):  # as the samples have the model's text and what comes before it
        with pytest.raises(InputError, match=f"named '{name}', which stands for the {name}"):
            measure_gap(teacher, {name: teacher}, [draw_long_documents(0)])
    with pytest.raises(InputError, match="vocabulary"):
        measure_gap(
            teacher, {"x": random_model(tiny_config(vocab_size=50), 1, torch.float32)}, [draw_long_documents(0)]
        )
    with pytest.raises(InputError, match="resamples"):
        measure_gap(teacher, {}, [draw_long_documents(0)], resamples=0)
    with pytest.raises(ValueError, match="no token counts"):
        measure_gap(teacher, {}, [])
    silent = draw_long_documents(0)
    silent.labels.fill_(-100)
    with pytest.raises(ValueError, match="no token counts"):
        measure_gap(teacher, {}, [silent])
    with torch.no_grad():
        found["pruned"].norm_f.weight[0] = float("nan")
    with pytest.raises(CheckFailed, match="'pruned' are not finite"):
        measure_gap(teacher, {"pruned": found["pruned"]}, [draw_long_documents(0)])


def test_a_hopeless_model_has_a_perplexity() -> None:
    report = made({"teacher": [(20.0, 0.0, 10.0)], "pruned": [(20000.0, 9.0, 0.0)]})
    assert report.models["pruned"].perplexity.value == sys.float_info.max
    json.dumps(report.to_json(), allow_nan=False)
