"""The `tokenizers` library's tokenizer of a file: opened within bounds, its errors and panics one line of the file.

A Rust panic reaches Python as a PanicException that is no Exception, after the library has printed it.
What a tokenizer adds to a text is said by the post-processor of tokenizer.json alone: transformers (5.19 and 5.23 were
tried, and vLLM reads through it) drops `add_bos_token` of tokenizer_config.json where a folder has a tokenizer.json.
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import tokenizers
from tokenizers import models, processors
from tokenizers.decoders import DecodeStream

from .errors import InputError, Panicked
from .foreign import first_line, parse_json, read_bytes

LONGEST = 1000  # times that a normalizer or decoder may lengthen a text; published ones do not, or by a character


class GuardedTokenizer:
    """The library's tokenizer, of which every method raises InputError, naming `path`, where the library fails."""

    def __init__(self, whole: tokenizers.Tokenizer, path: Path) -> None:
        self.whole, self.path = whole, path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying looks for, before there is a `whole`
            raise AttributeError(name)
        value = getattr(self.whole, name)
        return functools.partial(self.call, value) if callable(value) else value

    def call(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return method(*arguments, **options)
        except BaseException as error:
            if is_panic(error):
                raise Panicked(f"{self.path} is no tokenizer that works: {first_line(error)}") from None
            if type(error) is Exception:  # as the library raises
                raise InputError(f"{self.path} is no tokenizer that works: {first_line(error)}") from None
            raise

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GuardedTokenizer) and self.whole is other.whole

    def __hash__(self) -> int:
        return id(self.whole)


def is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # a class of each library that is written in Rust


def guarded(whole: tokenizers.Tokenizer, path: Path) -> tokenizers.Tokenizer:
    return cast(tokenizers.Tokenizer, GuardedTokenizer(whole, path))


def guarded_as(whole: tokenizers.Tokenizer, like: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer made from another, guarded where that is."""
    return guarded(whole, like.path) if isinstance(like, GuardedTokenizer) else whole


def next_piece(stream: DecodeStream, backend: tokenizers.Tokenizer, token: int) -> str | None:
    """What a stream of the library's gives for one more token. Raises InputError as a guarded tokenizer's methods."""
    if isinstance(backend, GuardedTokenizer):
        return cast(str | None, backend.call(stream.step, backend.whole, token))
    return stream.step(backend, token)


def open_backend(path: Path) -> tokenizers.Tokenizer:
    """The library's tokenizer of a file, shared with who reads the same. Raises InputError where it is broken."""
    content = read_bytes(path)
    try:
        return guarded(read_backend(content), path)
    except InputError as error:
        raise InputError(f"{path} is no tokenizer: {error}") from None
    except BaseException as error:
        if isinstance(error, Exception) or is_panic(error):  # the library raises plain Exception
            raise InputError(f"{path} is no tokenizer: {first_line(error)}") from None
        raise


@functools.lru_cache(maxsize=8)
def read_backend(content: bytes) -> tokenizers.Tokenizer:
    """The library's tokenizer; by content, since teacher and student each bring a copy of one file and 131,072 tokens
    take 0.4 s. A file may hold how one batch was once cut and padded, and how one training left merges out by chance:
    these are not part of the vocabulary (transformers switches the first two off, too), and a text would lose its end
    to them, or be other tokens each time. Raises InputError where its size is out of proportion."""
    check_maps(content)
    backend = tokenizers.Tokenizer.from_buffer(content)
    for part in (backend.normalizer, backend.decoder):
        if (times := lengthening(state_of(part))) > LONGEST:
            raise InputError(f"its {type(part).__name__} makes a text {times:,.0f} times as long; expected {LONGEST:,}"
                             " at most")  # fmt: skip
    backend.no_truncation()
    backend.no_padding()
    if isinstance(backend.model, models.BPE):
        backend.model.dropout = None
    return backend


def check_maps(content: bytes) -> None:
    """Raises InputError where a map of characters says that it is larger than it is: the library would reserve that."""
    if b"recompiled" not in content and rb"\u" not in content:  # spelled out, or with escapes
        return
    for part in parts_of(parse_json(content.decode(), "tokenizer.json")):
        if isinstance(text := part.get("precompiled_charsmap"), str):
            try:
                stored = base64.b64decode(text, validate=True)
            except ValueError:
                raise InputError("its precompiled_charsmap is no base64") from None
            size = int.from_bytes(stored[:4], "little")  # of the trie that follows
            if not 0 < size <= len(stored) - 4:
                raise InputError(f"its precompiled_charsmap of {len(stored):,} bytes has a trie of {size:,}; expected"
                                 " one that is in it")  # fmt: skip


def parts_of(content: Any) -> Iterator[dict[str, Any]]:
    """A normalizer or decoder with those in it, or whatever a tokenizer.json has beside its vocabulary."""
    pending = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield value
            pending += [value[key] for key in ("normalizer", "normalizers", "decoders") if key in value]
        elif isinstance(value, list):
            pending += value


def lengthening(state: dict[str, Any]) -> float:
    """How many times as long as it was a text may be after a normalizer or decoder: each replacement multiplies."""
    times = 1.0
    for part in parts_of(state):
        pattern = part.get("pattern")
        least = len(pattern.get("String", "")) if isinstance(pattern, dict) else 1
        added = part.get("content") if part.get("type") == "Replace" else part.get("prepend")
        times *= max(1.0, len(added) / max(least, 1)) if isinstance(added, str) else 1.0
    return times


def state_of(part: Any) -> dict[str, Any]:
    """A part of the library's tokenizer as tokenizer.json has it; empty for None."""
    return {} if part is None else dict(json.loads(part.__getstate__()))


def added_ids(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after one text, found on a text: post-processors may be several, and
    then what one adds is a further text to the next."""
    if backend.num_special_tokens_to_add(is_pair=False) == 0:
        return [], []
    for text in ("a", *backend.get_vocab()):
        try:
            plain, whole = (backend.encode(text, add_special_tokens=adds).ids for adds in (False, True))
        except Panicked:
            raise
        except Exception:  # the library's; a vocabulary of words may have no answer to others
            continue
        for place in range(len(whole) if plain else 0):
            if whole[place : place + len(plain)] == plain:
                return whole[:place], whole[place + len(plain) :]
    return [], []


def begins_with(token: str, number: int) -> processors.TemplateProcessing:
    """The post-processor that puts a token before a text, and before each of two (as Llama's)."""
    return processors.TemplateProcessing(
        single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1", special_tokens=[(token, number)]
    )


def put_before(backend: tokenizers.Tokenizer, token: str) -> None:
    """Has a tokenizer begin texts with a token of its vocabulary."""
    number = backend.token_to_id(token)
    assert number is not None, token
    backend.post_processor = begins_with(token, number)
