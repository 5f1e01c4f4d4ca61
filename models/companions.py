"""What goes along with a checkpoint's weights from folder to folder: the tokenizer, the template, how to generate.

Only what lies in the folder goes along: a link that leads out of it would carry a file of the machine into what is
published. And nothing that points to code: such code is never run here, and would be by whoever opens the copy.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from .errors import InputError
from .folder import write_json
from .foreign import LARGEST, check_regular, read_json, without_code

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def companions(folder: Path | None) -> list[Path]:
    """A folder's files that go along; none of None. Raises InputError for a link out of it, a pipe, or a device."""
    if folder is None:
        return []
    files = [folder / name for name in COMPANIONS if (folder / name).exists()]
    check_own(folder, files)
    return files


def check_own(folder: Path, files: Iterable[Path]) -> None:
    """Raises InputError unless files of a folder may go along: they lie in it (or in the hub's cache), regular, of a
    bounded size."""
    own = folder.resolve()
    homes = [own]
    if own.parent.name == "snapshots":  # the hub's cache has its files once, and links to them
        homes.append(own.parent.parent / "blobs")
    for file in files:
        target = file.resolve()
        if not any(home in target.parents for home in homes):
            raise InputError(f"{file} is a link out of its folder, to {target}; put a copy of the file in its place")
        check_regular(file, LARGEST)


def copy_companions(files: list[Path], folder: Path) -> None:
    """Copies them; without what points to code."""
    for file in files:
        content = read_json(file) if file.name.endswith("_config.json") else None
        if (plain := without_code(content)) != content:
            write_json(folder / file.name, plain)
        else:
            shutil.copyfile(file, folder / file.name)
