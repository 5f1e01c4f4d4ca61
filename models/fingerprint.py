"""What made a folder (its limbeck.json): a stage's name, its inputs by sha256, its options, and versions.

It holds no time or path, so that equal work gives equal bytes. The sums of large inputs are taken by a thread while
the stage works: until they are known, files count as the same by name, size and time of change (their `look`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .errors import InputError
from .folder import sha256_file, write_json

PROVENANCE = "limbeck.json"
RESULT = "result.json"
LOGS = "wandb"


class Fingerprint:
    """What a folder is to be made of. Raises InputError where an input does not exist."""

    def __init__(self, name: str, inputs: Mapping[str, Path | str], options: Mapping[str, Any]) -> None:
        self.name, self.inputs, self.options = name, dict(sorted(inputs.items())), plain(options)
        self.look = self.current_look()
        self.sums: dict[str, Any] | None = None
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None
        self.mark: Path | None = None
        self.marking = threading.Lock()

    def current_look(self) -> str:
        return digest(self.with_inputs(look_of))

    def with_inputs(self, describe: Callable[[Path | str], Any]) -> dict[str, Any]:
        return {
            "made_by": f"limbeck {self.name}",
            "inputs": {key: describe(value) for key, value in self.inputs.items()},
            "options": self.options,
            "versions": {"limbeck": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }

    def begin(self, mark: Path | None = None) -> None:
        """Has the inputs read by a thread of its own; once their sums are known, they stand in `mark` too."""
        self.mark = mark
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def leave(self) -> None:
        """Work has ended, or failed: `mark` is not to be touched any more."""
        with self.marking:
            self.mark = None

    def read(self) -> None:
        try:
            if self.sums is None:
                content = self.with_inputs(fingerprint_of)
                self.sums = content | {"fingerprint": digest(content)}
        except BaseException as error:  # raised where the sums are needed
            self.error = error
            return
        with self.marking, contextlib.suppress(OSError):  # a full disk
            if self.mark is not None:
                write_json(self.mark, {"look": self.look, "fingerprint": self.sums["fingerprint"]})

    def began(self, mark: Path) -> bool:
        """Whether the work that left `mark` is this one's: by the look of its inputs, or else by their sums."""
        try:
            left = json.loads(mark.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return left["look"] == self.look or left["fingerprint"] == self.content()["fingerprint"]

    def content(self) -> dict[str, Any]:
        """The contents of limbeck.json: the inputs by sha256, and the fingerprint of all. Waits for the sums."""
        if self.thread is not None:
            self.thread.join()
        elif self.sums is None:
            self.read()
        if self.error is not None:
            raise self.error
        assert self.sums is not None
        return self.sums

    def unchanged_content(self) -> dict[str, Any]:
        """`content`, once the work is done. Raises InputError where an input has changed meanwhile."""
        content = self.content()
        if self.current_look() != self.look:
            names = ", ".join(f"{key}={value}" for key, value in self.inputs.items() if isinstance(value, Path))
            raise InputError(f"an input of {self.name} changed while it was read ({names}); run the same command again")
        return content

    def check_finished(self, folder: Path) -> None:
        """Raises InputError unless the folder was made of just this."""
        try:
            made = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
            fingerprint = made["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{folder} exists already and is not of limbeck; give an output that does not") from None
        content = self.content()
        if fingerprint != content["fingerprint"]:
            made = {key: value for key, value in made.items() if key in content}  # not the notes
            raise InputError(
                f"{folder} exists already, made otherwise ({'; '.join(differences(made, content)[:3])});"
                " give another output, or remove the folder to make it anew"
            )


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """What differs between the contents of two limbeck.json, a line each: options with both values."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [key for key in {**before, **now} if key != "fingerprint" and before.get(key) != now.get(key)]
        return [line for key in keys for line in differences(before.get(key), now.get(key), f"{where}.{key}")]
    if where.startswith(".inputs"):
        return [f"{where[1:]} has changed"]
    return [f"{where.removeprefix('.options').lstrip('.')} was {before!r}, now {now!r}"]


def read_provenance(folder: Path) -> dict[str, Any]:
    """What a folder says of what made it; nothing where it says nothing."""
    try:
        content = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def files_of(folder: Path) -> list[Path]:
    """The files below a folder that are its content: in one of ours, not what made it, nor result.json, which is
    written once it is finished, nor the logs in wandb/."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if folder / PROVENANCE in files:
        files = [file for file in files if file not in (folder / PROVENANCE, folder / RESULT)]
        files = [file for file in files if folder / LOGS not in file.parents]
    return files


def fingerprint_of(value: Path | str) -> str:
    """The sha256 of a file, or of a folder's files; a text stands for itself."""
    if isinstance(value, str):
        return value
    if value.is_dir():
        return digest({file.relative_to(value).as_posix(): sha256_file(file) for file in files_of(value)})
    return sha256_file(value)


def look_of(value: Path | str) -> Any:
    """Names, sizes and times of change of the files that `fingerprint_of` reads. Raises InputError without any."""
    if isinstance(value, str):
        return value
    if not value.exists():
        raise InputError(f"{value} does not exist; expected a folder or a file")
    files = {file.relative_to(value).as_posix(): file for file in files_of(value)} if value.is_dir() else {"": value}
    return {name: (file.stat().st_size, file.stat().st_mtime_ns) for name, file in files.items()}


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Options as JSON knows them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        value = value.options() if hasattr(value, "options") else own
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
