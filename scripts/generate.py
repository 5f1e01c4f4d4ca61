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
from ..models.generate.engine import Engine
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
        request = writer.request(options.prompt)
        engine = writer.engine(len(request.prompt) + options.max_new_tokens, 1)
        number = engine.add(request)  # whatever is wrong has been said by now
        if not (options.chat or console.quiet):
            write(options.prompt)
        for _ in printed(engine, number):
            pass
    else:
        talk(writer, options)


def write(text: str) -> None:
    """A text on standard output, which --quiet leaves: it is the answer."""
    console.file.write(printable(text))
    console.file.flush()


def printed(engine: Engine, number: int) -> Iterator[str]:
    """Prints a request's text as it comes, and gives it piece by piece; the line is ended whatever happens."""
    try:
        for event in engine.stream():
            write(event.text)
            yield event.text
    finally:
        engine.cancel(number)
        write("\n")


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
            write("\n")
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        try:
            number, said = engine.add(writer.reply(messages, len(messages) - 1)), ""
        except InputError as error:
            messages.pop()
            say(f"{error}; give a shorter message, or chat with a larger context=")
            continue
        try:
            for piece in printed(engine, number):
                said += piece
        except KeyboardInterrupt:
            say("(stopped)")
        messages.append({"role": "assistant", "content": said})
