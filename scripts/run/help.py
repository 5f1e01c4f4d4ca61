"""What `limbeck COMMAND --help` prints: options, defaults and explanations, as conf/ has them."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .compose import config_text, groups, hydra_config, recipes

COLUMN, WIDTH = 30, 120


def describe(command: str, purpose: str, example: str) -> str:
    """A command's options, each with its default and what its config says of it, the recipes that set them, and an
    example."""
    from omegaconf import OmegaConf

    content = OmegaConf.to_container(hydra_config(command, ()), resolve=False)
    assert isinstance(content, dict)
    content.pop("recipe", None)
    said = dict(explanations(command))
    for group, (default, *others) in groups(command).items():
        said[group] = f"{group}={default}" + (f"; also {', '.join(others)}" if others else "")
    lines = [f"limbeck {command}: {purpose}", "", "Options (KEY: default)", *option_lines(content, said)]
    known = recipes(command)
    if known:
        lines += ["", "Recipes", *(f"  recipe={name:10} {text}" for name, text in known.items())]
    return "\n".join([*lines, "", f"Example: limbeck {command} {example}"])


def option_lines(content: Mapping[Any, Any], said: Mapping[str, str], above: str = "") -> Iterator[str]:
    """A line an option, those below it indented."""
    indent = "  " * (above.count(".") + 1)
    for key, value in content.items():
        branch = isinstance(value, dict) and bool(value)
        default = "" if branch else f" {value if isinstance(value, str) and value else json.dumps(value)}"
        option, text = f"{indent}{key}:{default}", said.get(above + str(key), "")
        first, *more = textwrap.wrap(text, WIDTH - COLUMN) or [""]
        yield f"{option:{COLUMN - 4}}  # {first}" if first else option
        yield from (" " * (COLUMN - 2) + f"# {line}" for line in more)
        if branch:
            yield from option_lines(value, said, f"{above}{key}.")


def explanations(name: str, place: str = "") -> Iterator[tuple[str, str]]:
    """The dotted keys of a config with the comments beside them, those of the configs that it builds on first."""
    text = config_text(name)
    group = str(Path(name).parent)
    for choice in re.findall(r"^  - (?:override )?(\S.*)$", text, re.M):
        key, colon, value = choice.partition(": ")
        if not colon and key != "_self_":
            yield from explanations(f"{group}/{key}", place)
        elif colon and key != "recipe":
            folder, _, at = key.lstrip("/").partition("@")
            within = place if at == "_here_" else f"{place}{at or folder}."
            yield from explanations(f"{folder}/{value}", within)
    above: list[tuple[int, str]] = []
    words: list[str] = []
    for line in text.splitlines():
        option, mark, comment = line.partition("# ")
        key_of = re.match(r"( *)(\w+):", option)
        if key_of:
            above = [each for each in above if each[0] < len(key_of[1])] + [(len(key_of[1]), key_of[2])]
            words = [comment]
        elif mark and line.startswith(" "):  # the comment continues
            words.append(comment)
        if above:
            yield place + ".".join(key for _, key in above), " ".join(words)
