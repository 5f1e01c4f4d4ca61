"""What an error of Hydra's says to whoever gave the options: one line, and what was probably meant."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...models.foreign import first_line
from ...models.hints import guess_option
from .compose import VERBATIM, groups, hydra_config

RENAMED = {"witness": "method", "room": "reserve"}


def explain(command: str, overrides: Sequence[str], error: Exception, folders: Sequence[Path] = ()) -> str:
    """One line for an error of Hydra's: which override, and what was probably meant."""
    missing = getattr(error, "full_key", None)
    if "Missing mandatory value" in str(error) and missing:  # every key was read before that
        return f"{missing} is missing; give {missing}=VALUE (limbeck {command} --help)"
    known = known_options(command, overrides, folders)
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    for key in keys:
        if key not in known and not is_free(key, known):
            return unknown(command, key, list(known))
    what = first_line(error).strip()
    if "hydra/launcher/submitit" in what:
        return "hydra/launcher= of slurm and submitit needs hydra-submitit-launcher: pip install 'limbeck[slurm]'"
    if "index out of range" in str(error.__cause__):
        place = getattr(error.__cause__, "full_key", what)
        return f"{place} is not there; give the whole list, as {place.rpartition('[')[0]}=[...]"
    if what.startswith("Ambiguous value"):
        return f"{what}; give one value, or a list as KEY=[A,B]"
    for key in keys:
        if what.startswith(f"Could not override '{key}'"):
            return f"{key} is not read with what else was chosen; leave it out (limbeck {command} --help)"
    unread = getattr(error, "override", None)
    return f"{unread!r} cannot be read: {what}; quote a value with special characters" if unread else what


def unknown(command: str, key: str, known: Sequence[str] = ()) -> str:
    near = (
        f"; it is {RENAMED[name]} now"
        if (name := key.split(".")[0]) in RENAMED
        else guess_option(key, known or known_keys(command))
    )
    return f"{key!r} is no option of limbeck {command}{near} (limbeck {command} --help)"


def known_keys(command: str) -> list[str]:
    """Every dotted key that a command's config has, the groups' keys among them."""
    return list(known_options(command))


def known_options(command: str, words: Sequence[str] = (), folders: Sequence[Path] = ()) -> dict[str, list[Any]]:
    """Every dotted key of a command's config, by default and with the groups and the recipe among the words, and its
    values in these."""
    from omegaconf import OmegaConf

    known: dict[str, list[Any]] = {}

    def note(content: Any, prefix: str) -> None:
        for name, value in content.items() if isinstance(content, Mapping) else ():
            known.setdefault(prefix + name, []).append(value)
            note(value, f"{prefix}{name}.")

    picks = {*groups(command), "recipe"}
    chosen = [word.partition(",")[0] for word in words if word.partition("=")[0].lstrip("+") in picks]
    for each in ([], chosen) if chosen else ([],):
        with contextlib.suppress(Exception):  # what is wrong with a choice is said elsewhere
            note(OmegaConf.to_container(hydra_config(command, each, folders), resolve=False), "")
    return known | {name: [""] for name in picks}


def is_free(key: str, known: Mapping[str, list[Any]]) -> bool:
    """Whether a dotted key is below an option that is null, empty or a list: what it may hold its dataclass says."""
    parts = key.split(".")
    below = [(value, parts[end]) for end in range(1, len(parts)) for value in known.get(".".join(parts[:end]), ())]
    return parts[0] not in VERBATIM and any(
        value is None or value == {} or (isinstance(value, list) and part.isdecimal()) for value, part in below
    )


def with_free_keys(command: str, words: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """The words, those with a `is_free` key as `++KEY=VALUE`: to Hydra there are no keys at such a place."""
    known = known_options(command, words, folders)
    return [word if word[0] in "+~" or not is_free(word.partition("=")[0], known) else f"++{word}" for word in words]
