"""Texts to token ids in bounded memory: a long text goes through the tokenizer in pieces and gives the whole's ids.

A piece begins where its predecessor has the begin of a word (what the pre-tokenizer gives, which merges do not cross)
and reaches beyond it by OVERLAP characters at least, so that a word's end is seen by both. The two are joined at the
first word after which SAME tokens agree: what a tokenizer does at the begin of a text alone, such as a space put
before it, lies before that. A word longer than LONGEST characters is cut where a token begins.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from ...models.backend import guarded_as
from ...models.tokenizer import Tokenizer

PIECE, OVERLAP, LONGEST = 2**18, 2**13, 2**21  # characters
SAME = 24  # tokens
AT_ONCE, AT_ONCE_CHARACTERS = 256, 2**20  # texts that go to the tokenizer together: it takes some 200 bytes a character


class Tokens(NamedTuple):
    """Ids of a piece, where in the text each begins and ends, and whether a word begins with it; all [tokens]."""

    ids: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    words: np.ndarray

    def rest(self, first: int) -> Tokens:
        return Tokens(*(column[first:] for column in self))

    def before(self, end: int) -> Tokens:
        return Tokens(*(column[:end] for column in self))

    def at(self, place: int) -> int | None:
        """The number of the first token of the character at a place of the text; None where it has none."""
        number = int(np.searchsorted(self.ends, place, "right"))
        return number if number < len(self.ids) and self.begins[number] <= place else None


def encoded_texts(
    texts: Iterable[str], tokenizer: Tokenizer, special_tokens: bool = False
) -> Iterator[tuple[np.ndarray, bool]]:
    """The ids of each text (int32), those of a long one in several arrays, and whether the text ends with them; without
    special tokens added: those that the text spells are text, unless `special_tokens`. Some hundred texts go to the
    tokenizer at once, which works on all processors (RAYON_NUM_THREADS)."""
    backend = tokenizer.backend if special_tokens else literal_backend(tokenizer.backend)
    waiting: list[str] = []
    characters = 0
    for text in texts:
        if len(text) > PIECE or len(waiting) == AT_ONCE or characters >= AT_ONCE_CHARACTERS:
            yield from at_once(waiting, backend)
            waiting, characters = [], 0
        if len(text) > PIECE:
            yield from ((part.ids, False) for part in joined_pieces(text, backend))
            yield np.empty(0, np.int32), True
        else:
            waiting.append(text)
            characters += len(text)
    yield from at_once(waiting, backend)


def at_once(texts: Sequence[str], backend: tokenizers.Tokenizer) -> Iterator[tuple[np.ndarray, bool]]:
    for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False):
        yield np.array(encoding.ids, dtype=np.int32), True


@functools.lru_cache(maxsize=4)
def literal_backend(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer to which "</s>" in a text is four letters like others, and not the end of the text."""
    literal = tokenizers.Tokenizer.from_str(backend.to_str())
    literal.encode_special_tokens = True
    return guarded_as(literal, backend)


def whole_tokens(text: str, backend: tokenizers.Tokenizer) -> Tokens:
    """The tokens of a text of any length, all of them together."""
    return Tokens(*map(np.concatenate, zip(*joined_pieces(text, backend), strict=True)))


def joined_pieces(text: str, backend: tokenizers.Tokenizer) -> Iterator[Tokens]:
    """The tokens of a text of any length, one stretch of it after the other; together they are those of the whole."""
    is_first, begin, size, piece = True, 0, PIECE, tokens_of(text, 0, PIECE, backend)
    while begin + size < len(text):
        joined = joined_piece(text, piece, begin + size, backend)
        if joined is None and size < LONGEST:  # a word of that length, or a tokenizer of long memory
            size = 2 * size
            longer = tokens_of(text, begin, size, backend)
            # Of the first tokens, which the join with the piece before has left out, there are none in a longer one.
            piece = longer if is_first else longer.rest(int(np.searchsorted(longer.begins, piece.begins[0])))
            continue
        if joined is None:
            cut = max(int(np.searchsorted(piece.begins, begin + size - OVERLAP, "right")) - 1, 1)
            joined = cut, int(piece.begins[cut]), tokens_of(text, int(piece.begins[cut]), PIECE, backend)
        cut, begin, following = joined
        yield piece.before(cut)
        piece, size, is_first = following, PIECE, False
    yield piece


def joined_piece(text: str, piece: Tokens, end: int, backend: tokenizers.Tokenizer) -> tuple[int, int, Tokens] | None:
    """The tokens that a piece, which ends at `end`, has before the next, where that begins, and its own from there on;
    None where the two cannot be joined."""
    overlap, cut = OVERLAP, 0
    while overlap < (end - int(piece.begins[0])):
        before, cut = cut, last_word(piece, end - overlap)
        if cut and cut != before:
            begin = int(piece.begins[cut])
            following = tokens_of(text, begin, PIECE, backend)
            if (pair := joint(piece.rest(cut), following)) is not None:
                return cut + pair[0], begin, following.rest(pair[1])
        overlap *= 4
    return None


def tokens_of(text: str, begin: int, size: int, backend: tokenizers.Tokenizer) -> Tokens:
    part = text[begin : begin + size]
    encoding = backend.encode(part, add_special_tokens=False)
    ids = np.array(encoding.ids, dtype=np.int32)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    numbers = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
    words = np.ones(len(ids), dtype=bool)
    if len(ids) and (numbers == numbers[0]).all():  # no pre-tokenizer: a word begins with a space
        after = offsets[:, 0].tolist()
        words[:] = [place > 0 and part[place] == " " != part[place - 1] for place in after]
    else:
        words[1:] = (numbers[1:] != numbers[:-1]) | (numbers[1:] < 0)
    return Tokens(ids, offsets[:, 0] + begin, offsets[:, 1] + begin, words)


def last_word(piece: Tokens, limit: int) -> int:
    """The number of the last token, but for the first, with which a word begins at `limit` or before; 0: there is
    none."""
    numbers = np.flatnonzero(piece.words & (piece.begins <= limit))
    return int(numbers[-1]) if len(numbers) else 0


def joint(old: Tokens, new: Tokens) -> tuple[int, int] | None:
    """The numbers of a token in both, with which a word begins and from which on SAME tokens are the same."""
    i = j = 0
    word: tuple[int, int] | None = None
    while i < len(old.ids) and j < len(new.ids):
        if old.begins[i] == new.begins[j] and old.ends[i] == new.ends[j] and old.ids[i] == new.ids[j]:
            if word is None and (old.words[i] or i == 0) and (new.words[j] or j == 0):
                word = i, j
            i, j = i + 1, j + 1
            if word is not None and i - word[0] >= SAME:
                return word
            continue
        word = None
        if (old.ends[i], old.begins[i]) <= (new.ends[j], new.begins[j]):
            i += 1
        else:
            j += 1
    return None
