"""lm-evaluation-harness run through our adapter and through its own transformers model: the same answers."""

from __future__ import annotations

import asyncio
import functools
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from limbeck.benchmarks.live_bytes import LiveBytes
from limbeck.distill.gap import harness
from limbeck.distill.gap import tasks as module
from limbeck.distill.gap.harness import SHARE, HarnessModel, Headroom, first_row
from limbeck.distill.gap.tasks import Tasks, answer_tasks, plan_tasks
from limbeck.distill.report.gap_tables import task_table
from limbeck.kernels.products import bfloat16_products
from limbeck.models.checkpoint import load_model
from limbeck.models.cost.hardware import Place
from limbeck.models.errors import InputError
from limbeck.models.generate.decode import Decoder
from limbeck.models.tokenizer import load_tokenizer
from limbeck.scripts.run.resolve import ZOO, model_config
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


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model as `limbeck export` gives it to other tools."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    code, _, err = limbeck("export", "model=zoo", f"output={folder}", "dtype=float32")
    assert code == 0, err
    return folder


def harness_results(model: Any, tasks: list[str]) -> Any:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    return simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True)


def test_the_same_as_the_harness_s_own_model(tasks: dict[str, str], exported: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    ours = HarnessModel(load_model(exported), load_tokenizer(exported), row_tokens=400)
    theirs = HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=4)
    found, expected = (harness_results(model, list(tasks.values())) for model in (ours, theirs))
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


class Tight:
    """Lets a model have memory for so many tokens of a row, and so many sequences at once, and counts refusals."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Any, tokens: int, slots: int, steps: int = 0) -> None:
        self.refused, self.left = 0, steps
        hidden_states, step = model.hidden_states, Decoder.step

        def few_tokens(ids: torch.Tensor, **options: Any) -> torch.Tensor:
            self.refuse(ids.shape[1] > tokens)
            return hidden_states(ids, **options)

        def few_rows(decoder: Decoder, ids: Any) -> torch.Tensor:
            self.left -= 1
            self.refuse(len(ids) > slots and self.left < 0)
            return step(decoder, ids)

        monkeypatch.setattr(model, "hidden_states", few_tokens)
        monkeypatch.setattr(Decoder, "step", few_rows)

    def refuse(self, beyond: bool) -> None:
        if beyond:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture(scope="module")
def asking(exported: Path) -> tuple[list[tuple[Any, list[int], list[int]]], list[SimpleNamespace]]:
    """Continuations to be scored, up to 60 tokens with their contexts, and prompts to continue, one of them drawn."""
    ids = load_tokenizer(exported).encode(Path(json.__file__).with_name("encoder.py").read_text())
    scored = [(None, ids[9 * i : 9 * i + 10 + 4 * i], ids[9 * i + 10 + 4 * i : 9 * i + 12 + 5 * i]) for i in range(10)]
    options: list[dict[str, Any]] = [{"until": ["\n\n"], "max_gen_toks": 8 + 2 * i} for i in range(5)]
    options[3] |= {"do_sample": True, "temperature": 0.7}
    texts = (row["context"] for row in records(5))
    return scored, [SimpleNamespace(args=pair) for pair in zip(texts, options, strict=True)]


def test_scores_where_memory_runs_out(exported: Path, asking: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are halved until they fit, and stay so; a request that does not fit alone is the error that torch gave."""
    scored, _ = asking
    model, tokenizer = load_model(exported), load_tokenizer(exported)
    expected = HarnessModel(model, tokenizer)._loglikelihood_tokens(scored)
    most = max(len(context) + len(continuation) for _, context, continuation in scored) - 1
    tight = Tight(monkeypatch, model, tokens=most, slots=8)
    steps: list[int] = []
    ours = HarnessModel(model, tokenizer, on_step=lambda done, total: steps.append(done))
    assert ours.row_tokens == 2048
    found = ours._loglikelihood_tokens(scored)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-5)
    assert tight.refused >= 2 and ours.row_tokens <= most and steps == sorted(steps) and steps[-1] == len(scored)
    refused = tight.refused
    assert ours._loglikelihood_tokens(scored) == found and tight.refused == refused
    Tight(monkeypatch, model, tokens=most - 1, slots=8)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        ours._loglikelihood_tokens(scored)


@pytest.mark.slow
def test_texts_where_memory_runs_out(exported: Path, asking: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of writing: what has ended stays, the others begin anew, fewer at once, and write the same."""
    _, prompts = asking
    model, tokenizer = load_model(exported), load_tokenizer(exported)
    expected = HarnessModel(model, tokenizer).generate_until(prompts)
    tight = Tight(monkeypatch, model, tokens=512, slots=2, steps=8)
    steps: list[int] = []
    ours = HarnessModel(model, tokenizer, on_step=lambda done, total: steps.append(done))
    runs: list[tuple[int, int]] = []  # texts, at once
    decode = ours.decode
    monkeypatch.setattr(ours, "decode", lambda *given: runs.append((len(given[2]), given[4])) or decode(*given))
    assert ours.generate_until(prompts) == expected and all(expected) and tight.refused == 1
    assert steps == [1, 2, 3, 4, 5] and runs == [(5, 5), (4, 2)]
    tight = Tight(monkeypatch, model, tokens=512, slots=1)
    assert ours.generate_until(prompts) == expected and tight.refused >= 1
    tight = Tight(monkeypatch, model, tokens=512, slots=0)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        ours.generate_until(prompts)
    assert tight.refused == 3  # of five, two and one


@pytest.mark.slow
def test_rows_and_slots_follow_free_memory() -> None:
    """The most that fits, between one and the device's bound; a CPU's bound is what it has always been."""
    config = model_config("nemotron-nano-9b-v2")
    card = Headroom(config, torch.bfloat16, Place("cuda", 132, "9.0"), 2048)
    computer = Headroom(config, torch.float32, Place("cpu", 2), 256)
    for headroom, most_tokens, most_slots in ((card, 65536, 128), (computer, 2048, 8)):
        assert headroom.row_tokens(None) == headroom.row_tokens(2**45) == most_tokens
        assert headroom.slots(8192, None) == headroom.slots(8192, 2**45) == most_slots
        assert headroom.row_tokens(0) == headroom.slots(8192, 0) == 1
        tokens, slots = [], []
        for free in (int(2**power) for power in (24, 28, 30, 31.5, 33, 34, 35, 36)):
            tokens.append(headroom.row_tokens(free))
            slots.append(headroom.slots(8192, free))
            slot_bytes = functools.partial(headroom.slot_bytes, length=8192)
            for found, most, size in (
                (tokens[-1], most_tokens, headroom.row_bytes),
                (slots[-1], most_slots, slot_bytes),
            ):
                assert found == 1 or size(found) <= SHARE * free
                assert found == most or size(found + 1) > SHARE * free
        assert tokens == sorted(tokens) and slots == sorted(slots) and tokens[0] < 16 and slots[0] == 1
        assert len(set(tokens)) >= 3 and len(set(slots)) >= 3
        assert headroom.slots(1024, 2**33) >= headroom.slots(65536, 2**33)


def test_a_row_takes_what_is_predicted(exported: Path, asking: tuple) -> None:
    """Bytes alive while a row is scored."""
    ours = HarnessModel(load_model(exported), load_tokenizer(exported))
    ids = (asking[0][-1][1] + asking[0][-1][2]) * 24
    for tokens, parts in ((256, 1), (256, 8), (1024, 16)):
        with LiveBytes(ours.model.parameters()) as live:
            weights = live.now
            ours.score_row([ids[: tokens // parts + 1]] * parts, [tokens // parts] * parts)
        found = (live.peak - weights) / ours.headroom.row_bytes(tokens)
        assert 0.5 <= found <= 1.02, (tokens, parts, found)


@pytest.mark.slow
def test_slots_by_the_memory_that_is_free(exported: Path, asking: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = HarnessModel(load_model(exported), load_tokenizer(exported))
    found: list[int] = []
    monkeypatch.setattr(ours, "decode", lambda requests, texts, left, length, slots: found.append(slots) or end(texts))
    for count in (1, 2, 3):
        monkeypatch.setattr(
            harness, "free_memory", lambda device, n=count: ours.headroom.slot_bytes(n, 200) / SHARE + 1
        )
        ours.complete([harness.Request([5] * 180, 20)] * 4)
    assert found == [1, 2, 3]


def answers(name: str, tasks: Tasks) -> Any:
    """The shipped model's answers, under a name."""
    plan = plan_tasks({name: ZOO}, tasks, dtype=torch.float32, seed=0)
    return answer_tasks({name: load_model(ZOO)}, {name: ZOO}, plan)


def end(texts: list[Any]) -> None:
    for text in texts:
        text.finished = "length"


def test_answers_are_kept_by_contents(tasks: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    wanted = Tasks((tasks["next_line"],), limit=3)
    found = answers("teacher", wanted)
    assert 0 <= found["teacher"]["next_line"]["acc,none"] <= 1
    _, columns, rows = task_table(found | {"student": found["teacher"]})
    assert columns[1:] == ("teacher", "student") and "next_line" in rows[0][0] and rows[0][1] == rows[0][2]
    calls = []
    monkeypatch.setattr(
        module, "answers_of", lambda name, *rest: calls.append(name) or {"next_line": {"acc,none": 1.0}}
    )
    assert answers("again", wanted)["again"] == found["teacher"] and not calls
    answers("more", Tasks(wanted.names, limit=4))
    data = Path(tasks["next_line"]).with_name("records.jsonl")
    data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")
    answers("longer", wanted)
    assert calls == ["more", "longer"]
    for name, value in (("__version__", "0.0.0"), ("FORMAT", 0)):
        with monkeypatch.context() as other:
            other.setattr(module, name, value)
            answers(name, wanted)
    answers("as before", wanted)
    assert calls == ["more", "longer", "__version__", "FORMAT"]


def test_what_a_task_is_told_by(tmp_path: Path) -> None:
    """Its file, the data that it names, and the code beside it; of two folders with files of the same names, both."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "records.jsonl").write_text("{}")
        (folder / "utils.py").write_text("def text(row):\n    return row\n")
        (folder / "task.yaml").write_text(CHOICE.format(path="records.jsonl") + "description: " + 99 * "long " + "\n"
                                          "process_docs: !function utils.text\n")  # fmt: skip
    wanted = Tasks(tuple(str(folder / "task.yaml") for folder in folders))
    seen = [wanted.content()]
    assert seen[0] == Tasks(wanted.names).content()
    for folder in folders:
        for name in ("records.jsonl", "utils.py", "task.yaml"):
            (folder / name).write_text((folder / name).read_text() + "\n")
            assert wanted.content() not in seen, (folder, name)
            seen.append(wanted.content())


@pytest.mark.parametrize("named", ("dataset_path: rows", "dataset_kwargs: {data_files: 'rows/*.jsonl'}"))
def test_data_may_be_a_folder_or_a_pattern_and_a_task_in_pieces(named: str, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "one.jsonl").write_text("{}")
    (tmp_path / "base.yaml").write_text(f"{named}\n")
    (tmp_path / "task.yaml").write_text("include: base.yaml\ntask: rows\ndescription: '*'\n")
    wanted = Tasks((str(tmp_path / "task.yaml"),))
    seen = [wanted.content()]
    for name in ("rows/one.jsonl", "rows/two.jsonl", "base.yaml"):
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        assert wanted.content() not in seen, name
        seen.append(wanted.content())


@pytest.mark.parametrize(
    ("options", "words"),
    (
        ({"names": ("nowhere/task.yaml",)}, "nowhere/task.yaml does not exist"),
        pytest.param({"names": ("arc_eesy",)}, "did you mean", marks=pytest.mark.slow),  # reads 10,000 task files
        ({"names": ("missing.yaml",)}, "tasks: .*missing.yaml: "),
        ({"names": ("column.yaml",)}, "tasks: .*column.yaml: .*context"),
        ({"names": ("syntax.yaml",)}, "tasks: .*syntax.yaml cannot be read: .*line"),
        ({"names": ("latin.yaml",)}, "tasks: .*latin.yaml cannot be read: .*utf-8"),
        ({"limit": 0}, "details.task_limit is 0"),
    ),
)
def test_wrong_tasks(options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    (tmp_path / "missing.yaml").write_text(CHOICE.format(path=tmp_path / "missing.jsonl"))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "column.yaml").write_text(CHOICE.format(path=tmp_path / "rows.jsonl"))
    (tmp_path / "syntax.yaml").write_text("task: [\n")
    (tmp_path / "latin.yaml").write_bytes(b"task: \xe9\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        answers("teacher", Tasks(**options))


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


@pytest.mark.slow
def test_texts_that_are_drawn_differ_and_repeat(exported: Path) -> None:
    """Of one prompt wanted several times, as tasks with repeats do; by the seed, and with top_k switched off."""
    model, tokenizer = load_model(exported), load_tokenizer(exported)
    how = {"until": [], "do_sample": True, "temperature": 0.8, "top_k": 0, "max_gen_toks": 12}
    wanted = [SimpleNamespace(args=("def mean(values):", dict(how))) for _ in range(6)]
    found = HarnessModel(model, tokenizer, seed=3).generate_until(wanted)
    assert len(set(found)) > 3
    assert HarnessModel(model, tokenizer, seed=3).generate_until(wanted) == found
    assert HarnessModel(model, tokenizer, seed=90).generate_until(wanted) != found


def test_kept_answers_know_their_products(exported: Path, tasks: dict[str, str]) -> None:
    wanted = Tasks((tasks["complete"],))
    kept = [plan_tasks({"one": exported}, wanted, dtype=torch.float32, seed=0).kept["one"]]
    with bfloat16_products():
        kept.append(plan_tasks({"one": exported}, wanted, dtype=torch.float32, seed=0).kept["one"])
    assert kept[0] != kept[1]
