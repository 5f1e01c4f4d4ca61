"""The layer kinds there are, by their letters in a pattern. A new kind is a file with a record, and an entry here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import attention, mamba2, mlp, moe, parallel
from .errors import InputError, guess
from .layer import LayerKind, ScoreSource
from .variants import variant_kind

KINDS: dict[str, LayerKind] = {
    kind.letter: kind for kind in (mamba2.KIND, attention.KIND, mlp.KIND, moe.KIND, parallel.KIND)
}


def kinds_of(pattern: str, variants: str = "") -> tuple[LayerKind, ...]:
    """The kind of each layer of a pattern; `variants` are the letters that stand for variants of experts. Raises
    InputError for a letter that no kind has."""
    for position, letter in enumerate(pattern):
        if letter not in KINDS and letter not in variants:
            known = ", ".join(f"{kind.letter!r} ({kind.name})" for kind in KINDS.values())
            raise InputError(
                f"config: layer {position} of the pattern has the unknown letter {letter!r}; known: {known}"
            )
    return tuple(KINDS[letter] if letter in KINDS else variant_kind(letter) for letter in pattern)


def key_of(letter: str) -> str:
    """What options call the kind of layers with this letter; a variant's is that of what it is like."""
    return (KINDS[letter] if letter in KINDS else variant_kind(letter)).key


def score_sources() -> dict[str, ScoreSource]:
    """What scores each axis of the layers, whichever kind has it."""
    return {axis: source for kind in KINDS.values() for axis, source in kind.scores.items()}


def check_sources(options: Any, where: str, **also: Sequence[str]) -> None:
    """Raises InputError where one of the options that say what scores an axis is none of its layer kind's; `also`: the
    values of further options."""
    choices = dict(also)
    for source in score_sources().values():
        if source.option and hasattr(options, source.option):
            choices[source.option] = [*source.observed, *([source.left_out] if source.left_out else [])]
    for name, known in choices.items():
        if (value := getattr(options, name)) not in known:
            raise InputError(f"{where}{name} is {value!r}; known: {', '.join(known)}{guess(str(value), known)}")


def kind_by_key(key: str, where: str) -> LayerKind:
    """The kind that options name so. Raises InputError."""
    for kind in KINDS.values():
        if kind.key == key:
            return kind
    known = ", ".join(kind.key for kind in KINDS.values())
    raise InputError(f"{where} names the unknown kind {key!r}; known: {known}")
