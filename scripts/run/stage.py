"""A stage: a folder made from inputs and options, that appears whole, is not made twice, and knows what made it.

The fingerprint is the sha256 of the inputs' contents, the options and the package's version. It stands in the
folder's limbeck.json, which holds no time or path, so that equal work gives equal bytes. The sums of large inputs are
taken while the stage works: until they are known, files count as the same by name, size and time of change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...models import processes
from ...models.errors import DiskError, InputError
from ...models.folder import atomic_folder, finish_folder, sha256_file, write_json

PROVENANCE = "limbeck.json"
RESULT = "result.json"
BEGUN = "begun.json"
LOGS = "wandb"


class Facts:
    """What makes a folder: the stage, its inputs, its options, and versions.

    `look` stands for the inputs without reading them. Raises InputError where one does not exist.
    """

    def __init__(self, name: str, inputs: Mapping[str, Path | str], options: Mapping[str, Any]) -> None:
        self.name, self.inputs, self.options = name, dict(sorted(inputs.items())), plain(options)
        self.look = self.current_look()
        self.known: dict[str, Any] | None = None
        self.notes: dict[str, Any] = {}  # what `make` has to say of its work, for limbeck.json
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
        """Has the contents read by a thread of its own; once they are known, they stand in `mark` too."""
        self.mark = mark
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def leave(self) -> None:
        """Work has ended, or failed: `mark` is not to be touched any more."""
        with self.marking:
            self.mark = None

    def read(self) -> None:
        try:
            facts = self.with_inputs(fingerprint_of)
            self.known = facts | {"fingerprint": digest(facts)}
        except BaseException as error:  # shown where the result is asked for
            self.error = error
            return
        with self.marking, contextlib.suppress(OSError):  # a full disk
            if self.mark is not None:
                write_json(self.mark, {"look": self.look, "fingerprint": self.known["fingerprint"]})

    def began(self, mark: Path) -> bool:
        """Whether the work that left `mark` is this one's: by the look of its inputs, or else by their contents."""
        try:
            found = json.loads(mark.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return found["look"] == self.look or found["fingerprint"] == self.content()["fingerprint"]

    def content(self) -> dict[str, Any]:
        """The contents of limbeck.json: the inputs by sha256, and the fingerprint of all. Waits for the sums."""
        if self.thread is not None:
            self.thread.join()
        elif self.known is None:
            self.read()
        if self.error is not None:
            raise self.error
        assert self.known is not None
        return self.known

    def finish(self) -> dict[str, Any]:
        """`content` and the notes, once the work is done. Raises InputError where an input has changed on the way."""
        content = self.content()
        if self.current_look() != self.look:
            names = ", ".join(f"{key}={value}" for key, value in self.inputs.items() if isinstance(value, Path))
            raise InputError(f"an input of {self.name} changed while it was read ({names}); run the same command again")
        return content | self.notes


def files_of(folder: Path) -> list[Path]:
    """The files below a folder that are its content: in one of ours, not who made it, nor result.json, which is written
    once it is finished, nor the logs in wandb/."""
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
    make: Callable[[Path, Facts], None],
    resumes: bool = False,
    scratch: str | None = None,
) -> bool:
    """Makes `folder` by `make(temporary folder, facts)`, unless it is there already with the same fingerprint.

    Returns whether it was made. With `resumes` the temporary folder outlives a kill and a full disk, and `make` finds
    what it has done; a `scratch` folder within is no part of the result, and goes once the folder has its name.
    Of many processes the first alone has the folder; the others run `make` too, are given it to look at, and wait.
    Raises InputError where the folder was made from something else, and where an input changes on the way.
    """
    told = False

    def told_to_all(temporary: Path | None, facts: Facts) -> None:
        nonlocal told
        told = True
        make(processes.from_first(temporary), facts)

    with processes.together():
        facts = Facts(name, inputs, options)
    with processes.together():
        try:
            if processes.rank() == 0:
                return make_stage(folder, facts, told_to_all, resumes, scratch)
        finally:
            if processes.rank() == 0 and not told:
                processes.from_first(None)
        temporary = processes.from_first(None)
        if temporary is not None:
            make(temporary, facts)
    return temporary is not None


def make_stage(
    folder: Path, facts: Facts, make: Callable[[Path, Facts], None], resumes: bool, scratch: str | None
) -> bool:
    """`run_stage` in the process that writes."""
    resumes = resumes or scratch is not None
    if folder.exists():
        check_finished(folder, facts)
        if resumes:
            clear(folder, scratch)
        return False
    if not resumes:
        with atomic_folder(folder) as temporary:
            facts.begin()
            make(temporary, facts)
            write_json(temporary / PROVENANCE, facts.finish())
        return True
    temporary = begin(folder, facts)
    facts.begin(temporary / BEGUN)
    try:
        make(temporary, facts)
    except InputError as error:
        worked = scratch is not None and (temporary / scratch).exists()
        if not worked and not isinstance(error, DiskError):  # wrong from the start
            facts.leave()
            shutil.rmtree(temporary)
        raise
    finally:
        facts.leave()
    write_json(temporary / PROVENANCE, facts.finish())
    finish_folder(temporary, folder)
    clear(folder, scratch)
    return True


def begin(folder: Path, facts: Facts) -> Path:
    """The temporary folder of unfinished work beside `folder`: as it was left, or new if it was of other facts."""
    temporary = folder.with_name(f".{folder.name}.partial")
    mark = temporary / BEGUN
    try:
        if temporary.exists() and not facts.began(mark):
            shutil.rmtree(temporary)
        if not temporary.exists():
            temporary.mkdir(parents=True)
            write_json(mark, {"look": facts.look, "fingerprint": None})
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from None
    return temporary


def clear(folder: Path, scratch: str | None) -> None:
    """What only unfinished work needs goes; the folder has its name by then, so that a kill here loses nothing."""
    (folder / BEGUN).unlink(missing_ok=True)
    if scratch is not None:
        shutil.rmtree(folder / scratch, ignore_errors=True)


def check_finished(folder: Path, made_of: Facts) -> None:
    """Raises InputError unless the folder was made from just these facts."""
    try:
        found = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        made_from = found["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder} exists already and is not of limbeck; give an output that does not") from None
    facts = made_of.content()
    if made_from != facts["fingerprint"]:
        asked = {key: value for key, value in found.items() if key in facts}  # not the notes
        raise InputError(
            f"{folder} exists already, made otherwise ({'; '.join(differences(asked, facts)[:3])});"
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
