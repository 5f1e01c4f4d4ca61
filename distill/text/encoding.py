"""Documents to tokens: a text as `<s> ... </s>` where the tokenizer begins texts so, a conversation as its template has
it."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ...models.tokenizer import Tokenizer
from .conversations import TEXT, Renderer
from .pieces import encoded_texts
from .reading import Reading
from .records import Document, Notes

MODES = {True: " (reasoning on)", False: " (reasoning off)", None: ""}


class Stretch(NamedTuple):
    """Some of a document's tokens, one after another: ids (int32), what each is part of (uint8; see `conversations`),
    and whether the document ends with them. Only a long text comes in several, which memory need not hold together."""

    name: str
    ids: np.ndarray
    parts: np.ndarray
    chat: bool
    last: bool


def encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, reading: Reading | None = None, notes: Notes | None = None
) -> Iterator[Stretch]:
    """The documents in tokens, `<s> ... </s>` (`... </s>` where the tokenizer adds no bos). A conversation is as its
    template writes it, special tokens and all; its name says whether it was told to think. Raises InputError."""
    reading, notes = reading or Reading(), Notes() if notes is None else notes
    renderer = Renderer(tokenizer, reading.reasoning_share)
    for is_text, group in itertools.groupby(documents, lambda document: document.chat is None):
        if is_text:
            yield from encoded_plain(group, tokenizer, reading.special_tokens)
            continue
        for document in group:
            assert document.chat is not None
            reasoning = renderer.reasoning(document.name, document.chat)
            ids, parts = renderer.tokens(document.chat, reasoning, notes)
            yield Stretch(document.name + MODES[reasoning], ids, parts, chat=True, last=True)


def encoded_plain(documents: Iterable[Document], tokenizer: Tokenizer, special_tokens: bool) -> Iterator[Stretch]:
    waiting: collections.deque[str] = collections.deque()

    def texts() -> Iterator[str]:
        for document in documents:
            waiting.append(document.name)
            yield document.text

    begins = True
    for ids, last in encoded_texts(texts(), tokenizer, special_tokens):
        before, after = tokenizer.begin if begins else [], [tokenizer.eos_token_id] if last else []
        framed = np.concatenate((before, ids, after), dtype=np.int32, casting="unsafe")
        name = waiting.popleft() if last else waiting[0]
        yield Stretch(name, framed, np.full(len(framed), TEXT, np.uint8), chat=False, last=last)
        begins = last
