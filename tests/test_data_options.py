"""data= with options of its own, on the command line and from Python, through the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import limbeck
import pytest
from limbeck.distill.text.reading import TextData
from limbeck.models.checkpoint import save_model
from limbeck.models.errors import InputError
from limbeck.models.tokenizer import load_tokenizer
from limbeck.scripts import distill, prune
from limbeck.scripts.run.compose import build, compose_config
from limbeck.tests.chat_helpers import REASONS, chat_folder
from limbeck.tests.helpers import limbeck as command
from limbeck.tests.helpers import random_model, tiny_config

GIVEN = ["teacher=zoo", "student=x", "output=y"]


def composed(*overrides: str) -> Any:
    return build(distill.Options, compose_config("distill", [*GIVEN, *overrides])).data


def test_options_beside_a_path() -> None:
    assert composed("data=a=b (1).jsonl") == "a=b (1).jsonl"
    found = composed("data.long=drop", "data=a=b (1).jsonl", "data.columns=[q,a]", "data.reasoning_share=0.5")
    assert found == TextData("a=b (1).jsonl", columns=("q", "a"), long="drop", reasoning_share=0.5)
    assert str(found) == "a=b (1).jsonl (columns=('q', 'a'), reasoning_share=0.5, long=drop)"
    assert build(prune.Options, compose_config("prune", ["model=zoo", "scores=x", "output=y"])).data is None


@pytest.mark.parametrize(
    ("override", "says"),
    (
        ("data.trian_on=all", "data.trian_on is no option here; did you mean 'data.train_on'"),
        ("data.train_on=none", "train_on 'none' is unknown; known: assistant, all, weighted"),
        ("data.reasoning_share=2", "reasoning_share .2.0. between 0 and 1"),
        ("data.prompt_weight=-1", "prompt_weight .-1.0. must be 0 or more"),
        ("data.columns=text", "data.columns is 'text'; expected a list"),
        ("data.columns=[", "is no YAML"),
    ),
)
def test_wrong_options(override: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as raised:
        composed("data=x", override)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template, and conversations of which half have thoughts."""
    root = tmp_path_factory.mktemp("chat")
    chat_folder(root / "words", REASONS)
    config = tiny_config(vocab_size=load_tokenizer(root / "words").vocab_size, pad_token_id=0)
    save_model(random_model(config), root / "model", tokenizer_from=root / "words")
    (root / "model" / "chat_template.jinja").write_text(REASONS)
    rows = []
    for number in range(120):
        answer = {"role": "assistant", "content": f"it is {number * number}"}
        if number % 2:
            answer["reasoning_content"] = f"{number} times {number}"
        rows.append({"messages": [{"role": "user", "content": f"the square of {number}?"}, answer]})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.slow
def test_conversations_through_the_commands(chat: Path, tmp_path: Path) -> None:
    """Scores on answers, a student, and the gap on answers and thoughts, with reasoning and without."""
    model, data = f"model={chat / 'model'}", f"data={chat / 'rows.jsonl'}"
    small = ["seq_len=64", "batch=2"]
    assert command("score", model, data, f"output={tmp_path / 'scores'}", *small, "importance.tokens=512")[0] == 0
    code, _, err = command(
        "prune", model, data, f"scores={tmp_path / 'scores'}", f"output={tmp_path / 'pruned'}", *small,
        "target.hidden_size=24", "repair.tokens=512",
    )  # fmt: skip
    assert code == 0, err
    teacher, student = f"teacher={chat / 'model'}", f"student={tmp_path / 'pruned'}"
    code, _, err = command(
        "distill", teacher, student, data, "data.train_on=weighted", f"output={tmp_path / 'distilled'}",
        "distill.train.steps=3", "distill.seq_len=64", "distill.batch=2", "distill.evaluate_tokens=256",
    )  # fmt: skip
    assert code == 0, err
    code, _, err = command(
        "evaluate", teacher, f"+student.distilled={tmp_path / 'distilled'}", data, "data.reasoning_share=1.0",
        "split=all", f"output={tmp_path / 'gap'}", *small, "tokens=100000",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "gap" / "gap.json").read_text())["models"]["distilled"]
    assert found["by_part"].keys() == {"answer", "thought"}
    assert found["by_domain"].keys() == {"rows.jsonl (reasoning on)", "rows.jsonl (reasoning off)"}
    assert all(part["documents"] == 60 for part in found["by_domain"].values())
    code, _, err = command("distill", teacher, student, data, "data.long=refuse", f"output={tmp_path / 'no'}",
                           "distill.seq_len=8", "distill.batch=2", "distill.train.steps=1")  # fmt: skip
    assert code == 2 and "would be cut off" in err and not (tmp_path / "no").exists()


def test_conversations_from_python(chat: Path) -> None:
    model = limbeck.load(chat / "model")
    rows = [json.loads(line) for line in (chat / "rows.jsonl").read_text().splitlines()]
    answers = limbeck.evaluate(model, model, rows, seq_len=64).report
    everything = limbeck.evaluate(
        model, model, {"path": str(chat / "rows.jsonl"), "train_on": "all"}, split="all", seq_len=64
    )
    assert set(answers.models["student"].by_part) == {"answer", "thought"}
    assert set(everything.report.models["student"].by_part) == {"prompt", "answer", "thought"}
    with pytest.raises(InputError, match="trian_on is no option here"):
        limbeck.evaluate(model, model, {"path": "x", "trian_on": "all"})
