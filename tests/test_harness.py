"""lm-evaluation-harness asked through our adapter and through its own transformers model: the same answers."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill.harness import HarnessModel, first_row
from limbeck.models.checkpoint import load_model
from limbeck.models.errors import InputError
from limbeck.models.tokenizer import load_tokenizer
from limbeck.scripts import tasks as task_script
from limbeck.scripts.inputs import ZOO
from limbeck.scripts.tasks import Tasks, answer, show_tasks
from limbeck.tests.helpers import limbeck

CHOICE = """
task: next_line
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""
COMPLETE = """
task: complete
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["\\n"], max_gen_toks: 24, do_sample: false}}
metric_list:
  - metric: exact_match
"""
ROLLING = """
task: perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


def records(count: int) -> list[dict[str, Any]]:
    """Lines of the standard library: the text before, four lines of which one comes next, and what begins it."""
    lines = [line for line in Path(json.__file__).with_name("encoder.py").read_text().splitlines() if line.strip()]
    draw = random.Random(0)
    found = []
    for _ in range(count):
        place = draw.randrange(3, len(lines) - 1)
        choices = [lines[place], *draw.sample(lines, 3)]
        answer = draw.randrange(4)
        choices[0], choices[answer] = choices[answer], choices[0]
        context = "\n".join(lines[max(0, place - draw.randint(1, 12)) : place]) + "\n"
        found.append({"context": context, "choices": choices, "answer": answer, "target": choices[answer],
                      "text": "\n".join(lines[place : place + 30])})  # fmt: skip
    return found


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(8)))
    written = {"next_line": CHOICE, "complete": COMPLETE, "perplexity": ROLLING}
    for name, text in written.items():
        (folder / f"{name}.yaml").write_text(text.format(path=folder / "records.jsonl"))
    return {name: str(folder / f"{name}.yaml") for name in written}


def asked(model: Any, tasks: list[str]) -> Any:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    return simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True)


def test_the_same_as_the_harness_s_own_model(tasks: dict[str, str]) -> None:
    from lm_eval.models.huggingface import HFLM

    ours = HarnessModel(load_model(ZOO), load_tokenizer(ZOO), row_tokens=400)
    theirs = HFLM(pretrained=str(ZOO), device="cpu", dtype="float32", batch_size=4)
    found, expected = (asked(model, list(tasks.values())) for model in (ours, theirs))
    for name in tasks:
        numbers = [
            {key: value for key, value in side["results"][name].items() if isinstance(value, float)}
            for side in (found, expected)
        ]
        assert numbers[0].keys() == numbers[1].keys() and numbers[0] == pytest.approx(numbers[1], rel=1e-5), name
        for mine, other in zip(found["samples"][name], expected["samples"][name], strict=True):
            if name == "complete":
                assert mine["resps"] == other["resps"]
            else:
                values = [torch.tensor([answer[0][0] if name == "next_line" else answer[0] for answer in s["resps"]])
                          for s in (mine, other)]  # fmt: skip
                torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-4)


def test_rows_are_filled_longest_first() -> None:
    assert first_row([3, 0, 2, 1], [5, 2, 4, 9], 13) == [3, 2]
    assert first_row([3, 0, 2, 1], [5, 2, 4, 9], 3) == [3]


def test_answers_are_kept_by_contents(
    tasks: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    wanted = Tasks((tasks["next_line"],), limit=3)
    place: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "seed": 0}
    found = answer({"teacher": ZOO}, wanted, **place)
    assert 0 <= found["teacher"]["next_line"]["acc,none"] <= 1
    capsys.readouterr()
    show_tasks(found | {"student": found["teacher"]})
    assert "next_line" in capsys.readouterr().out
    calls = []
    monkeypatch.setattr(
        task_script, "asked", lambda name, *rest: calls.append(name) or {"next_line": {"acc,none": 1.0}}
    )
    assert answer({"again": ZOO}, wanted, **place)["again"] == found["teacher"] and not calls
    answer({"more": ZOO}, Tasks(wanted.names, limit=4), **place)
    data = Path(tasks["next_line"]).with_name("records.jsonl")
    data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")
    answer({"longer": ZOO}, wanted, **place)
    assert calls == ["more", "longer"]


@pytest.mark.parametrize(
    ("options", "words"),
    (
        ({"names": ("nowhere/task.yaml",)}, "nowhere/task.yaml does not exist"),
        pytest.param({"names": ("arc_eesy",)}, "did you mean", marks=pytest.mark.slow),  # reads 10,000 task files
        ({"names": ("BROKEN",)}, "tasks:"),
        ({"limit": 0}, "details.task_limit is 0"),
    ),
)
def test_wrong_tasks(options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    (tmp_path / "broken.yaml").write_text(CHOICE.format(path=tmp_path / "missing.jsonl"))
    if options.get("names") == ("BROKEN",):
        options = {"names": (str(tmp_path / "broken.yaml"),)}
    with pytest.raises(InputError, match=words):
        answer({"teacher": ZOO}, Tasks(**options), dtype=torch.float32, device=torch.device("cpu"), seed=0)


def test_evaluate_asks_tasks(tasks: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    data = Path(asyncio.__file__).parent
    code, out, err = limbeck(
        "evaluate", "teacher=zoo", "+student.same=zoo", f"data={data}", f"output={tmp_path / 'gap'}", "tokens=512",
        "seq_len=128", f"tasks=[{tasks['next_line']}]", "details.task_limit=2", "details.prompts=0", "details.worst=0",
        "fit.context=1024", "details.resamples=10",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "gap" / "gap.json").read_text())["tasks"]
    assert found["teacher"] == found["same"] and "acc,none" in found["same"]["next_line"]
    assert "next_line, acc" in out and "next_line, acc_norm" in (tmp_path / "gap" / "gap.html").read_text()
