"""Text as it comes, token by token: whole characters, held back where a stop string may have begun."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InputError
from ..tokenizer import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of bytes that are no character, or not yet


class TextStream:
    """Pieces of text out of tokens; together they are what the tokenizer makes of all tokens at once, special ones left
    out, up to the first stop string. `stopped` says that one has come.

    Raises InputError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise InputError("generate: a stop string is empty; leave it out")
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids: list[int] = []
        # Decoding starts at `begin`, behind which `read` tokens' text is out: a decoder may treat the first token of
        # all in its own way, so that the window never starts with a new one.
        self.begin, self.read, self.shown = 0, 0, 0
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be shown after one more token."""
        self.ids.append(token)
        text = self.decode(self.begin)
        whole = text.rstrip(BROKEN)
        piece = whole[self.shown :]
        self.shown = max(self.shown, len(whole))
        if whole == text:
            self.begin, self.read = self.read, len(self.ids)
            self.shown = len(self.decode(self.begin))
        return self.release(piece)

    def finish(self) -> str:
        """What was held back, when no token follows."""
        piece = self.release(self.decode(self.begin)[self.shown :])
        rest, self.held = self.held, ""
        return piece if self.stopped else piece + rest

    def decode(self, begin: int) -> str:
        return self.tokenizer.decode(self.ids[begin:], skip_special_tokens=True)

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


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
