"""How documents become tokens, and which of them count: the options that a source has for its conversations."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ...models.errors import InputError

TRAIN_ON = ("assistant", "all", "weighted")
LONG = ("split", "drop", "refuse")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """Of conversations the loss is on the "assistant" alone, on "all", or "weighted": `prompt_weight` on what is not
    the assistant's. `reasoning_share` of those with thoughts keep them and are told to think, the others are told not
    to (None: all as they are). Those that do not fit a row are "split" at their turns, "drop"ped, or "refuse"d.
    `special_tokens` that a plain text spells are these tokens, and not text."""

    train_on: str = "assistant"
    prompt_weight: float = 0.1
    reasoning_share: float | None = None
    long: str = "split"
    special_tokens: bool = False

    def __post_init__(self) -> None:
        for name, known in (("train_on", TRAIN_ON), ("long", LONG)):
            if getattr(self, name) not in known:
                raise InputError(f"data: {name} {getattr(self, name)!r} is unknown; known: {', '.join(known)}")
        if not (0 <= self.prompt_weight < math.inf and 0 <= (self.reasoning_share or 0) <= 1):
            raise InputError(
                f"data: prompt_weight ({self.prompt_weight}) must be 0 or more, reasoning_share"
                f" ({self.reasoning_share}) between 0 and 1"
            )

    @property
    def prompts(self) -> float:
        """The weight of a conversation's tokens that are not the assistant's."""
        return {"assistant": 0.0, "all": 1.0, "weighted": self.prompt_weight}[self.train_on]


@dataclasses.dataclass(frozen=True)
class TextData:
    """data= with options of its own (data.train_on=all and so on), which go before those of a mixture's sources; None
    leaves these, or the default."""

    path: str
    columns: tuple[str, ...] | None = None
    train_on: str | None = None
    prompt_weight: float | None = None
    reasoning_share: float | None = None
    long: str | None = None
    special_tokens: bool | None = None

    def __post_init__(self) -> None:
        Reading(**{name: value for name, value in self.changes.items() if name != "columns"})

    @property
    def changes(self) -> dict[str, Any]:
        """The options given, as fields of a source."""
        options = {name: value for name, value in dataclasses.asdict(self).items() if name != "path"}
        return {name: value for name, value in options.items() if value is not None}

    def __str__(self) -> str:
        said = ", ".join(f"{name}={value}" for name, value in self.changes.items())
        return f"{self.path} ({said})" if said else self.path
