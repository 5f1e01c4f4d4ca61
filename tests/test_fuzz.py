"""Whatever stands in a model's folder, a command does what it should or says in one line why not: drawn documents that
are nearly right. Each draw takes less than 10 s of the processor and 2 GiB."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limbeck.models.checkpoint import load_config
from limbeck.models.shards import INDEX
from limbeck.models.tokenizer import load_tokenizer
from limbeck.scripts import generate
from limbeck.scripts.run.compose import build, compose_config
from limbeck.tests.fuzz_helpers import DAMAGE, DRAWS, SAMPLE, documents, fuzz_workshop, judged, linked, tell_outcomes

Fuzz = Callable[[str, bytes], int]


pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")  # what is drawn is long


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuzz_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def generate_options() -> Callable[[Path, bool], generate.Options]:
    words = ("prompt=def x", "max_new_tokens=2", "context=64")
    options = build(generate.Options, compose_config("generate", words))
    return lambda folder, chat: dataclasses.replace(options, model=str(folder), chat=chat)


@pytest.fixture(scope="module")
def fuzz(workshop: Path, generate_options: Any, tmp_path_factory: pytest.TempPathFactory) -> Fuzz:
    """Runs what reads a file of a model's folder, with other bytes in it."""
    root = tmp_path_factory.mktemp("drawn")

    def run(name: str, content: bytes) -> int:
        source = workshop / ("shards" if name == INDEX else "model")
        folder = linked(source, root / "folder", {name: content})

        def work() -> None:
            generate.run(generate_options(folder, "template" in name))
            assert load_tokenizer(folder).token_bytes.sum() > 0
            load_config(folder).to_hf()

        try:
            return judged(name, work)
        finally:
            shutil.rmtree(folder)

    return run


@pytest.fixture(scope="module", autouse=True)
def outcomes() -> Iterator[None]:
    """With -s one sees what became of the draws."""
    yield
    tell_outcomes()


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def content_of(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "name",
    (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    ),
)
def test_json_of_a_folder(name: str, workshop: Path, fuzz: Fuzz) -> None:
    base = content_of(workshop / ("shards" if name == INDEX else "model") / name)

    @settings(SAMPLE, max_examples=DRAWS)
    @given(documents(base))
    def draw(content: bytes) -> None:
        fuzz(name, content)

    draw()
    for number, damage in enumerate(DAMAGE.values()):
        fuzz(name, damage(json.dumps(base), 7 * number + 3))


def test_headers_of_weights(workshop: Path, fuzz: Fuzz) -> None:
    whole = (workshop / "model" / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    base, weights = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    @settings(SAMPLE, max_examples=DRAWS)
    @given(documents(base), st.sampled_from((0, 0, 0, 0, 1, -1, 8, 2**40, 2**63)), st.integers(0, len(weights)))
    def draw(header: bytes, wrong: int, cut: int) -> None:
        size = (len(header) + wrong) % 2**64
        fuzz("model.safetensors", size.to_bytes(8, "little") + header + weights[: cut if wrong == 1 else None])

    draw()


PIECES = (
    "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ messages }}", "{% if ", "%}", "{{", "}}",
    "m.role ", "== 'user'", "{% set x = ", "range(10 ** 9) ", "* 10 ** 9 ", "'a' ", "~ x ", "| tojson ", "| join ",
    "[0] ", ".x ", "{% macro f() %}{{ f() }}{% endmacro %}", "{{ f() }}", "raise_exception(", ")", "loop.index ",
    "{% generation %}", "\x00", "é", "''.__class__ ", "strftime_now('%Y') ", "{# ", "{% include 'x' %}", "not ",
    "{% endif %}", "| sort ", "cycler(1) ", "namespace(x=1) ", "{% break %}", "| string | reverse ", "(", "1 / 0 ",
    "lipsum(10 ** 6) ", "| length ",
)  # fmt: skip


def test_templates(fuzz: Fuzz) -> None:
    @settings(SAMPLE, max_examples=DRAWS)
    @given(
        st.one_of(st.lists(st.sampled_from(PIECES), max_size=12).map("".join).map(str.encode), st.binary(max_size=40))
    )
    def draw(source: bytes) -> None:
        fuzz("chat_template.jinja", source)

    draw()
