"""Chat templates: messages to a text, by the Jinja template of a checkpoint folder, in a sandbox and a process of
its own with bounds on time and memory.

Templates find what transformers gives them: trimmed blocks, {% generation %} blocks, `raise_exception`, `strftime_now`,
a `tojson` that leaves letters as they are, loop controls, the special tokens, `tools` and `documents` (none where there
are none), `add_generation_prompt` and `enable_thinking`; messages come without their null fields, and with their
reasoning by every name that it has had.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from ..errors import InputError
from ..foreign import SETTINGS, read_text
from ..tokenizer import tokenizer_settings
from .template_worker import SECONDS

Message = Mapping[str, Any]
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING = ("reasoning_content", "thinking", "reasoning")  # what a message's thoughts are called
AT_ONCE = 2**20  # characters of JSON that go to the process together, more where one rendering's are
SWITCHED_BY, SET_BY = "/no_think", "enable_thinking"  # how templates are told whether to think
BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class NoTemplate(InputError):
    """A folder that has no chat template."""


class Rendering(NamedTuple):
    """A text, where in it {% generation %} blocks begin and end, and instead of both what the template did wrong."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    wrong: str | None = None


class TemplateProcess:
    """The process of template_worker.py that renders one template, for as long as this object lives. Where a rendering
    has ended it, the next one has a new process.

    `where` begins what errors say; a rendering may take `seconds` of the processor. Raises InputError where the
    template is no Jinja.
    """

    def __init__(self, source: str, where: str, seconds: float = SECONDS) -> None:
        self.source, self.where, self.seconds = source, where, seconds
        self.start()

    def start(self) -> None:
        # A group of its own: Ctrl-C at the terminal is meant for us.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py")), str(self.seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, process_group=0,
        )  # fmt: skip
        self.end = weakref.finalize(self, end_process, self.process)
        (answer,) = self.answers(json.dumps({"source": self.source}), 1)
        if "failed" in answer:
            raise InputError(f"{self.where}: the chat template cannot be read: {one_line(answer['failed'])}")

    def render(self, variables: Mapping[str, Any]) -> str:
        """The template's text. Raises InputError, in one line, for whatever the template does wrong."""
        (rendering,) = self.renderings([variables])
        if rendering.wrong is not None:
            raise InputError(rendering.wrong)
        return rendering.text

    def renderings(self, many: Iterable[Mapping[str, Any]]) -> Iterator[Rendering]:
        """The template's texts of some variables each, which are read as their turn comes: of a long conversation,
        rendered from each of its turns on, memory need not hold all."""
        waiting: list[str] = []
        size = 0
        for variables in many:
            waiting.append(json.dumps(variables, default=str))  # a table may have dates
            size += len(waiting[-1])
            if size > AT_ONCE:
                yield from self.rendered(waiting)
                waiting, size = [], 0
        if waiting:
            yield from self.rendered(waiting)

    def rendered(self, variables: Sequence[str]) -> list[Rendering]:
        """Of variables in JSON, all of them at once."""
        if self.process.poll() is not None:
            self.end()
            self.start()
        answers = self.answers('{"variables": [' + ", ".join(variables) + "]}", len(variables))
        return [self.rendering(answer) for answer in answers]

    def rendering(self, answer: Mapping[str, Any]) -> Rendering:
        if "refused" in answer:
            return Rendering("", wrong=f"the chat template refuses: {one_line(answer['refused'])}")
        if "failed" in answer:
            return Rendering("", wrong=f"{self.where}: the chat template fails: {one_line(answer['failed'])}")
        text = str(answer["text"]).encode("utf-8", "replace").decode()  # halves of surrogate pairs
        return Rendering(text, tuple((begin, end) for begin, end in answer["spans"]))

    def answers(self, given: str, count: int) -> list[dict[str, Any]]:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(given.encode() + b"\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if line:
            return cast(list[dict[str, Any]], json.loads(line))
        late = self.process.wait() == -signal.SIGPROF
        why = f"it takes more than {self.seconds:g} s" if late else "it breaks Python, or takes its memory"
        return [{"failed": why}] * count


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
    """A folder's template, or the two of them where one is for conversations with tools. Raises InputError where there
    is none, or it is no Jinja."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources, self.special = read_templates(folder)
        self.processes = {name: TemplateProcess(source, str(folder)) for name, source in self.sources.items()}

    def name_for(self, tools: Any) -> str:
        return "tool_use" if tools is not None and "tool_use" in self.sources else "default"

    def has_blocks(self, tools: Any = None) -> bool:
        """Whether {% generation %} blocks say what the assistant's is."""
        return BLOCK.search(self.sources[self.name_for(tools)]) is not None

    @property
    def knows_reasoning(self) -> bool:
        """Whether a template goes by reasoning on or off."""
        return any(word in source for source in self.sources.values() for word in (SWITCHED_BY, SET_BY))

    def variables(
        self, messages: Sequence[Message], reasoning: bool | None = None, tools: Any = None, prompt: bool = False
    ) -> dict[str, Any]:
        """What a template is given; `prompt`: the text is to end where the assistant begins. `reasoning` sets
        `enable_thinking`, as Qwen3 has it, and where the template reads "/think" or "/no_think" in messages, as
        Nemotron-Nano-9B-v2's does, adds that to the system message."""
        given: dict[str, Any] = {**self.special, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        if reasoning is not None:
            given["enable_thinking"] = reasoning
            if SWITCHED_BY in self.sources[self.name_for(tools)]:
                messages = with_reasoning(messages, reasoning)
        return given | {"messages": [plain(message) for message in messages]}

    def render(self, messages: Sequence[Message], reasoning: bool | None = None, tools: Any = None) -> str:
        """The prompt that ends where the assistant begins; see `variables`.

        Raises InputError, in one line, for whatever the template raises.
        """
        return self.processes[self.name_for(tools)].render(self.variables(messages, reasoning, tools, prompt=True))

    def renderings(
        self, wanted: Iterable[tuple[Sequence[Message], bool]], reasoning: bool | None = None, tools: Any = None
    ) -> Iterator[Rendering]:
        """The texts of some messages each, given with whether they end where the assistant begins."""
        many = (self.variables(messages, reasoning, tools, prompt) for messages, prompt in wanted)
        return self.processes[self.name_for(tools)].renderings(many)


def text_of_parts(parts: list[Any], where: str) -> str:
    """The text of a content in parts, as a text: most templates would write the list itself. Raises InputError where
    a part is something else."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind != "text" or not isinstance(text, str):
            raise InputError(f"{where} has a part of type {kind!r} in its content; only text is read")
        texts.append(text)
    return "".join(texts)


def checked_message(message: Any, where: str) -> dict[str, Any]:
    """A message as templates read it: its content is a text, or it calls tools. Raises InputError."""
    if not isinstance(message, dict):
        raise InputError(f"{where} is no message but {type(message).__name__}")
    if not isinstance(message.get("role"), str):
        raise InputError(f"{where} has no role; it has {', '.join(map(repr, message))}")
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": text_of_parts(content, where)}
    if content is None:
        if not message.get("tool_calls"):
            raise InputError(f"{where} has no content")
    elif not isinstance(content, str):
        raise InputError(f"{where}: its content is no text but {type(content).__name__}")
    return message


def checked_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Tools that a conversation has at hand, given as a list or as its JSON; None without any. Raises InputError."""
    tools = unpacked_json(value, f"{where}: tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError(f"{where}: tools is no list of objects")
    return tools or None


def unpacked_json(value: Any, where: str) -> Any:
    """Lists and objects that a table holds as JSON in a cell. Raises InputError."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InputError(f"{where} is a text, and no JSON") from None


def plain(message: Message) -> dict[str, Any]:
    """A message without null fields, its reasoning under the names that templates read."""
    content = {key: value for key, value in message.items() if value is not None}
    reasoning = next((content[name] for name in REASONING if name in content), None)
    if reasoning is None:
        return content
    return {"thinking": reasoning, **content, "reasoning_content": reasoning}


def with_reasoning(messages: Sequence[Message], reasoning: bool) -> list[Message]:
    """Messages whose system message, the first, says whether to think."""
    word = "/think" if reasoning else "/no_think"
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n{word}"}, *messages[1:]]
    return [{"role": "system", "content": word}, *messages]


def read_templates(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """A folder's templates by their names and its special tokens, from chat_template.jinja or tokenizer_config.json."""
    settings = tokenizer_settings(folder)
    special = {name: settings[name] for name in SPECIAL if isinstance(settings.get(name), str)}
    if (folder / "chat_template.jinja").exists():
        return {"default": read_text(folder / "chat_template.jinja", SETTINGS)}, special
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    else:
        named = {"default": template}
    texts = {name: text for name in ("default", "tool_use") if isinstance(text := named.get(name), str)}
    if "default" not in texts:
        raise NoTemplate(f"{folder} has no chat template; leave out chat=true, or take an aligned model's folder")
    return texts, special


def read_template(folder: Path) -> tuple[str, dict[str, str]]:
    """A folder's template for conversations without tools, and its special tokens. Raises InputError."""
    sources, special = read_templates(folder)
    return sources["default"], special
