"""A file of prompts and the file of answers to them: it appears whole, and an interrupted run resumes where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...kernels.products import chosen
from ..errors import InputError
from ..folder import sync
from ..foreign import parse_json, read_text
from .chat import checked_message, checked_tools
from .engine import Completion, Request
from .writer import Writer

OBJECTS = (".jsonl", ".ndjson")  # endings of files with an object a line


def answer_file(writer: Writer, prompts: Path, output: Path, on_answer: Callable[[int, int], None]) -> int:
    """Answers each line of a text file, or each object of a JSON or JSONL one ({"prompt": ...} or {"messages": [...]}),
    as many at a time as the options' `batch`. A line of the output has the object's fields, "text", "finished",
    "tokens", and "logprobs" where the options say so. `on_answer(done, total)` counts them; returns how many there are.

    Raises InputError where the output exists, a line cannot be read, or a prompt is too long.
    """
    if output.exists():
        raise InputError(f"{output} exists already; give an output file that does not")
    lines = [(row, line_request(writer, row, number)) for number, row in enumerate(read_prompts(prompts))]
    journal = Journal(output.with_name(f".{output.name}.partial"), digest(writer, lines))
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
    journal.finish(output)
    return len(lines)


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


def digest(writer: Writer, lines: list[tuple[dict[str, Any], Request]]) -> str:
    """Changes with the prompts, the options and the model's files."""
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in writer.folder.glob("*.*"))
    requests = [(row, dataclasses.asdict(request)) for row, request in lines]
    options = (writer.options.dtype, writer.options.ssm_dtype, *chosen().values())
    return hashlib.sha256(json.dumps([files, requests, options], sort_keys=True).encode()).hexdigest()


class Journal:
    """What is answered so far, in a file beside the output: a line that says for what, then answers as they come."""

    def __init__(self, path: Path, inputs: str) -> None:
        self.path, self.done = path, dict[int, dict[str, Any]]()
        begin = json.dumps({"inputs": inputs})
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if lines and lines[0] == begin:
            for line in lines[1:]:
                try:
                    number, row = json.loads(line)
                except (ValueError, TypeError):  # the line that was cut off
                    break
                self.done[number] = row
        lines = [begin, *(json.dumps(item) for item in self.done.items())]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path.parent} cannot be written: {error.strerror}") from None

    def __enter__(self) -> Journal:
        self.file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, number: int, row: dict[str, Any]) -> None:
        self.done[number] = row
        self.file.write(json.dumps((number, row)) + "\n")
        self.file.flush()

    def finish(self, output: Path) -> None:
        """The answers in the prompts' order take the journal's place."""
        rows = (json.dumps(self.done[number], ensure_ascii=False) for number in sorted(self.done))
        temporary = output.with_name(f".{output.name}.whole")
        temporary.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
        sync(temporary)
        os.replace(temporary, output)
        self.path.unlink()
