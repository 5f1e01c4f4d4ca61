"""A folder's tokenizer as a GGUF file says it: tokens with their kinds, merges, special ids, the chat template."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import HybridConfig
from ..errors import InputError
from ..generate.chat import read_template
from ..generate.writer import stop_tokens
from ..tokenizer import Tokenizer, check_vocabulary, load_tokenizer, tokenizer_settings, trained_with_bos
from .pretokenizers import pre_tokenizer

# Kinds of tokens (gguf.TokenType).
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # the keys of tokens that end a text, of which each has one


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What stands under `tokenizer.` in the file: `ggml` below tokenizer.ggml., lists and numbers, and the template;
    whether llama.cpp makes the `same_text` into the same tokens; and what it does otherwise, in sentences."""

    ggml: Mapping[str, Any]
    chat_template: str | None
    same_text: bool
    notes: tuple[str, ...]

    @property
    def pre(self) -> str:
        return str(self.ggml["pre"])


def read_vocabulary(folder: Path, config: HybridConfig, chosen: str | None = None) -> Vocabulary:
    """A byte-level BPE with every row of the model's embeddings named. Raises InputError for other tokenizers, and
    where llama.cpp would cut text otherwise (unless a pre-tokenizer was `chosen`)."""
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config)
    path = folder / "tokenizer.json"
    content = json.loads(tokenizer.backend.to_str())
    merges = merges_of(content, path)
    pre, same_cuts = pre_tokenizer(content, path, chosen)
    tokens, kinds = tokens_of(tokenizer, config.vocab_size)
    ggml = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges}
    ends = ends_of(folder, tokenizer, config)
    ids = special_ids_of(tokenizer, config, ends)
    try:
        template: str | None = read_template(folder)[0]
    except InputError:  # base models have none
        template = None
    texts = text_notes(content, pre, same_cuts)
    return Vocabulary(ggml | ids, template, not texts, (*texts, *end_notes(ends, tokens)))


def text_notes(content: Mapping[str, Any], pre: str, same_cuts: bool) -> tuple[str, ...]:
    """What llama.cpp does otherwise with a text, each with its remedy."""
    notes = []
    if content.get("normalizer") is not None:
        notes.append(
            "llama.cpp has no normalizer, this model's tokenizer has NFC: text with decomposed letters becomes other"
            " tokens there. Give it text in NFC."
        )
    if not same_cuts:
        notes.append(
            f"llama.cpp has no pre-tokenizer that cuts text as this model's: the file names `{pre}`, and some texts"
            " become other tokens there. Give it token ids where they have to be the same."
        )
    return tuple(notes)


def end_notes(ends: Sequence[int], tokens: Sequence[str]) -> tuple[str, ...]:
    """What of the tokens that end a text has no key in the file."""
    left = [f"{number} (`{tokens[number]}`)" for number in ends[len(ENDS) :]]
    if not left:
        return ()
    return (
        f"A GGUF file has places for {len(ENDS)} tokens that end a text, this model has {len(ends)}: llama.cpp does not"
        f" end at {', '.join(left)} unless it knows the name. Stop there by its text.",
    )


def merges_of(content: Mapping[str, Any], path: Path) -> list[str]:
    """The merges of a byte-level BPE, each two pieces with a space between. Raises InputError for anything else, and
    for one without any, whose file llama.cpp does not load."""
    model = content["model"]
    kind, normalizer = model["type"], content.get("normalizer")
    levels = json.dumps(content.get("pre_tokenizer"))
    if kind != "BPE" or '"ByteLevel"' not in levels:
        what = "BPE of characters" if kind == "BPE" else kind
        raise InputError(f"{path} is a tokenizer of type {what}; format=gguf takes a byte-level BPE")
    if normalizer is not None and normalizer.get("type") != "NFC":  # most text is in NFC already (`text_notes`)
        raise InputError(f"{path} has a normalizer {normalizer.get('type')}, which llama.cpp does not have")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise InputError(f"{path} has {name}={model[name]!r}, which llama.cpp does not have")
    if not model["merges"]:
        raise InputError(f"{path} has no merges, and llama.cpp loads no such vocabulary; take format=hf")
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def tokens_of(tokenizer: Tokenizer, count: int) -> tuple[list[str], list[int]]:
    """Every token's text and kind by its id; ids without one, as rows that fill up a width, are unused."""
    names = {number: text for text, number in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.backend.get_added_tokens_decoder()
    tokens, kinds = [], []
    for number in range(count):
        tokens.append(names.get(number, f"[PAD{number}]"))
        if number not in names:
            kinds.append(UNUSED)
        elif number in tokenizer.special_ids:
            kinds.append(CONTROL)
        else:
            kinds.append(USER_DEFINED if number in added else NORMAL)
    return tokens, kinds


def ends_of(folder: Path, tokenizer: Tokenizer, config: HybridConfig) -> list[int]:
    """The tokens that end a text: the tokenizer's eos, the config's in their order, those of generation_config.json; of
    no row of the embeddings none."""
    own = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    every = dict.fromkeys((tokenizer.eos_token_id, *own, *stop_tokens(folder, config)))
    return [number for number in every if number is not None and 0 <= number < config.vocab_size]


def special_ids_of(tokenizer: Tokenizer, config: HybridConfig, ends: Sequence[int]) -> dict[str, Any]:
    """The ids that begin, end and fill text; of several `ends` the further two are those of a turn and of a message,
    which end text there too; ids of no row of the embeddings are left out. (Without a bos llama.cpp takes token 11.)
    Raises InputError where the tokenizer adds what llama.cpp cannot."""
    begin, end = tokenizer.begin, tokenizer.end
    if len(begin) > 1 or end not in ([], [tokenizer.eos_token_id]):
        raise InputError(
            f"{tokenizer.folder / 'tokenizer.json'} puts tokens {begin} before a text and {end} after it; llama.cpp"
            " adds one that begins it, and eos"
        )
    first = begin[0] if begin else tokenizer.bos_token_id
    ids: dict[str, Any] = {
        "bos_token_id": config.bos_token_id if first is None else first,
        "padding_token_id": tokenizer.pad_token_id,
    } | dict(zip(ENDS, ends, strict=False))
    stated = {name: number for name, number in ids.items() if number is not None and 0 <= number < config.vocab_size}
    adds_bos = bool(begin) or trained_with_bos(tokenizer.backend, tokenizer_settings(tokenizer.folder))
    return stated | {"add_bos_token": adds_bos, "add_eos_token": bool(end)}
