"""A folder's tokenizer, chat template and model, and requests to it by one set of options."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from ..checkpoint import load_config
from ..config import HybridConfig
from ..device import torch_device, torch_dtype
from ..errors import InputError
from ..matmul import Multiplied
from ..named import load_checked
from ..schema import GenerationSettings, read_as
from ..served_inputs import served
from ..tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from .chat import ChatTemplate, Message
from .engine import Engine, Request
from .sampling import Sampling

SWITCH = {"on": True, "off": False, "true": True, "false": False}


@dataclasses.dataclass(frozen=True)
class WritingOptions(Multiplied):
    """How texts are written; see conf/generate.yaml."""

    chat: bool
    system: str | None
    reasoning: Any
    thinking_budget: NonNegativeInt | None
    max_new_tokens: PositiveInt
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int
    stop: tuple[str, ...]
    logprobs: bool
    batch: PositiveInt
    prefill_chunk: PositiveInt
    device: str
    dtype: str
    ssm_dtype: str

    def __post_init__(self) -> None:
        self.sampling()  # which says what is out of range

    def sampling(self, seed: int = 0) -> Sampling:
        """How tokens are drawn; `seed` counts from the options'."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.seed + seed)


class Writer:
    """A folder's tokenizer, template and model, and requests by the options."""

    def __init__(self, folder: Path, options: WritingOptions) -> None:
        self.folder, self.options = folder, options
        self.config: HybridConfig = load_config(folder)
        self.tokenizer: Tokenizer = load_tokenizer(folder)
        check_vocabulary(self.tokenizer, self.config)
        self.reasoning = switch(options.reasoning)
        if not options.chat and (self.reasoning is not None or options.system is not None):
            raise InputError("reasoning= and system= are parts of a chat; give chat=true too")
        self.template = ChatTemplate(folder) if options.chat else None
        if self.reasoning is not None and self.template is not None and not self.template.knows_reasoning:
            raise InputError(
                f"{folder}: the chat template knows neither enable_thinking nor /no_think; leave reasoning= out"
            )
        self.stop_tokens = stop_tokens(folder, self.config)
        self.request("x")  # wrong options are refused before weights are read

    def request(self, prompt: str, seed: int = 0) -> Request:
        """A request for a text, or for a user's message where one chats; `seed` counts from the options'."""
        if self.template is not None:
            return self.reply([{"role": "user", "content": prompt}], seed)
        return self.request_of(self.tokenizer.prompt(prompt), seed)

    def reply(self, messages: list[Message], seed: int = 0, tools: Any = None) -> Request:
        """A request for the assistant's next message, with `tools` at hand; a template spells out its own special
        tokens."""
        if self.template is None:
            raise InputError("messages need the folder's chat template; give chat=true")
        if self.options.system is not None and not (messages and messages[0]["role"] == "system"):
            messages = [{"role": "system", "content": self.options.system}, *messages]
        return self.request_of(self.tokenizer.encode(self.template.render(messages, self.reasoning, tools)), seed)

    def request_of(self, ids: list[int], seed: int) -> Request:
        options = self.options
        return Request(
            ids,
            options.max_new_tokens,
            options.sampling(seed),
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
            served(load_checked(self.folder, torch_dtype(options.dtype), torch_device(options.device)), self.folder),
            max_length=max_length,
            slots=slots,
            prefill_chunk=options.prefill_chunk,
            ssm_dtype=torch_dtype(options.ssm_dtype),
            tokenizer=self.tokenizer,
        )


def stop_tokens(folder: Path, config: HybridConfig) -> tuple[int, ...]:
    """The tokens that end a text: the config's, and those of generation_config.json, where aligned models name the end
    of a turn."""
    ends = [config.eos_token_id]
    path = folder / "generation_config.json"
    if path.exists():
        ends.append(read_as(GenerationSettings, path).get("eos_token_id"))
    numbers = [number for each in ends for number in (each if isinstance(each, (list, tuple)) else (each,))]
    return tuple(sorted({number for number in numbers if isinstance(number, int)}))


def switch(value: Any) -> bool | None:
    """on, off, or null."""
    if value is None or isinstance(value, bool):
        return value
    if str(value).lower() not in SWITCH:
        raise InputError(f"reasoning is {value!r}; expected on, off or null")
    return SWITCH[str(value).lower()]
