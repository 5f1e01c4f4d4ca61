"""The order of layers: every metric by its definition on whole logits, the race against the full table, single-shot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from limbeck.distill.report.words import DEPTH_METRICS
from limbeck.models import offload as layers
from limbeck.models.errors import InputError
from limbeck.models.hybrid import HybridLM
from limbeck.prune import depth, depth_metrics
from limbeck.prune.depth import Race, score_layers
from limbeck.prune.depth_metrics import CrossEntropy, Divergence, Reading
from limbeck.tests.helpers import dense_config, random_model, tiny_config
from limbeck.tests.pruning_helpers import Rows, draw_rows
from torch import Tensor
from torch.nn import functional as F

METRICS = ("mse", "kl", "perplexity", "block_influence")


@torch.no_grad()
def stream(model: HybridLM, batch: Rows, stack: Sequence[int]) -> Tensor:
    """The residual stream after these layers."""
    hidden = model.embed(batch.input_ids)
    for layer in stack:
        hidden = model.forward_layers(hidden, layer, layer + 1, seq_idx=batch.seq_idx)
    return hidden


def logits(model: HybridLM, batch: Rows, stack: Sequence[int]) -> Tensor:
    """[counted tokens, V]"""
    hidden = stream(model, batch, stack)[batch.labels != -100]
    normed = hidden / (hidden.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt()
    return normed * model.norm_f.weight.detach() @ model.head_weight.detach().T


def plainly(model: HybridLM, batches: Sequence[Rows], stack: Sequence[int], cut: Sequence[int], metric: str) -> float:
    """What removing `cut` from a stack costs, a whole forward at a time, averaged over tokens (mse: and vocabulary)."""
    found = []
    rest = [layer for layer in stack if layer not in cut]
    for batch in batches:
        counted = batch.labels != -100
        if metric == "block_influence":
            begin = stack.index(cut[0])
            before = stream(model, batch, stack[:begin])[counted]
            after = stream(model, batch, stack[: begin + len(cut)])[counted]
            found.append(1 - (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1))
            continue
        student = logits(model, batch, rest)
        if metric == "perplexity":
            found.append(F.cross_entropy(student, batch.labels[counted], reduction="none"))
            continue
        teacher = logits(model, batch, range(model.config.num_layers))
        if metric == "mse":
            found.append((student - teacher).square().mean(-1))
        else:
            p, q = teacher.log_softmax(-1), student.log_softmax(-1)
            found.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("pairs", (False, True))
def test_metrics_are_what_they_say(metric: str, pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against whole forwards of what remains, step after step; pieces of the head and of the tokens included."""
    monkeypatch.setattr(layers, "HEAD_ROWS", 40)
    monkeypatch.setattr(depth_metrics, "TOKENS", 16)
    model = random_model(tiny_config(pattern="M-M*-M"))
    batch = draw_rows(97, rows=3)
    batches, size = [batch.take([0, 1]), batch.take([2])], 1 + pairs
    found = score_layers(model, batches, remove=4, pairs=pairs, metric=metric, table="all")
    stack = list(range(6))
    gone: list[int] = []
    for step in range(4 // size):
        cuts = [tuple(stack[i : i + size]) for i in range(len(stack) - size + 1)]
        measured = {cut: plainly(model, batches, stack, cut, metric) for cut in cuts}
        assert found.candidates[step] == pytest.approx({cut[0]: value for cut, value in measured.items()}, rel=1e-8)
        best = min(measured, key=lambda cut: measured[cut])
        assert found.values[step] == pytest.approx(measured[best], rel=1e-8)
        gone += best
        stack = [layer for layer in stack if layer not in best]
    assert list(found.order) == gone and found.metric == metric


@pytest.mark.parametrize(("seed", "metric"), [(0, "mse"), (1, "mse"), (2, "kl"), (3, "mse"), (3, "kl"), (4, "mse"),
                                              (5, "perplexity"), (1, "block_influence")])  # fmt: skip
def test_a_race_ends_as_the_whole_table_does(seed: int, metric: str) -> None:
    """The same order and the same bits with fewer layers run; of blocks of two and of pairs, too."""
    torch.manual_seed(seed)
    config = tiny_config(pattern="M-M*-M-M") if seed < 4 else dense_config(seed).replace(pattern="*-" * 5)
    model = random_model(config, seed, dtype=torch.float32)
    batch = draw_rows(config.vocab_size, rows=6, tokens=12)
    batches = [batch.take([row]) for row in range(6)]
    options: dict[str, Any] = {"remove": 4, "pairs": seed == 3, "metric": metric}
    whole = score_layers(model, batches, **options, table="all")
    raced = score_layers(model, batches, **options)
    assert (raced.order, raced.values, raced.candidates[0]) == (whole.order, whole.values, whole.candidates[0])
    assert raced.layer_evaluations <= whole.layer_evaluations
    if metric != "block_influence":
        begins = range(0, len(whole.order), 2 if seed >= 3 else 1)
        expected = [{raced.order[begin]: value} for begin, value in zip(begins, raced.values, strict=True)]
        assert list(raced.candidates[1:]) == expected[1:]


def test_ties_and_nothing_lost() -> None:
    """Two layers that do nothing: the lower goes first, at no cost, and the race is over at once."""
    model = random_model(tiny_config(pattern="M-M*-M"))
    with torch.no_grad():
        for name in ("layers.4.mixer.down_proj.weight", "layers.1.mixer.down_proj.weight"):
            model.state_dict()[name].zero_()
    batch = draw_rows(97, rows=4)
    batches = [batch.take([row]) for row in range(4)]
    for metric in ("mse", "kl"):
        found = score_layers(model, batches, remove=2, metric=metric)
        assert found.order == (1, 4) and found.values == (0, 0)
    influence = score_layers(model, batches, remove=2, metric="block_influence")
    assert sorted(influence.order) == [1, 4] and max(influence.values) < 1e-12


def test_half_the_plain_way() -> None:
    """Of 12 layers, three of which matter little, four go: at most half the evaluations of plain forwards."""
    model = random_model(tiny_config(pattern="M-M*-M" * 2))
    with torch.no_grad():
        for name in ("layers.4.mixer.down_proj.weight", "layers.7.mixer.down_proj.weight"):
            model.state_dict()[name].mul_(0.05)
    batch = draw_rows(97, rows=8, tokens=12)
    found = score_layers(model, [batch.take([row]) for row in range(8)], remove=4)
    plain = 12 + sum(left * (left - 1) for left in (12, 11, 10, 9))
    assert found.layer_evaluations <= plain / 2
    streamed = layers.layers_of(model)
    streamed.streamed = True  # as of a folder: batches go in groups
    raced = score_layers(streamed, [batch.take([row]) for row in range(8)], remove=4)
    assert (raced.order, raced.values) == (found.order, found.values)
    assert found.layer_evaluations < raced.layer_evaluations <= plain / 2
    first = score_layers(model, [batch], remove=1)
    assert first.layer_evaluations == 12 + sum(range(12)) and len(first.candidates[0]) == 12


def test_evaluations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the layers that really run."""
    model = random_model(tiny_config(pattern="M-M*-M"))
    calls = 0
    forward_layers = model.forward_layers

    def counted(hidden: Tensor, start: int, stop: int, **rest: Any) -> Tensor:
        nonlocal calls
        calls += stop - start
        return forward_layers(hidden, start, stop, **rest)

    monkeypatch.setattr(model, "forward_layers", counted)
    batch = draw_rows(97, rows=5)
    for metric in METRICS:
        calls = 0
        found = score_layers(model, [batch.take([row]) for row in range(5)], remove=3, metric=metric)
        assert found.layer_evaluations == pytest.approx(calls / 5)


@pytest.mark.parametrize("metric", METRICS)
def test_single_shot_measures_once(metric: str) -> None:
    model = random_model(tiny_config(pattern="M-M*-M-M"))
    batches = [draw_rows(97, rows=2)]
    first = score_layers(model, batches, remove=1, metric=metric).candidates[0]
    ascending = sorted(first, key=lambda layer: first[layer])
    found = score_layers(model, batches, remove=4, metric=metric, iterative=False)
    assert list(found.order) == ascending[:4] and list(found.values) == sorted(first.values())[:4]
    assert found.candidates == (first,)


def test_single_shot_keeps_what_must_stay_and_whole_pairs() -> None:
    model = random_model(tiny_config(pattern="M-M*-M-M"))
    batches = [draw_rows(97, rows=2)]
    first = score_layers(model, batches, remove=1).candidates[0]
    least = {"mlp": 2, "mamba": 3}
    found = score_layers(model, batches, remove=3, iterative=False, min_layers=least)
    best = [min(group, key=lambda layer: first[layer]) for group in ((1, 4, 6), (0, 2, 5, 7), (3,))]
    assert list(found.order) == sorted(best, key=lambda layer: first[layer])
    together = score_layers(model, batches, remove=4, iterative=False, pairs=True)
    assert [layer + 1 for layer in together.order[::2]] == list(together.order[1::2]) and len(set(together.order)) == 4
    blocks = random_model(dense_config(0).replace(pattern="*-" * 4))
    order = score_layers(blocks, [draw_rows(blocks.config.vocab_size, rows=2)], remove=6, iterative=False).order
    assert not any(layer % 2 for layer in order[::2]) and len(set(order)) == 6


@torch.no_grad()
def test_single_shot_may_run_out_of_pairs() -> None:
    """Of seven layers 1, 2 and 4, 5 do nothing; without them 0, 3 and 6 are neighbours that nobody has measured."""
    model = random_model(tiny_config(pattern="M-M*-M-"))
    for name in ("1.mixer.down_proj", "2.mixer.out_proj", "4.mixer.down_proj", "5.mixer.out_proj"):
        model.state_dict()[f"layers.{name}.weight"].zero_()
    options: dict[str, Any] = {"batches": [draw_rows(97, rows=1)], "pairs": True}
    assert score_layers(model, remove=4, iterative=False, **options).order == (1, 2, 4, 5)
    with pytest.raises(InputError, match="after 4 layers no two neighbours are left that were measured together"):
        score_layers(model, remove=6, iterative=False, **options)
    assert len(score_layers(model, remove=6, **options).order) == 6


def test_the_report_knows_every_metric() -> None:
    assert set(DEPTH_METRICS) == set(depth.METRICS) == set(METRICS)


def test_wrong_options() -> None:
    model, batches = random_model(tiny_config()), [draw_rows(97, rows=1)]
    for option, value in (("metric", "mae"), ("table", "last")):
        with pytest.raises(InputError, match=f"depth: {option} is '{value}'; known: "):
            score_layers(model, batches, remove=1, **{option: value})  # type: ignore[arg-type]


@torch.no_grad()
def test_activations_that_are_not_finite() -> None:
    model, batch = random_model(tiny_config()), draw_rows(97, rows=1)
    model.state_dict()["layers.1.mixer.up_proj.weight"][3, 3] = torch.nan
    for metric in METRICS:
        with pytest.raises(InputError, match="is not finite"):
            score_layers(model, [batch], remove=1, metric=metric)


@torch.no_grad()
def test_logits_of_every_size() -> None:
    """Divergence and cross-entropy where logits are hundreds apart, and exactly nothing between equals."""
    torch.manual_seed(0)
    model = random_model(tiny_config())
    source = layers.layers_of(model)
    labels = torch.randint(97, (9,))
    for scale in (1e-3, 1.0, 300.0):
        p, q = torch.randn(2, 9, 32, dtype=torch.float64) * scale
        reading = Reading(p, labels, [q, p])
        head = model.head_weight
        lp, lq = (p @ head.T).log_softmax(-1), (q @ head.T).log_softmax(-1)
        (kl,) = Divergence(source).costs([reading])
        assert float(kl[0]) == pytest.approx(float((lp.exp() * (lp - lq)).sum()), rel=1e-7)
        assert float(kl[1]) == 0
        (entropy,) = CrossEntropy(source).costs([reading])
        assert float(entropy[0]) == pytest.approx(float(-lq.gather(1, labels[:, None]).sum()), rel=1e-9)


def test_batches_without_a_counted_token_change_nothing() -> None:
    model, batch = random_model(tiny_config()), draw_rows(97, rows=2)
    nothing = Rows(batch.input_ids, torch.full_like(batch.labels, -100), batch.seq_idx)
    for metric in METRICS:
        alone = score_layers(model, [batch], remove=2, metric=metric)
        beside = score_layers(model, [nothing, batch], remove=2, metric=metric)
        assert beside.order == alone.order and beside.values == alone.values
    assert Race(layers.layers_of(model), [batch], "mse", 2**20).terms == int((batch.labels != -100).sum()) * 97
