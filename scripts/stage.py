"""A stage: a folder made from inputs and options, that appears whole, is not made twice, and knows what made it.

The fingerprint is the sha256 of the inputs' contents, the options and the package's version. It stands in the
folder's limbeck.json, which holds no time or path, so that equal work gives equal bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..models.errors import InputError
from ..models.folder import atomic_folder, finish_folder, sha256_file, sha256_folder, write_json

PROVENANCE = "limbeck.json"


def provenance(name: str, inputs: Mapping[str, Path | str], options: Mapping[str, Any]) -> dict[str, Any]:
    """What made a folder: the stage, its inputs by sha256, its options, and versions; with their fingerprint."""
    facts = {
        "made_by": f"limbeck {name}",
        "inputs": {key: fingerprint_of(value) for key, value in sorted(inputs.items())},
        "options": plain(options),
        "versions": {"limbeck": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    return facts | {"fingerprint": digest(facts)}


def fingerprint_of(value: Path | str) -> str:
    """The sha256 of a file, or of a folder's files; a text stands for itself."""
    if isinstance(value, str):
        return value
    if value.is_dir():
        return digest({name: found for name, found in sha256_folder(value).items() if name != PROVENANCE})
    return sha256_file(value)


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Options as JSON knows them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def run_stage(
    folder: Path,
    *,
    name: str,
    inputs: Mapping[str, Path | str],
    options: Mapping[str, Any],
    make: Callable[[Path, dict[str, Any]], None],
    scratch: str | None = None,
) -> bool:
    """Makes `folder` by `make(temporary folder, facts)`, unless it is there already with the same fingerprint.

    Returns whether it was made. Where `make` names a folder within for its unfinished work, `scratch`, the temporary
    folder outlives a kill and is found again; the scratch goes once the folder has its name.
    Raises InputError where the folder was made from something else.
    """
    facts = provenance(name, inputs, options)
    if folder.exists():
        check_finished(folder, facts)
        if scratch is not None:
            shutil.rmtree(folder / scratch, ignore_errors=True)
        return False
    if scratch is None:
        with atomic_folder(folder) as temporary:
            make(temporary, facts)
            write_json(temporary / PROVENANCE, facts)
        return True
    temporary = folder.with_name(f".{folder.name}.partial")
    mark = temporary / "begun.json"
    if temporary.exists() and not (mark.exists() and mark.read_text() == digest(facts)):
        shutil.rmtree(temporary)
    if not temporary.exists():
        temporary.mkdir(parents=True)
        half = temporary / "begun.json.partial"
        half.write_text(digest(facts))
        os.replace(half, mark)
    make(temporary, facts)
    write_json(temporary / PROVENANCE, facts)
    mark.unlink()
    finish_folder(temporary, folder)
    shutil.rmtree(folder / scratch)
    return True


def check_finished(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raises InputError unless the folder was made from just these facts."""
    try:
        found = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        raise InputError(f"{folder} exists already and is not of limbeck; give an output that does not") from None
    if found.get("fingerprint") != facts["fingerprint"]:
        parts = [key for key in ("made_by", "inputs", "options", "versions") if found.get(key) != facts[key]]
        raise InputError(
            f"{folder} exists already, made from other {' and '.join(parts)};"
            " give another output, or remove the folder to make it anew"
        )
