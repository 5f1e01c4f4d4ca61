"""What a token is, so that a gap can be told by kind: the domain of its document, its class, its context."""

from __future__ import annotations

import collections
import keyword
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...models.tokenizer import Tokenizer, texts_within
from ..text.encoding import MODES
from ..text.packing import Corpus

CLASSES = ("white space", "keyword", "word", "number", "quote or comment", "punctuation", "other")
KEYWORDS = frozenset(keyword.kwlist)
QUOTES = frozenset("\"'`#")
CONTEXTS = 24  # powers of two of the tokens seen: 1, 2-3, 4-7 ... 2^23 and more
DOMAINS, REST = 8, "the rest"


class TokenGroups(NamedTuple):
    """The domains' names, the domain [D] of each document of a corpus, and the class [V] of each token."""

    domains: tuple[str, ...]
    domain_of: Tensor
    class_of: Tensor


def group_tokens(text: Corpus, tokenizer: Tokenizer, vocabulary: int) -> TokenGroups:
    """The groups of a corpus's documents and of all tokens."""
    return TokenGroups(*group_documents(text.names, text.starts), token_classes(tokenizer, vocabulary))


def class_of(text: str) -> str:
    """The class of a token, from its text alone: what a word is inside of (a string, a comment) it cannot say."""
    inner = text.strip()
    if not inner:
        return "white space" if text else "other"
    if "\N{REPLACEMENT CHARACTER}" in inner:
        return "other"
    if inner in KEYWORDS:
        return "keyword"
    if any(letter.isalpha() or letter == "_" for letter in inner):
        return "word"
    if any(letter.isnumeric() for letter in inner):
        return "number"
    return "quote or comment" if QUOTES & set(inner) else "punctuation"


def token_classes(tokenizer: Tokenizer, vocabulary: int) -> Tensor:
    """The number in CLASSES of every token [V]; special tokens, pieces of characters and unused rows are "other"."""
    classes = torch.full((vocabulary,), CLASSES.index("other"))
    tokens = torch.nonzero(tokenizer.token_bytes).flatten().tolist()
    for token, text in zip(tokens, texts_within(tokenizer.backend, [[token] for token in tokens]), strict=True):
        classes[token] = CLASSES.index(class_of(text))
    return classes


def domain_of(name: str) -> str:
    """A document's domain by its name: the folder it is in, the file whose record it is, or its suffix; and whether it
    is a conversation with reasoning or without."""
    for mode in filter(None, MODES.values()):
        if name.endswith(mode):
            return domain_of(name.removesuffix(mode)) + mode
    folder, slash, rest = name.partition("/")
    if slash:
        return folder + "/"
    file, colon, number = rest.rpartition(":") if slash else name.rpartition(":")
    if colon and number.isdigit():
        return file
    _, dot, suffix = name.rpartition(".")
    return f"*.{suffix}" if dot else REST


def group_documents(names: Sequence[str], starts: np.ndarray) -> tuple[tuple[str, ...], Tensor]:
    """The largest domains by tokens, the others together, and the number of each document's [D] (a byte each): of
    documents that begin at `starts` [D + 1]. Names are read twice and not kept."""
    sizes: collections.Counter[str] = collections.Counter()
    for number, name in enumerate(names):
        sizes[domain_of(name)] += int(starts[number + 1] - starts[number])
    largest = [domain for domain, _ in sizes.most_common(DOMAINS + 1) if domain != REST]
    kept = largest if len(sizes) == len(largest) else largest[: DOMAINS - 1]
    domains = (*kept, *([REST] if len(sizes) > len(kept) else []))
    place = {domain: number for number, domain in enumerate(domains)}
    numbers = (place.get(domain_of(name), len(domains) - 1) for name in names)
    return domains, torch.from_numpy(np.fromiter(numbers, np.uint8, len(names)))


def contexts(seq_idx: Tensor) -> Tensor:
    """How many tokens of its document each token has before it in its row, itself counted: the power of two [B, T]."""
    places = torch.arange(seq_idx.shape[1]).expand_as(seq_idx)
    begins = torch.zeros_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    seen = places - torch.where(begins, places, 0).cummax(1).values + 1
    return seen.double().log2().floor().long().clamp_max(CONTEXTS - 1)


def context_name(power: int) -> str:
    """The tokens that a power of two stands for."""
    first, last = 2**power, 2 ** (power + 1) - 1
    if power == CONTEXTS - 1:
        return f"{first:,} and more"
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"
