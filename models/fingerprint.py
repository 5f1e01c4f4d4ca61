"""What made a folder (its limbeck.json): a stage's name, its inputs by checksum, its options, and versions.

All that holds no time or path, so that equal work gives equal bytes; these stand in its `run`, apart from what is
hashed. The sums of large inputs are taken by a thread while the stage works: until they are known, files count as the
same by name, size and time of change (their `look`).
It holds the sums of what the stage left, too: whoever reads the folder next finds what has been damaged since.
Unfinished work, in a folder beside the stage's output, is resumed by whoever would make the same there. Nobody else
clears it while it holds work, such as a training's states or finished shards: these took hours, and a command with a
slip in it would have none to show for them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import logging
import platform
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from .errors import InputError
from .folder import file_sum, file_sums, finish_folder, owned, partial_of, size_and_change, unchanging, write_json
from .folder import plain as plain
from .foreign import read_object

PROVENANCE = "limbeck.json"
RESULT = "result.json"
SPEED = "speed.jsonl"  # what a training took, by steps: it differs from run to run, and is no part of the result
LOG = "log.txt"  # what a stage said of its progress, by the clock
RUN = "run"  # of limbeck.json: command, host, times, paths and sizes, in no sum
PAGES = ("gap.html", "report.html")  # say when and how long, and are made from files that are hashed
LOGS = ("wandb", "tensorboard")
BEGUN = "begun.json"  # of unfinished work: its fingerprint
AGAIN = (BEGUN, LOG, SPEED, "metrics.jsonl")  # what every run begins anew where no state is there

log = logging.getLogger("limbeck")


# What the limbeck.json of every stage has.
SAID = {"made_by": str, "inputs": dict, "options": dict, "versions": dict, "fingerprint": str}


class MadeOtherwise(InputError):
    """A folder is there, whole, and of other inputs or options."""


class Fingerprint:
    """What a folder is to be made of. Raises InputError where an input does not exist."""

    def __init__(self, name: str, inputs: Mapping[str, Path | str], options: Mapping[str, Any]) -> None:
        from ..kernels.products import chosen  # imports torch

        self.name, self.inputs = name, dict(sorted(inputs.items()))
        self.options = plain(options) | chosen()  # of products, which whoever makes the folder does in one way
        self.looks = {key: look_of(value) for key, value in self.inputs.items()}
        self.look = digest(self.with_inputs(str) | {"inputs": self.looks})
        self.sums: dict[str, Any] | None = None
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None
        self.mark: Path | None = None
        self.marking = threading.Lock()

    def with_inputs(self, describe: Callable[[Path | str], Any]) -> dict[str, Any]:
        import torch  # names of files are wanted of this module before it

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
                # One file after the other, as the stage reads them meanwhile: what does not fit into the system's page
                # cache is then still read once.
                content = self.with_inputs(functools.partial(fingerprint_of, at_once=1))
                self.sums = content | {"fingerprint": digest(content)}
        except BaseException as error:  # raised where the sums are needed
            self.error = error
            return
        with self.marking, contextlib.suppress(OSError):  # a full disk
            if self.mark is not None:
                self.mark_begun(self.mark)

    def mark_begun(self, mark: Path) -> None:
        """Says beside unfinished work what that is to be made of: all but the sums of large inputs is known."""
        fingerprint = None if self.sums is None else self.sums["fingerprint"]
        write_json(mark, {"look": self.look, "fingerprint": fingerprint, "made_of": self.with_inputs(str)})

    def began(self, mark: Path) -> bool:
        """Whether the work that left `mark` is this one's: by the look of its inputs, or else by their sums."""
        try:
            left = read_object(mark)
        except (OSError, ValueError):
            return False
        if not isinstance(left, dict):
            return False
        return left.get("look") == self.look or left.get("fingerprint") == self.content()["fingerprint"]

    def unlike(self, mark: Path) -> str:
        """What differs from the work that left `mark`, for a message."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if lines := differences(read_object(mark)["made_of"], self.with_inputs(str))[:3]:
                return "; ".join(lines)
        return "its inputs have changed"

    def content(self) -> dict[str, Any]:
        """The contents of limbeck.json: the inputs by checksum, and the fingerprint of all. Waits for the sums."""
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
        changed = [f"{key}={self.inputs[key]}" for key, look in self.looks.items() if look_of(self.inputs[key]) != look]
        if changed:
            raise InputError(
                f"an input of {self.name} changed while it was read ({', '.join(changed)}); run the same command again"
            )
        return content

    def settle(self, *keys: str) -> dict[str, Any]:
        """`unchanged_content`, once these inputs have been read whole: what becomes of them from here on is no matter,
        so that work which takes days is not lost to a text that has grown."""
        content = self.unchanged_content()
        self.looks = {key: look for key, look in self.looks.items() if key not in keys}
        return content

    def sealed(
        self, folder: Path, notes: Mapping[str, Any], apart: tuple[str, ...], known: Mapping[str, str]
    ) -> dict[str, Any]:
        """What limbeck.json says of a folder once the work in it is done: `unchanged_content`, notes, and the sums of
        its files (those `apart`, which go, aside; some are `known` from when they were written) and of all that
        itself."""
        content = self.unchanged_content() | dict(notes)  # first: its thread writes into the folder until it ends
        files = [file for file in content_files(folder) if file.relative_to(folder).parts[0] not in apart]
        unknown = [file for file in files if file.relative_to(folder).as_posix() not in known]
        sums = {**known, **file_sums(folder, unknown)}
        names = [file.relative_to(folder).as_posix() for file in files]
        return summed(content | {"files": {name: sums[name] for name in names}})

    def check_finished(self, folder: Path) -> None:
        """Raises InputError unless the folder is whole (MadeOtherwise, where it is) and was made of just this."""
        try:
            made = read_object(folder / PROVENANCE)
            fingerprint = made["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{folder} exists already and is not of limbeck; give an output that does not") from None
        fingerprint_of(folder)  # says what is damaged
        content = self.content()
        if fingerprint != content["fingerprint"]:
            made = {key: value for key, value in made.items() if key in content}  # not the notes
            raise MadeOtherwise(
                f"{folder} exists already, made otherwise ({'; '.join(differences(made, content)[:3])});"
                " give another output, or remove the folder to make it anew"
            )


def unfinished(
    folder: Path,
    made_of: Fingerprint,
    keeps: bool,
    replaces: bool,
    held: contextlib.ExitStack,
    scratch: str | None = None,
) -> Path | None:
    """The temporary folder beside `folder`: as unfinished work of the same fingerprint left it, or new; None where
    `folder` is finished, else `held` owns it from here on. One that was killed before it got its name, but after all
    was done, gets it now. What `replaces` a finished folder that was made otherwise replaces unfinished work too.

    Raises InputError where there is work of another fingerprint.
    """

    def finished() -> bool:
        if not folder.exists() and not folder.is_symlink():
            return False
        try:
            made_of.check_finished(folder)
        except MadeOtherwise:
            if replaces:
                return False
            raise
        return True

    if finished():
        (folder / BEGUN).unlink(missing_ok=True)
        return None
    left = held.enter_context(owned(folder))
    if finished():  # by whoever owned it just now
        return None
    mark = folder.with_name(f".{folder.name}.partial") / BEGUN
    temporary = partial_of(folder, left or mark.is_file())
    try:
        if (temporary / PROVENANCE).is_file():
            with contextlib.suppress(InputError):
                made_of.check_finished(temporary)
                put_in_place(temporary, folder, scratch)
                return None
        if temporary.exists() and not (keeps and made_of.began(mark)):
            if mark.is_file() and holds_work(temporary):
                otherwise = f"{temporary} was begun otherwise ({made_of.unlike(mark)})"
                if not replaces:
                    raise InputError(f"{otherwise}; remove it, or give another output")
                log.warning(f"{otherwise}; it is made anew")
            shutil.rmtree(temporary)
        if not temporary.exists():
            temporary.mkdir()
            if keeps:
                made_of.mark_begun(mark)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from None
    return temporary


def put_in_place(temporary: Path, folder: Path, scratch: str | None) -> None:
    """Gives a finished folder its name, without the scratch folder: whoever reads it from then on finds what stays. One
    that it replaces is whole until then."""
    if scratch is not None:
        shutil.rmtree(temporary / scratch, ignore_errors=True)
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    finish_folder(temporary, folder)
    (folder / BEGUN).unlink(missing_ok=True)  # not before, since it says whose the temporary folder is
    shutil.rmtree(old, ignore_errors=True)


def holds_work(temporary: Path) -> bool:
    """Whether an unfinished folder has what its command would not make again: a state, a shard, a measured figure."""
    names = (path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
    return any(
        name.name not in AGAIN and not name.name.endswith((".partial", ".writing")) and name.parts[0] not in LOGS
        for name in names
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
    """What a folder says of the stage that made it; nothing where it says nothing, or what no stage of ours says."""
    content = content_of(folder)
    return content if all(isinstance(content.get(key), kind) for key, kind in SAID.items()) else {}


def content_of(folder: Path) -> dict[str, Any]:
    """A folder's limbeck.json, whoever wrote it; nothing where there is none, or one that cannot be read."""
    try:
        return read_object(folder / PROVENANCE)
    except (OSError, ValueError):
        return {}


def read_run(folder: Path) -> dict[str, Any]:
    """What a folder says of the run that made it: command, host, times, paths and sizes; nothing where it does not."""
    run = read_provenance(folder).get(RUN)
    return run if isinstance(run, dict) else {}


def files_of(folder: Path) -> list[Path]:
    """The files below a folder that are its content; see `content_files` for one of ours."""
    if (folder / PROVENANCE).is_file():
        return content_files(folder)
    return sorted(file for file in folder.rglob("*") if file.is_file())


def content_files(folder: Path) -> list[Path]:
    """The files of a folder of ours: not what made it, nor result.json, which is written once it is finished, nor what
    holds times (speed.jsonl, log.txt, pages, the logs in wandb/ and tensorboard/), nor begun.json."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and is_content(file.relative_to(folder)))


def is_content(name: Path) -> bool:
    """Whether a file of a folder of ours, by its path in there, is part of what is hashed."""
    apart = name.parts[0] in (PROVENANCE, RESULT, *PAGES) if len(name.parts) == 1 else name.parts[0] in LOGS
    return not apart and name.name not in (SPEED, LOG, BEGUN, PROVENANCE)  # a folder in it has sums of its own


def fingerprint_of(value: Path | str, at_once: int = 4) -> str:
    """The checksum of a file, or of a folder's files, so many read at a time; a text stands for itself. Raises
    InputError where a folder of ours is not as it was left."""
    if isinstance(value, str):
        return value
    with unchanging(value):
        if not value.is_dir():
            return file_sum(value)
        sums = file_sums(value, files_of(value), at_once, recorded_sums(value))
        check_sums(value, sums)
        return digest(sums)


def check_files(folder: Path, names: Sequence[str] | None = None) -> None:
    """Raises InputError where the files of a folder, or those of them that are named, are not as a stage left them."""
    if (folder / PROVENANCE).is_file():
        with unchanging(folder):
            found = content_files(folder)
            files = [file for file in found if names is None or file.relative_to(folder).as_posix() in names]
            check_sums(folder, file_sums(folder, files, like=recorded_sums(folder)), names)


@contextlib.contextmanager
def checked_files(folder: Path) -> Iterator[None]:
    """Has the sums of a folder taken by a thread while the block reads it. Raises InputError as `check_files` does."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        check = pool.submit(check_files, folder)
        yield
        check.result()


def check_sums(folder: Path, sums: Mapping[str, str], names: Sequence[str] | None = None) -> None:
    """Raises InputError where the files of a folder, of these sums, are not those that its limbeck.json has; of all of
    them, or of those named."""
    path = folder / PROVENANCE
    try:
        made = read_object(path) if path.exists() else {}
    except (OSError, ValueError):
        made = None
    if isinstance(made, dict) and "sum" not in made and "files" not in made:
        return  # of no stage (a model that ships), or from before there were sums
    what = f"remove {folder} to make it anew, or its {PROVENANCE} alone to take it as it is"
    if not isinstance(made, dict) or not holds_sum(made) or not holds_sum(made.get(RUN)):
        raise InputError(f"{path} is damaged; {what}")
    for name, expected in made["files"].items():
        if is_content(Path(name)) and (names is None or name in names) and sums.get(name) != expected:
            state = "missing" if name not in sums else "not as it was left: damaged, or changed by hand"
            raise InputError(f"{folder / name} is {state} ({made['made_by']} left it); {what}")


def recorded_sums(folder: Path) -> dict[str, str]:
    """The checksums of its files that a folder's limbeck.json has; nothing where it has none."""
    files = content_of(folder).get("files")
    return {name: found for name, found in files.items() if isinstance(found, str)} if isinstance(files, dict) else {}


def summed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with a sum of all of it, but for `run`, which has its own."""
    return {**content, "sum": digest({key: value for key, value in content.items() if key != RUN})}


def holds_sum(content: Any) -> bool:
    """Whether what `summed` gave is still so; None (of a folder from before there was a `run`) is."""
    if not isinstance(content, dict):
        return content is None
    return content.get("sum") == digest({key: value for key, value in content.items() if key not in ("sum", RUN)})


def look_of(value: Path | str) -> Any:
    """Names, sizes and times of change of the files that `fingerprint_of` reads. Raises InputError without any, and
    where one cannot be read."""
    if isinstance(value, str):
        return value
    with unchanging(value):
        if not value.exists():
            raise InputError(f"{value} does not exist; expected a folder or a file")
        found = files_of(value) if value.is_dir() else [value]
        files = {file.relative_to(value).as_posix() if file != value else "": file for file in found}
        return {name: size_and_change(file) for name, file in files.items()}


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
