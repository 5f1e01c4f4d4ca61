"""Losses: weights that move, hidden states against the formula, a cached teacher against the one that answered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill.hidden import KeptParts, Pairing, choose_pairs, make_pairing
from limbeck.distill.losses import DistillLoss, cross_entropy_loss, distillation_loss
from limbeck.distill.options import HiddenLoss, Ramp, weight_at
from limbeck.distill.teacher import CachedTeacher, CacheOptions, finish_cache, read_keys, row_keys, shards, write_cache
from limbeck.distill.text.packing import Batch
from limbeck.distill.trainer import TrainOptions, train
from limbeck.kernels.linear_topk_kl import TopK
from limbeck.models.axes import Axis
from limbeck.models.errors import InputError
from limbeck.models.hybrid import HybridLM
from limbeck.prune.slice import Selection, slice_model
from limbeck.tests.helpers import assert_close, random_model, tiny_config
from limbeck.tests.training_helpers import draw_batch
from torch import Tensor


def model_of(seed: int, **changes: Any) -> HybridLM:
    return random_model(tiny_config(**changes), seed)


def gradients(loss_of: Any, student: HybridLM, batch: Batch, micro: int, normalizer: float) -> tuple[Tensor, Tensor]:
    """Loss and all gradients of a batch taken `micro` rows at a time."""
    student.zero_grad()
    total = torch.zeros(())
    for start in range(0, len(batch.input_ids), micro):
        loss = loss_of(student, batch.rows(start, start + micro), normalizer)
        loss.backward()
        total = total + loss.detach()
    return total, torch.cat([weight.grad.flatten() for weight in student.parameters() if weight.grad is not None])


def test_weights_move() -> None:
    line, wave = Ramp(1.0, 0.0, 4), Ramp(0.0, 2.0, 4, "cosine")
    assert [weight_at(line, step) for step in (0, 1, 4, 9)] == [1.0, 0.75, 0.0, 0.0]
    assert [round(weight_at(wave, step), 6) for step in (0, 1, 2, 4, 9)] == [0.0, 0.292893, 1.0, 2.0, 2.0]
    teacher, student, batch = model_of(0), model_of(1), draw_batch(3)
    loss = distillation_loss(teacher, DistillLoss(kl_weight=line, ce_weight=Ramp(0.0, 1.0, 4)))
    only = distillation_loss(teacher, DistillLoss())(student, batch, 9.0)
    assert_close("start", only, loss(student, batch, 9.0), 1e-12)
    loss.at(7)
    assert_close("end", cross_entropy_loss(student, batch, 9.0), loss(student, batch, 9.0), 1e-12)
    loss.at(1)
    mixed = 0.75 * only + 0.25 * cross_entropy_loss(student, batch, 9.0)
    assert_close("between", mixed, loss(student, batch, 9.0), 1e-12)


@pytest.mark.parametrize(
    "wrong",
    (
        {"kl_weight": Ramp(1.0, -0.1, 5)},
        {"kl_weight": 0.0},
        {"ce_weight": float("inf")},
        {"hidden": {"weight": 1.0, "compare": "odd"}},
        {"hidden": {"streams": 0}},
        {"hidden": {"pairs": ((1, 2, 3),)}},
        {"kl_weight": {"steps": 0}},
        {"kl_weight": {"shape": "odd"}},
    ),
)
def test_wrong_losses(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="loss"):
        if isinstance(wrong.get("hidden"), dict):
            wrong = {"hidden": HiddenLoss(**wrong["hidden"])}
        if isinstance(wrong.get("kl_weight"), dict):
            wrong = {"kl_weight": Ramp(**({"start": 1.0, "end": 0.0, "steps": 2} | wrong["kl_weight"]))}
        DistillLoss(**wrong)


def test_streams_are_paired_with_what_the_next_kept_layer_read() -> None:
    teacher, student = tiny_config(), tiny_config(pattern="M-*M")
    kept = KeptParts((0, 1, 3, 5), None)
    assert choose_pairs(teacher, student, HiddenLoss(streams=9), kept) == ((1, 1), (2, 3), (3, 5), (4, 6))
    assert choose_pairs(teacher, student, HiddenLoss(streams=2), kept) == ((2, 3), (4, 6))
    assert choose_pairs(teacher, student, HiddenLoss(streams=9), None) == ((1, 2), (2, 3), (3, 4), (4, 6))
    assert choose_pairs(teacher, student, HiddenLoss(pairs=((0, 0), (4, 5))), kept) == ((0, 0), (4, 5))
    with pytest.raises(InputError, match=r"\[5, 0\]"):
        choose_pairs(teacher, student, HiddenLoss(pairs=((5, 0),)), kept)


def cut(teacher: HybridLM) -> tuple[HybridLM, KeptParts]:
    """A student without layers 2 and 4, of 24 channels."""
    channels, layers = tuple(range(3, 27)), (0, 1, 3, 5)
    selection = Selection(layers, {Axis("hidden"): channels})
    return slice_model(teacher, selection), KeptParts(layers, channels)


def streams_of(model: HybridLM, batch: Batch, numbers: list[int]) -> list[Tensor]:
    """The residual streams, plainly."""
    found, hidden = [], model.embed(batch.input_ids)
    for layer in range(model.config.num_layers + 1):
        found.append(hidden)
        if layer < model.config.num_layers:
            hidden = model.forward_layers(hidden, layer, layer + 1, seq_idx=batch.seq_idx)
    return [found[number] for number in numbers]


def test_hidden_loss_is_the_formula_on_kept_channels() -> None:
    teacher = model_of(0)
    student, kept = cut(teacher)
    batch = draw_batch(4)
    options = DistillLoss(hidden=HiddenLoss(weight=0.5, streams=2))
    pairing = make_pairing(teacher, student, options.hidden, kept, ())
    found = distillation_loss(teacher, options, pairing)(student, batch, 11.0)
    ours, theirs = streams_of(student, batch, [2, 4]), streams_of(teacher, batch, [3, 6])
    distance = torch.zeros(())
    for a, b in zip(ours, theirs, strict=True):
        distance = distance + 2 - 2 * torch.nn.functional.cosine_similarity(a, b[..., 3:27], dim=-1)
    expected = distillation_loss(teacher, DistillLoss())(student, batch, 11.0)
    expected = expected + 0.5 * (distance / 2)[batch.labels >= 0].sum() / 11.0
    assert_close("loss", expected, found, 1e-9)
    assert (
        make_pairing(teacher, teacher, options.hidden, KeptParts(tuple(range(6)), tuple(range(32))), ()).channels
        is None
    )


def test_fitted_maps_find_a_rotation() -> None:
    """A student whose stream is the teacher's, turned: the fitted map turns it back, and the distance is nothing."""
    teacher, student = model_of(0), model_of(0)
    turn = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0]
    with torch.no_grad():  # a stream is turned by turning what writes it and what reads it
        student.embeddings.weight.copy_(teacher.embeddings.weight @ turn)
        for block, source in zip(student.layers, teacher.layers, strict=True):
            for name, weight in block.named_parameters():
                theirs = source.get_parameter(name)
                if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
                    weight.copy_(turn.T @ theirs)
                elif name == "norm.weight":
                    weight.fill_(1)
                elif weight.dim() == 2:
                    weight.copy_((theirs * source.get_parameter("norm.weight")) @ turn)
    batches = [draw_batch(seed) for seed in range(8)]
    pairing = make_pairing(teacher, student, HiddenLoss(streams=3), None, batches)
    assert pairing.channels is None and pairing.maps is not None and len(pairing.maps) == 3
    with torch.no_grad():
        numbers = [a for a, _ in pairing.pairs]
        found = pairing.distance(streams_of(student, batches[0], numbers), streams_of(teacher, batches[0], numbers))
        apart = Pairing(pairing.pairs).distance(
            streams_of(student, batches[0], numbers), streams_of(teacher, batches[0], numbers)
        )
    assert found.max() < 1e-4 < 0.5 < apart.mean()
    with pytest.raises(InputError, match="compare=kept"):
        make_pairing(teacher, student, HiddenLoss(compare="kept"), None, batches)


def test_moving_weights_are_resumed(tmp_path: Path) -> None:
    """The trainer tells the loss its step: killed and resumed, the weights are where they would have been."""
    teacher = model_of(0).float()
    options = TrainOptions(steps=6, learning_rate=0.01, warmup_steps=1, save_every=2, log_every=1)
    ends = []
    for name, stops in (("calm", (None,)), ("rough", (3, None))):
        for stop in stops:
            student = model_of(1).float()
            loss = distillation_loss(teacher, DistillLoss(kl_weight=Ramp(1.0, 0.0, 5), ce_weight=Ramp(0.0, 1.0, 5)))
            source = lambda start: (draw_batch(number) for number in range(start, 6))  # noqa: E731
            train(student, loss, source, options, tmp_path / name, stop_after=stop)
        assert loss.kl_weight == 0 and loss.ce_weight == 1
        ends.append(torch.cat([weight.detach().flatten() for weight in student.parameters()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("micro", (1, 3))
@pytest.mark.parametrize("kind", ("kept", "fitted", "cached"))
def test_gradient_does_not_depend_on_the_split(micro: int, kind: str, tmp_path: Path) -> None:
    teacher = model_of(0)
    student, kept = cut(teacher)
    student.float(), teacher.float()
    batch = draw_batch(5)
    if kind == "cached":
        loss = distillation_loss(cache_of(teacher, [batch], tmp_path, 8), DistillLoss(ce_weight=0.3))
    else:
        options = DistillLoss(ce_weight=0.3, hidden=HiddenLoss(weight=2.0, compare=kind))
        loss = distillation_loss(
            teacher, options, make_pairing(teacher, student, options.hidden, kept, [draw_batch(1)])
        )
    normalizer = float((batch.labels >= 0).sum())
    whole, parts = (gradients(loss, student, batch, size, normalizer) for size in (4, micro))
    assert_close("loss", whole[0], parts[0], 1e-6)
    assert_close("gradient", whole[1], parts[1], 1e-5)


def cache_of(teacher: HybridLM, batches: list[Batch], folder: Path, k: int, **options: Any) -> CachedTeacher:
    chosen = CacheOptions(k=k, **({"dtype": "float32"} | options))
    write_cache(teacher, [(batch, 3) for batch in batches], folder, chosen)
    finish_cache(folder, teacher.config.vocab_size, "sum of the tokenizer", chosen)
    return CachedTeacher(folder)


def test_cached_teacher_is_the_dense_one_at_every_token(tmp_path: Path) -> None:
    teacher, student = (model_of(seed).float() for seed in (0, 1))
    batches = [draw_batch(seed) for seed in range(3)]
    dense = distillation_loss(teacher, DistillLoss(ce_weight=0.3))
    losses: dict[Any, float] = {}
    for k in (2, 16, 97):
        teacher_cached = cache_of(teacher, batches, made(tmp_path, k), k)
        for tail in (True, False):
            loss = distillation_loss(teacher_cached, DistillLoss(ce_weight=0.3, tail=tail))
            losses[k, tail] = sum(loss(student, batch, 50.0).item() for batch in batches)
    expected = sum(dense(student, batch, 50.0).item() for batch in batches)
    for tail in (True, False):
        assert losses[97, tail] == pytest.approx(expected, rel=1e-6)
    assert losses[2, True] < losses[16, True] < expected
    assert abs(losses[16, True] - expected) < abs(losses[2, True] - expected) < abs(losses[2, False] - expected)


def made(root: Path, name: Any) -> Path:
    folder = root / str(name)
    folder.mkdir()
    return folder


def test_cache_is_read_in_any_order_and_written_on(tmp_path: Path) -> None:
    teacher = model_of(0).float()
    batches = [draw_batch(seed) for seed in range(3)]
    whole = cache_of(teacher, [*batches, batches[1]], made(tmp_path, "whole"), 5, shard_bytes=2000)
    assert len(whole.places) == 12 and len(shards(whole.folder)) > 2, "a row that comes twice is kept once"
    resumed = made(tmp_path, "resumed")
    write_cache(teacher, [(batches[0], 4)], resumed, CacheOptions(k=5, dtype="float32"))
    written = shards(resumed)[0].stat().st_mtime_ns
    again = cache_of(teacher, batches, resumed, 5)
    assert shards(resumed)[0].stat().st_mtime_ns == written and again.places.keys() == whole.places.keys()
    mixed = Batch(*(torch.stack((a[2], b[0], c[3])) for a, b, c in zip(*(
        [getattr(batch, name) for name in ("input_ids", "labels", "seq_idx", "n_bytes", "doc_id")] for batch in batches
    ), strict=True)))  # fmt: skip
    for cache in (whole, again):
        found = cache.targets(mixed)
        for place, (batch, row) in enumerate(((batches[0], 2), (batches[1], 0), (batches[2], 3))):
            alone = cache.targets(batch.rows(row, row + 1))
            for name, a, b in zip(found._fields, found, alone, strict=True):
                assert torch.equal(a[place * 20 : place * 20 + 20], b), name
    with pytest.raises(InputError, match="does not hold row 0"):
        whole.targets(draw_batch(9))
    moved = Batch(mixed.input_ids, mixed.labels, mixed.seq_idx * 0, mixed.n_bytes, mixed.doc_id)
    assert row_keys(moved.input_ids, moved.seq_idx) != row_keys(mixed.input_ids, mixed.seq_idx)


WRITER = """
import sys
from pathlib import Path
import torch
from limbeck.distill.teacher import CacheOptions, finish_cache, write_cache
from limbeck.models import processes
from limbeck.tests.helpers import random_model, tiny_config
from limbeck.tests.training_helpers import draw_batch

torch.distributed.init_process_group("gloo")
assert processes.count() == 2
torch.manual_seed(0)
options, folder = CacheOptions(k=5, dtype="float32", shard_bytes=2000), Path(sys.argv[1])
write_cache(random_model(tiny_config(), 0).float(), [(draw_batch(seed), 3) for seed in range(3)], folder, options)
processes.gather(None)
if processes.rank() == 0:
    finish_cache(folder, 97, "", options)
processes.leave()
"""


@pytest.mark.slow
def test_two_processes_write_one_cache(tmp_path: Path) -> None:
    """Each asks for its share, in files of its own; what is read is what one process would have written."""
    (tmp_path / "writer.py").write_text(WRITER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "writer.py"), str(made(tmp_path, "two"))]
    found = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    batches = [draw_batch(seed) for seed in range(3)]
    one = cache_of(model_of(0).float(), batches, made(tmp_path, "one"), 5)
    two = CachedTeacher(tmp_path / "two")
    assert len(two) == 12 and sum(len(read_keys(path)) for path in shards(two.folder)) == 12
    for batch in batches:
        for name, a, b in zip(TopK._fields, one.targets(batch), two.targets(batch), strict=True):
            assert_close(name, a, b, 1e-5)


def test_cache_of_a_large_vocabulary_and_its_size(tmp_path: Path) -> None:
    teacher = model_of(0, vocab_size=70001).float()
    batch = draw_batch(1, vocabulary=97)
    cache = cache_of(teacher, [batch], made(tmp_path, "cache"), 70, dtype="float16")
    ids = cache.targets(batch).ids
    with torch.no_grad():
        logits = teacher(batch.input_ids, seq_idx=batch.seq_idx).flatten(0, 1)
    assert (ids > 65536).any() and torch.equal(ids[:, :3], logits.topk(3).indices)
    size = sum(path.stat().st_size for path in shards(cache.folder)) / batch.input_ids.numel()
    expected = CacheOptions(k=70, dtype="float16").bytes_per_token(70001)
    assert expected == 70 * 5 + 2 and size == pytest.approx(expected, rel=0.03)


def test_cached_teacher_refuses_what_it_does_not_hold(tmp_path: Path) -> None:
    teacher = model_of(0).float()
    cache = cache_of(teacher, [draw_batch(1)], made(tmp_path, "cache"), 5)
    for wrong in (DistillLoss(divergence="reverse"), DistillLoss(temperature=2.0), DistillLoss(hidden=HiddenLoss(1.0))):
        with pytest.raises(InputError, match="cached teacher"):
            distillation_loss(cache, wrong)
    with pytest.raises(InputError, match="vocabulary"):
        distillation_loss(cache, DistillLoss())(model_of(1, vocab_size=50), draw_batch(1, vocabulary=50), 1.0)
    with pytest.raises(InputError, match="no finished cache"):
        CachedTeacher(tmp_path)
    with pytest.raises(InputError, match="beyond the vocabulary"):
        write_cache(teacher, [], tmp_path, CacheOptions(k=98))
    (shards(cache.folder)[0]).write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot be read"):
        CachedTeacher(cache.folder)
    with pytest.raises(InputError, match="no streams are paired"):
        distillation_loss(teacher, DistillLoss(hidden=HiddenLoss(1.0)))
