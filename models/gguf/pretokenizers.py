"""How a tokenizer.json cuts text before its merges, and the name under which llama.cpp cuts it alike.

llama.cpp's regular expressions stand in its code (src/llama-vocab.cpp) and are chosen by a name in the file; here are
the tokenizer.json's that they were written for. What has no name of its own there cannot be said in a GGUF file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, guess

# The `tokenizers` library's ByteLevel with use_regex, and Digits.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
LLAMA3 = rf"{ENDINGS}|{WORDS}|\p{{N}}{{1,3}}|{SYMBOLS}|{SPACES}"
QWEN2 = rf"{ENDINGS}|{WORDS}|\p{{N}}|{SYMBOLS}|{SPACES}"
QWEN35 = rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}"
TEKKEN = rf"{CASED[0]}|{CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
GPT4O = rf"{CASED[0]}{ENDINGS}?|{CASED[1]}{ENDINGS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"

Cuts = tuple[str, ...]  # regular expressions, one after the other
# Name -> how it cuts, and whether a word that is a token as a whole is taken without merges (ignore_merges).
KNOWN: dict[str, tuple[Cuts, bool]] = {
    "gpt-2": ((GPT2,), False),
    "smollm": ((DIGIT, GPT2), False),
    "llama-bpe": ((LLAMA3,), True),
    "dbrx": ((LLAMA3,), False),
    "qwen2": ((QWEN2,), False),
    "qwen35": ((QWEN35,), False),
    "tekken": ((TEKKEN,), True),
    "gpt-4o": ((GPT4O,), False),
}


def pre_tokenizer(content: Mapping[str, Any], path: Path, chosen: str | None = None) -> tuple[str, bool]:
    """llama.cpp's name for how a tokenizer.json's content cuts text, or the `chosen` one; and whether it cuts alike.
    Raises InputError where none does and none was chosen."""
    if chosen is not None and chosen not in KNOWN:
        raise InputError(f"pre_tokenizer={chosen} is unknown; known: {', '.join(KNOWN)}{guess(chosen, list(KNOWN))}")
    cuts = tuple(cuts_of(content.get("pre_tokenizer")))
    alike = [name for name, known in KNOWN.items() if known == (cuts, bool(content["model"].get("ignore_merges")))]
    if chosen is not None:
        return chosen, chosen in alike
    if not alike:
        raise InputError(
            f"{path}: llama.cpp has no pre-tokenizer that cuts text as this one; give pre_tokenizer=NAME"
            f" ({', '.join(KNOWN)}) to have text cut another way there, and token ids where it matters"
        )
    return alike[0], True


def cuts_of(step: Any) -> Iterator[str]:
    """The regular expressions of a pre-tokenizer; a step that is none gives its type, which is none of llama.cpp's."""
    kind = step.get("type") if isinstance(step, Mapping) else None
    if kind == "Sequence":
        for part in step.get("pretokenizers") or ():
            yield from cuts_of(part)
    elif kind == "ByteLevel" and not step.get("add_prefix_space"):
        if step.get("use_regex", True):
            yield GPT2
    elif kind == "Digits" and step.get("individual_digits"):
        yield DIGIT
    elif kind == "Split" and is_isolating(step) and isinstance(step.get("pattern"), Mapping):
        yield str(step["pattern"].get("Regex", step["pattern"].get("String")))
    else:
        yield f"({kind})"


def is_isolating(step: Mapping[str, Any]) -> bool:
    """Whether the matches become words; with `invert` what is removed lies between them, and all text is matched."""
    return (step.get("behavior"), bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))
