"""A file of prompts and the file of answers to them: it appears whole, and an interrupted run resumes where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...kernels.products import chosen
from ..errors import InputError
from ..folder import owned, sync
from ..foreign import check_regular, parse_json, read_text
from .chat import checked_message, checked_tools
from .engine import Completion, Request
from .writer import Writer, WritingOptions

OBJECTS = (".jsonl", ".ndjson")  # endings of files with an object a line
IDLE = {"batch", "prefill_chunk", "device", "matmul"}  # options that answers do not depend on, or that `chosen` tells
BEGIN = re.compile(rb'\{"inputs": "[0-9a-f]{64}"\}\n')  # a journal's first line


def answer_file(writer: Writer, prompts: Path, output: Path, on_answer: Callable[[int, int], None]) -> int:
    """Answers each line of a text file, or each object of a JSON or JSONL one ({"prompt": ...} or {"messages": [...]}),
    as many at a time as the options' `batch`. A line of the output has the object's fields, "text", "finished",
    "tokens", and "logprobs" where the options say so. `on_answer(done, total)` counts them; returns how many there are.

    All is checked before the first byte is written. Raises InputError where the output exists or another process writes
    it, a line cannot be read, a prompt is too long, or what is answered so far was to something else.
    """
    check_absent(output)
    lines = [(row, line_request(writer, row, number)) for number, row in enumerate(read_prompts(prompts))]
    with owned(output) as left:
        check_absent(output)  # it may have appeared while the lock was another's
        journal = Journal(output, digest(writer, [row for row, _ in lines]), left)
        todo = [number for number in range(len(lines)) if number not in journal.done]
        if todo:
            longest = max(len(lines[number][1].prompt) for number in todo) + writer.options.max_new_tokens
            engine = writer.engine(longest, min(writer.options.batch, len(todo)))
            running = {engine.add(lines[number][1]): (number, Completion()) for number in todo}
            with journal:
                for event in engine.stream():
                    number, completion = running[event.request]
                    completion.add(event)
                    if event.finished:
                        journal.write(number, answer(lines[number][0], completion, writer.options.logprobs))
                        on_answer(len(journal.done), len(lines))
        journal.finish()
    return len(lines)


def check_absent(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise InputError(f"{output} exists already; give an output file that does not")


def answer(row: dict[str, Any], completion: Completion, logprobs: bool) -> dict[str, Any]:
    content = row | {"text": completion.text, "finished": completion.finished, "tokens": completion.tokens}
    return content | {"logprobs": completion.logprobs} if logprobs else content


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The lines of a text file, empty ones left out; or the objects of a .jsonl, .ndjson or .json file, each checked.
    Raises InputError."""
    text, kind = read_text(path).removeprefix("\ufeff"), path.suffix.lower()
    if kind == ".json":
        content = parse_json(text, str(path))
        if not isinstance(content, list):
            raise InputError(f"{path} holds no list; expected [{{...}}, ...], or one object a line in a .jsonl file")
        rows = [checked_row(row, f"{path}: record {number}") for number, row in enumerate(content, 1)]
    else:
        lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        if kind in OBJECTS:  # other line ends may be part of a text
            read = ((f"{path}: line {number}", line) for number, line in lines)
            rows = [checked_row(parse_json(line, where), where) for where, line in read]
        else:
            rows = [{"prompt": line.rstrip("\r")} for _, line in lines]
            if rows and is_row(rows[0]["prompt"]):
                raise InputError(f"{path} holds JSON objects, and would be read as texts; name it {path.stem}.jsonl")
    if not rows:
        raise InputError(f"prompts={path} has no prompts")
    return rows


def is_row(line: str) -> bool:
    """Whether a line is an object of a .jsonl file."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and bool(row.keys() & {"prompt", "messages"})


def checked_row(row: Any, where: str) -> dict[str, Any]:
    """A row with its messages as templates read them: contents are texts, tools objects. Raises InputError."""
    if not isinstance(row, dict) or not (isinstance(row.get("prompt"), str) or row.get("messages")):
        raise InputError(f'{where} has neither a "prompt" (a text) nor "messages" (of "role" and "content")')
    messages, tools = row.get("messages"), checked_tools(row.get("tools"), where)
    if messages and not isinstance(messages, list):
        raise InputError(f"{where}: messages is no list of messages")
    turns = [checked_message(each, f"{where}, turn {number}") for number, each in enumerate(messages or (), 1)]
    return row | ({"messages": turns} if turns else {}) | ({"tools": tools} if "tools" in row else {})


def line_request(writer: Writer, row: dict[str, Any], number: int) -> Request:
    """Each line draws from a seed of its own."""
    messages, tools = row.get("messages"), row.get("tools")
    if not messages and tools is None:
        return writer.request(row["prompt"], number)
    return writer.reply(list(messages or [{"role": "user", "content": row["prompt"]}]), number, tools=tools)


def digest(writer: Writer, rows: list[dict[str, Any]]) -> str:
    """Changes with the rows, the template, the options and the model's files; not with the prompts that a template
    makes of them, which may tell the date."""
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in writer.folder.glob("*.*"))
    template = None if writer.template is None else [writer.template.sources, writer.template.special]
    names = [field.name for field in dataclasses.fields(WritingOptions) if field.name not in IDLE]
    options = [{name: getattr(writer.options, name) for name in names}, *chosen().values()]
    return hashlib.sha256(json.dumps([files, rows, template, options], sort_keys=True).encode()).hexdigest()


class Journal:
    """What is answered so far, in a file beside the output: a line that says for what, then answers as they come. The
    file is read at first, and written from the block's begin on.

    `left`: a process that died has left its lock beside the output. Raises InputError where the file is of other
    inputs, or what lies there is not of limbeck.
    """

    def __init__(self, output: Path, inputs: str, left: bool) -> None:
        self.output, self.begin = output, json.dumps({"inputs": inputs}).encode() + b"\n"
        self.path, self.whole = (output.with_name(f".{output.name}.{end}") for end in ("partial", "whole"))
        self.done, self.size = dict[int, dict[str, Any]](), 0
        if self.path.exists() or self.path.is_symlink():
            self.read()
        if not left and (self.whole.exists() or self.whole.is_symlink()):
            raise self.foreign(self.whole)

    def read(self) -> None:
        """The answers of a journal, up to a line that was cut off, before which it has `size` bytes."""
        check_regular(self.path)
        with self.path.open("rb") as stream:
            first = stream.readline(2 * len(self.begin))
            if BEGIN.fullmatch(first) and first != self.begin:
                raise InputError(
                    f"{self.path} was begun otherwise (prompts, options, model); remove it, or give another output"
                )
            if not self.begin.startswith(first):  # a part of it, or nothing: cut off when it was begun
                raise self.foreign(self.path)
            if first != self.begin:
                return
            self.size = len(first)
            for line in stream:
                try:
                    number, row = json.loads(line)
                except (ValueError, TypeError):
                    return
                if not line.endswith(b"\n"):
                    return
                self.done[number] = row
                self.size += len(line)

    def foreign(self, path: Path) -> InputError:
        return InputError(f"{path} is not of limbeck, and {self.output} is made there; move it, or give another output")

    def __enter__(self) -> Journal:
        self.file = self.path.open("ab")
        self.file.truncate(self.size)
        if not self.size:
            self.file.write(self.begin)
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, number: int, row: dict[str, Any]) -> None:
        self.done[number] = row
        self.file.write(json.dumps((number, row)).encode() + b"\n")
        self.file.flush()

    def finish(self) -> None:
        """The answers in the prompts' order take the journal's place."""
        rows = (json.dumps(self.done[number], ensure_ascii=False) for number in sorted(self.done))
        try:
            self.whole.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
            sync(self.whole)
            check_absent(self.output)
            os.replace(self.whole, self.output)
        except BaseException:
            self.whole.unlink(missing_ok=True)
            raise
        self.path.unlink()
