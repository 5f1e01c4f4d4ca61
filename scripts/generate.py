"""`limbeck generate`: a prompt goes on in the terminal, token by token; a file of prompts becomes a file of answers; or
one talks with the model, in its folder's chat template."""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..models.checkpoint import load_config, load_model
from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.generate.chat import ChatTemplate, Message
from ..models.generate.engine import Engine, Request
from ..models.generate.sampling import Sampling
from ..models.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from .answers import answer_file
from .run.resolve import model_folder, torch_device, torch_dtype
from .run.show import console, say

SWITCH = {"on": True, "off": False, "true": True, "false": False}


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    prompt: str
    prompts: Path | None
    output: Path | None
    chat: bool
    system: str | None
    reasoning: Any
    thinking_budget: int | None
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int
    stop: tuple[str, ...]
    logprobs: bool
    batch: int
    context: int
    prefill_chunk: int
    device: str
    dtype: str
    ssm_dtype: str


def run(options: Options) -> None:
    if options.prompt and options.prompts is not None:
        raise InputError("prompt= and prompts= are both given; give one of them")
    if not (options.prompt or options.prompts is not None or options.chat):
        raise InputError("prompt is missing; give prompt=TEXT, prompts=FILE, or chat=true to talk in the terminal")
    if (options.output is None) != (options.prompts is None):
        raise InputError("output= is the file of answers to prompts=FILE; give both or neither")
    folder = model_folder(options.model)
    writer = Writer(folder, options)
    if options.prompts is not None:
        answer_file(writer, options.prompts, options.output, options.batch)  # type: ignore[arg-type]
    elif options.prompt:
        console.print("" if options.chat else options.prompt, end="", markup=False, soft_wrap=True)
        request = writer.request(options.prompt)
        for _ in show(writer.engine(len(request.prompt) + options.max_new_tokens, 1), request):
            pass
    else:
        talk(writer, options)


class Writer:
    """A folder's tokenizer, template and model, and requests by the options."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder, self.options = folder, options
        self.config: HybridConfig = load_config(folder)
        self.tokenizer: Tokenizer = load_tokenizer(folder)
        check_vocabulary(self.tokenizer, self.config)
        self.reasoning = switch(options.reasoning)
        if not options.chat and (self.reasoning is not None or options.system is not None):
            raise InputError("reasoning= and system= are parts of a chat; give chat=true too")
        self.template = ChatTemplate(folder) if options.chat else None
        self.stop_tokens = stop_tokens(folder, self.config)
        for name in ("batch", "max_new_tokens", "context", "prefill_chunk"):
            if getattr(options, name) < 1:
                raise InputError(f"{name} is {getattr(options, name)}; expected at least 1")
        self.request("x")  # wrong options are refused before weights are read

    def request(self, prompt: str, seed: int = 0) -> Request:
        """A request for a text, or for a user's message where one chats; `seed` counts from the options'."""
        if self.template is not None:
            return self.reply([{"role": "user", "content": prompt}], seed)
        return self.asked([self.tokenizer.bos_token_id, *self.tokenizer.encode(prompt)], seed)

    def reply(self, messages: list[Message], seed: int = 0) -> Request:
        """A request for the assistant's next message; a template spells out its own special tokens."""
        if self.template is None:
            raise InputError("messages need the folder's chat template; give chat=true")
        if self.options.system is not None and not (messages and messages[0]["role"] == "system"):
            messages = [{"role": "system", "content": self.options.system}, *messages]
        return self.asked(self.tokenizer.encode(self.template.render(messages, self.reasoning)), seed)

    def asked(self, ids: list[int], seed: int) -> Request:
        options = self.options
        sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p, options.seed + seed)
        return Request(
            ids,
            options.max_new_tokens,
            sampling,
            stop=options.stop,
            stop_tokens=self.stop_tokens,
            logprobs=options.logprobs,
            thinking_budget=options.thinking_budget,
        )

    def engine(self, max_length: int, slots: int) -> Engine:
        """Loads the model; the length is checked before."""
        longest = self.config.max_position_embeddings
        if max_length > longest:
            raise InputError(
                f"generate: prompt and new tokens ({self.options.max_new_tokens}) make {max_length}, the model's"
                f" maximum is {longest}"
            )
        options = self.options
        return Engine(
            load_model(self.folder, torch_dtype(options.dtype), torch_device(options.device)),
            max_length=max_length,
            slots=slots,
            prefill_chunk=options.prefill_chunk,
            ssm_dtype=torch_dtype(options.ssm_dtype),
            tokenizer=self.tokenizer,
        )


def stop_tokens(folder: Path, config: HybridConfig) -> tuple[int, ...]:
    """The tokens that end a text: the config's, and those of generation_config.json, where aligned models name the end
    of a turn."""
    found = [config.eos_token_id]
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id"))
        except (ValueError, AttributeError):
            raise InputError(f"{path} is no valid JSON object") from None
    numbers = [number for each in found for number in (each if isinstance(each, (list, tuple)) else (each,))]
    return tuple(sorted({number for number in numbers if isinstance(number, int)}))


def switch(value: Any) -> bool | None:
    """on, off, or null."""
    if value is None or isinstance(value, bool):
        return value
    if str(value).lower() not in SWITCH:
        raise InputError(f"reasoning is {value!r}; expected on, off or null")
    return SWITCH[str(value).lower()]


def show(engine: Engine, request: Request) -> Iterator[str]:
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
            for piece in show(engine, request):
                said += piece
        except KeyboardInterrupt:
            say("(stopped)")
        messages.append({"role": "assistant", "content": said})
