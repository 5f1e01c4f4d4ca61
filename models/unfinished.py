"""Unfinished work: the folder beside a stage's output in which that is made.

Whoever would make the same resumes there. Nobody else clears it while it holds work, such as a training's states or
finished shards: these took hours, and a command with a slip in it would have none to show for them.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from pathlib import Path

from .errors import DiskError, InputError
from .fingerprint import LOG, LOGS, SPEED, Fingerprint, MadeOtherwise
from .folder import finish_folder, owned, partial_of

log = logging.getLogger("limbeck")
BEGUN = "begun.json"
AGAIN = (BEGUN, LOG, SPEED, "metrics.jsonl")  # what every run begins anew where no state is there


def unfinished(
    folder: Path, made_of: Fingerprint, keeps: bool, replaces: bool, held: contextlib.ExitStack
) -> Path | None:
    """The temporary folder beside `folder`: as unfinished work of the same fingerprint left it, or new; None where
    `folder` is finished, else `held` owns it from here on. What `replaces` a finished folder that was made otherwise
    replaces unfinished work too.

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
        return None
    left = held.enter_context(owned(folder))
    if finished():  # by whoever owned it just now
        return None
    mark = folder.with_name(f".{folder.name}.partial") / BEGUN
    temporary = partial_of(folder, left or mark.is_file())
    try:
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


def holds_work(temporary: Path) -> bool:
    """Whether an unfinished folder has what its command would not make again: a state, a shard, a measured figure."""
    names = (path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
    return any(
        name.name not in AGAIN and not name.name.endswith((".partial", ".writing")) and name.parts[0] not in LOGS
        for name in names
    )


def is_worth_keeping(error: BaseException, temporary: Path, scratch: str | None, resumed: bool) -> bool:
    """Whether the same command may resume: after a kill, a defect or a full disk, and what it had `resumed` itself; not
    where the input was wrong from the start."""
    worked = resumed or (scratch is not None and (temporary / scratch).exists())
    return worked or isinstance(error, DiskError) or not isinstance(error, InputError)


def put_in_place(temporary: Path, folder: Path) -> None:
    """Gives the finished folder its name; one that it replaces is whole until then."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    finish_folder(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def clear(folder: Path, scratch: str | None) -> None:
    """What only unfinished work needs goes; the folder has its name by then, so that a kill here loses nothing."""
    (folder / BEGUN).unlink(missing_ok=True)
    if scratch is not None:
        shutil.rmtree(folder / scratch, ignore_errors=True)
