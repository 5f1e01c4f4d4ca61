"""A teacher's answers by draws: no bias, less variance than draws apart, and the cache that holds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from limbeck.distill.losses import DistillLoss, distillation_loss
from limbeck.distill.teacher import CachedTeacher, CacheOptions, cached_gap, finish_cache, shards, write_cache
from limbeck.distill.text.packing import Batch
from limbeck.kernels.linear_draws_kl import Draws, linear_draws, linear_draws_kl
from limbeck.kernels.linear_kl import linear_kl
from limbeck.kernels.linear_topk_kl import TopK, linear_topk, linear_topk_kl
from limbeck.models.errors import CheckFailed, InputError
from limbeck.models.hybrid import HybridLM
from limbeck.tests.helpers import assert_close, limbeck, make_pair
from limbeck.tests.training_helpers import draw_batch, model_of
from torch import Tensor
from torch.nn import functional as F

T, V, H, K, ROUNDS = 6, 17, 8, 4, 1000


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student's hidden states and head, the teacher's."""
    torch.manual_seed(0)
    student, head = torch.randn(T, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64) / 2
    teacher, taught = torch.randn(T, H + 3, dtype=torch.float64), torch.randn(V, H + 3, dtype=torch.float64) / 2
    return student.requires_grad_(), head.requires_grad_(), teacher, taught


def gradients(loss: Tensor, student: Tensor, head: Tensor) -> Tensor:
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, (student, head))])


def test_the_gradient_has_no_bias_and_less_variance_than_draws_apart() -> None:
    """The mean over 1,000 draws is the dense gradient within its standard errors, and so is the loss; a top-k of as
    many tokens is off by far more than that."""
    student, head, teacher, taught = problem()
    dense = linear_kl(student, head, teacher, taught)
    expected = gradients(dense.loss, student, head)
    generator = torch.Generator().manual_seed(1)
    found, losses, apart = [], [], []
    p = (teacher @ taught.T).softmax(-1)
    for number in range(ROUNDS):
        drawn = linear_draws(teacher, taught, K, torch.rand(T, generator=generator))
        loss = linear_draws_kl(student, head, drawn).loss
        losses.append(loss.detach())
        found.append(gradients(loss, student, head))
        if number % 4:
            continue
        plain = drawn._replace(ids=torch.multinomial(p, K, replacement=True, generator=generator))
        apart.append(gradients(linear_draws_kl(student, head, plain).loss, student, head))
    for draws in (torch.stack(found), torch.stack(apart)):
        errors = (draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5 + 1e-12)
        # 184 numbers, standard normal where there is no bias: the greatest is beyond 4.5 once in 800 times.
        assert errors.abs().max() < 4.5 and errors.square().mean() < 2
    error = (torch.stack(losses).mean() - dense.loss.detach()) / (torch.stack(losses).std() / ROUNDS**0.5)
    assert abs(error) < 4
    assert torch.stack(found).var(0).sum() < 0.6 * torch.stack(apart).var(0).sum()
    cut = gradients(linear_topk_kl(student, head, linear_topk(teacher, taught, K)).loss, student, head)
    bias = (torch.stack(found).mean(0) - expected).norm()
    assert (cut - expected).norm() > 3 * bias


def test_counts_are_within_one_draw() -> None:
    _, _, teacher, taught = problem()
    p = (teacher @ taught.T).softmax(-1)
    for k in (1, 5, 100):
        drawn = linear_draws(teacher, taught, k, torch.rand(T, dtype=torch.float64), chunk_tokens=2)
        counts = F.one_hot(drawn.ids, V).sum(1)
        assert (counts.sum(1) == k).all() and ((counts - k * p).abs() < 1).all()
    assert_close("entropy", -(p * p.log()).sum(-1), drawn.entropy, 1e-12)
    assert torch.equal(drawn.first, p.argmax(-1))
    certain = linear_draws(teacher * 1e4, taught, 3, torch.tensor([0.0, 1 - 1e-7, 0.5, 0.1, 0.9, 0.3]))
    assert torch.equal(certain.ids, (teacher @ taught.T).argmax(-1)[:, None].expand(T, 3))


@pytest.mark.parametrize("weights", ((1.0, 0.0), (0.7, 0.3)))
@pytest.mark.parametrize("chunk", (2, None))
def test_values_and_gradients(weights: tuple[float, float], chunk: int | None) -> None:
    """Of autograd on all logits, with ignored tokens, weights, and tokens that were drawn twice."""
    student, head, teacher, taught = problem()
    (kl, ce), labels = weights, torch.tensor([3, -100, 0, 16, 5, 5])
    drawn, token_weights = linear_draws(teacher, taught, 9, torch.rand(T)), torch.rand(T, dtype=torch.float64)
    log_q = (student @ head.T).log_softmax(-1)
    shares = F.one_hot(drawn.ids, V).double().mean(1)
    cross = F.nll_loss(log_q, labels, ignore_index=-100, reduction="none")
    token = kl * (-(shares * log_q).sum(-1) - drawn.entropy) + ce * cross
    expected = (token * token_weights * (labels >= 0)).sum() / 7
    found = linear_draws_kl(
        student, head, drawn, labels=labels, token_weights=token_weights, kl_weight=kl, ce_weight=ce, normalizer=7.0,
        chunk_tokens=chunk,
    )  # fmt: skip
    assert_close("loss", expected.detach(), found.loss.detach(), 1e-12)
    assert_close("gradient", gradients(expected, student, head), gradients(found.loss, student, head), 1e-12)
    assert found.kl[1] == 0 and not found.agreement[1]
    ranks = (student @ head.T).argmax(-1) == (teacher @ taught.T).argmax(-1)
    assert torch.equal(found.agreement, ranks & (labels >= 0))
    with pytest.raises(ValueError, match="expected"):
        linear_draws_kl(student, head, drawn._replace(entropy=drawn.entropy[:2]))
    with pytest.raises(ValueError, match="expected at least 1"):
        linear_draws(teacher, taught, 0, torch.rand(T))
    with pytest.raises(ValueError, match="needs labels"):
        linear_draws_kl(student, head, drawn, ce_weight=1.0)


def cache_of(teacher: HybridLM, batches: list[Batch], folder: Path, **options: object) -> CachedTeacher:
    folder.mkdir()
    chosen = CacheOptions(**({"method": "sample", "k": 12} | options))  # type: ignore[arg-type]
    write_cache(teacher, [(batch, 3) for batch in batches], folder, chosen)
    finish_cache(folder, teacher.config.vocab_size, "sum of the tokenizer", chosen)
    return CachedTeacher(folder)


def test_a_cache_of_draws(tmp_path: Path) -> None:
    """A row has the same draws whichever batch it comes in; many of them teach as the teacher itself does."""
    teacher, student = model_of(0), model_of(1)
    batches = [draw_batch(seed) for seed in range(3)]
    cache = cache_of(teacher, batches, tmp_path / "few")
    alone = cache_of(teacher, [batches[1].rows(2, 3)], tmp_path / "alone").targets(batches[1].rows(2, 3))
    both = cache.targets(batches[1])
    assert isinstance(both, Draws)
    for name, one, other in zip(Draws._fields, alone, both, strict=True):
        assert torch.equal(one, other[40:60]), name
    size = sum(path.stat().st_size for path in shards(cache.folder)) / (12 * 20)
    assert CacheOptions(method="sample", k=12).bytes_per_token(97) == 28 and size == pytest.approx(28, abs=5)
    many = cache_of(teacher, batches, tmp_path / "many", k=2000, dtype="float32")
    dense, drawn = (distillation_loss(each, DistillLoss(ce_weight=0.3)) for each in (teacher, many))
    for batch in batches:
        assert drawn(student, batch, 50.0).item() == pytest.approx(dense(student, batch, 50.0).item(), rel=0.01)
    figures = cached_gap(many, student, batches)
    exact = cached_gap(cache_of(teacher, batches, tmp_path / "all", method="top_k", k=97), student, batches)
    assert figures["validation_kl"] == pytest.approx(exact["validation_kl"], rel=0.01)
    for name in ("validation_loss", "validation_agreement"):
        assert figures[name] == pytest.approx(exact[name], rel=1e-6)


def test_a_large_vocabulary_and_what_is_refused(tmp_path: Path) -> None:
    teacher, batch = model_of(0, vocab_size=70001), draw_batch(1)
    cache = cache_of(teacher, [batch], tmp_path / "large", k=70)
    found = cache.targets(batch)
    with torch.no_grad():
        logits = teacher(batch.input_ids, seq_idx=batch.seq_idx).flatten(0, 1)
    assert isinstance(found, Draws) and (found.ids > 65536).any() and torch.equal(found.first, logits.argmax(-1))
    with pytest.raises(InputError, match="no tail to leave out"):
        distillation_loss(cache, DistillLoss(tail=False))
    with pytest.raises(InputError, match="known: top_k, sample"):
        CacheOptions(method="draw")
    facts = json.loads((cache.folder / "cache.json").read_text())
    (cache.folder / "cache.json").write_text(json.dumps(facts | {"method": "sketch"}))
    with pytest.raises(InputError, match="method 'sketch'"):
        CachedTeacher(cache.folder)


def test_caches_from_before_there_were_methods(tmp_path: Path) -> None:
    """They open as what they are, and their options are the same in a fingerprint."""
    teacher, batch = model_of(0), draw_batch(1)
    folder = cache_of(teacher, [batch], tmp_path / "old", method="top_k", k=5).folder
    facts = json.loads((folder / "cache.json").read_text())
    assert facts.pop("method") == "top_k"
    (folder / "cache.json").write_text(json.dumps(facts))
    assert isinstance(CachedTeacher(folder).targets(batch), TopK)
    assert CacheOptions().chosen == {"k": 64, "dtype": "float16", "shard_bytes": 2**27}
    assert CacheOptions(method="sample").chosen["method"] == "sample"


def test_the_commands(tmp_path: Path) -> None:
    root = make_pair(tmp_path)
    small = {"seq_len": 32, "batch": 2, "evaluate_tokens": 64, "train.steps": 2, "train.warmup_steps": 1,
             "train.log_every": 1, "train.evaluate_every": 2}  # fmt: skip
    how = [f"data={root / 'text'}", *(f"distill.{key}={value}" for key, value in small.items())]
    code, out, err = limbeck("cache-teacher", f"teacher={root / 'model'}", f"output={root / 'answers'}", *how,
                             "cache.method=sample", "cache.k=12")  # fmt: skip
    assert code == 0 and "sample" in out, err
    places = (f"teacher={root / 'model'}", f"student={root / 'student'}", f"output={root / 'out'}")
    code, _, err = limbeck("distill", *places, *how, f"teacher_cache={root / 'answers'}", "wandb=off")
    assert code == 0, err
    last = json.loads((root / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["validation_kl"] > 0 and "validation_agreement" in last


def test_figures_that_are_not_finite_are_a_check_that_failed(tmp_path: Path) -> None:
    cache, student = cache_of(model_of(0), [draw_batch(0)], tmp_path / "cache"), model_of(1)
    with torch.no_grad():
        student.norm_f.weight[0] = float("nan")
    with pytest.raises(CheckFailed, match="not finite"):
        cached_gap(cache, student, [draw_batch(0)])
