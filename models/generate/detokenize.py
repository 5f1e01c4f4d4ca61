"""Text as it comes, token by token: whole characters, held back where a stop string may have begun."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence

import tokenizers
from tokenizers.decoders import DecodeStream

from ..backend import next_piece
from ..errors import InputError, Panicked
from ..tokenizer import Tokenizer, decoder_kinds

# Decoders to which a text's first token is another matter than the others, as no decoder at all is.
BY_PLACE = {"Strip", "Metaspace", "WordPiece"}
BEFORE = 16  # tokens of a prompt that new ones are decoded after


class TextStream:
    """Pieces of text out of tokens; together they are what the tokenizer makes of all tokens at once, special ones left
    out, up to the first stop string. `stopped` says that one has come. Where the tokens continue a `prompt`, the text
    is what they add to the prompt's: a SentencePiece decoder takes the first space of a text away.

    Raises InputError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        if not all(stop):
            raise InputError("generate: a stop string is empty; leave it out")
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.decoder = DecodeStream(skip_special_tokens=False)
        self.ids: list[int] = []
        self.waiting = 0  # tokens at the end of which nothing has come yet
        self.decoded = 0  # characters that have come out of the decoder
        for token in last_tokens(tokenizer, prompt):
            self.step(token)
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be shown after one more token."""
        return self.release(self.step(token))

    def step(self, token: int) -> str:
        if token in self.tokenizer.special_ids:
            return ""
        self.ids.append(token)
        try:
            piece = next_piece(self.decoder, self.tokenizer.backend, token) or ""
        except Panicked:
            raise
        except Exception:  # the library's: with bytes that are no text a decoder takes back what has come; begin again
            if self.waiting == len(self.ids) - 1:
                raise
            again = self.ids[-self.waiting - 1 :]
            self.decoder, self.ids, self.waiting, self.decoded = DecodeStream(skip_special_tokens=False), [], 0, 0
            return "".join(map(self.step, again))
        self.waiting = 0 if piece else self.waiting + 1
        self.decoded += len(piece)
        return piece

    def finish(self) -> str:
        """What was held back, when no token follows."""
        # The decoder keeps bytes that are no character (yet) and has no end: only all tokens at once tell their text.
        piece = self.release(self.tokenizer.decode(self.ids)[self.decoded :])
        rest, self.held = self.held, ""
        return piece if self.stopped else piece + rest

    def release(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self.held + piece
        places = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self.held = True, ""
            return text[: min(places)]
        held = max((overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held]


def last_tokens(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt that the text of those after it depends on; none where it does not, where a special
    token, and so a text of its own, lies between, or where they end within a character."""
    if not goes_by_place(tokenizer.backend):
        return []
    ids = list(itertools.takewhile(lambda token: token not in tokenizer.special_ids, reversed(prompt)))[::-1]
    for size in (BEFORE, len(ids)):  # the first of some may be in the midst of a character, that of all is not
        text = tokenizer.decode(ids[-size:])
        if "\ufffd" not in text:
            return ids[-size:]
    return [] if text.endswith("\ufffd") else ids


@functools.lru_cache(maxsize=8)
def goes_by_place(backend: tokenizers.Tokenizer) -> bool:
    """Whether a token's text depends on what is before it."""
    kinds = decoder_kinds(json.loads(backend.to_str()).get("decoder"))
    return not kinds or bool(kinds & BY_PLACE)


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
