"""`limbeck generate`: a prompt goes on, in the terminal, token by token."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.checkpoint import load_model
from ..models.errors import InputError
from ..models.generate import generate
from ..models.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from .inputs import model_folder, torch_device, torch_dtype
from .show import console


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    prompt: str
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    chat: bool
    reasoning: bool | None
    seed: int
    device: str
    dtype: str


def run(options: Options) -> None:
    folder = model_folder(options.model)
    tokenizer = load_tokenizer(folder)
    text = chat_text(folder, options.prompt, options.reasoning) if options.chat else options.prompt
    if options.reasoning is not None and not options.chat:
        raise InputError("reasoning= is part of a chat; give chat=true too")
    model = load_model(folder, torch_dtype(options.dtype), torch_device(options.device))
    check_vocabulary(tokenizer, model.config)
    stream = Stream(tokenizer)
    # A chat template spells out its own special tokens; a plain text begins like a document.
    ids = tokenizer.encode(text) if options.chat else [tokenizer.bos_token_id, *tokenizer.encode(text)]
    console.print(text if not options.chat else "", end="", markup=False, soft_wrap=True)
    generate(
        model,
        torch.tensor([ids]),
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed,
        eos_token_id=model.config.eos_token_id,
        on_token=stream,
    )
    console.print()


class Stream:
    """Prints text as soon as its bytes are whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = 0

    def __call__(self, token: Tensor) -> None:
        self.ids.append(int(token[0]))
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            console.print(text[self.shown :], end="", markup=False, soft_wrap=True)
            self.shown = len(text)


def chat_text(folder: Path, prompt: str, reasoning: bool | None) -> str:
    """The prompt in the folder's chat template, rendered in Jinja's sandbox. `reasoning` adds the system message
    "/think" or "/no_think", as Nemotron-Nano-9B-v2 has it. Raises InputError where there is no template."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    source, special = read_template(folder)
    messages: list[dict[str, str]] = []
    if reasoning is not None:
        messages.append({"role": "system", "content": "/think" if reasoning else "/no_think"})
    messages.append({"role": "user", "content": prompt})
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source).render(messages=messages, add_generation_prompt=True, **special)
    except TemplateError as error:
        raise InputError(f"{folder}: the chat template fails: {error}") from None


def refuse(message: str) -> None:
    raise InputError(f"the chat template refuses: {message}")


def read_template(folder: Path) -> tuple[str, dict[str, Any]]:
    settings: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {name: settings[name] for name in ("bos_token", "eos_token") if isinstance(settings.get(name), str)}
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8"), special
    template = settings.get("chat_template")
    if not isinstance(template, str):
        raise InputError(f"{folder} has no chat template; leave out chat=true, or take an aligned model's folder")
    return template, special
