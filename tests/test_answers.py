"""A file of answers is made once and nothing of it is lost; what `generate` prints, and when."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from limbeck.models.errors import InputError
from limbeck.models.folder import owned
from limbeck.models.generate import answers
from limbeck.scripts.run.main import with_escapes
from limbeck.scripts.run.outside import quoted
from limbeck.tests.helpers import limbeck

WRITE = answers.Journal.write


@pytest.fixture
def begun(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The options of a command that was interrupted after 2 of 3 answers to `a.jsonl`."""
    (tmp_path / "p.txt").write_text("def a\ndef b\ndef c\n")
    places = [f"model={workshop / 'model'}", f"prompts={tmp_path / 'p.txt'}", f"output={tmp_path / 'a.jsonl'}"]
    words = ["generate", *places, "max_new_tokens=4", "batch=1"]
    interrupt_after(2, words, monkeypatch)
    assert len((tmp_path / ".a.jsonl.partial").read_text().splitlines()) == 3
    yield words


def interrupt_after(count: int, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def interrupted(journal: answers.Journal, number: int, row: dict[str, Any]) -> None:
        if len(written) == count:
            raise KeyboardInterrupt
        written.append(number)
        WRITE(journal, number, row)

    with monkeypatch.context() as patch:
        patch.setattr(answers.Journal, "write", interrupted)
        assert limbeck(*words)[0] == 130


def answered(words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lines that the command still had to answer."""
    counted: list[int] = []

    def counting(journal: answers.Journal, number: int, row: dict[str, Any]) -> None:
        counted.append(number)
        WRITE(journal, number, row)

    with monkeypatch.context() as patch:
        patch.setattr(answers.Journal, "write", counting)
        code, _, err = limbeck(*words)
    assert code == 0, err
    return counted


@pytest.mark.parametrize(
    ("more", "says"),
    (
        (["seed=1"], "begun otherwise"),
        (["ssm_dtype=int8"], "begun otherwise"),
        (["max_new_tokens=131072"], "begun otherwise"),
        (["stop=[x]"], "begun otherwise"),
        (["dtype=bfloat16"], "begun otherwise"),
        (["prefill_chunk=0"], "prefill_chunk"),
    ),
)
def test_another_command_leaves_a_journal_alone(
    more: list[str], says: str, begun: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (tmp_path / ".a.jsonl.partial").read_bytes()
    code, _, err = limbeck(*begun, *more)
    assert code == 2 and says in err and err.count("\n") == 1, err
    assert (tmp_path / ".a.jsonl.partial").read_bytes() == before
    assert answered([*begun, "batch=2"], monkeypatch) == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "p.txt"]


def test_other_prompts_leave_a_journal_alone(begun: list[str], tmp_path: Path) -> None:
    before = (tmp_path / ".a.jsonl.partial").read_bytes()
    (tmp_path / "p.txt").write_text("def a\ndef b\ndef d\n")
    code, _, err = limbeck(*begun)
    assert code == 2 and "begun otherwise" in err and (tmp_path / ".a.jsonl.partial").read_bytes() == before


@pytest.mark.parametrize("more", (["ssm_dtype=int8"], ["max_new_tokens=131072"], ["stop=['']"]))
def test_nothing_is_written_before_all_is_checked(more: list[str], workshop: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("def a\n")
    places = [f"model={workshop / 'model'}", f"prompts={tmp_path / 'p.txt'}", f"output={tmp_path / 'a.jsonl'}"]
    code, _, err = limbeck("generate", *places, *more)
    assert code == 2 and err.count("\n") == 1, err
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]


@pytest.mark.parametrize("name", (".a.jsonl.partial", ".a.jsonl.whole"))
def test_files_of_others_stay(name: str, workshop: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("def a\n")
    places = [f"model={workshop / 'model'}", f"prompts={tmp_path / 'p.txt'}", f"output={tmp_path / 'a.jsonl'}"]
    (tmp_path / name).write_bytes(b"\xffthesis")
    code, _, err = limbeck("generate", *places)
    assert code == 2 and "is not of limbeck" in err and err.count("\n") == 1
    assert (tmp_path / name).read_bytes() == b"\xffthesis"
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert limbeck("generate", *places)[0] == 2 and (tmp_path / name).is_dir()


@pytest.mark.parametrize("cut", (0, 5, 40, -1, -9))
def test_a_journal_cut_off_anywhere_resumes(
    cut: int, begun: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / ".a.jsonl.partial"
    journal.write_bytes(journal.read_bytes()[:cut])
    assert answered(begun, monkeypatch) == ([0, 1, 2] if cut >= 0 else [1, 2])
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["def a", "def b", "def c"]


def test_two_commands_on_one_output(begun: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (tmp_path / ".a.jsonl.partial").read_bytes()
    with owned(tmp_path / "a.jsonl"):
        code, _, err = limbeck(*begun)
    assert code == 2 and "another process" in err and (tmp_path / ".a.jsonl.partial").read_bytes() == before
    finish = answers.Journal.finish

    def late(journal: answers.Journal) -> None:
        (tmp_path / "a.jsonl").write_text("mine")
        finish(journal)

    monkeypatch.setattr(answers.Journal, "finish", late)
    code, _, err = limbeck(*begun)
    assert code == 2 and "exists already" in err and (tmp_path / "a.jsonl").read_text() == "mine"
    assert len((tmp_path / ".a.jsonl.partial").read_text().splitlines()) == 4
    assert not (tmp_path / ".a.jsonl.whole").exists()


def test_a_template_that_tells_the_time_resumes(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "aligned"
    folder.mkdir()
    for path in (workshop / "model").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%H:%M:%S.%f') }}{{ messages[0].content }}")
    (tmp_path / "p.txt").write_text("def a\ndef b\n")
    places = [f"model={folder}", f"prompts={tmp_path / 'p.txt'}", f"output={tmp_path / 'a.jsonl'}"]
    words = ["generate", *places, "max_new_tokens=2", "batch=1", "chat=true"]
    interrupt_after(1, words, monkeypatch)
    code, _, err = limbeck(*words, "system=s")
    assert code == 2 and "begun otherwise" in err
    assert answered(words, monkeypatch) == [1]


@pytest.mark.parametrize("more", ("ssm_dtype=int8", "stop=['']", "max_new_tokens=131072"))
def test_no_prompt_before_an_error(more: str, workshop: Path) -> None:
    code, out, err = limbeck("generate", f"model={workshop / 'model'}", "prompt=def", more)
    assert code == 2 and out == "" and err.count("\n") == 1


def test_quiet_prints_the_text_alone(workshop: Path, tmp_path: Path) -> None:
    words = [f"model={workshop / 'model'}", "prompt=def a", "max_new_tokens=8"]
    plain = limbeck("generate", *words)[1]
    code, out, err = limbeck("generate", *words, "--quiet")
    assert (code, err) == (0, "") and plain == "def a" + out and len(out) > 1
    code, out, err = limbeck("generate", *words, "ssm_dtype=int8", "--quiet")
    assert code == 2 and out == "" and "int8" in err
    assert limbeck("generate", *words)[1] == plain  # it was said of that command alone
    (tmp_path / "p.txt").write_text("def a\n")
    words = [words[0], f"prompts={tmp_path / 'p.txt'}", f"output={tmp_path / 'a.jsonl'}", words[2]]
    assert limbeck("generate", *words, "--quiet")[:2] == (0, "")
    assert json.loads((tmp_path / "a.jsonl").read_text())["text"] == plain.removeprefix("def a")[:-1]


@pytest.mark.slow
def test_quiet_chat(workshop: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for path in (workshop / "model").iterdir():
        (tmp_path / "m" / path.name).symlink_to(path)
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    words = ["generate", f"model={tmp_path / 'm'}", "chat=true", "context=64", "max_new_tokens=6", "--quiet"]
    command = [sys.executable, "-m", "limbeck.scripts.run.main", *words]
    done = subprocess.run(command, input="def a\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone = limbeck("generate", *words[1:3], words[4], "prompt=def a")[1]
    assert done.stdout == f"> {alone}> \n"


@pytest.mark.parametrize(
    ("given", "stops"),
    (
        ('["\\n"]', ("\n",)), ("['\\n']", ("\\n",)), ('["\\t\\\\",END]', ("\t\\", "END")), ("[a,'b c']", ("a", "b c")),
        ('["it\'s\\n"]', ("it's\n",)), ('["\\\\\'"]', ("\\'",)), ("[]", ()),
    ),
)  # fmt: skip
def test_stop_strings_as_yaml_has_them(
    given: str, stops: tuple[str, ...], workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr("limbeck.scripts.generate.run", lambda options: seen.append(options.stop))
    code, _, err = limbeck("generate", f"model={workshop / 'model'}", "prompt=x", f"stop={given}")
    assert code == 0 and seen == [stops], err


def test_what_is_no_list_of_texts_is_left_to_hydra() -> None:
    for word in ('stop="\\n"', 'stop=["\n\\t"]', "stop=[1]", 'prompt=["\\n"]', "stop=[END]"):
        assert with_escapes(word) == word
    assert with_escapes('stop=["\\n"],[END]') == f"stop=['\n'],[{quoted('END')}]"
    with pytest.raises(InputError, match="YAML"):
        with_escapes('stop=["\\d"]')


@pytest.mark.parametrize("text", ("a\\b", "a\\", "it's", "a\\'b", "\\\\", "C:\\x\\'", "${home}", "a,b=[c] d", ""))
def test_a_quoted_text_is_itself_to_hydra(text: str) -> None:
    assert OverridesParser.create().parse_override(f"key={quoted(text)}").value() == text
