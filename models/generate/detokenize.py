"""Text as it comes, token by token: whole characters, held back where a stop string may have begun."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from ..errors import InputError
from ..tokenizer import Tokenizer


class TextStream:
    """Pieces of text out of tokens; together they are what the tokenizer makes of all tokens at once, special ones left
    out, up to the first stop string. `stopped` says that one has come.

    Raises InputError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise InputError("generate: a stop string is empty; leave it out")
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self.decoded = 0  # characters that have come out of the decoder
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be shown after one more token."""
        self.ids.append(token)
        piece = self.decoder.step(self.tokenizer.backend, token) or ""
        self.decoded += len(piece)
        return self.release(piece)

    def finish(self) -> str:
        """What was held back, when no token follows."""
        # The decoder keeps bytes that are no character (yet) and has no end: only all tokens at once tell their text.
        piece = self.release(self.tokenizer.decode(self.ids, skip_special_tokens=True)[self.decoded :])
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


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
