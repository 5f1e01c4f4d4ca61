"""Text out: whole characters, stop strings, chat templates, thoughts that end, files of prompts, a terminal."""

from __future__ import annotations

import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models.errors import InputError
from limbeck.models.generate.chat import ChatTemplate
from limbeck.models.generate.detokenize import TextStream
from limbeck.models.generate.engine import Engine, Request, Thought
from limbeck.models.generate.sampling import Sampling
from limbeck.models.tokenizer import Tokenizer, load_tokenizer
from limbeck.scripts import answers, generate
from limbeck.scripts.run.resolve import ZOO
from limbeck.tests.helpers import limbeck, make_workshop, random_model, tiny_config
from rich.console import Console

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


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


def bytes_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text in tokens of one byte each, so that characters fall apart."""
    return [token for byte in text.encode() for token in [byte_token(tokenizer, byte)]]


def byte_token(tokenizer: Tokenizer, byte: int) -> int:
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # how byte-level vocabularies spell bytes
    rest = [value for value in range(256) if value not in shown]
    letter = chr(byte) if byte in shown else chr(256 + rest.index(byte))
    token = tokenizer.backend.token_to_id(letter)
    assert token is not None
    return token


@pytest.mark.parametrize("text", ("déjà vu", "日本語 ok", "🦊🦊 x", "a\ufffdb", "plain"))
def test_pieces_are_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    for ids in (bytes_of(tokenizer, text), tokenizer.encode(text)):
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in ids]
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + stream.finish() == text
    assert len([piece for piece in pieces if piece]) > 1 or text == "plain"


def test_bytes_that_are_no_text_come_at_the_end(tokenizer: Tokenizer) -> None:
    ids = [*bytes_of(tokenizer, "ab"), byte_token(tokenizer, 0xE6), byte_token(tokenizer, 0x97)]
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in ids] == ["a", "b", "", ""]
    assert "ab" + stream.finish() == tokenizer.decode(ids)
    again = TextStream(tokenizer)
    mixed = [*ids, *bytes_of(tokenizer, "c日d")]
    assert "".join(again.push(token) for token in mixed) + again.finish() == tokenizer.decode(mixed)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_any_tokens_are_the_whole_text(seed: int) -> None:
    """The shipped tokenizer, on bytes of many alphabets cut anywhere and on tokens drawn at random."""
    shipped, draw = load_tokenizer(ZOO), random.Random(seed)
    ranges = ((32, 127), (0x300, 0x9FFF), (0x1F300, 0x1F6FF))
    letters = "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(60))
    spelled, drawn = bytes_of(shipped, letters), [draw.randrange(shipped.vocab_size) for _ in range(80)]
    for ids in (spelled, spelled[: draw.randrange(1, len(spelled))], drawn):
        stream = TextStream(shipped)
        pieces = [stream.push(token) for token in ids]
        whole = shipped.decode(ids, skip_special_tokens=True)
        assert "".join(pieces) + stream.finish() == whole
        assert "".join(pieces) == whole[: stream.decoded]
        if ids is spelled:
            assert whole == letters and not any("\ufffd" in piece for piece in pieces)


def test_special_tokens_are_not_shown(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    ids = [*tokenizer.encode("ab"), tokenizer.eos_token_id]
    assert "".join(stream.push(token) for token in ids) + stream.finish() == "ab"


@pytest.mark.parametrize(
    "stop,shown", ((("END",), "abc"), (("cEN", "END"), "ab"), (("ENx",), "abcENDz"), (("z",), "abcEND"), (("ab",), ""))
)
def test_stop_strings_across_tokens(tokenizer: Tokenizer, stop: tuple[str, ...], shown: str) -> None:
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(token) for token in bytes_of(tokenizer, "abcENDz")]
    held = stream.finish()
    assert "".join(pieces) + held == shown
    assert stream.stopped == (shown != "abcENDz")
    for cut in range(len(pieces)):  # no piece takes back what an earlier one has shown
        assert shown.startswith("".join(pieces[:cut]))
    with pytest.raises(InputError, match="empty"):
        TextStream(tokenizer, ("",))


def test_what_may_become_a_stop_string_waits(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ("aab",))
    pushed = [stream.push(token) for token in bytes_of(tokenizer, "aaab")]
    assert pushed == ["", "", "a", ""] and stream.stopped and stream.finish() == ""


def test_stop_strings_end_requests(workshop: Path, tokenizer: Tokenizer) -> None:
    model = random_model(tiny_config(vocab_size=tokenizer.vocab_size), dtype=torch.float32)
    sampling = Sampling(1.0, seed=3)
    free = Request([1, 2], 40, sampling, stop_tokens=())
    engine = Engine(model, max_length=60, tokenizer=tokenizer)
    whole = engine.complete([free])[0]
    assert whole.finished == "length" and whole.text == tokenizer.decode(whole.tokens, skip_special_tokens=True)
    stop = whole.text[len(whole.text) // 2 :][:3]
    stopped, never = engine.complete(
        [
            Request([1, 2], 40, sampling, stop=(stop,), stop_tokens=()),
            Request([1, 2], 40, sampling, stop=("no such text",), stop_tokens=()),
        ]
    )
    assert stopped.finished == "stop string" and stopped.text == whole.text[: whole.text.index(stop)]
    assert len(stopped.tokens) < 40 and stopped.tokens == whole.tokens[: len(stopped.tokens)]
    assert never.finished == "length" and never.text == whole.text


@pytest.mark.parametrize("budget", (0, 1, 7))
def test_thoughts_end_with_their_budget(tokenizer: Tokenizer, budget: int) -> None:
    model = random_model(tiny_config(vocab_size=tokenizer.vocab_size), dtype=torch.float32)
    close = tokenizer.encode("</think>")
    prompt = [1, *tokenizer.encode("<think>\n")]
    request = Request(prompt, 30, Sampling(1.0, seed=1), stop_tokens=(), thinking_budget=budget)
    engine = Engine(model, max_length=60, tokenizer=tokenizer)
    free, found = engine.complete([Request(prompt, 30, Sampling(1.0, seed=1), stop_tokens=()), request])
    assert found.tokens[:budget] == free.tokens[:budget]
    assert found.tokens[budget : budget + len(close)] == close
    assert found.text.count("</think>") == 1 and len(found.tokens) == 30


def test_thoughts_are_seen_opening_and_closing(tokenizer: Tokenizer) -> None:
    thought = Thought(tokenizer, [1, *tokenizer.encode("<think>a</think>b")], 2)
    assert not thought.open
    for token in tokenizer.encode("c<think>"):
        thought.see(token)
    assert thought.open and not thought.forced
    for token in tokenizer.encode("x</think>"):
        thought.see(token)
        if thought.forced:
            break
    for token in thought.forced:
        thought.see(token)
    assert not thought.open


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
    chat = ChatTemplate(write_template(tmp_path / "f", template))
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
    for line, says in (("{", "line 1 is no JSON"), ('{"text": 1}', "line 1 has neither"), ("", "no prompts")):
        (tmp_path / "p.jsonl").write_text(line)
        code, _, err = limbeck(*base, f"output={tmp_path / 'b.jsonl'}")
        assert code == 2 and says in err


def test_an_interrupted_file_goes_on(aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    """Options of a text that goes on for long."""
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
