"""`limbeck generate`: the text after a prompt in the terminal, token by token; a file of prompts becomes a file of
answers; or one talks with the model, in its folder's chat template."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import PositiveInt

from ..models.errors import InputError
from ..models.generate.answers import answer_file
from ..models.generate.chat import Message
from ..models.generate.engine import Engine, Request
from ..models.generate.writer import Writer, WritingOptions
from .run.resolve import model_folder
from .run.show import console, progress, say


@dataclasses.dataclass(frozen=True)
class Options(WritingOptions):
    model: str
    prompt: str
    prompts: Path | None
    output: Path | None
    context: PositiveInt


def run(options: Options) -> None:
    if options.prompt and options.prompts is not None:
        raise InputError("prompt= and prompts= are both given; give one of them")
    if not (options.prompt or options.prompts is not None or options.chat):
        raise InputError("prompt is missing; give prompt=TEXT, prompts=FILE, or chat=true to talk in the terminal")
    if (options.output is None) != (options.prompts is None):
        raise InputError("output= is the file of answers to prompts=FILE; give both or neither")
    writer = Writer(model_folder(options.model), options)
    if options.prompts is not None and options.output is not None:
        with progress("answers") as bar:
            count = answer_file(writer, options.prompts, options.output, on_answer=bar.set)
        say(f"result: {options.output} ({count} answers)")
    elif options.prompt:
        console.print("" if options.chat else options.prompt, end="", markup=False, soft_wrap=True)
        request = writer.request(options.prompt)
        for _ in printed(writer.engine(len(request.prompt) + options.max_new_tokens, 1), request):
            pass
    else:
        talk(writer, options)


def printed(engine: Engine, request: Request) -> Iterator[str]:
    """Prints a request's text as it comes, and gives it piece by piece; the line is ended whatever happens."""
    number = engine.add(request)
    try:
        for event in engine.stream():
            console.print(printable(event.text), end="", markup=False, soft_wrap=True)
            console.file.flush()
            yield event.text
    finally:
        engine.cancel(number)
        console.print()


def printable(text: str) -> str:
    """A text whose control characters cannot steer the terminal; a pipe gets it as it is."""
    if not console.is_terminal:
        return text
    steers = (letter not in "\n\t" and unicodedata.category(letter) == "Cc" for letter in text)
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if control else letter for letter, control in zip(text, steers, strict=True)
    )


def talk(writer: Writer, options: Options, read: Callable[[str], str] = input) -> None:
    """A chat in the terminal. Ctrl-C stops an answer, and at the prompt the chat; so does the end of the input."""
    context = min(options.context, writer.config.max_position_embeddings)
    engine = writer.engine(context, 1)
    messages: list[Message] = []
    say("Ctrl-D ends the chat, Ctrl-C an answer.")
    while True:
        try:
            line = read("> ")
        except EOFError:
            console.print()
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        request = writer.reply(messages, len(messages) - 1)
        said = ""
        try:
            for piece in printed(engine, request):
                said += piece
        except KeyboardInterrupt:
            say("(stopped)")
        messages.append({"role": "assistant", "content": said})
