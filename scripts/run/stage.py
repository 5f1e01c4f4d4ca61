"""A stage: a folder made from inputs and options, that appears whole, is not made twice, and knows what made it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...models import processes
from ...models.errors import DiskError, InputError
from ...models.fingerprint import BEGUN, LOG, PROVENANCE, RUN, Fingerprint, put_in_place, summed, unfinished
from ...models.folder import owned, write_json
from ...models.foreign import own_path
from ...models.named import input_notes
from .facts import run_facts
from .resolve import torch_device
from .show import console, logged


def launched_processes() -> int:
    """How many a launcher has started, by the environment. Raises InputError where that is none of a launcher's."""
    numbers = {name: os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    for name, value in numbers.items():
        if value is not None and not (value.isascii() and value.isdigit() and len(value) < 10):
            raise InputError(f"the environment has {name}={value!r}; expected a whole number, as torchrun sets it")
    count, rank = int(numbers["WORLD_SIZE"] or 1), int(numbers["RANK"] or 0)
    if count > 1 and None in numbers.values():
        missing = ", ".join(name for name, value in numbers.items() if value is None)
        raise InputError(f"the environment has WORLD_SIZE={count} without {missing}; start it by torchrun")
    if count > 1 and rank >= count:
        raise InputError(f"the environment has RANK={rank} and WORLD_SIZE={count}; expected a rank below the size")
    return count


@contextlib.contextmanager
def many_processes(device: str) -> Iterator[None]:
    """Joins the processes that a launcher started, unless they are, on GPUs by nccl, else by gloo; only the first
    speaks."""
    if processes.active() or launched_processes() < 2:
        yield
        return
    from accelerate import PartialState

    state = PartialState(cpu=torch_device(device).type != "cuda")
    quiet, console.quiet = console.quiet, console.quiet or not state.is_main_process
    try:
        yield
    finally:
        console.quiet = quiet
        state.destroy_process_group()
        processes.leave()


@dataclasses.dataclass
class Work:
    """What a stage has to do: nothing where it is `finished`, else what goes into the temporary `folder`. `notes` are
    what it has to say of itself, for limbeck.json; `sums` the checksums of files that are known already."""

    folder: Path
    finished: bool
    made_of: Fingerprint
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    sums: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """The stage's options as JSON knows them."""
        return self.made_of.options

    def content(self) -> dict[str, Any]:
        """What limbeck.json will say, without the notes: inputs by checksum, fingerprint. Waits for the sums."""
        return self.made_of.content()


@contextlib.contextmanager
def stage(
    folder: Path,
    name: str,
    *,
    inputs: Mapping[str, Path | str],
    options: Mapping[str, Any],
    resumes: bool = False,
    scratch: str | None = None,
    replaces: bool = False,
) -> Iterator[Work]:
    """Makes `folder` of what the block writes into `work.folder`, unless it is there already with the same fingerprint:
    then `work.finished` is true, and the block should leave it alone.

    With `resumes` the temporary folder outlives a kill and a full disk, and the block sees what it has done; a
    `scratch` folder within is no part of the result, and goes before the folder gets its name. With `replaces` a folder
    that was made otherwise goes when the new one is done, and unfinished work at once. All of a run's processes enter
    the block, with the first one's folder; it alone writes, and meanwhile no other command does.
    Raises InputError where the folder was made, or unfinished work begun, from something else, is damaged, lies within
    an input, or is another process's, and where an input is damaged or changes meanwhile.
    """
    writes, keeps = processes.rank() == 0, resumes or scratch is not None
    with contextlib.ExitStack() as held:
        with processes.together():
            made_of = Fingerprint(name, inputs, options)
            check_apart(folder, made_of)
        with processes.together():
            temporary = unfinished(folder, made_of, keeps, replaces, held, scratch) if writes else None
        temporary = processes.from_first(temporary)
        if temporary is None:
            yield Work(folder, True, made_of)
            return
        begun, resumed = time.time(), any(path.name not in (BEGUN, LOG) for path in temporary.iterdir())
        work = Work(temporary, False, made_of, input_notes(inputs))
        with processes.together():
            if writes:
                made_of.begin(temporary / BEGUN if keeps else None)
            try:
                with logged(temporary) if writes else contextlib.nullcontext():
                    yield work
                if writes:
                    apart = (BEGUN, *([scratch] if scratch is not None else []))
                    content = made_of.sealed(temporary, work.notes, apart, work.sums)
                    facts = run_facts(temporary, output=folder, inputs=made_of.inputs, begun=begun, resumed=resumed)
                    for name in apart:
                        facts["bytes"].pop(name, None)
                    write_json(temporary / PROVENANCE, content | {RUN: summed(facts)})
                    made_of.leave()
                    put_in_place(temporary, folder, scratch)
            except BaseException as error:
                made_of.leave()
                if writes and not (keeps and is_worth_keeping(error, temporary, scratch, resumed)):
                    shutil.rmtree(temporary, ignore_errors=True)
                raise


@contextlib.contextmanager
def owned_by_run(folder: Path) -> Iterator[None]:
    """The folder of several stages is this run's alone, of however many processes. Raises InputError in all of them."""
    with contextlib.ExitStack() as held:
        with processes.together():
            if processes.rank() == 0:
                held.enter_context(owned(folder))
                held.enter_context(logged(folder))
        yield


def check_apart(folder: Path, made_of: Fingerprint) -> None:
    """Raises InputError where the folder lies within one of its inputs, which would never stay as it was read."""
    place = own_path(folder).resolve()
    for key, value in made_of.inputs.items():
        if isinstance(value, Path) and value.is_dir() and value.resolve() in (place, *place.parents):
            raise InputError(
                f"output {folder} lies within {key}={value}, which would change while it is read; give an output"
                " outside of it"
            )


def check_ours(root: Path, known: set[str], mark: Path) -> None:
    """Raises InputError where a folder of several stages is there without the stage `mark` that claims it, and has
    more than what is `known` of them."""
    if not root.exists() or (root.is_dir() and mark.is_dir()):
        return
    strangers = [path.name for path in root.iterdir()] if root.is_dir() else [root.name]
    known = known | {LOG}
    if [name for name in strangers if re.sub(r"\.(partial|writing|old)$", "", name.strip(".")) not in known]:
        raise InputError(f"{root} exists already and is not of limbeck; give an output that does not")


def is_worth_keeping(error: BaseException, temporary: Path, scratch: str | None, resumed: bool) -> bool:
    """Whether the same command may resume: after a kill, a defect or a full disk, and what it had `resumed` itself; not
    where the input was wrong from the start."""
    worked = resumed or (scratch is not None and (temporary / scratch).exists())
    return worked or isinstance(error, DiskError) or not isinstance(error, InputError)
