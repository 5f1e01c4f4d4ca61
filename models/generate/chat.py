"""Chat templates: messages to a prompt, by the Jinja template of a checkpoint folder, in a sandbox and a process of
its own with bounds on time and memory.

Templates find what transformers gives them: trimmed blocks, `raise_exception`, `strftime_now`, a `tojson` that leaves
letters as they are, loop controls, the special tokens, `add_generation_prompt` and `enable_thinking`.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ..errors import InputError
from ..foreign import SETTINGS, read_text
from ..tokenizer import tokenizer_settings
from .template_worker import SECONDS

Message = Mapping[str, str]
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class TemplateProcess:
    """The process of template_worker.py that renders one template, for as long as this object lives.

    `where` begins what errors say; a rendering may take `seconds` of the processor. Raises InputError where the
    template is no Jinja.
    """

    def __init__(self, source: str, where: str, seconds: float = SECONDS) -> None:
        self.where, self.seconds = where, seconds
        # A group of its own: Ctrl-C at the terminal is meant for us.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py")), str(seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, process_group=0,
        )  # fmt: skip
        weakref.finalize(self, end_process, self.process)
        answer = self.answer({"source": source})
        if "failed" in answer:
            raise InputError(f"{where}: the chat template cannot be read: {one_line(answer['failed'])}")

    def render(self, variables: Mapping[str, Any]) -> str:
        """The template's text. Raises InputError, in one line, for whatever the template does wrong."""
        answer = self.answer({"variables": variables})
        if "refused" in answer:
            raise InputError(f"the chat template refuses: {one_line(answer['refused'])}")
        if "failed" in answer:
            raise InputError(f"{self.where}: the chat template fails: {one_line(answer['failed'])}")
        return str(answer["text"]).encode("utf-8", "replace").decode()  # halves of surrogate pairs

    def answer(self, given: Mapping[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(given).encode() + b"\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if line:
            return cast(dict[str, Any], json.loads(line))
        late = self.process.wait() == -signal.SIGPROF
        return {"failed": f"it takes more than {self.seconds:g} s" if late else "it breaks Python, or takes its memory"}


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Its input ends, and so does the process."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.wait()


def one_line(text: str) -> str:
    return " ".join(text.split())[:500]


class ChatTemplate:
    """A folder's template. Raises InputError where there is none, or it is no Jinja."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        source, self.special = read_template(folder)
        self.process = TemplateProcess(source, str(folder))

    def render(self, messages: Sequence[Message], reasoning: bool | None = None) -> str:
        """The prompt that ends where the assistant begins. `reasoning` adds "/think" or "/no_think" to the system
        message, as Nemotron-Nano-9B-v2 has it, and sets `enable_thinking`, as Qwen3 has it.

        Raises InputError, in one line, for whatever the template raises.
        """
        variables: dict[str, Any] = dict(self.special)
        if reasoning is not None:
            messages, variables["enable_thinking"] = with_reasoning(messages, reasoning), reasoning
        variables |= {"messages": [dict(message) for message in messages], "add_generation_prompt": True}
        return self.process.render(variables)


def with_reasoning(messages: Sequence[Message], reasoning: bool) -> list[Message]:
    """Messages whose system message, the first, says whether to think."""
    word = "/think" if reasoning else "/no_think"
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n{word}"}, *messages[1:]]
    return [{"role": "system", "content": word}, *messages]


def read_template(folder: Path) -> tuple[str, dict[str, str]]:
    """A folder's template and special tokens, from chat_template.jinja or tokenizer_config.json."""
    settings = tokenizer_settings(folder)
    special = {name: settings[name] for name in SPECIAL if isinstance(settings.get(name), str)}
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja", SETTINGS), special
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise InputError(f"{folder} has no chat template; leave out chat=true, or take an aligned model's folder")
    return template, special
