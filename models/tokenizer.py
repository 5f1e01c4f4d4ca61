"""Tokenizers: read from a checkpoint folder, or trained on a corpus (byte-level BPE), by the `tokenizers` library."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from .backend import added_ids, open_backend, put_before, state_of
from .checkpoint import load_config
from .config import HybridConfig
from .errors import InputError
from .folder import sync, write_json
from .foreign import LARGEST_WIDTH, SETTINGS, read_object

log = logging.getLogger("limbeck")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
# Words with the character before them, numbers by threes, a line break with the indentation that follows, symbols
# with the line break that follows: 3.8 bytes a token on Python sources with 4,096 tokens, against 3.4 with GPT-2's.
BYTE = re.compile("<0x[0-9A-F]{2}>")  # how a SentencePiece vocabulary spells a byte
PATTERN = r"[^\r\n\p{L}\p{N}_]?[\p{L}_]+|\p{N}{1,3}|[\r\n]+[ \t]*| ?[^\s\p{L}\p{N}]+[\r\n]*[ \t]*|[ \t]+(?!\S)|\s+"


class Tokenizer:
    """A folder's tokenizer.json with the ids of its special tokens (`bos_token_id` is None where it has none, as
    Qwen3's). A text begins with the ids `begin` and ends with `end`: what the post-processor adds, often nothing.
    `special_ids` are those that the file marks so and those that have a name here: to transformers both are special.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, folder: Path, bos: str | None, eos: str | None, pad: str | None
    ) -> None:
        self.backend, self.folder = backend, folder
        self.vocab_size = vocabulary_size(backend)
        self.begin, self.end = added_ids(backend)
        if (most := max([*self.begin, *self.end], default=0)) >= self.vocab_size:
            raise InputError(f"{folder / 'tokenizer.json'}: the post-processor adds token {most}, which is not there")
        self.bos_token_id = None if bos is None else self.special(bos, "bos_token")
        self.eos_token_id = self.special(eos, "eos_token")
        self.pad_token_id = self.eos_token_id if pad is None else self.special(pad, "pad_token")
        named = {number for number in (self.bos_token_id, self.eos_token_id, self.pad_token_id) if number is not None}
        marked = {number for number, whole in backend.get_added_tokens_decoder().items() if whole.special}
        self.special_ids = frozenset(named | marked)

    def framed(self, text: str) -> list[int]:
        """A text's token ids with those that the tokenizer adds: what transformers and vLLM make of it."""
        return [*self.begin, *self.encode(text), *self.end]

    def prompt(self, text: str) -> list[int]:
        """A text to be continued. Raises InputError where that is no token at all."""
        ids = self.framed(text)
        if not ids:
            raise InputError(f"the prompt is empty, and the tokenizer of {self.folder} adds nothing; give some text")
        return ids

    @property
    def token_bytes(self) -> Tensor:
        """UTF-8 bytes of text that each token stands for within a text [V], 0 for special ones; see `byte_counts`."""
        counts = byte_counts(self.backend).clone()
        counts[list(self.special_ids)] = 0
        return counts

    def special(self, text: str | None, name: str) -> int:
        number = None if text is None else self.backend.token_to_id(text)
        if number is None:
            raise InputError(f"{self.folder}: the tokenizer has no {name} ({text!r}); tokenizer_config.json names it")
        return number

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        left_out = self.special_ids if skip_special_tokens else frozenset()
        return self.backend.decode([token for token in ids if token not in left_out], skip_special_tokens=False)

    def decode_within(self, ids: Iterable[int]) -> str:
        """The text that tokens add to a text in the midst of it; see `texts_within`."""
        return texts_within(self.backend, [list(ids)])[0]


@functools.lru_cache(maxsize=8)
def vocabulary_size(backend: tokenizers.Tokenizer) -> int:
    """The largest id and one: some vocabularies leave ids out."""
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1


@functools.lru_cache(maxsize=8)
def byte_counts(backend: tokenizers.Tokenizer) -> Tensor:
    """UTF-8 bytes of text that each token stands for within a text [V]: what the decoder gives back for it, not how it
    is spelled. (`<0xE6>` of a SentencePiece vocabulary is a byte, its "\u2581" a space.)

    A byte-level vocabulary spells a byte with one character, and needs no decoding; of the others the one space that is
    taken away at the beginning of a text is counted, too.
    """
    vocabulary, added = backend.get_vocab(with_added_tokens=True), backend.get_added_tokens_decoder()
    kinds = decoder_kinds(json.loads(backend.to_str()).get("decoder"))
    counts = np.zeros(vocabulary_size(backend), np.int64)
    if "ByteLevel" in kinds:
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        for token, number in vocabulary.items():
            counts[number] = len(token) if alphabet.issuperset(token) else len(token.encode())
        for number, whole in added.items():  # these are spelled as they are
            counts[number] = len(whole.content.encode())
    else:
        numbers = list(vocabulary.values())
        counts[numbers] = [len(text.encode()) for text in texts_within(backend, [[number] for number in numbers])]
        if "ByteFallback" in kinds:
            counts[[number for token, number in vocabulary.items() if BYTE.fullmatch(token)]] = 1
    return torch.from_numpy(counts)


def texts_within(backend: tokenizers.Tokenizer, many: Sequence[Sequence[int]]) -> list[str]:
    """The text of some tokens each, special ones too, between two others: decoders take a space away at the beginning
    or at the end, and a text that begins with a space, or is nothing else, would lose it."""
    other = plain_token(backend)
    alone, twice, *texts = backend.decode_batch([[other], [other, other], *([other, *ids, other] for ids in many)],
                                                skip_special_tokens=False)  # fmt: skip
    return [text[len(alone) : len(text) - (len(twice) - len(alone))] for text in texts]


@functools.lru_cache(maxsize=8)
def plain_token(backend: tokenizers.Tokenizer) -> int:
    """A token of letters alone."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    letters = [number for token, number in vocabulary.items() if token.isalpha() and token.isascii()]
    return min(letters or vocabulary.values())


def decoder_kinds(decoder: Any) -> set[str]:
    """The types of a tokenizer.json's decoder and of those in it."""
    if not isinstance(decoder, dict):
        return set()
    return {decoder.get("type", "")}.union(*map(decoder_kinds, decoder.get("decoders") or ()))


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a checkpoint folder. Raises InputError where tokenizer.json is missing or broken."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.exists():
        raise InputError(f"{path} is missing; the folder needs its tokenizer beside the weights")
    backend = open_backend(path)
    if not 0 < vocabulary_size(backend) <= LARGEST_WIDTH:
        most = vocabulary_size(backend) - 1
        raise InputError(
            f"{path} has tokens up to number {most:,}; expected one at least, and {LARGEST_WIDTH:,} at most"
        )
    settings = tokenizer_settings(folder)

    def text(name: str, fallback: str) -> str | None:
        if name in settings and (settings[name] is not None or name == "bos_token"):  # null: it has none, and says so
            return settings[name]
        return fallback if backend.token_to_id(fallback) is not None else None

    named = text("bos_token", BOS), text("eos_token", EOS), text("pad_token", PAD)
    tokenizer = Tokenizer(backend, folder, *named)
    stated = settings.get("add_bos_token")
    if stated in (True, False) and stated != bool(tokenizer.begin):
        first = backend.decode(tokenizer.begin, skip_special_tokens=False) or "nothing"
        say_once(
            f"{folder}: tokenizer_config.json has add_bos_token {json.dumps(stated)}, tokenizer.json lets texts begin"
            f" with {first}; that counts, as it does in transformers"
        )
    elif trained_with_bos(backend, settings):
        say_once(
            f"{folder}: an earlier limbeck trained this with {BOS} before every text, which its tokenizer.json does not"
            " say; texts are read without, and limbeck export writes it there"
        )
    return tokenizer


def trained_with_bos(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> bool:
    """Whether a vocabulary is one that limbeck trained before it gave those a post-processor: it put bos before every
    text then, unless tokenizer_config.json said otherwise."""
    if backend.post_processor is not None or backend.token_to_id(BOS) is None:
        return False
    own = json.dumps(PATTERN) in json.dumps(state_of(backend.pre_tokenizer))
    return own and settings.get("bos_token", BOS) == BOS and settings.get("add_bos_token") is not False


def check_tokenizer(folder: Path) -> None:
    """Raises InputError where the folder has a tokenizer that cannot be read: known before its model is written."""
    if (folder / "tokenizer.json").is_file():
        open_backend(folder / "tokenizer.json")
        tokenizer_settings(folder)


def state_begin(folder: Path) -> None:
    """Says in a folder's tokenizer.json that texts begin with bos, where limbeck trained it so and it does not."""
    path = folder / "tokenizer.json"
    if path.is_file() and trained_with_bos(open_backend(path), tokenizer_settings(folder)):
        backend = tokenizers.Tokenizer.from_file(str(path))
        put_before(backend, BOS)
        save_backend(backend, path)


def save_backend(backend: tokenizers.Tokenizer, path: Path) -> None:
    """Writes a tokenizer.json through a temporary file."""
    temporary = path.with_name(path.name + ".partial")
    backend.save(str(temporary))
    sync(temporary)
    os.replace(temporary, path)


@functools.lru_cache(maxsize=64)
def say_once(text: str) -> None:
    log.warning(text)


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """A folder's tokenizer_config.json, special tokens as plain texts; empty where there is none. Raises InputError."""
    from .schema import TokenizerSettings, read_as

    path = folder / "tokenizer_config.json"
    if not path.exists():
        return {}
    settings = read_as(TokenizerSettings, path)
    return {
        name: value.get("content") if name.endswith("_token") and isinstance(value, dict) else value
        for name, value in settings.items()
    }


def check_vocabulary(tokenizer: Tokenizer, config: HybridConfig) -> None:
    """Raises InputError where the tokenizer knows more tokens than the model has rows for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{tokenizer.folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary only"
            f" {config.vocab_size}; they do not belong together"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Trains a byte-level BPE on texts and writes it to an existing folder; equal texts give equal files.
    Texts begin with bos."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    put_before(backend, BOS)
    # tokenizer.json comes last: where it is, both files are whole.
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
        },
    )
    save_backend(backend, folder / "tokenizer.json")
    return load_tokenizer(folder)


def check_agreement(teacher: Path, student: Path) -> list[str]:
    """Compares two checkpoint folders; answers with what is odd and may be meant.

    Raises InputError where sizes of the vocabulary, tokens or special ids of teacher and student differ, or where an
    id lies outside of the vocabulary.
    """
    configs = {path: load_config(path) for path in (teacher, student)}
    sizes = [configs[path].vocab_size for path in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"teacher and student must share a vocabulary: {teacher} has {sizes[0]} tokens, {student} {sizes[1]}"
        )
    ids = {path: special_ids(path, config.vocab_size) for path, config in configs.items()}
    for name in SPECIAL:
        taught, learned = (ids[path].get(name) for path in (teacher, student))
        if taught is not None and learned is not None and taught != learned:
            raise InputError(
                f"teacher and student must share special tokens: {name} is {listed(taught)} in"
                f" {teacher / 'config.json'} and {listed(learned)} in {student / 'config.json'}; set both alike"
            )
    tokenizer = load_tokenizer(student)
    check_vocabulary(tokenizer, configs[student])
    if (teacher / "tokenizer.json").is_file() and teacher != student:
        check_tokens(load_tokenizer(teacher), tokenizer)
    notes = begin_notes(teacher, tokenizer)
    for name in SPECIAL[:2]:
        stated, used = ids[student].get(name), getattr(tokenizer, name)
        if stated is not None and used is not None and used not in stated:
            notes.append(
                f"{student / 'config.json'} has {name} {listed(stated)}, its tokenizer {used}: training uses the"
                " tokenizer's"
            )
    return notes


def begin_notes(teacher: Path, student: Tokenizer) -> list[str]:
    """What is odd where the two begin texts with other tokens."""
    if teacher == student.folder or not (teacher / "tokenizer.json").is_file():
        return []
    begins = [load_tokenizer(teacher).begin, student.begin]
    first, second = (student.decode(begin) or "nothing" for begin in begins)
    if begins[0] == begins[1]:
        return []
    return [f"texts begin with {first} in {teacher / 'tokenizer.json'}, with {second} in the student's: training uses"
            " the student's"]  # fmt: skip


def special_ids(path: Path, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """The special ids that a config.json states. Raises InputError where one is outside of the vocabulary."""
    content = read_object(path / "config.json", SETTINGS)
    ids = {}
    for name in SPECIAL:
        value = content.get(name)
        if value is None:
            continue
        numbers = tuple(value) if isinstance(value, list) else (value,)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < vocabulary:
                raise InputError(
                    f"{path / 'config.json'}: {name} is {value!r}, outside of the vocabulary of {vocabulary} tokens"
                )
        ids[name] = numbers
    return ids


def listed(numbers: tuple[int, ...] | None) -> str:
    return ", ".join(str(number) for number in numbers or ())


def check_tokens(teacher: Tokenizer | None, student: Tokenizer | None) -> None:
    """Raises InputError at the first number that stands for another text. None is a model without a tokenizer, of
    which nothing is known."""
    if teacher is None or student is None or teacher is student:
        return
    texts = [
        {number: text for text, number in tokenizer.backend.get_vocab().items()} for tokenizer in (teacher, student)
    ]
    for number in sorted(texts[0].keys() | texts[1].keys()):
        one, other = (text.get(number) for text in texts)
        if one != other:
            raise InputError(
                f"teacher and student must share a tokenizer: token {number} is {one!r} in"
                f" {teacher.folder / 'tokenizer.json'} and {other!r} in {student.folder / 'tokenizer.json'}"
            )
