"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import InputError
from .foreign import own_path, read_object

BLAKE3 = "blake3:"


def cache_folder() -> Path:
    """Where what can be made again is kept: $LIMBECK_CACHE, or ~/.cache/limbeck."""
    given = os.environ.get("LIMBECK_CACHE")
    try:
        return own_path(given) if given else Path.home() / ".cache" / "limbeck"
    except RuntimeError:  # of a user without an entry in the system's list, and HOME unset
        raise InputError("there is no home folder for ~/.cache/limbeck; set LIMBECK_CACHE to a folder") from None


@contextlib.contextmanager
def owned(path: Path) -> Iterator[bool]:
    """While it lasts this process alone writes `path`: a lock beside it, which a process that dies lets go. Gives
    whether one that died has left its lock there.

    Raises InputError where another process has the lock, or the place cannot be written.
    """
    path = own_path(path)
    if not path.name:
        raise InputError(f"{path} is no folder to write; give another output")
    place = path.with_name(f".{path.name}.writing")
    left, lock = place.exists(), FileLock(place, timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        check_writable(path)
        raise InputError(
            f"{path} is being written by another process{owner(place)}; wait for it, or give another output"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            facts = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
            place.write_text(json.dumps(facts), encoding="utf-8")
        yield left
    finally:
        place.unlink(
            missing_ok=True
        )  # while it is held: who waits for this file sees that it is gone, and makes his own
        lock.release()


def check_writable(path: Path) -> None:
    """Raises InputError where no file can be made beside a path: the lock does not tell that from one that is held."""
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def owner(place: Path) -> str:
    """Who has a lock, in brackets; nothing where it does not say."""
    try:
        facts = read_object(place)
        return f" (process {facts['process']} on {facts['host']}, since {facts['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`; on leaving it is synced to disk and renamed to `path`, on an error removed.

    Raises InputError where `path` exists already, its parent cannot be written, or another process writes it.
    """
    path = Path(path)
    check_new(path)
    with owned(path) as left:
        check_new(path)  # it may have appeared while the lock was another's
        temporary = partial_of(path, left)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from None
        try:
            yield temporary
            finish_folder(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def check_new(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists already; give an output folder that does not")


def partial_of(path: Path, ours: bool) -> Path:
    """The temporary folder beside `path`. Raises InputError where one is there that is not `ours`, and not empty."""
    temporary = path.with_name(f".{path.name}.partial")
    there = temporary.exists() or temporary.is_symlink()
    if there and not ours and not (temporary.is_dir() and not temporary.is_symlink() and not any(temporary.iterdir())):
        raise InputError(f"{temporary} is not of limbeck, and {path} is made there; move it, or give another output")
    return temporary


def finish_folder(temporary: Path, path: Path) -> None:
    """Syncs a finished temporary folder and gives it its name."""
    for file in sorted(temporary.rglob("*")):
        sync(file)
    sync(temporary)
    os.rename(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON through a temporary file, keys in their order."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


@contextlib.contextmanager
def unchanging(value: Path) -> Iterator[None]:
    """Raises InputError where a file of a folder goes while the block reads it, or may not be read."""
    try:
        yield
    except FileNotFoundError as error:
        gone = f"{error.filename} is gone"
        raise InputError(f"{value} changed while it was read ({gone}); run the same command again") from None
    except PermissionError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}; change its permissions") from None


def size_and_change(file: Path) -> tuple[int, int]:
    """A file's size and time of change. Raises PermissionError where its content cannot be read."""
    facts = file.stat()
    if not os.access(file, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
    return facts.st_size, facts.st_mtime_ns


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_sum(path: Path, like: str | None = None) -> str:
    """A file's checksum, which names its algorithm: "blake3:" and 64 hexadecimal digits; or the sha256, where `like`,
    one to be compared with, is of before that."""
    if like is not None and not like.startswith(BLAKE3):
        return sha256_file(path)
    with path.open("rb", buffering=0) as stream:
        return stream_sum(stream)


def stream_sum(stream: io.RawIOBase) -> str:
    """The checksum of what is left of a stream; see `file_sum`."""
    from blake3 import blake3  # sha256 took more time than slicing a checkpoint

    total, window = blake3(), memoryview(bytearray(2**20))  # small enough for a core's cache
    while size := stream.readinto(window):
        total.update(window[:size])
    return BLAKE3 + total.hexdigest()


def file_sums(
    folder: Path, files: Iterable[Path], at_once: int = 4, like: Mapping[str, str] | None = None
) -> dict[str, str]:
    """`file_sum` of files by their names below a folder, so many read at a time; `like` are others by the same
    names."""
    names = {file.relative_to(folder).as_posix(): file for file in files}
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        sums = pool.map(lambda name: file_sum(names[name], (like or {}).get(name)), names)
        return dict(zip(names, sums, strict=True))


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
