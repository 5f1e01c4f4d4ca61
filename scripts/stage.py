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
from ..models.errors import DiskError, InputError
from ..models.folder import atomic_folder, finish_folder, sha256_file, sha256_folder, write_json

PROVENANCE = "limbeck.json"
RESULT = "result.json"
BEGUN = "begun.json"


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
    if not value.exists():
        raise InputError(f"{value} does not exist; expected a folder or a file")
    if value.is_dir():
        files = sha256_folder(value)
        if PROVENANCE in files:  # of ours: who made it is no content, and result.json is written once it is finished
            files = {name: found for name, found in files.items() if name not in (PROVENANCE, RESULT)}
        return digest(files)
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
    resumes: bool = False,
    scratch: str | None = None,
) -> bool:
    """Makes `folder` by `make(temporary folder, facts)`, unless it is there already with the same fingerprint.

    Returns whether it was made. With `resumes` the temporary folder outlives a kill and a full disk, and `make` finds
    what it has done; a `scratch` folder within is no part of the result, and goes once the folder has its name.
    Raises InputError where the folder was made from something else.
    """
    resumes = resumes or scratch is not None
    facts = provenance(name, inputs, options)
    if folder.exists():
        check_finished(folder, facts)
        if resumes:
            clear(folder, scratch)
        return False
    if not resumes:
        with atomic_folder(folder) as temporary:
            make(temporary, facts)
            write_json(temporary / PROVENANCE, facts)
        return True
    temporary = begin(folder, facts)
    try:
        make(temporary, facts)
    except InputError as error:
        worked = scratch is not None and (temporary / scratch).exists()
        if not worked and not isinstance(error, DiskError):  # wrong from the start
            shutil.rmtree(temporary)
        raise
    write_json(temporary / PROVENANCE, facts)
    finish_folder(temporary, folder)
    clear(folder, scratch)
    return True


def begin(folder: Path, facts: Mapping[str, Any]) -> Path:
    """The temporary folder of unfinished work beside `folder`: as it was left, or new if it was of other facts."""
    temporary = folder.with_name(f".{folder.name}.partial")
    mark = temporary / BEGUN
    try:
        if temporary.exists() and not (mark.exists() and mark.read_text() == facts["fingerprint"]):
            shutil.rmtree(temporary)
        if not temporary.exists():
            temporary.mkdir(parents=True)
            half = temporary / f"{BEGUN}.partial"
            half.write_text(facts["fingerprint"])
            os.replace(half, mark)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from None
    return temporary


def clear(folder: Path, scratch: str | None) -> None:
    """What only unfinished work needs goes; the folder has its name by then, so that a kill here loses nothing."""
    (folder / BEGUN).unlink(missing_ok=True)
    if scratch is not None:
        shutil.rmtree(folder / scratch, ignore_errors=True)


def check_finished(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raises InputError unless the folder was made from just these facts."""
    try:
        found = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        made_from = found["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder} exists already and is not of limbeck; give an output that does not") from None
    if made_from != facts["fingerprint"]:
        raise InputError(
            f"{folder} exists already, made otherwise ({'; '.join(differences(found, facts)[:3])});"
            " give another output, or remove the folder to make it anew"
        )


def differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    """What differs between the facts of a folder and those wanted, a line each: options with both values."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        keys = [key for key in {**found, **wanted} if key != "fingerprint" and found.get(key) != wanted.get(key)]
        return [line for key in keys for line in differences(found.get(key), wanted.get(key), f"{where}.{key}")]
    if where.startswith(".inputs"):
        return [f"{where[1:]} has changed"]
    return [f"{where.removeprefix('.options').lstrip('.')} was {found!r}, now {wanted!r}"]
