"""Text out: chat templates, wrong input, files of prompts, a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from limbeck.models.errors import InputError
from limbeck.models.generate import answers
from limbeck.models.generate.chat import ChatTemplate
from limbeck.models.tokenizer import Tokenizer, load_tokenizer
from limbeck.scripts import generate
from limbeck.tests.helpers import limbeck
from rich.console import Console

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    "{# /no_think #}"
)


@pytest.fixture(scope="module")
def tokenizer(workshop: Path) -> Tokenizer:
    return load_tokenizer(workshop / "model")


@pytest.fixture
def aligned(workshop: Path, tmp_path: Path) -> Path:
    """The workshop's model with a chat template."""
    folder = tmp_path / "aligned"
    folder.mkdir()
    for path in (workshop / "model").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write_template(folder: Path, template: str | None, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    content = settings if template is None else settings | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


MESSAGES = [{"role": "user", "content": 'Grüße "x"'}]


@pytest.mark.parametrize(
    "template,expected",
    (
        ("{{ bos_token }}{{ messages[0].content }}", '<s>Grüße "x"'),
        ("{{ messages[0]['content'] | tojson }}", '"Grüße \\"x\\""'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% if tools %}t{% endif %}{{ add_generation_prompt }}", "True"),
        ("a\n  {% if true %}\nb\n  {% endif %}\n", "a\nb\n"),
    ),
)
def test_templates_find_what_they_expect(template: str, expected: str, tmp_path: Path) -> None:
    folder = write_template(tmp_path / "f", template, bos_token={"content": "<s>"})
    assert ChatTemplate(folder).render(MESSAGES) == expected
    named = write_template(
        tmp_path / "g", None, bos_token="<s>", chat_template=[{"name": "default", "template": template}]
    )
    assert ChatTemplate(named).render(MESSAGES) == expected


def test_reasoning_is_a_word_of_the_system_message(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ enable_thinking }}"
    variable = ChatTemplate(write_template(tmp_path / "g", template))
    assert variable.render([{"role": "user", "content": "u"}], True) == "[user]uTrue"  # the template goes by it alone
    chat = ChatTemplate(write_template(tmp_path / "f", template + "{# /think, /no_think #}"))
    user = [{"role": "user", "content": "u"}]
    assert chat.render(user) == "[user]u"
    assert chat.render(user, True) == "[system]/think[user]uTrue"
    assert chat.render(user, False) == "[system]/no_think[user]uFalse"
    assert chat.render([{"role": "system", "content": "s"}, *user], True) == "[system]s\n/think[user]uTrue"


@pytest.mark.parametrize(
    "template,says",
    (
        ("{{ raise_exception('roles must\nalternate') }}", "refuses: roles must"),
        ("{{ messages[7].content }}", "fails: UndefinedError"),
        ("{{ 1 // 0 }}", "fails: ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "fails: SecurityError"),
        ("{{ messages.append(1) }}", "fails: SecurityError"),
        ("{% if %}", "cannot be read"),
        (None, "no chat template"),
    ),
)
def test_templates_that_raise(template: str | None, says: str, aligned: Path) -> None:
    (aligned / "chat_template.jinja").unlink()
    if template is not None:
        (aligned / "chat_template.jinja").write_text(template)
    code, _, err = limbeck("generate", f"model={aligned}", "prompt=hello", "chat=true")
    assert code == 2 and says in err and err.count("\n") == 1 and "Traceback" not in err, err


@pytest.mark.parametrize(
    "arguments,says",
    (
        (["prompt=x", "max_new_tokens=131072"], "maximum is 131072"),
        (["prompt=x", "max_new_tokens=0"], "max_new_tokens"),
        (["prompt=x", "batch=0"], "batch"),
        (["prompt=x", "reasoning=on"], "chat=true"),
        (["prompt=x", "chat=true", "reasoning=maybe"], "on, off"),
        (["prompt=x", "top_p=0"], "top_p"),
        (["prompt=x", "stop=['']"], "stop"),
        (["prompt=x", "thinking_budget=-1"], "thinking_budget"),
        (["prompt=x", "ssm_dtype=int3"], "int3"),
        (["prompt=x", "prompts=y", "output=z"], "both"),
        (["prompts=y"], "output"),
        (["prompts=none.txt", "output=z"], "none.txt"),
        ([], "prompt is missing"),
    ),
)
def test_wrong_input(arguments: list[str], says: str, aligned: Path) -> None:
    code, _, err = limbeck("generate", f"model={aligned}", *arguments)
    assert code == 2 and says in err and err.count("\n") == 1 and "Traceback" not in err, err


def test_a_prompt_beyond_the_memory(aligned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limbeck.models.generate.engine.free_memory", lambda device: 1000)
    code, _, err = limbeck("generate", f"model={aligned}", "prompt=x")
    assert code == 2 and "GiB of memory are free" in err and err.count("\n") == 1


def test_a_file_of_prompts(aligned: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("def a\n\ndef b(x):\ndef c\n")
    base = (
        "generate",
        f"model={aligned}",
        f"prompts={tmp_path / 'p.txt'}",
        "max_new_tokens=5",
        "batch=2",
        "logprobs=true",
    )
    code, out, err = limbeck(*base, f"output={tmp_path / 'a.jsonl'}")
    assert code == 0 and "3 answers" in out, err
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["def a", "def b(x):", "def c"]
    assert all(len(row["tokens"]) == len(row["logprobs"]) <= 5 and row["finished"] for row in rows)
    alone = limbeck("generate", f"model={aligned}", "prompt=def b(x):", "max_new_tokens=5")[1]
    assert alone == "def b(x):" + rows[1]["text"] + "\n"
    code, _, err = limbeck(*base, f"output={tmp_path / 'a.jsonl'}")
    assert code == 2 and "exists already" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "aligned", "p.txt"]


def test_messages_of_a_jsonl_file(aligned: Path, tmp_path: Path) -> None:
    rows = [{"id": 7, "messages": MESSAGES}, {"prompt": "hi"}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    base = ("generate", f"model={aligned}", f"prompts={tmp_path / 'p.jsonl'}", "max_new_tokens=3")
    assert limbeck(*base, f"output={tmp_path / 'a.jsonl'}", "chat=true", "reasoning=off", "system=s")[0] == 0
    found = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert found[0]["id"] == 7 and found[1]["prompt"] == "hi" and len(found) == 2
    code, _, err = limbeck(*base, f"output={tmp_path / 'b.jsonl'}")
    assert code == 2 and "chat=true" in err
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": [*MESSAGES, call], "tools": [{"name": "look"}]}))
    (aligned / "chat_template.jinja").unlink()
    (aligned / "chat_template.jinja").write_text(
        "{% if messages | length > 1 and messages[1].tool_calls and tools[0].name == 'look' %}"
        "{{ raise_exception('both are there') }}{% endif %}"
    )
    code, _, err = limbeck(*base, f"output={tmp_path / 'b.jsonl'}", "chat=true")
    assert code == 2 and "both are there" in err
    (aligned / "chat_template.jinja").write_text(TEMPLATE)
    for line, says in (("{", "line 1 is no valid JSON"), ('{"text": 1}', "line 1 has neither"), ("", "no prompts")):
        (tmp_path / "p.jsonl").write_text(line)
        code, _, err = limbeck(*base, f"output={tmp_path / 'b.jsonl'}")
        assert code == 2 and says in err


def test_an_interrupted_file_resumes(aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("".join(f"def {letter}\n" for letter in "abcdef"))
    base = (
        "generate",
        f"model={aligned}",
        f"prompts={tmp_path / 'p.txt'}",
        "max_new_tokens=4",
        "batch=1",
        "temperature=1",
    )
    assert limbeck(*base, f"output={tmp_path / 'whole.jsonl'}")[0] == 0
    write = answers.Journal.write
    written: list[int] = []

    def interrupted(journal: answers.Journal, number: int, row: dict[str, Any]) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(number)
        write(journal, number, row)

    with monkeypatch.context() as patch:
        patch.setattr(answers.Journal, "write", interrupted)
        assert limbeck(*base, f"output={tmp_path / 'a.jsonl'}")[0] == 130
    assert not (tmp_path / "a.jsonl").exists()
    with (tmp_path / ".a.jsonl.partial").open("a") as file:
        file.write('[5, {"prompt": "cut o')
    counted: list[int] = []

    def counting(journal: answers.Journal, number: int, row: dict[str, Any]) -> None:
        counted.append(number)
        write(journal, number, row)

    monkeypatch.setattr(answers.Journal, "write", counting)
    assert limbeck(*base, f"output={tmp_path / 'a.jsonl'}")[0] == 0
    assert counted == [3, 4, 5]
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_control_characters_do_not_steer_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[2Jb\r\x9b\tc\n\u200d\xa0é"
    assert generate.printable(text) == text
    monkeypatch.setattr(generate, "console", Console(force_terminal=True))
    assert generate.printable(text) == "a\ufffd[2Jb\ufffd\ufffd\tc\n\u200d\xa0é"


class Terminal:
    """A command at a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "limbeck.scripts.run.main", *arguments]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=take_terminal
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} did not come: {self.seen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 4096).decode(errors="replace")

    def send(self, text: str) -> None:
        self.seen = ""
        os.write(self.master, text.encode())

    def close(self) -> int:
        """The exit code; what is still said is read."""
        end = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 4096).decode(errors="replace")
                except OSError:
                    break
        return self.process.wait(10)


def take_terminal() -> None:
    """Makes standard input the controlling terminal, whose Ctrl-C reaches the process."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def endless(aligned: Path) -> Iterator[list[str]]:
    """Options of a text that takes long."""
    yield [f"model={aligned}", "chat=true", "max_new_tokens=30000", "context=40000", "temperature=1"]


def test_ctrl_c_in_a_stream_leaves_the_terminal_clean(endless: list[str]) -> None:
    terminal = Terminal("generate", "prompt=hello", *endless)
    import termios

    before = termios.tcgetattr(terminal.master)
    while len(terminal.seen) < 40:
        assert select.select([terminal.master], [], [], 90)[0], terminal.seen
        terminal.seen += os.read(terminal.master, 4096).decode(errors="replace")
    terminal.send("\x03")
    assert terminal.close() == 130
    assert "limbeck: interrupted" in terminal.seen and "Traceback" not in terminal.seen
    line = terminal.seen.split("limbeck: interrupted")[0]
    assert line.endswith("\n") and "\x1b[?25l" not in terminal.seen  # a line of its own, the cursor not hidden
    assert termios.tcgetattr(terminal.master) == before


def test_a_chat_at_the_terminal(endless: list[str]) -> None:
    """Ctrl-C stops an answer and leads back to the prompt; the end of the input ends the chat."""
    terminal = Terminal("generate", *endless)
    terminal.wait_for("> ")
    terminal.send("hello\n")
    terminal.wait_for("hello\r\n")
    while len(terminal.seen) < 60:
        assert select.select([terminal.master], [], [], 60)[0]
        terminal.seen += os.read(terminal.master, 4096).decode(errors="replace")
    terminal.send("\x03")
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    terminal.send("\x04")
    assert terminal.close() == 0 and "Traceback" not in terminal.seen


def test_a_chat_that_is_too_long_goes_on(aligned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["hello", "word " * 400, "hello again"])

    def read(_: str) -> str:
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(generate.talk, "__defaults__", (read,))
    code, out, err = limbeck("generate", f"model={aligned}", "chat=true", "max_new_tokens=4", "context=200")
    assert code == 0, err
    assert "the maximum here is 200; give a shorter message" in out and next(lines, None) is None


@pytest.mark.parametrize("ending", ("JSONL", "ndjson", "json"))
def test_objects_by_every_ending(ending: str, aligned: Path, tmp_path: Path) -> None:
    """With tools as a table holds them, as a text; contents in parts; a byte order mark."""
    tools, user = [{"name": "look"}], {"role": "user", "content": [{"type": "text", "text": "u"}]}
    rows: list[dict[str, Any]] = [
        {"messages": [user], "tools": json.dumps(tools)}, {"prompt": "p", "tools": tools}, {"prompt": "p"}
    ]  # fmt: skip
    text = json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows))
    (tmp_path / f"p.{ending}").write_text("\ufeff" + text)
    read = answers.read_prompts(tmp_path / f"p.{ending}")
    assert [row.get("tools") for row in read] == [tools, tools, None]
    assert read[0]["messages"] == [{"role": "user", "content": "u"}]
    (aligned / "chat_template.jinja").write_text("{{ tools[0].name if tools else 'none' }}:{{ messages[0].content }}")
    words = ("generate", f"model={aligned}", f"prompts={tmp_path / f'p.{ending}'}", "max_new_tokens=1", "chat=true")
    with pytest.MonkeyPatch.context() as patch:
        seen: list[str] = []
        encode = Tokenizer.encode
        patch.setattr(Tokenizer, "encode", lambda own, text: seen.append(text) or encode(own, text))
        code, _, err = limbeck(*words, f"output={tmp_path / 'a.jsonl'}")
    (aligned / "chat_template.jinja").write_text(TEMPLATE)
    assert code == 0, err
    assert seen[-3:] == ["look:u", "look:p", "none:p"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    (
        ("p.txt", '{"prompt": "x"}\ny', "name it p.jsonl"),
        ("p.jsonl", '{"prompt": "x", "tools": "x y"}', "tools is a text, and no JSON"),
        ("p.jsonl", '{"prompt": "x", "tools": [5]}', "no list of objects"),
        ("p.jsonl", '{"messages": {"role": "user"}}', "no list of messages"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', "turn 1 has no content"),
        ("p.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "part of type 'image'"),
        ("p.json", '{"prompt": "x"}', "holds no list"),
    ),
)  # fmt: skip
def test_wrong_rows_of_prompts(name: str, text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=re.escape(says)):
        answers.read_prompts(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffdef a\n")
    assert answers.read_prompts(tmp_path / "p.txt") == [{"prompt": "def a"}]


def test_a_template_without_a_word_for_reasoning(aligned: Path) -> None:
    (aligned / "chat_template.jinja").write_text("{{ messages[0].content }}")
    code, _, err = limbeck("generate", f"model={aligned}", "prompt=x", "chat=true", "reasoning=on")
    (aligned / "chat_template.jinja").write_text(TEMPLATE)
    assert code == 2 and "neither enable_thinking nor /no_think" in err
