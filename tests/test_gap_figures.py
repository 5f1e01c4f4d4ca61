"""What a gap says beyond KL: exact on the shipped model, intervals that cover, groups, worst windows, continuations."""

from __future__ import annotations

import copy
import gc
import math
import tracemalloc
import weakref
from collections.abc import Iterator
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from limbeck.distill.gap import measure as gap
from limbeck.distill.gap import sums as gap_sums
from limbeck.distill.gap.continuation import continuations, draw_prompts
from limbeck.distill.gap.examples import WINDOW, as_text
from limbeck.distill.gap.measure import GapReport, figures, measure_gap, summarise
from limbeck.distill.gap.statistics import Totals, plain_tail, resampled, tail
from limbeck.distill.gap.token_groups import (
    CLASSES,
    TokenGroups,
    class_of,
    context_name,
    contexts,
    domain_of,
    group_documents,
    token_classes,
)
from limbeck.distill.text.packing import Corpus, tokenize
from limbeck.distill.text.records import Document
from limbeck.models.checkpoint import load_model
from limbeck.models.hybrid import HybridLM
from limbeck.models.tokenizer import Tokenizer, load_tokenizer
from limbeck.scripts.run.resolve import ZOO
from limbeck.tests.helpers import random_model, tiny_config
from torch.nn import functional as F

SOURCE = '''def area(radius):
    """The area of a circle."""
    return 3.14159 * radius ** 2  # never negative

for number in range(10):
    print(f"{number}: {area(number)}")
'''


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(ZOO)


@pytest.fixture(scope="module")
def corpus(tokenizer: Tokenizer) -> Corpus:
    texts = [SOURCE.replace("area", f"name_{number}") * (1 + number % 3) for number in range(12)]
    return tokenize([Document(f"{'ab'[i % 2]}/{i}.py", text) for i, text in enumerate(texts)], tokenizer)


def perturbed(model: HybridLM, layer: int = 5) -> HybridLM:
    """A copy, one layer of which has been disturbed."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.layers[layer].parameters():
            weight += 0.3 * weight.std() * torch.randn_like(weight) if weight.numel() > 1 else 0
    return other


def test_the_shipped_model_against_itself(corpus: Corpus) -> None:
    """KL 0 and agreement 1, to the bit, though it is another copy."""
    batches = list(corpus.sample(batch_size=2, seq_len=96, seed=0))
    report = measure_gap(load_model(ZOO), {"itself": load_model(ZOO)}, batches, resamples=50)
    own = report.models["itself"]
    for found, value in ((own.kl, 0), (own.reverse_kl, 0), (own.agreement, 1), (own.top5_agreement, 1),
                         (own.mean_rank, 1), (own.mass_kept, 1)):  # fmt: skip
        assert (found.value, found.low, found.high) == (value,) * 3
    assert own.median_rank == 1 and own.cross_entropy == report.models["teacher"].cross_entropy
    assert report.differences[0].p["kl"] == 1


@pytest.mark.parametrize(("dtype", "token", "position"), ((torch.float64, 1e-11, 1e-11), (torch.float32, 1e-5, 1e-6)))
def test_one_layer_disturbed(dtype: torch.dtype, token: float, position: float, corpus: Corpus) -> None:
    """Against dense float64 log-probabilities: the KL of every token, and the mean at every position of a row."""
    teacher = load_model(ZOO, dtype)
    student = perturbed(teacher)
    batches = list(corpus.sample(batch_size=12, seq_len=16, seed=0, max_tokens=320))
    report = measure_gap(teacher, {"disturbed": student}, batches, resamples=10)
    wide = {number: copy.deepcopy(model).double() for number, model in enumerate((teacher, student))}
    sums, tokens = torch.zeros(16), torch.zeros(16)
    for batch in batches:
        counted = batch.labels >= 0
        with torch.no_grad():
            p, q = (F.log_softmax(wide[i](batch.input_ids, seq_idx=batch.seq_idx), -1) for i in (0, 1))
        kl = (p.exp() * (p - q)).sum(-1) * counted
        found = figures(teacher, {"disturbed": student}, batch, torch.device("cpu"))[1].kl.view_as(kl)
        assert (found - kl).abs().max() < token
        sums, tokens = sums + kl.sum(0), tokens + counted.sum(0)
    places = report.models["disturbed"].kl_by_position
    assert [start for start, _ in places] == list(range(16))
    assert np.abs(np.array([value for _, value in places]) - (sums / tokens).numpy()).max() < position
    assert report.models["disturbed"].kl.value > 1e-2


@pytest.mark.parametrize("documents", (15, 50, 150))
def test_intervals_cover_the_true_mean(documents: int) -> None:
    """Of 1,000 draws of documents with uneven lengths and means of their own, and of two models on the same ones."""
    draw = np.random.default_rng(documents)
    draws = 1000
    tokens = draw.integers(20, 400, (draws, documents)).astype(float)
    level = draw.normal(2.0, 0.5, (draws, documents))  # what makes a document hard is there for both
    first = tokens * (level + draw.normal(0, 0.1, level.shape))
    second = tokens * (level + 0.3 + draw.normal(0, 0.1, level.shape))
    columns = {f"{name}{i}": values[i] for name, values in (("tokens", tokens), ("a", first), ("b", second))
               for i in range(draws)}  # fmt: skip
    drawn = resampled(columns, 1000, 0)
    ratios = {name: [drawn[f"{name}{i}"].over(drawn[f"tokens{i}"]) for i in range(draws)] for name in "ab"}
    alone = [ratio.estimate() for ratio in ratios["a"]]
    assert 0.93 <= np.mean([found.low <= 2.0 <= found.high for found in alone]) <= 0.97
    apart = [b.minus(a) for a, b in zip(ratios["a"], ratios["b"], strict=True)]
    paired = [found.estimate() for found in apart]
    assert 0.93 <= np.mean([found.low <= 0.3 <= found.high for found in paired]) <= 0.97
    widths = [np.mean([found.high - found.low for found in each]) for each in (alone, paired)]
    assert widths[1] < 0.4 * widths[0], "pairing has to narrow the interval"
    assert max(found.p_value() for found in apart) <= 0.05, "a difference of three standard errors is seen"
    chance = tokens * (level + draw.normal(0, 0.1, level.shape))  # a model as good as the first
    third = resampled({f"c{i}": chance[i] - first[i] for i in range(draws)}, 1000, 0)
    p = np.array([found.p_value() for found in third.values()])
    assert 0.03 <= np.mean(p < 0.05) <= 0.07 and 0.4 <= np.median(p) <= 0.6


def test_the_tails_are_students() -> None:
    """Quantiles of Student's t from tables; with many documents the percentiles are the plain ones."""
    for degrees, expected in ((1, 12.7062), (5, 2.5706), (10, 2.2281), (30, 2.0423), (1000, 1.9623)):
        expanded = -NormalDist().inv_cdf(tail(degrees + 1))
        assert expanded / math.sqrt((degrees + 1) / degrees) == pytest.approx(expected, abs=1e-4)
    assert tail(10**7) == pytest.approx(0.025, abs=1e-6) and tail(10) < 0.01 and tail(1) == pytest.approx(0.025)


@pytest.mark.parametrize("documents", (2, 3, 5, 15, 150, 10**6))
def test_p_says_what_the_interval_says(documents: int) -> None:
    """p < 0.05 exactly where 0 is outside of the interval, also with ties and nan; never below 2 / (R + 1)."""
    draw = np.random.default_rng(documents)
    for resamples in (41, 200, 1000):
        seen = set()
        for shift in np.linspace(-4, 4, 161):
            for drawn in (draw.normal(shift, 1, resamples), draw.integers(-6, 7, resamples) + np.round(2 * shift)):
                drawn[: int(draw.integers(0, 2))] = np.nan
                found = Totals(float(shift), drawn, documents)
                interval, p = found.estimate(), found.p_value()
                outside = interval.low > 0 or interval.high < 0
                assert (p < 0.05) == outside, (shift, resamples, p, interval)
                assert 2 / (resamples + 1) <= p <= 1
                if documents > 2:  # whose ends are the least and the most, to rounding
                    assert p == Totals(-float(shift), -drawn, documents).p_value()
                seen.add(outside)
        assert seen == {False, True}
    assert Totals(0.0, np.zeros(200), documents).p_value() == 1
    assert Totals(1.0, np.ones(10), documents).p_value() == pytest.approx(2 / 11)


def test_p_is_the_interval_turned_round() -> None:
    """The level of the tail that leaves 0 out is p; with many documents it is twice the share, at least 2 / (R + 1)."""
    for documents in (2, 3, 5, 15, 150):
        assert plain_tail(tail(documents), documents) == pytest.approx(0.025, rel=1e-9)
        shares = [plain_tail(share, documents) for share in (1e-9, 1e-4, 0.01, 0.2, 0.5, 0.7)]
        assert shares == sorted(shares)
    for share in (0.001, 0.02, 0.3):
        assert plain_tail(share, 10**7) == pytest.approx(share, rel=1e-5)
    assert Totals(1.0, np.ones(999), 10**7).p_value() == pytest.approx(0.002, rel=1e-5)
    assert Totals(1.0, np.linspace(-0.1, 0.9, 999), 10**7).p_value() == pytest.approx(0.2, rel=0.02)
    assert Totals(1.0, np.ones(999), 15).p_value() == pytest.approx(0.0098, rel=0.01)  # of Student's t with 14 degrees


def dense(found: dict[str, HybridLM], batches: list) -> dict[str, torch.Tensor]:
    """Logits [all counted tokens, V] of every model in float64."""
    wide = {name: copy.deepcopy(model).double() for name, model in found.items()}
    with torch.no_grad():
        return {
            name: torch.cat([model(b.input_ids, seq_idx=b.seq_idx)[b.labels >= 0] for b in batches])
            for name, model in wide.items()
        }


@pytest.fixture(scope="module")
def measured(corpus: Corpus, tokenizer: Tokenizer) -> tuple[GapReport, dict[str, torch.Tensor], list, TokenGroups]:
    teacher = load_model(ZOO)
    batches = list(corpus.sample(batch_size=3, seq_len=64, seed=1))
    models = {"teacher": teacher, "student": perturbed(teacher, 4)}
    domains, domain = group_documents(corpus.names, corpus.starts)
    groups = TokenGroups(domains, domain, token_classes(tokenizer, 4096))
    report = measure_gap(teacher, {"student": models["student"]}, batches, groups=groups, worst=3, resamples=60)
    return report, dense(models, batches), batches, groups


def test_every_further_figure_is_the_dense_one(measured: tuple) -> None:
    report, logits, batches, groups = measured
    p, q = (F.log_softmax(logits[name], -1) for name in ("teacher", "student"))
    labels = torch.cat([b.labels[b.labels >= 0] for b in batches])
    documents = torch.cat([b.doc_id[b.labels >= 0] for b in batches])
    student = report.models["student"]
    assert student.reverse_kl.value == pytest.approx(float((q.exp() * (q - p)).sum(-1).mean()), rel=1e-4)
    assert student.mass_kept.value == pytest.approx(float(torch.minimum(p, q).exp().sum(-1).mean()), rel=1e-5)
    rank = (q > q.gather(1, p.argmax(-1, keepdim=True))).sum(-1) + 1
    assert student.mean_rank.value == pytest.approx(float(rank.double().mean()), rel=1e-6)
    assert student.median_rank == int(rank.sort().values[(len(rank) - 1) // 2])
    confidence, choice = q.exp().max(-1)
    correct = (choice == labels).double()
    ece, filled = 0.0, []
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            ece += abs(float((correct - confidence)[inside].sum())) / len(labels)
            filled.append((int(inside.sum()), float(confidence[inside].mean()), float(correct[inside].mean())))
    assert student.calibration.ece.value == pytest.approx(ece, rel=1e-4)
    assert [count for count, *_ in student.calibration.bins] == [count for count, *_ in filled]
    assert np.allclose(student.calibration.bins, filled, rtol=1e-5)
    kl = (p.exp() * (p - q)).sum(-1)
    context = torch.cat([contexts(b.seq_idx)[b.labels >= 0] for b in batches])
    kinds = {
        "by_class": (groups.class_of[labels], CLASSES), "by_domain": (groups.domain_of[documents], groups.domains),
        "by_context": (context, [context_name(power) for power in range(24)]),
    }  # fmt: skip
    for key, (numbers, names) in kinds.items():
        found = getattr(student, key)
        assert set(found) == {names[number] for number in numbers.unique()} and len(found) > 1
        assert sum(part.tokens for part in found.values()) == report.tokens
        for name, part in found.items():
            mine = numbers == list(names).index(name)
            assert part.kl.value == pytest.approx(float(kl[mine].mean()), rel=1e-4)
            nats = -q[mine].gather(1, labels[mine, None])
            assert part.cross_entropy.value == pytest.approx(float(nats.mean()), rel=1e-5)
            assert part.kl.low <= part.kl.value <= part.kl.high
            assert part.documents == len(documents[mine].unique())


def test_worst_windows(measured: tuple, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """The three worst of the windows that a plain search finds; their text is the documents'."""
    report, logits, batches, _ = measured
    p, q = (F.log_softmax(logits[name], -1) for name in ("teacher", "student"))
    flat = iter((p.exp() * (p - q)).sum(-1).tolist())
    means: dict[int, float] = {}
    for batch in batches:
        for row in range(len(batch.labels)):
            kl = [next(flat) if label >= 0 else None for label in batch.labels[row].tolist()]
            for start in range(0, 64, WINDOW):
                owners = batch.doc_id[row, start : start + WINDOW].tolist()
                mine = [value for value, owner in zip(kl[start : start + WINDOW], owners, strict=True)
                        if value is not None and owner == owners[0]]  # fmt: skip
                if 2 * len(mine) >= WINDOW:
                    means[owners[0]] = max(means.get(owners[0], 0.0), sum(mine) / len(mine))
    expected = sorted(means.items(), key=lambda item: -item[1])[:3]
    found = report.worst["student"]
    assert [window.document for window in found] == [document for document, _ in expected]
    assert [window.mean_kl for window in found] == pytest.approx([mean for _, mean in expected], rel=1e-4)
    for window in found:
        shown = as_text(window, corpus.names, tokenizer)
        text = "".join(piece["text"] for piece in shown["pieces"])
        whole = tokenizer.decode(corpus.ids[corpus.starts[window.document] : corpus.starts[window.document + 1]])
        assert text in whole and shown["document"] == corpus.names[window.document]
        assert sum(window.kl) / len(window.kl) == pytest.approx(window.mean_kl)
        assert all({"text", "kl", "teacher", "student"} == piece.keys() for piece in shown["pieces"])


def test_parts_of_a_character_are_shown_together(tokenizer: Tokenizer) -> None:
    from limbeck.distill.gap.examples import Window

    ids = tokenizer.encode("x = '\N{SNOWMAN}'")
    count = len(ids)
    shown = as_text(
        Window(0, 1.0, tuple(ids), tuple(map(float, range(count))), tuple(ids), tuple(ids)), ["a"], tokenizer
    )
    assert "".join(piece["text"] for piece in shown["pieces"]) == "x = '\N{SNOWMAN}'"
    assert len(shown["pieces"]) < count


def test_memory_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the documents, all beyond BLOCKS: as many places, no batch kept, and as much held at the end."""
    model = random_model(tiny_config(), 0, torch.float32)
    other = random_model(tiny_config(), 1, torch.float32)
    places: list[int] = []
    held: list[int] = []

    def counted(sums: dict[str, gap_sums.Sums], sizes: dict[int, np.ndarray], *rest: Any) -> GapReport:
        tables = [sizes, *(table for found in sums.values()
                           for table in (found.documents, found.bins, *found.groups.values()))]  # fmt: skip
        places.append(max(map(len, tables)))
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        return summarise(sums, sizes, *rest)

    def measured(documents: int) -> GapReport:
        ids = np.random.default_rng(0).integers(3, 97, 20 * documents, dtype=np.int32)
        starts = np.arange(0, len(ids) + 1, 20)
        names = [str(number) for number in range(documents)]
        sample = Corpus(ids, starts, names, torch.ones(97, dtype=torch.int64), 0).sample(
            batch_size=16, seq_len=32, seed=0
        )
        alive: list[weakref.ref[Any]] = []

        def batches() -> Iterator[Any]:
            for batch in sample:
                alive[:] = [found for found in alive if found() is not None]
                assert len(alive) <= 1, "no more than the one before"
                alive.append(weakref.ref(batch))
                yield batch

        with monkeypatch.context() as patched:
            patched.setattr("limbeck.distill.gap.measure.summarise", counted)
            tracemalloc.start()
            try:
                report = measure_gap(model, {"other": other}, batches(), worst=2, resamples=20)
            finally:
                tracemalloc.stop()
        assert report.documents == documents and report.tokens == 19 * documents
        assert len(report.worst["other"]) == 2
        return report

    plain = measured(150)
    monkeypatch.setattr(gap_sums, "BLOCKS", 32)
    shared = measured(150)
    measured(600)
    assert places == [150, 32, 32] and held[2] < 1.25 * held[1], held
    assert shared.models["other"].kl.value == pytest.approx(plain.models["other"].kl.value, rel=1e-9)


def test_documents_are_counted_in_a_bit_each() -> None:
    documents = np.random.default_rng(0).permutation(50_000).tolist()
    tracemalloc.start()
    seen = gap.Seen()
    seen.add(documents)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    seen.add(documents[:1000])
    seen.add([10**12, 10**12])
    assert len(seen) == 50_001 and size < 50_000 / 4


@pytest.mark.parametrize(
    ("text", "kind"),
    (("\n    ", "white space"), (" ", "white space"), (" return", "keyword"), ("None", "keyword"), (" area", "word"),
     (".x_1", "word"), ("__", "word"), ("314", "number"), ("**", "punctuation"), ("):\n", "punctuation"),
     ('("', "quote or comment"), (" #", "quote or comment"), ("\N{REPLACEMENT CHARACTER}", "other"), ("", "other")),
)  # fmt: skip
def test_classes_of_tokens(text: str, kind: str) -> None:
    assert class_of(text) == kind


def test_domains() -> None:
    assert [domain_of(name) for name in ("json/decoder.py", "abc.py", "web.jsonl:17", "a/b.jsonl:3", "README")] == [
        "json/", "*.py", "web.jsonl", "a/", "the rest"]  # fmt: skip
    names = [f"{letter}/x.py" for letter in "abcdefghijk"] + ["README"]
    domains, numbers = group_documents(names, np.cumsum([0, *(100 - i for i in range(11)), 1]))
    assert domains == ("a/", "b/", "c/", "d/", "e/", "f/", "g/", "the rest")
    assert numbers.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 7]
    domains, numbers = group_documents(["a.py", "b.md"], np.array([0, 1, 3]))
    assert domains == ("*.md", "*.py") and numbers.tolist() == [1, 0] and numbers.dtype == torch.uint8


def test_contexts_begin_anew_with_a_document() -> None:
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2], [0] * 8], dtype=torch.int32)
    assert contexts(seq_idx).tolist() == [[0, 1, 1, 2, 0, 1, 0, 1], [0, 1, 1, 2, 2, 2, 2, 3]]
    assert [context_name(power) for power in (0, 1, 10)] == ["1", "2 to 3", "1,024 to 2,047"]


def test_continuations(corpus: Corpus, tokenizer: Tokenizer) -> None:
    teacher = load_model(ZOO)
    prompts = draw_prompts(corpus, 3, 24, seed=0)
    assert prompts is not None and prompts.shape == (3, 24)
    assert torch.equal(prompts, draw_prompts(corpus, 3, 24, seed=0)) and draw_prompts(corpus, 3, 10**6, 0) is None
    for prompt in prompts.tolist():
        assert tokenizer.eos_token_id not in prompt
    for length in (24, int(np.diff(corpus.starts).max()) - 1):  # a part, and all of a document: bos once, in front
        begun = draw_prompts(corpus, 3, length, seed=0, begin=tokenizer.begin)
        assert begun is not None and begun.shape[1] == length and ((begun == 1).nonzero()[:, 1] == 0).all()
    students = {"itself": teacher, "other": perturbed(teacher, 4)}
    found = continuations(teacher, students, prompts, 8, eos_token_id=tokenizer.eos_token_id)
    assert found["itself"].length.value == 8 and found["itself"].identical.value == 1
    lengths = []
    for prompt in prompts:  # each alone, by the plain loop
        written = {}
        for name in students:
            ids = prompt[None]
            for _ in range(8):
                with torch.no_grad():
                    ids = torch.cat((ids, students[name](ids)[:, -1:].argmax(-1)), 1)
            written[name] = ids[0, 24:].tolist()
        pairs = list(zip(written["itself"], written["other"], strict=True))
        lengths.append(next((place for place, (a, b) in enumerate(pairs) if a != b), 8))
    assert found["other"].length.value == pytest.approx(np.mean(lengths))
    assert found["other"].identical.value == pytest.approx(np.mean([length == 8 for length in lengths]))
    assert found["other"].length.low <= found["other"].length.value <= found["other"].length.high


def test_no_worst_windows_by_default(measured: tuple[GapReport, dict[str, torch.Tensor], list, TokenGroups]) -> None:
    report, _, batches, _ = measured
    teacher = load_model(ZOO)
    found = measure_gap(teacher, {"student": perturbed(teacher, 4)}, batches[:1], resamples=2)
    assert len(report.worst["student"]) == 3 and found.worst == {"student": ()}
