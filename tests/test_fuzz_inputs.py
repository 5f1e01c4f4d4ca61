"""Whatever a command is given beside a model (scores, what an output says of itself, texts, options, the environment),
it does what it should or says in one line why not."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limbeck.distill.text.resolve import documents as texts
from limbeck.distill.text.resolve import text_in_tokens
from limbeck.models.fingerprint import PROVENANCE
from limbeck.models.named import CONF
from limbeck.scripts import prune
from limbeck.scripts.run.compose import build, compose_config
from limbeck.scripts.run.main import COMMANDS
from limbeck.tests.fuzz_helpers import (
    DRAWS,
    SAMPLE,
    TEXTS,
    VALUES,
    documents,
    fuzz_workshop,
    judged,
    linked,
    tell_outcomes,
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")  # what is drawn is long


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuzz_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module", autouse=True)
def outcomes() -> Iterator[None]:
    """With -s one sees what became of the draws."""
    yield
    tell_outcomes()


@pytest.fixture(scope="module")
def pruning(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, Path], None]:
    """Prunes with the scores of a folder into another, where a stage may have been before."""
    model = workshop / "model"
    words = (f"model={model}", "scores=x", "output=x", "target.layers=5", "target.hidden_size=24", "repair=plain")
    options = build(prune.Options, compose_config("prune", words))
    return lambda scores, output: prune.run(dataclasses.replace(options, scores=scores, output=output))


@pytest.mark.parametrize("name", ("scores.json", "scores.safetensors"))
def test_scores(name: str, workshop: Path, pruning: Callable[[Path, Path], None], tmp_path: Path) -> None:
    whole = (workshop / "scores" / name).read_bytes()
    length = 0 if name.endswith(".json") else int.from_bytes(whole[:8], "little")
    base = json.loads(whole[8 : 8 + length] if length else whole)

    @settings(SAMPLE, max_examples=DRAWS)
    @given(documents(base))
    def draw(content: bytes) -> None:
        if length:
            content = len(content).to_bytes(8, "little") + content + whole[8 + length :]
        scores = linked(workshop / "scores", tmp_path / "scores", {name: content})
        (scores / PROVENANCE).unlink()  # its sums would have said it
        try:
            judged(name, lambda: pruning(scores, tmp_path / "pruned"))
        finally:
            for folder in tmp_path.iterdir():
                shutil.rmtree(folder)

    draw()


def test_what_an_output_says_of_itself(workshop: Path, pruning: Callable[[Path, Path], None], tmp_path: Path) -> None:
    pruning(workshop / "scores", tmp_path / "pruned")
    base = json.loads((tmp_path / "pruned" / PROVENANCE).read_text())

    @settings(SAMPLE, max_examples=DRAWS)
    @given(documents(base))
    def draw(content: bytes) -> None:
        output = linked(tmp_path / "pruned", tmp_path / "again", {PROVENANCE: content})
        try:
            judged(PROVENANCE, lambda: pruning(workshop / "scores", output))
        finally:
            shutil.rmtree(output)

    draw()


MIXTURE = {
    "sources": [
        {"path": "a.jsonl", "weight": 2, "columns": ["text"], "epochs": 3},
        {"path": "b.txt", "weight": 0.5, "include": ["*"]},
    ]
}
ROW = {"text": "def f(x):\n    return x", "n": 3, "also": {"text": "more"}}
YAML = (
    "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
    "sources: &x [*x]", "? [a]\n: b", "- !!python/object:os.system x", "sources: [{path: !!timestamp x}]",
    "x: 2024-99-99", "{" * 5000, "- " * 3000, "a: &a {<<: *a}", "sources: [{path: 0x" + "f" * 9999 + "}]", "!!int ''",
    "!!float ''", "%YAML 9.9\n---\n", "\t- x", "sources: [{path: b.txt, weight: .nan}]", "sources: {1: 2, null: 3}",
    "sources: [{path: b.txt, weight: 1e400}]", "sources:\n- path: b.txt\n  weight: 1" + "0" * 4999, "!!binary x", "&a",
)  # fmt: skip


@pytest.fixture
def reading(workshop: Path, tmp_path: Path) -> Callable[[str, str, bytes], None]:
    """Reads data= in a folder with a.jsonl and b.txt, one file of which, or another one, is given."""
    row = json.dumps(ROW) + "\n"
    (tmp_path / "a.jsonl").write_text(row * 3)
    (tmp_path / "b.txt").write_text("some text, and more of it")

    def read(what: str, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)

        def work() -> None:
            list(texts(str(tmp_path / name), "all"))
            text_in_tokens(str(tmp_path / name), "all", workshop / "model")

        judged(what, work)

    return read


def test_rows(reading: Callable[[str, str, bytes], None]) -> None:
    @settings(SAMPLE, max_examples=DRAWS)
    @given(st.lists(documents(ROW), min_size=1, max_size=3), st.sampled_from(("a.jsonl", "a.json")))
    def draw(rows: list[bytes], name: str) -> None:
        reading("rows", name, b"\n".join(rows))

    draw()


def test_mixtures(reading: Callable[[str, str, bytes], None]) -> None:
    @settings(SAMPLE, max_examples=DRAWS)
    @given(documents(MIXTURE))
    def draw(content: bytes) -> None:  # JSON is YAML
        reading("YAML", "m.yaml", content)

    draw()
    for text in YAML:
        reading("YAML", "m.yaml", text.encode())


def as_override(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def test_options() -> None:
    """What is composed of any words, of any command."""
    keys = {
        command: [*compose_config(command, given_words(command)), "importance.tokens", "distill.train.steps",
                  "target.layers", "fit.context", "repair", "recipe", "hydra.run.dir", "+x.y", "~seed",
                  "data.train_on", "data.columns"]
        for command in COMMANDS if command != "experiment"
    }  # fmt: skip

    @settings(SAMPLE, max_examples=2 * DRAWS)
    @given(st.sampled_from(sorted(keys)), st.integers(0, 10**6), st.one_of(VALUES, TEXTS).map(as_override), TEXTS)
    def draw(command: str, number: int, value: str, key: str) -> None:
        module = importlib.import_module(f"limbeck.scripts.{command.replace('-', '_')}")
        chosen = keys[command][number % len(keys[command])] if number % 10 else key

        def work() -> None:
            build(module.Options, compose_config(command, [*given_words(command), f"{chosen}={value}"]))

        judged("overrides", work)

    draw()


FILL = {"data": "stdlib", "output": "x", "scores": "x"} | dict.fromkeys(("model", "teacher", "student", "other"), "zoo")


def given_words(command: str) -> list[str]:
    """What a command cannot do without."""
    body = (CONF / f"{command}.yaml").read_text()
    words = [f"{key}={value}" for key, value in FILL.items() if re.search(rf"^{key}: (\?\?\?|null)", body, re.M)]
    words += ["prompt=x"] if "prompt:" in body else []
    return words + (["target.parameters=0.75"] if command == "compress" else [])
