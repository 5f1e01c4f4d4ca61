"""Chat templates: messages to a prompt, by the Jinja template of a checkpoint folder, in a sandbox.

Templates find what transformers gives them: trimmed blocks, `raise_exception`, `strftime_now`, a `tojson` that leaves
letters as they are, loop controls, the special tokens, `add_generation_prompt` and `enable_thinking`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..tokenizer import tokenizer_settings

Message = Mapping[str, str]
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTemplate:
    """A folder's template. Raises InputError where there is none, or it is no Jinja."""

    def __init__(self, folder: Path) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.folder = folder
        source, self.special = read_template(folder)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = as_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self.template = environment.from_string(source)
        except TemplateError as error:
            raise InputError(f"{folder}: the chat template cannot be read: {error}") from None

    def render(self, messages: Sequence[Message], reasoning: bool | None = None) -> str:
        """The prompt that ends where the assistant begins. `reasoning` adds "/think" or "/no_think" to the system
        message, as Nemotron-Nano-9B-v2 has it, and sets `enable_thinking`, as Qwen3 has it.

        Raises InputError, in one line, for whatever the template raises.
        """
        variables: dict[str, Any] = dict(self.special)
        if reasoning is not None:
            messages, variables["enable_thinking"] = with_reasoning(messages, reasoning), reasoning
        try:
            return self.template.render(
                messages=[dict(message) for message in messages], add_generation_prompt=True, **variables
            )
        except InputError:
            raise
        except Exception as error:  # a template is a program of someone else's, and may raise anything
            raise InputError(
                f"{self.folder}: the chat template fails: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from None


def with_reasoning(messages: Sequence[Message], reasoning: bool) -> list[Message]:
    """Messages whose system message, the first, says whether to think."""
    word = "/think" if reasoning else "/no_think"
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n{word}"}, *messages[1:]]
    return [{"role": "system", "content": word}, *messages]


def refuse(message: str) -> None:
    raise InputError(f"the chat template refuses: {message}")


def as_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def read_template(folder: Path) -> tuple[str, dict[str, str]]:
    """A folder's template and special tokens, from chat_template.jinja or tokenizer_config.json."""
    settings = tokenizer_settings(folder)
    special = {name: settings[name] for name in SPECIAL if isinstance(settings.get(name), str)}
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8"), special
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise InputError(f"{folder} has no chat template; leave out chat=true, or take an aligned model's folder")
    return template, special
