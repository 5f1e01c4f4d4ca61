"""Conversations: read from the rows of a file, and to tokens with what each token is part of.

A row has `messages` (of role and content), `conversations` (of from and value), or `prompt` and `completion` (texts, or
messages); `tools` and, beside `conversations`, `system` where they are there. Messages go to the template as they are,
reasoning_content and tool_calls in them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from typing import Any

import numpy as np

from ...models.errors import InputError
from ...models.generate.chat import (
    REASONING,
    ChatTemplate,
    Message,
    NoTemplate,
    checked_message,
    checked_tools,
    unpacked_json,
)
from ...models.generate.spans import ASSISTANT, Span, assistant_rendering
from ...models.tokenizer import Tokenizer
from .notes import Notes
from .pieces import Tokens, whole_tokens

TEXT, PROMPT, ANSWER, THOUGHT = range(4)  # what a token is part of
PARTS = ("text", "prompt", "answer", "thought")
KIND, EXCHANGE, HEAD = 3, 16, 32  # bits: the part; an exchange begins; the token stands before every exchange
ROLES = {
    "human": "user", "user": "user", "gpt": ASSISTANT, "assistant": ASSISTANT, "chatgpt": ASSISTANT, "bing": ASSISTANT,
    "bard": ASSISTANT, "model": ASSISTANT, "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
OPENED = "<think>"
THINKING = re.compile(r"<think>.*?</think>", re.S)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages, the tools that were at hand, and where they stand."""

    messages: tuple[Message, ...]
    where: str
    tools: tuple[Any, ...] | None = None

    @property
    def text(self) -> str:
        """What is said, as plain text."""
        return "\n".join(str(message.get("content") or "") for message in self.messages)

    @property
    def has_thoughts(self) -> bool:
        return any(thoughts(message) for message in self.messages)

    def without_thoughts(self) -> Conversation:
        return dataclasses.replace(self, messages=tuple(without_thought(message) for message in self.messages))


def thoughts(message: Message) -> bool:
    content = message.get("content")
    named = any(message.get(name) for name in REASONING)
    return message["role"] == ASSISTANT and (named or (isinstance(content, str) and bool(THINKING.search(content))))


def without_thought(message: Message) -> Message:
    if message["role"] != ASSISTANT:
        return message
    kept = {name: value for name, value in message.items() if name not in REASONING}
    if isinstance(content := kept.get("content"), str):
        kept["content"] = THINKING.sub("", content).lstrip() if THINKING.search(content) else content
    return kept


def read_conversation(record: dict[str, Any], where: str) -> Conversation | None:
    """The conversation of a record; None where its messages are null. Raises InputError."""
    name = next((name for name in ("messages", "conversations") if name in record), "")
    if name:
        turns = unpacked_json(record[name], f"data: {where}: {name}")
        if turns is None:
            return None
        if not isinstance(turns, list):
            raise InputError(f"data: {where}: {name} is no list of messages")
    else:
        if record["prompt"] is None or record["completion"] is None:
            return None
        turns = [*spoken(record["prompt"], "user", where), *spoken(record["completion"], ASSISTANT, where)]
    if not turns:
        raise InputError(f"data: {where} is an empty conversation; leave it out")
    messages = [read_message(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, 1)]
    if isinstance(system := record.get("system"), str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    tools = checked_tools(record.get("tools"), f"data: {where}")
    return Conversation(tuple(messages), where, tuple(tools) if tools else None)


def spoken(value: Any, role: str, where: str) -> list[Any]:
    """A prompt or a completion as messages. Raises InputError."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return value
    raise InputError(f"data: {where}: prompt and completion are texts, or lists of messages")


def read_message(turn: Any, where: str) -> Message:
    """Raises InputError where it is no message, or more than text is in it."""
    if isinstance(turn, dict) and "from" in turn and "role" not in turn:
        role = ROLES.get(str(turn["from"]).lower())
        if role is None:
            raise InputError(f"data: {where} is from {turn['from']!r}; known: {', '.join(ROLES)}")
        others = {name: value for name, value in turn.items() if name not in ("from", "value")}
        turn = {"role": role, "content": turn.get("value"), **others}
    return checked_message(turn, f"data: {where}")


def drawn(name: str, share: float) -> bool:
    """Whether a conversation falls in a share of all, by the sha256 of its name."""
    number = int(hashlib.sha256(f"reasoning {name}".encode()).hexdigest()[:12], 16)
    return number < share * 16**12


class Renderer:
    """Conversations to tokens by a folder's tokenizer and template. `reasoning_share` of the conversations that have
    thoughts keep them and are told to think, the others are told not to; None leaves all as they are."""

    def __init__(self, tokenizer: Tokenizer, reasoning_share: float | None) -> None:
        self.tokenizer, self.share = tokenizer, reasoning_share
        names = map(tokenizer.backend.id_to_token, sorted(tokenizer.special_ids))
        self.ends = tuple(name for name in names if name is not None)

    @functools.cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer.folder)

    def reasoning(self, name: str, conversation: Conversation) -> bool | None:
        if self.share is None:
            return None
        return conversation.has_thoughts and drawn(name, self.share)

    def tokens(
        self, conversation: Conversation, reasoning: bool | None, notes: Notes | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids (int32), those of transformers' apply_chat_template, and what each is part of (uint8). Raises
        InputError, with the turn."""
        if reasoning is False:
            conversation = conversation.without_thoughts()
        where, tools = conversation.where, None if conversation.tools is None else list(conversation.tools)
        try:
            template = self.template
        except NoTemplate:
            raise InputError(
                f"data: {where} is a conversation, and {self.tokenizer.folder} has no chat template; take an aligned"
                " model's folder, or read its texts as plain ones with data.columns=[...]"
            ) from None
        except InputError as error:
            raise InputError(f"data: {where} is a conversation: {error}") from None
        try:
            whole = assistant_rendering(
                template, conversation.messages, reasoning=reasoning, tools=tools, ends=self.ends
            )
        except InputError as error:
            raise InputError(f"data: {where}, {error}") from None
        if notes is not None and reasoning is not None and not template.knows_reasoning:
            notes.add("conversations are told nothing of thinking: the template has no word for it", where)
        tokens = whole_tokens(whole.text, self.tokenizer.backend)
        parts = np.full(len(tokens.ids), PROMPT, np.uint8)
        for begin, end in whole.spans:
            if not mark(parts, tokens, (begin, end), ANSWER):
                break
            for match in THINKING.finditer(whole.text, thinking_from(whole.text, begin), end):
                mark(parts, tokens, (max(begin, match.start()), match.end()), THOUGHT)
        if notes is not None and conversation.has_thoughts and not (parts == THOUGHT).any():
            notes.add("conversations have thoughts that the template leaves out, or writes without <think>", where)
        self.mark_exchanges(parts, tokens, conversation, whole.text, reasoning)
        return tokens.ids, parts

    def mark_exchanges(
        self, parts: np.ndarray, tokens: Tokens, conversation: Conversation, whole: str, reasoning: bool | None
    ) -> None:
        """Marks where an exchange begins, and what stands before all of them, so that a conversation can be split: only
        where the parts are rendered as the template renders them alone."""
        messages, tools = conversation.messages, None if conversation.tools is None else list(conversation.tools)
        system = messages[:1] if messages[0]["role"] == "system" else ()
        bounds = [number for number, message in enumerate(messages)
                  if message["role"] == "user" and number > len(system)]  # fmt: skip
        wanted = ((part, False) for bound in bounds for part in (messages[:bound], (*system, *messages[bound:])))
        rendered = self.template.renderings(wanted, reasoning, tools)
        heads: list[int] = []
        for before, after in zip(rendered, rendered, strict=True):
            place = len(before.text)
            head = len(after.text) - (len(whole) - place)
            if before.wrong or after.wrong or head < 0 or (heads and heads[0] != head):
                continue
            if whole.startswith(before.text) and after.text == whole[:head] + whole[place:]:
                first, last = tokens.at(place), tokens.at(head)
                if first is None or last is None or tokens.begins[first] != place:
                    continue
                if tokens.begins[last] == head:
                    heads.append(head)
                    parts[first] |= EXCHANGE
                    parts[:last] |= HEAD


def thinking_from(text: str, begin: int) -> int:
    """Where to look for the thoughts of an answer that begins there: at a `<think>` before it, where the header of the
    answer ends with one."""
    header = text[:begin].rstrip()
    return len(header) - len(OPENED) if header.endswith(OPENED) else begin


def mark(parts: np.ndarray, tokens: Tokens, span: Span, kind: int) -> bool:
    """Marks the tokens of a span of characters, as transformers does; False where there are none any more."""
    first, last = tokens.at(span[0]), tokens.at(span[1] - 1)
    if first is None:
        return False
    parts[first : last + 1 if last else len(parts)] = kind
    return True
