"""Which part of a rendered conversation is the assistant's: {% generation %} blocks say it, or renderings of the first
messages alone, cut where an answer begins and where it ends.

A turn's beginning is where the text of the messages before it, with the header of an answer, departs from the text with
the turn; its end is that text's end. Where a template rewrites what came before (Qwen3 drops the thoughts of earlier
turns), the turn is looked for by its content: what changes with it is it, and around it stands what stood there when
it was the last. White space after the token that ends an answer is the template's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import InputError
from .chat import ChatTemplate, Message, Rendering

ASSISTANT = "assistant"
MARK = "\ue000"  # of the private use area: no text has it

Span = tuple[int, int]


def assistant_rendering(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    reasoning: bool | None = None,
    tools: Any = None,
    ends: Sequence[str] = (),
) -> Rendering:
    """A conversation's text and the assistant's spans of characters in it. `ends`: the special tokens' texts.

    Raises InputError, beginning with "turn N", where the template refuses the conversation, or writes a turn so that
    it cannot be told from the rest.
    """
    turns = [number for number, message in enumerate(messages) if message.get("role") == ASSISTANT]
    marked = template.has_blocks(tools)

    def wanted() -> Iterator[tuple[Sequence[Message], bool]]:
        yield messages, False
        for turn in () if marked else turns:
            yield from ((messages[:turn], True), (messages[: turn + 1], False))

    rendered = template.renderings(wanted(), reasoning, tools)
    whole = next(rendered)
    if whole.wrong is not None:
        raise InputError(f"turn {wrong_turn(template, messages, reasoning, tools)}: {whole.wrong}")
    if marked:
        return whole
    spans = []
    for turn, before, after in zip(turns, rendered, rendered, strict=True):
        span = strict_span(whole.text, before, after)
        if span is None:
            span = span_by_content(template, messages, turn, (whole, before, after), reasoning, tools)
        begin, end = span
        if begin < (end := trimmed(whole.text, begin, end, ends)):
            spans.append((begin, end))
    return Rendering(whole.text, tuple(spans))


def wrong_turn(template: ChatTemplate, messages: Sequence[Message], reasoning: bool | None, tools: Any) -> int:
    """The first message with which a conversation is refused, counted from 1."""
    parts = ((messages[:count], False) for count in range(1, len(messages) + 1))
    wrong = [rendering.wrong is not None for rendering in template.renderings(parts, reasoning, tools)]
    # A refusal that a longer beginning does not meet (no user message yet) is not the one looked for.
    return max((count for count in range(1, len(wrong) + 1) if count == 1 or not wrong[count - 2]), default=1)


def common(*texts: str) -> int:
    """How many characters the texts begin with together."""
    return len(os.path.commonprefix(texts))  # noqa: RUF071 - texts, and not paths


def strict_span(whole: str, before: Rendering, after: Rendering) -> Span | None:
    """Where the whole begins with the text of the messages up to the turn, and that with the header of an answer; None
    where they do not."""
    if before.wrong is not None or after.wrong is not None:
        return None
    if not (whole.startswith(after.text) and after.text.startswith(before.text)):
        return None
    return len(before.text), len(after.text)


def span_by_content(
    template: ChatTemplate, messages: Sequence[Message], turn: int, texts: tuple[Rendering, Rendering, Rendering],
    reasoning: bool | None, tools: Any,
) -> Span:  # fmt: skip
    """Where a turn is in a text that was rewritten after it. Raises InputError."""
    whole, before, after = texts
    changed = [*messages[:turn], {**messages[turn], "content": MARK}, *messages[turn + 1 :]]
    other, other_after = template.renderings([(changed, False), (changed[: turn + 1], False)], reasoning, tools)
    if after.wrong or other.wrong or other_after.wrong or other.text.count(MARK) != 1:
        raise InputError(
            f"turn {turn + 1}: the chat template does not show which tokens are the assistant's; give it"
            " {% generation %} blocks"
        )
    begin, end = differing(whole.text, other.text)
    first, last = differing(after.text, other_after.text)
    start = first if before.wrong else min(common(before.text, after.text), first)
    lead, tail = after.text[start:first], after.text[last:]
    if lead and whole.text[:begin].endswith(lead):
        begin -= len(lead)
    return begin, end + common(whole.text[end:], tail)


def differing(text: str, marked: str) -> Span:
    """What stands in a text where another one has the mark."""
    place = marked.index(MARK)
    return place, len(text) - (len(marked) - place - 1)


def trimmed(text: str, begin: int, end: int, ends: Sequence[str]) -> int:
    """The end of a turn: without the white space that follows a special token."""
    kept = text[begin:end].rstrip()
    return begin + len(kept) if kept.endswith(tuple(ends)) and ends else end
