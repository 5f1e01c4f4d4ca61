"""Text that the student writes itself: what it is, what of it counts, what is learned there, and that it repeats."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from limbeck import api
from limbeck.distill.losses import DistillLoss, distillation_loss
from limbeck.distill.options import DistillOptions, StageOptions, TrainOptions
from limbeck.distill.rollout_options import RolloutChanges, Rollouts
from limbeck.distill.rollouts import OnPolicy, check_student, continuations_of, slots_of
from limbeck.distill.stages import check_text, stage_batches
from limbeck.distill.text.conversations import ANSWER, PROMPT, THOUGHT
from limbeck.distill.text.mixture import Mixture, Source
from limbeck.distill.text.packing import Corpus
from limbeck.distill.text.prompts import MixedBatch, Prompts, prompt_batches
from limbeck.distill.trainer import counted, train
from limbeck.kernels.linear_kl import linear_kl
from limbeck.kernels.linear_reverse_kl import linear_reverse_kl
from limbeck.models.errors import InputError
from limbeck.models.hybrid import HybridLM
from limbeck.tests.helpers import assert_close, limbeck, make_pair
from limbeck.tests.processes_helpers import run_workers
from limbeck.tests.training_helpers import model_of, options, records, weights
from torch import Tensor

HOW = Rollouts(prompt_tokens=5, new_tokens=7)
SEQ_LEN = 27  # two slots of twelve, and three tokens that are left over


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("workshop"))


def corpus_of(lengths: list[int], seed: int = 0, parts: list[list[int]] | None = None) -> Corpus:
    """Documents `<1> tokens <2>` of these lengths."""
    draw = np.random.default_rng(seed)
    ids = np.concatenate([np.r_[1, draw.integers(3, 97, length - 2), 2] for length in lengths]).astype(np.int32)
    names = [f"document {number}" for number in range(len(lengths))]
    marks = None if parts is None else np.concatenate([np.array(part, np.uint8) for part in parts])
    return Corpus(ids, np.cumsum([0, *lengths]), names, torch.ones(97, dtype=torch.int64), 0, parts=marks)


CORPUS = corpus_of([30, 9, 14, 25, 40, 3, 18] * 4)


def mixed(start: int = 0, share: float = 1.0, rows: int = 4, **changes: Any) -> MixedBatch:
    how = dataclasses.replace(HOW, **changes)
    return next(
        prompt_batches(
            CORPUS, rows=rows, own_rows=round(share * rows), seq_len=SEQ_LEN, width=how.width,
            prompt_tokens=how.prompt_tokens, seed=3, start=start,
        )
    )  # fmt: skip


def on_policy(how: Rollouts = HOW, loss: DistillLoss | None = None, ends: tuple[int, ...] = (2,)) -> OnPolicy:
    return OnPolicy(model_of(0), loss or DistillLoss(), how, seed=5, ends=ends)


def tempered(seed: int = 1, **changes: Any) -> HybridLM:
    """A student that is not certain of anything."""
    model = model_of(seed, **changes)
    with torch.no_grad():
        model.head_weight.mul_(0.2)
    return model


@pytest.mark.parametrize("how", (HOW, dataclasses.replace(HOW, temperature=0.7, top_p=0.8, at_once=3)))
def test_the_engine_and_the_trainer_give_the_same_log_probabilities(how: Rollouts) -> None:
    student, batch, loss = tempered(), mixed(), on_policy(how)
    slots = slots_of(batch, range(4), how.width)
    assert len(slots) == 8 and {slot.begin for slot in slots} == {0, 12} and all(slot.prompt[0] == 1 for slot in slots)
    wanted = continuations_of(student, slots, how, (2,), 5, 9)
    rows = loss.written(student, batch, 9)
    log_probs = student(rows.input_ids, seq_idx=rows.seq_idx).log_softmax(-1)
    for slot, completion in zip(slots, wanted, strict=True):
        begin = slot.begin + len(slot.prompt)
        places = slice(begin - 1, begin - 1 + len(completion.tokens))
        assert rows.labels[slot.row, places].tolist() == completion.tokens
        assert rows.input_ids[slot.row, begin : begin + len(completion.tokens)].tolist() == completion.tokens
        found = log_probs[slot.row, places].gather(1, rows.labels[slot.row, places, None])[:, 0]
        assert (found - torch.tensor(completion.logprobs)).abs().max() <= 1e-5
    again = loss.written(student, batch, 10)
    assert not torch.equal(again.input_ids, rows.input_ids)  # other steps draw anew


def test_only_what_was_written_counts_and_its_end_ends_it() -> None:
    """The loss is reverse KL over the written tokens, of whole logits in float64; what stands elsewhere is not read."""
    ends = tuple(range(2, 40))  # so that most continuations end early
    student, loss = tempered(), on_policy(ends=ends)
    rows = loss.written(student, mixed(), 0)
    written = rows.labels >= 0
    slots = slots_of(mixed(), range(4), HOW.width)
    lengths = [int(written[slot.row, slot.begin : slot.begin + HOW.width].sum()) for slot in slots]
    assert min(lengths) < HOW.new_tokens and sum(lengths) == written.sum()
    for slot, length in zip(slots, lengths, strict=True):
        tokens = rows.labels[slot.row, slot.begin : slot.begin + HOW.width]
        tokens = tokens[tokens >= 0]
        assert len(tokens) == HOW.new_tokens or int(tokens[-1]) in ends
        assert not set(tokens[:-1].tolist()) & set(ends)
        assert int((rows.doc_id[slot.row, slot.begin : slot.begin + HOW.width] >= 0).sum()) == len(slot.prompt) + length
    q, p = (model.double()(rows.input_ids, seq_idx=rows.seq_idx).log_softmax(-1)[written]
            for model in (tempered(), model_of(0)))  # fmt: skip
    expected = ((q.exp() * (q - p)).sum() / counted(rows)).detach()
    found = loss(student, rows, counted(rows)).detach()
    assert_close("loss", expected, found, 1e-5)
    figures = loss.figures()
    assert figures["rollout_kl"] == pytest.approx(float(expected), rel=1e-5)
    assert figures["rollout_length"] == sum(lengths) / len(lengths)
    assert 0 < figures["rollout_ended"] <= 1
    drawn = -q.detach().gather(1, rows.labels[written][:, None]).mean()
    assert figures["rollout_entropy"] == pytest.approx(float(drawn), rel=1e-5)
    noise = rows.input_ids.masked_fill(rows.doc_id < 0, 77)
    elsewhere = dataclasses.replace(rows, input_ids=noise)
    assert loss(student, elsewhere, counted(rows)).item() == pytest.approx(float(found), rel=1e-6)


def test_rows_of_the_text_beside() -> None:
    """A share is dealt out evenly; the others are the text's, with the loss that they always had; any split into
    micro-batches gives the same."""
    loss = on_policy(loss=DistillLoss(ce_weight=0.3))
    student, batch = tempered(), mixed(share=0.5)
    assert batch.is_own.tolist() == [False, True, False, True]
    text = next(CORPUS.train_batches(batch_size=2, seq_len=SEQ_LEN, seed=3))
    for column in ("input_ids", "labels", "seq_idx", "doc_id"):
        assert torch.equal(getattr(batch.of(False), column), getattr(text, column))
    rows = loss.written(student, batch, 0)
    assert torch.equal(rows.of(False).input_ids, text.input_ids)
    normalizer = counted(rows)
    whole = loss(student, rows, normalizer)
    apart = distillation_loss(model_of(0), DistillLoss(ce_weight=0.3))(student, text, normalizer)
    own = distillation_loss(model_of(0), DistillLoss(divergence="reverse"))(student, rows.of(True), normalizer)
    assert whole.item() == pytest.approx((apart + own).item(), rel=1e-6)
    pieces = [loss(student, rows.rows(row, row + 1), normalizer).item() for row in range(4)]
    assert sum(pieces) == pytest.approx(whole.item(), rel=1e-5)


def drawn_problem(tokens: int = 11, vocabulary: int = 13) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, head = torch.randn(tokens, 6, dtype=torch.float64), torch.randn(vocabulary, 6, dtype=torch.float64)
    teacher, taught = torch.randn(tokens, 4, dtype=torch.float64), torch.randn(vocabulary, 4, dtype=torch.float64)
    return student.requires_grad_(), head.requires_grad_(), teacher, taught


def test_the_drawn_tokens_gradient_is_that_of_reverse_kl_on_average() -> None:
    """Every token in turn, in the share in which it would be drawn: value and gradient of the dense divergence."""
    torch.manual_seed(0)
    student, head, teacher, taught = drawn_problem()
    dense = linear_kl(student, head, teacher, taught, divergence="reverse", normalizer=1.0)
    expected = torch.autograd.grad(dense.loss, (student, head))
    q = (student @ head.T).softmax(-1).detach()
    total, gradients = 0.0, [torch.zeros_like(each) for each in (student, head)]
    for token in range(13):
        drawn = {"labels": torch.full((11,), token), "token_weights": q[:, token], "normalizer": 1.0}
        found = linear_reverse_kl(student, head, teacher, taught, clip=1e9, chunk_tokens=4, **drawn)  # type: ignore[arg-type]
        total += found.loss.item()
        for sum_, gradient in zip(gradients, torch.autograd.grad(found.loss, (student, head)), strict=True):
            sum_ += gradient
    assert total == pytest.approx(dense.loss.item(), rel=1e-10)
    for name, a, b in zip(("hidden", "head"), expected, gradients, strict=True):
        assert_close(name, a, b, 1e-10)
    labels = torch.randint(0, 13, (11,))
    free, cut = (linear_reverse_kl(student, head, teacher, taught, labels=labels, clip=clip) for clip in (1e9, 0.5))
    assert torch.equal(cut.kl, free.kl.clamp(-0.5, 0.5)) and not torch.equal(cut.kl, free.kl)


def test_top_k_and_the_rest() -> None:
    """A bound that grows to the dense divergence; its gradient is autograd's of the formula."""
    torch.manual_seed(1)
    student, head, teacher, taught = drawn_problem()
    labels = torch.randint(0, 13, (11,))
    labels[3] = -100
    dense = linear_kl(student, head, teacher, taught, divergence="reverse", labels=labels)
    found = [linear_reverse_kl(student, head, teacher, taught, top_k=k, labels=labels) for k in (1, 3, 8, 13)]
    assert all((a.kl <= b.kl + 1e-12).all() for a, b in itertools.pairwise(found))
    assert_close("all of them", dense.loss.detach(), found[-1].loss.detach(), 1e-12)
    both = [torch.autograd.grad(each.loss, (student, head), retain_graph=True) for each in (dense, found[-1])]
    for a, b in zip(*both, strict=True):
        assert_close("gradient", a, b, 1e-10)
    log_q, log_p = (student @ head.T).log_softmax(-1), (teacher @ taught.T).log_softmax(-1)
    ids = log_q.topk(3, -1).indices
    q, p = (torch.cat((each.exp().gather(1, ids), 1 - each.exp().gather(1, ids).sum(1, keepdim=True)), 1)
            for each in (log_q, log_p))  # fmt: skip
    expected = ((q * (q / p).log()).sum(-1) * (labels >= 0)).sum() / 10
    assert_close("formula", expected.detach(), found[1].loss.detach(), 1e-12)
    for a, b in zip(*(torch.autograd.grad(each, (student, head)) for each in (expected, found[1].loss)), strict=True):
        assert_close("gradient of three", a, b, 1e-10)
    for wrong in ({"top_k": 14}, {"clip": 0.0}, {}, {"top_k": 1, "clip": 1.0}):
        with pytest.raises(ValueError, match="expected"):
            linear_reverse_kl(student, head, teacher, taught, labels=labels, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    (
        {"share": 0.5, "top_p": 0.9},
        {"estimator": "advantage"},
        pytest.param({"estimator": "top_k", "k": 9}, marks=pytest.mark.slow),
        pytest.param({"divergence": "jsd"}, marks=pytest.mark.slow),
    ),
)
def test_learns_and_resumes_to_the_same_bytes(changes: dict[str, Any], tmp_path: Path) -> None:
    """Stopped after any step, a run draws and learns what it would have; and it comes nearer on its own text."""
    how = dataclasses.replace(HOW, **changes)

    def batches(start: int) -> Iterator[MixedBatch]:
        return (mixed(number, how.share) for number in itertools.count(start))

    def run(folder: Path, *stops: int | None) -> HybridLM:
        for stop in stops:
            model = tempered().train()
            train(model, on_policy(how), batches, options(steps=4, save_every=2), folder, stop_after=stop)
        return model

    calm, rough = run(tmp_path / "calm", None), run(tmp_path / "rough", 2, None)
    assert all(torch.equal(a, b) for a, b in zip(weights(calm).values(), weights(rough).values(), strict=True))
    lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("calm", "rough")]
    assert lines[0] == lines[1]
    found = records(tmp_path / "calm")
    names = ("rollout_length", "rollout_ended", "rollout_entropy", "rollout_kl")
    assert len(found) == 4 and all(np.isfinite(record[name]) for record in found for name in names)
    assert found[-1]["rollout_kl"] < found[0]["rollout_kl"]


def test_prompts_of_texts_and_conversations() -> None:
    """A text's first tokens or its first half; a conversation up to its last answer, thought and all; then others."""
    plain = Prompts(CORPUS, 5, 0)
    epoch = [plain[number] for number in range(len(CORPUS))]
    assert sorted(document for document, _ in epoch) == list(range(len(CORPUS)))
    for document, ids in epoch:
        begin, end = CORPUS.starts[document : document + 2]
        assert ids.tolist() == CORPUS.ids[begin : begin + min(5, (end - begin) // 2)].tolist()
    assert [plain[number][0] for number in range(len(CORPUS), 2 * len(CORPUS))] != [document for document, _ in epoch]
    chat = [[PROMPT] * 3 + [ANSWER] * 2 + [PROMPT] * 2 + [THOUGHT] + [ANSWER] * 2, [0] * 12, [PROMPT] * 9 + [ANSWER],
            [PROMPT] * 4]  # fmt: skip
    corpus = corpus_of([len(part) for part in chat], parts=chat)
    found = {Prompts(corpus, 8, 0)[number][0]: len(Prompts(corpus, 8, 0)[number][1]) for number in range(4)}
    assert found == {0: 7, 1: 6}  # the third's prompt is too long, the fourth has no answer
    assert {Prompts(corpus, 9, 0)[number][0] for number in range(4)} == {0, 1, 2}
    with pytest.raises(InputError, match="none of 4 documents gives a prompt of at most 0"):
        Prompts(corpus, 0, 0)[0]


def test_prompts_of_a_mixture_in_their_shares() -> None:
    mixture = Mixture.of([Source("a", 3.0), Source("b", 1.0)], [CORPUS, corpus_of([20] * 6, 1)])
    prompts = Prompts(mixture, 5, 0)
    found = [prompts[number][0] for number in range(1000)]
    assert sum(document >= len(CORPUS) for document in found) == 250
    assert set(found[-400:]) == set(range(len(CORPUS) + 6))
    how = {"rows": 2, "own_rows": 1, "seq_len": SEQ_LEN, "width": 12, "prompt_tokens": 5, "seed": 0}
    later = next(itertools.islice(prompt_batches(mixture, **how), 7, None))  # type: ignore[arg-type]
    sought = next(prompt_batches(mixture, **how, start=7))  # type: ignore[arg-type]
    assert torch.equal(later.input_ids, sought.input_ids) and torch.equal(later.doc_id, sought.doc_id)


def plan_of(**changes: Any) -> DistillOptions:
    return DistillOptions(DistillLoss(), TrainOptions(4, 0.1), SEQ_LEN, 4, 0, **changes)


def test_stages_turn_it_on_and_off_and_nothing_is_said_where_it_is_off() -> None:
    warm = StageOptions(steps=2)  # type: ignore[call-arg]
    own = StageOptions(rollouts=RolloutChanges(share=0.5, prompt_tokens=5, new_tokens=7))  # type: ignore[call-arg]
    off = StageOptions(rollouts=RolloutChanges(share=0.0))  # type: ignore[call-arg]
    first, second = plan_of(stages=(warm, own)).plan()
    assert first.rollouts is None and second.rollouts == dataclasses.replace(HOW, share=0.5)
    assert (first.own_rows, second.own_rows, second.text_rows) == (0, 2, 2)
    second, third = plan_of(rollouts=HOW, stages=(StageOptions(), off)).plan()
    assert second.rollouts == HOW and third.own_rows == 0
    assert not isinstance(next(stage_batches(CORPUS, third, 1, 0)), MixedBatch)
    assert isinstance(next(stage_batches(CORPUS, second, 0, 0)), MixedBatch)
    assert "rollouts" not in plan_of().chosen and plan_of(rollouts=HOW).chosen["rollouts"]["new_tokens"] == 7


@pytest.mark.parametrize(
    ("says", "changes"),
    [
        ("share is 1.5", {"share": 1.5}),
        ("new_tokens is 0", {"new_tokens": 0}),
        ("top_p is 0", {"top_p": 0.0}),
        ("temperature is -1", {"temperature": -1.0}),
        ("clip is 0", {"clip": 0.0}),
        ("known: full, top_k, advantage", {"estimator": "reinforce"}),
        ("known: forward, mse, reverse, jsd", {"divergence": "kl"}),
        ("give divergence=reverse", {"estimator": "top_k", "divergence": "jsd"}),
        ("give temperature=1", {"estimator": "advantage", "temperature": 0.5}),
        ("is not one row; give 0.25", {"share": 0.1}),
        ("make 34, and rows have 27", {"new_tokens": 29}),
    ],
)
def test_wrong_options(says: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=says):
        plan_of(rollouts=dataclasses.replace(HOW, **changes))


def test_what_does_not_go_with_it() -> None:
    for says, loss, changes in (
        ("kl_weight above 0", DistillLoss(kl_weight=0.0, ce_weight=1.0), {}),
        ("ce_weight counts on rows of the text", DistillLoss(ce_weight=1.0), {}),
        ("is at temperature 1", DistillLoss(temperature=2.0), {"estimator": "top_k"}),
    ):
        with pytest.raises(InputError, match=says):
            dataclasses.replace(plan_of(), loss=loss, rollouts=dataclasses.replace(HOW, **changes))
    with pytest.raises(InputError, match="shard=false"):
        check_student(plan_of(rollouts=HOW), 1000, whole=False)
    with pytest.raises(InputError, match="made for 11"):
        check_student(plan_of(rollouts=HOW), 11, whole=True)
    check_student(plan_of(), 11, whole=False)


def test_from_python(workshop: Path) -> None:
    data = [f"def name_{number}(x):\n    return x + {number}\n" * 4 for number in range(20)]
    teacher, student = (api.load(workshop / name) for name in ("model", "student"))
    small = {"prompt_tokens": 6, "new_tokens": 4}
    done = api.distill(teacher, student, data, steps=1, batch=1, seq_len=20, rollouts=small, learning_rate=1e-5)
    assert done.records[0]["rollout_length"] == 4
    with pytest.raises(InputError, match="new_token is no option here; did you mean 'new_tokens'"):
        api.distill(teacher, student, data, steps=1, rollouts={"new_token": 4})


def command(root: Path, output: Path) -> list[str]:
    how = {"seq_len": 32, "batch": 2, "evaluate_tokens": 64, "train.steps": 2, "train.warmup_steps": 1,
           "train.log_every": 1, "train.evaluate_every": 2}  # fmt: skip
    places = (f"teacher={root / 'model'}", f"student={root / 'student'}", f"data={root / 'text'}", f"output={output}")
    return ["distill", *places, *(f"distill.{key}={value}" for key, value in how.items()), "wandb=off"]


def test_the_command_with_a_warm_up_before(workshop: Path, tmp_path: Path) -> None:
    own = "rollouts: {prompt_tokens: 8, new_tokens: 8}"
    code, _, err = limbeck(*command(workshop, tmp_path / "out"), f"distill.stages=[{{}}, {{steps: 1, {own}}}]")
    assert code == 0, err
    found = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [("rollout_kl" in record, record["stage"]) for record in found] == [(False, 1), (False, 1), (True, 2)]
    assert 1 <= found[-1]["rollout_length"] <= 8 and found[-1]["validation_kl"] > 0
    for words, says in (
        (("distill.rollouts={new_tokens: 0}",), "distill.rollouts.new_tokens is 0; expected at least 1"),
        (("distill.rollouts={}",), "distill.rollouts: prompt_tokens (64) and new_tokens (64) make 128"),
        (("distill.rollouts={new_token: 3}",), "did you mean 'new_tokens'"),
        (("distill.stages=[{rollouts: {share: 2}}]",), "distill.rollouts.share is 2"),
        (
            ("distill.rollouts={prompt_tokens: 8, new_tokens: 8}", "teacher_cache=answers"),
            "teacher_cache has no answer to text that the student is yet to write",
        ),
    ):
        code, _, err = limbeck(*command(workshop, tmp_path / "wrong"), *words)
        assert code == 2 and says in err and err.count("\n") == 1, (words, err)
        assert not (tmp_path / "wrong").exists()
    places = [
        word for word in command(workshop, tmp_path / "wrong")[1:] if "student=" not in word and "wandb" not in word
    ]
    code, _, err = limbeck("cache-teacher", *places, "distill.rollouts={prompt_tokens: 8, new_tokens: 8}")
    assert code == 2 and "nothing of it can be cached" in err


def train_in_parts(folder: str) -> None:
    model = tempered().train()
    batches = (mixed(number, rows=4) for number in itertools.count())
    train(model, on_policy(), lambda start: batches, options(steps=2), Path(folder) / "two")


@pytest.mark.slow
def test_two_processes_write_their_own_rows(tmp_path: Path) -> None:
    """Each draws half of a batch; together they learn what one does, to rounding."""
    run_workers(train_in_parts, tmp_path)
    train(tempered().train(), on_policy(), lambda start: (mixed(number) for number in itertools.count(start)),
          options(steps=2), tmp_path / "one")  # fmt: skip
    for one, two in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["rollout_kl"] == pytest.approx(two["rollout_kl"], rel=1e-4)
        assert one["rollout_length"] == two["rollout_length"]


def test_conversations_that_are_skipped_are_said(caplog: pytest.LogCaptureFixture) -> None:
    long, short = [PROMPT] * 30 + [ANSWER] * 2, [PROMPT] * 3 + [ANSWER] * 2
    text = corpus_of([32, 32, 5, 32], parts=[long, long, short, long])
    assert [*Prompts(text, 8, 0).notes()] == [
        "1 of 4 documents give a prompt of at most 8 tokens; only these are continued (a larger prompt_tokens takes"
        " more of them)"
    ]
    check_text(text, plan_of(rollouts=Rollouts(prompt_tokens=8, new_tokens=8)))
    assert "1 of 4 documents give a prompt" in caplog.text
    assert not [*Prompts(text, 30, 0).notes()] and not [*Prompts(corpus_of([9, 3]), 8, 0).notes()]


def test_a_stage_may_switch_off_what_the_whole_has() -> None:
    whole = Rollouts(prompt_tokens=4, new_tokens=4, top_p=0.9)
    own = StageOptions(rollouts=RolloutChanges(top_p="none", estimator="advantage"), quantize="none")  # type: ignore[call-arg]
    train = TrainOptions(3, 1e-3, quantize="w8a8")
    plan = DistillOptions(DistillLoss(), train, SEQ_LEN, 4, 0, rollouts=whole, stages=(StageOptions(), own)).plan()
    assert plan[0].rollouts == whole and plan[0].train.quantize == "w8a8"
    assert plan[1].rollouts is not None and plan[1].rollouts.top_p is None and plan[1].train.quantize is None
