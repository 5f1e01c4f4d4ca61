"""What must not go wrong in training: signals, numbers that are none, data that does not come, models that disagree;
and what is left in the end."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill import trainer
from limbeck.distill.average import final_weights
from limbeck.distill.parallel import Trained, prepare
from limbeck.distill.state import states
from limbeck.distill.stop import Stopper
from limbeck.distill.text.packing import Batch
from limbeck.distill.trainer import TrainingRun, ending_alone, train
from limbeck.models.errors import InputError, Stopped
from limbeck.models.tensors import ahead
from limbeck.models.tokenizer import check_agreement
from limbeck.tests.helpers import assert_close, limbeck
from limbeck.tests.training_helpers import batches_from, draw_batch, model_of, options, records, teach, weights
from torch import Tensor


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_saves_and_ends(number: signal.Signals, tmp_path: Path) -> None:
    calm, rough = model_of(1), model_of(1)
    train(calm, teach(), batches_from, options(), tmp_path / "calm")
    before = signal.getsignal(number)

    def on_step(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped, match=r"stopped after step [34] of 8, saved at step [34]; the same command") as caught:
        train(rough, teach(), batches_from, options(), tmp_path / "rough", on_step=on_step)
    assert caught.value.signal == number and signal.getsignal(number) is before
    train(rough, teach(), batches_from, options(), tmp_path / "rough")
    assert all(torch.equal(weight, weights(rough)[name]) for name, weight in weights(calm).items())


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    def on_step(record: dict[str, Any]) -> None:
        for _ in range(2):  # one after the other: two that wait together are one
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        train(model_of(1), teach(), batches_from, options(), tmp_path, on_step=on_step)
    assert not states(tmp_path)


class Poisoned:
    """A loss that is not a number in some steps."""

    def __init__(self, bad: set[int], infinite_gradient: bool = False) -> None:
        self.bad, self.infinite, self.step, self.inner = bad, infinite_gradient, -1, teach()

    def at(self, step: int) -> None:
        self.step = step

    def __call__(self, model: Any, batch: Any, normalizer: float) -> Tensor:
        loss = self.inner(model, batch, normalizer)
        if self.step not in self.bad:
            return loss
        if self.infinite:
            return loss + (torch.sqrt(model.norm_f.weight[0] * 0) if self.infinite else 0)
        return loss * float("nan")


@pytest.mark.parametrize("infinite_gradient", (False, True))
def test_a_step_that_is_not_finite_is_passed_over(infinite_gradient: bool, tmp_path: Path) -> None:
    """The weights stay, the batch is named; the run continues, or ends after so many in a row, with the state from
    before kept. Skipped steps are counted over a restart."""
    model = model_of(1)
    seen: list[dict[str, Tensor]] = []
    how = options(save_every=1, max_skipped=3)
    loss = Poisoned({2, 3, 6}, infinite_gradient)
    train(model, loss, batches_from, how, tmp_path / "a", on_step=lambda _: seen.append(weights(model)))
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(seen)]
    assert same == [False, True, True, False, False, True, False]
    skipped = {record["step"]: record for record in records(tmp_path / "a") if "skipped" in record}
    assert sorted(skipped) == [3, 4, 7] and "loss" not in skipped[3]
    assert skipped[3]["skipped"]["batch"] == 2
    counted = draw_batch(2)
    assert skipped[3]["skipped"]["documents"] == sorted(set(counted.doc_id[counted.labels >= 0].tolist()))
    assert "nan" in skipped[3]["skipped"]["loss"] or infinite_gradient
    state = json.loads((states(tmp_path / "a")[-1] / "state.json").read_text())
    assert (state["skipped"], state["in_a_row"]) == (3, 0)
    broken = Poisoned({4, 5, 6, 7}, infinite_gradient)
    with pytest.raises(
        InputError, match=r"3 steps in a row were not finite \(step 7.*batch 6.*good state is of step 4"
    ):
        train(model_of(1), broken, batches_from, how, tmp_path / "b")
    assert [state.name for state in states(tmp_path / "b")] == ["state-00000003", "state-00000004"]


def blow_up(weight: Tensor) -> None:
    weight.data.fill_(float("inf"))


class Blown(Poisoned):
    """From a step on the weights are beyond float32, which the step itself does not show."""

    def __call__(self, model: Any, batch: Any, normalizer: float) -> Tensor:
        if self.step in self.bad:
            model.norm_f.weight.register_post_accumulate_grad_hook(blow_up)
        return self.inner(model, batch, normalizer)


@pytest.mark.parametrize("bad", (3, 7), ids=("before the end", "the last step"))
def test_weights_that_are_not_finite_are_never_saved(bad: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"weights are not finite after step {bad + 1}; lower .* is of step {bad}$"):
        train(model_of(1), Blown({bad}), batches_from, options(save_every=1, max_skipped=9), tmp_path)
    assert states(tmp_path)[-1].name == f"state-{bad:08d}"


def test_one_process_alone_says_what_is_wrong_and_is_gone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others wait in sums of gradients: nothing that all of them had to call would be reached."""
    codes: list[int] = []
    monkeypatch.setattr(trainer.processes, "count", lambda: 2)
    monkeypatch.setattr(trainer.os, "_exit", codes.append)
    with ending_alone():
        raise InputError("a cache does not hold row 3")
    assert codes == [2] and capsys.readouterr().err == "limbeck: a cache does not hold row 3\n"


def test_data_that_does_not_come(tmp_path: Path) -> None:
    def stuck(start: int) -> Iterator[Batch]:
        yield draw_batch(start)
        yield draw_batch(start + 1)
        time.sleep(30)

    assert [entry[0] for entry in zip(ahead(iter("ab"), timeout=1e300), "ab", strict=False)] == ["a", "b"]
    with pytest.raises(InputError, match=r"waited 0.5 seconds for batch 2.*data_timeout"):
        train(model_of(1), teach(), stuck, options(data_timeout=0.5), tmp_path / "stuck")

    def broken(start: int) -> Iterator[Batch]:
        yield draw_batch(start)
        raise InputError("data: a line is no JSON")

    with pytest.raises(InputError, match="a line is no JSON"):
        train(model_of(1), teach(), broken, options(), tmp_path / "broken")


def given_back(tensor: Tensor) -> Tensor:
    return tensor


@pytest.mark.parametrize("changes", ({}, {"qk_norm": True, "rope_theta": 1e4}, {"tie_word_embeddings": True}))
def test_activation_checkpointing_changes_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    """Packed rows: the gradients are the same bits, and less is kept."""
    found, kept = [], []
    for number, again in enumerate((False, True)):
        trained = prepare(model_of(1, **changes))
        how = options(activation_checkpointing=again)
        run = TrainingRun(trained, teach(), how, tmp_path / str(number), Stopper(), None, None, None)
        held: list[int] = []

        def keep(tensor: Tensor, held: list[int] = held) -> Tensor:
            held.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, given_back):
            trained.model.hidden_states(draw_batch(5).input_ids, seq_idx=draw_batch(5).seq_idx)
        kept.append(sum(held))
        run.gradients(draw_batch(5))
        found.append([weight.local.grad for weight in trained.weights])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's, of itself
def test_compiled_layers_train_alike(tmp_path: Path) -> None:
    """torch.compile, with and without activation checkpointing, against plain layers. (Of attention and MLP: on a CPU
    the scan's chunks are unrolled, and inductor takes many minutes over them.)"""
    found = {}
    for name, compiled, again in (("plain", False, False), ("compiled", True, False), ("both", True, True)):
        how = options(steps=3, compile=compiled, activation_checkpointing=again)
        model = model_of(1, pattern="*-")
        train(model, teach(), batches_from, how, tmp_path / name)
        assert ("mix" in vars(model.layers[0])) == compiled
        found[name] = [record["loss"] for record in records(tmp_path / name)]
    assert found["compiled"] == pytest.approx(found["plain"], rel=1e-5)
    assert found["both"] == pytest.approx(found["plain"], rel=1e-5)


def test_bfloat16_has_float32_copies(tmp_path: Path) -> None:
    """Steps and gradients add up in the copies; vectors stay float32; a state resumes to the bit."""
    how = options(steps=4, learning_rate=1e-4, micro_batch=2, save_every=2)
    full, half = prepare(model_of(1)), prepare(model_of(1), torch.bfloat16)
    dtypes = {name: weight.dtype for name, weight in half.model.named_parameters()}
    assert dtypes["layers.0.mixer.in_proj.weight"] == torch.bfloat16 == dtypes["embeddings.weight"]
    assert {dtypes["layers.0.mixer.A_log"], dtypes["layers.0.mixer.D"], dtypes["norm_f.weight"]} == {torch.float32}
    assert all(weight.local.dtype == torch.float32 for weight in half.weights)
    before = {weight.name: weight.local.detach().clone() for weight in half.weights}
    train(full, teach(), batches_from, how, tmp_path / "full")
    train(half, teach(), batches_from, how, tmp_path / "half", stop_after=3)
    again = prepare(model_of(2), torch.bfloat16)
    train(again, teach(), batches_from, how, tmp_path / "half")
    straight = prepare(model_of(1), torch.bfloat16)
    train(straight, teach(), batches_from, how, tmp_path / "straight")
    for weight, other, exact in zip(again.weights, straight.weights, full.weights, strict=True):
        assert torch.equal(weight.local, other.local), weight.name
        assert torch.equal(weight.parameter, weight.local.to(weight.parameter.dtype))
        if len(weight.shape) > 1:  # AdamW's steps, through bfloat16's gradients
            moved, expected = (w.local.detach() - before[weight.name] for w in (weight, exact))
            assert float((moved * expected).sum()) > 0.8 * float(moved.norm() * expected.norm()), weight.name
    losses = [[record["loss"] for record in records(tmp_path / name)] for name in ("full", "half")]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_moving_average_mean_and_best(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []
    evaluated: list[dict[str, Tensor]] = []
    values = iter((3.0, 1.0, 2.0, 1.5) * 4)

    def run(name: str, **changes: Any) -> tuple[Trained, dict[str, Tensor], dict[str, Any]]:
        seen.clear()
        trained, how = prepare(model_of(1)), options(save_every=2, evaluate_every=2, **changes)
        held: list[dict[str, Tensor]] = []

        def evaluate(model: Any) -> dict[str, float]:
            held.append(weights(model))
            return {"validation_kl": next(values)}

        def on_step(_: dict[str, Any]) -> None:
            seen.append(weights(trained.model))

        train(trained, teach(), batches_from, how, tmp_path / name, evaluate=evaluate, on_step=on_step)
        evaluated[:] = held
        kept = final_weights(tmp_path / name, how)
        return trained, dict(kept.tensors()), kept.said

    trained, found, said = run("last")
    assert said == {"kept": "last", "step": 8}
    assert all(torch.equal(found[name], value) for name, value in weights(trained.model).items())
    _, found, said = run("best", keep="best")
    assert said == {"kept": "best", "step": 4, "value": 1.0}
    assert all(torch.equal(found[name], value) for name, value in seen[3].items())
    assert [path.name for path in (tmp_path / "best").glob("best-*")] == ["best-00000004"]
    _, found, said = run("mean", average_states=3)
    assert said == {"kept": "mean", "steps": [4, 6, 8]} and len(states(tmp_path / "mean")) == 3
    for name, value in found.items():
        assert_close(name, (seen[3][name] + seen[5][name] + seen[7][name]) / 3, value, 1e-6)
    _, found, said = run("ema", ema_decay=0.7)
    assert said == {"kept": "moving average", "step": 8}
    expected = weights(model_of(1))
    for step in seen:
        expected = {name: 0.7 * value + 0.3 * step[name] for name, value in expected.items()}
    for name, value in expected.items():
        assert_close(name, value, found[name], 1e-6)
        assert torch.equal(evaluated[-1][name], found[name])  # what is left was evaluated


def test_a_mean_is_of_the_same_states_after_a_stop(tmp_path: Path) -> None:
    """The state that a signal leaves between two others is resumed from, and counts for nothing else."""
    how = options(save_every=2, average_states=3)
    train(model_of(1), teach(), batches_from, how, tmp_path / "whole")

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 4:  # told with the next step
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train(model_of(1), teach(), batches_from, how, tmp_path / "parts", on_step=stop)
    assert states(tmp_path / "parts")[-1].name == "state-00000005"
    train(model_of(1), teach(), batches_from, how, tmp_path / "parts")
    whole, parts = (final_weights(tmp_path / name, how) for name in ("whole", "parts"))
    assert whole.said == parts.said == {"kept": "mean", "steps": [4, 6, 8]}
    expected = dict(whole.tensors())
    assert all(torch.equal(value, expected[name]) for name, value in parts.tensors())


def test_fewer_states_than_a_mean_is_of_are_said(tmp_path: Path) -> None:
    for steps, every, said in ((3, 500, 1), (5, 3, 1), (6, 2, 0)):
        heard: list[str] = []
        how = options(steps=steps, save_every=every, average_states=3, warmup_steps=1)
        train(model_of(1), teach(), batches_from, how, tmp_path / f"{steps}", say=heard.append)
        assert sum("average_states is 3" in line for line in heard) == said


@pytest.mark.parametrize(
    "wrong",
    (
        {"keep": "first"}, {"keep": "best"}, {"ema_decay": 1.0}, {"average_states": 0}, {"max_skipped": 0},
        {"average_states": 2, "ema_decay": 0.9}, {"data_timeout": 0.0},
    ),
)  # fmt: skip
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        options(**wrong)


def edited(source: Path, target: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(source, target)
    change(target)
    return target


def set_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(content))

    return change


def swap_tokens(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_config(eos_token_id=5), "must share special tokens: eos_token_id is 5 in"),
        (set_config(bos_token_id=7), "must share special tokens: bos_token_id is 7 in"),
        (set_config(pad_token_id=999), "pad_token_id is 999, outside of the vocabulary of 320 tokens"),
        (swap_tokens, "must share a tokenizer: token "),
    ],
)
def test_teacher_and_student_that_disagree(
    change: Callable[[Path], None], says: str, workshop: Path, tmp_path: Path
) -> None:
    model, other = workshop / "model", edited(workshop / "model", tmp_path / "other", change)
    assert check_agreement(model, model) == []
    code, _, err = limbeck(
        "distill", f"teacher={other}", f"student={model}", f"data={workshop / 'text'}", f"output={tmp_path / 'out'}"
    )
    assert code == 2 and says in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_a_tokenizer_that_ends_otherwise_is_told(workshop: Path, tmp_path: Path) -> None:
    both = edited(workshop / "model", tmp_path / "both", set_config(eos_token_id=[3, 4]))
    (note,) = check_agreement(both, both)
    assert "eos_token_id 3, 4, its tokenizer 2" in note
