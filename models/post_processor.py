"""What a tokenizer adds to a text: the post-processor of tokenizer.json.

It is said there alone. transformers (5.19 and 5.23 were tried, and vLLM reads through it) drops `add_bos_token` of
tokenizer_config.json where a folder has a tokenizer.json.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import processors

from .errors import Panicked


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
