"""Retrieval at any length: a fact somewhere in held-out text, and a question at its end. In the spirit of RULER (arXiv
2404.06654), in a form that needs no instruction: lines `key = value` among other text, and `key =` again.

needle: one fact. multi-key: eight facts, a question for one. variables: a value handed on by three more names, a
question for the last. A probe is answered where every token of the value is the model's argmax, which is what greedy
text would give; the nats of the value's tokens say how near a miss was. Shapes: [T] tokens of a probe.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ...models.errors import InputError
from ...models.hybrid import HybridLM
from ...models.placement import placed
from ...models.tokenizer import Tokenizer
from ..text.packing import Corpus
from .statistics import Estimate, resampled

KINDS = ("needle", "multi-key", "variables")
KEYS, CHAIN = 8, 4  # facts of a multi-key probe; names of a variable's chain


@dataclasses.dataclass(frozen=True)
class Probe:
    """Tokens [T] that end with an answer of `answer` tokens."""

    ids: Tensor
    answer: int


@dataclasses.dataclass(frozen=True)
class Retrieved:
    """Of the probes of one kind and length: the share answered, and the nats of an answer, all its tokens together."""

    answered: Estimate
    nats: Estimate


def check_probes(kinds: Sequence[str], lengths: Sequence[int], longest: int) -> None:
    """Raises InputError for kinds that do not exist, and lengths beyond the model's."""
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"probes: {kind!r} is unknown; known: {', '.join(KINDS)}")
    for length in lengths if kinds else ():
        if not 1 <= length <= longest:
            raise InputError(f"probes: {length} tokens; the models take 1 to {longest:,}")


def make_probe(kind: str, length: int, corpus: Corpus, tokenizer: Tokenizer, draw: np.random.Generator) -> Probe:
    """A probe of exactly `length` tokens, which begins as texts do; the text between the facts is the corpus's, from a
    drawn token on.

    Raises InputError where the facts alone are longer, or the corpus is too short to fill in."""
    count = {"needle": 1, "multi-key": KEYS, "variables": CHAIN}[kind]
    names = [made_up_word(draw) for _ in range(count)]
    values = [str(draw.integers(10_000, 100_000)) for _ in names]
    question_of = int(draw.integers(count)) if kind == "multi-key" else count - 1
    if kind == "variables":
        values = [values[0], *names[:-1]]
    lines = [encoded_within(f"\n{key} = {value}\n", tokenizer) for key, value in zip(names, values, strict=True)]
    question, answer = question_and_answer(
        names[question_of], values[0] if kind == "variables" else values[question_of], tokenizer
    )
    size = length - len(tokenizer.begin) - sum(map(len, lines)) - len(question) - len(answer)
    if size < 0:
        raise InputError(f"probes: {kind} of {length} tokens leaves {size} for other text; give another length")
    filler = text_from(corpus, int(draw.integers(corpus.tokens)), size, tokenizer)
    if len(filler) < size:
        raise InputError(
            f"probes: {kind} of {length} tokens leaves {size} for other text, of which the data has {len(filler)};"
            " give another length, or more data"
        )
    ids = [*tokenizer.begin]
    before = 0
    for place, line in zip(sorted(draw.integers(0, size + 1, count).tolist()), lines, strict=True):
        ids += filler[before:place] + line
        before = place
    ids += filler[before:] + question + answer
    assert len(ids) == length
    return Probe(torch.tensor(ids), len(answer))


def question_and_answer(key: str, value: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens of a line `key = value` up to where those of `key =` alone end or differ, and the others: together
    they are spelled as the fact is, also where a token begins with the equals sign's space, or has both of its spaces.

    Raises InputError where the tokenizer has no tokens for the value."""
    alone, whole = (encoded_within(text, tokenizer) for text in (f"\n{key} =", f"\n{key} = {value}"))
    common = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(alone, whole, strict=False))))
    if common == len(whole):
        raise InputError(f"probes: the tokenizer of {tokenizer.folder} has no tokens for {value!r}; leave probes out")
    return whole[:common], whole[common:]


def encoded_within(text: str, tokenizer: Tokenizer) -> list[int]:
    """A text's tokens where another text is before it: at a text's very beginning many tokenizers add a space. They are
    those that follow a letter's, or another character's where that makes one token with what follows."""
    for character in "a0.":
        before, whole = tokenizer.encode(character), tokenizer.encode(character + text)
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return tokenizer.encode(text)


def text_from(corpus: Corpus, begin: int, size: int, tokenizer: Tokenizer) -> list[int]:
    """`size` tokens from one on, documents' beginnings and ends left out; the first document follows on the last. All
    there are where they are fewer. No more is read at a time than is wanted."""
    ids: list[int] = []
    left = corpus.tokens
    while left and len(ids) < size:
        part = corpus.ids[begin : begin + min(left, size)]
        ids += part[~np.isin(part, [*tokenizer.begin, tokenizer.eos_token_id])].tolist()
        left, begin = left - len(part), (begin + len(part)) % corpus.tokens
    return ids[:size]


def made_up_word(draw: np.random.Generator) -> str:
    """A made-up word of three syllables."""
    return "".join("bdfgklmnprstvz"[draw.integers(14)] + "aeiou"[draw.integers(5)] for _ in range(3))


@torch.no_grad()
def retrieve(
    models: Mapping[str, HybridLM],
    probes: Sequence[Probe],
    *,
    resamples: int,
    seed: int,
    device: torch.device | None = None,
) -> dict[str, Retrieved]:
    """How every model answers the probes, on a `device` where one is given; intervals over probes. Only the answer's
    places meet the head."""
    results = {}
    for name, model in models.items():
        answered, nats = np.zeros(len(probes)), np.zeros(len(probes))
        with placed(model, device):
            for number, probe in enumerate(probes):
                ids = probe.ids.to(model.head_weight.device)
                hidden = model.hidden_states(ids[None, :-1])[0, -probe.answer :]
                logs = torch.log_softmax((hidden @ model.head_weight.T).float(), -1)
                wanted = ids[-probe.answer :]
                answered[number] = bool((logs.argmax(-1) == wanted).all())
                nats[number] = -float(logs.gather(1, wanted[:, None]).sum())
        drawn = resampled({"answered": answered, "nats": nats, "probes": np.ones(len(probes))}, resamples, seed)
        results[name] = Retrieved(*(drawn[key].over(drawn["probes"]).estimate() for key in ("answered", "nats")))
    return results
