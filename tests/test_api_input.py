"""What limbeck's functions are given from Python: numbers, names, tokenizers, and models that are used afterwards."""

from __future__ import annotations

from pathlib import Path

import limbeck
import pytest
import torch
from limbeck.models.errors import InputError
from limbeck.models.folder import write_json
from limbeck.models.hybrid import HybridLM
from limbeck.tests.gguf_helpers import write_tokenizer
from limbeck.tests.helpers import TEXT, random_model, tiny_config

TEXTS = [TEXT[start : start + 500] for start in range(0, 6000, 500)]


@pytest.fixture(scope="module")
def model(workshop: Path) -> HybridLM:
    return limbeck.load(workshop / "model")


def test_a_student_in_few_bits_trains_again_afterwards(model: HybridLM) -> None:
    """What training hung on its matrices goes with it: their gradients are their own again."""
    student = random_model(tiny_config(vocab_size=model.config.vocab_size), 1, torch.bfloat16)
    limbeck.distill(model, student, [TEXT[:400]], steps=1)
    student(torch.zeros(1, 4, dtype=torch.int64)).float().square().sum().backward()
    assert all(weight.grad is not None for weight in student.parameters())
    before = {name: weight.clone() for name, weight in student.float().state_dict().items()}
    limbeck.distill(model, student, [TEXT[:400]], steps=1, learning_rate=0.01)
    assert not any(torch.equal(weight, before[name]) for name, weight in student.named_parameters())


def test_other_tokens_are_noticed(model: HybridLM, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "words", "gpt-2", 300)
    other = limbeck.load(random_model(model.config, 1), tokenizer=tmp_path / "words")
    for wrong in (
        lambda: limbeck.distill(model, other, TEXTS, steps=1),
        lambda: limbeck.evaluate(model, {"other": other}, TEXTS, tokens=64),
    ):
        with pytest.raises(InputError, match="must share a tokenizer"):
            wrong()


def test_numbers_and_names_are_checked(model: HybridLM) -> None:
    scores = limbeck.score(model, TEXTS, tokens="1k", depth_tokens=128, seq_len=64)
    assert limbeck.prune(model, scores, hidden_size=24, data=TEXTS, tokens="1k", seq_len=64).config.hidden_size == 24
    other = random_model(model.config, 1)
    for wrong, says in (
        (lambda: limbeck.score(model, TEXTS, seq_len=0), "seq_len is 0"),
        (lambda: limbeck.score(model, TEXTS, batch=0), "batch is 0"),
        (lambda: limbeck.evaluate(model, model, TEXTS, tokens="few"), "tokens is 'few'"),
        (lambda: limbeck.evaluate(model, model, TEXTS, seq_len=-1), "seq_len is -1"),
        (lambda: limbeck.prune(model, scores, layer=3), "did you mean 'layers'"),
        (lambda: limbeck.prune(model, scores, layers="three"), "layers is 'three'"),
        (lambda: limbeck.load("zoo", dtype="bf17"), "'bf17' is unknown"),
        (lambda: limbeck.prune(model, "scores"), "scores is 'scores'; expected what score gives"),
        (lambda: limbeck.prune(model, scores, repair="yes"), "repair is 'yes'; expected true, false"),
        (lambda: limbeck.prune(model, scores, hidden_size=True), "hidden_size is True; expected a number"),
        (lambda: limbeck.memory_fit(model, 5), "hardware 5 is unknown"),
        (lambda: limbeck.score(model, None), "data is None; expected a path"),
        (lambda: limbeck.score(model, TEXTS, seed=-1), "seed is -1; expected a whole number, at least 0"),
        (lambda: limbeck.evaluate(model, other, TEXTS, seed="a"), "seed is 'a'"),
        (lambda: limbeck.distill(model, other, TEXTS, nested={}, scores=3), "scores=, the student's as of score"),
        (
            lambda: limbeck.distill(model, other, TEXTS, loss={"temperatur": 2.0}),
            "'temperature'",
        ),
    ):
        with pytest.raises(InputError, match=says):
            wrong()
    assert limbeck.load("zoo", dtype="bf16").head_weight.dtype == torch.bfloat16


def test_a_text_ends_where_the_command_ends_it(model: HybridLM, tmp_path: Path) -> None:
    """At the tokens of generation_config.json too."""
    folder = limbeck.export(model, tmp_path / "model")
    (whole,) = limbeck.generate(folder, ["def name"], max_new_tokens=8)
    (first,) = limbeck.generate(folder, ["def name"], max_new_tokens=1)
    assert model.tokenizer is not None
    write_json(folder / "generation_config.json", {"eos_token_id": model.tokenizer.prompt(first)[-1]})
    (ended,) = limbeck.generate(folder, ["def name"], max_new_tokens=8)
    assert len(ended) <= len(first) < len(whole)


def test_one_stop_text_is_one(model: HybridLM) -> None:
    (whole,) = limbeck.generate(model, ["def name"], max_new_tokens=24)
    stop = whole[len("def name") + 2 :][:3]
    (one,), (several,) = (limbeck.generate(model, ["def name"], max_new_tokens=24, stop=by) for by in (stop, [stop]))
    assert one == several and len(one) < len(whole)
