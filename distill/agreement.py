"""Whether teacher, student and tokenizer mean the same tokens, checked before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..models.checkpoint import load_config, read_json
from ..models.errors import InputError
from ..models.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


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
        ours, theirs = (ids[path].get(name) for path in (student, teacher))
        if ours is not None and theirs is not None and ours != theirs:
            raise InputError(
                f"teacher and student must share special tokens: {name} is {listed(theirs)} in"
                f" {teacher / 'config.json'} and {listed(ours)} in {student / 'config.json'}; set both alike"
            )
    tokenizer = load_tokenizer(student)
    check_vocabulary(tokenizer, configs[student])
    if (teacher / "tokenizer.json").is_file() and teacher != student:
        check_tokens(load_tokenizer(teacher), tokenizer)
    notes = []
    for name in SPECIAL[:2]:
        stated, used = ids[student].get(name), getattr(tokenizer, name)
        if stated is not None and used not in stated:
            notes.append(
                f"{student / 'config.json'} has {name} {listed(stated)}, its tokenizer {used}: training uses the"
                " tokenizer's"
            )
    return notes


def special_ids(path: Path, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """The special ids that a config.json states. Raises InputError where one is outside of the vocabulary."""
    content: dict[str, Any] = read_json(path / "config.json")
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


def listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def check_tokens(teacher: Tokenizer, student: Tokenizer) -> None:
    """Raises InputError at the first number that stands for another text."""
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
