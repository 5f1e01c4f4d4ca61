"""What training needs to resume: folders `state-<step>`, whole or not there, in safetensors and JSON.

Tensors are written whole, one after the other, whatever part of them each process has: a state is read by any number
of processes. The first process writes; each reads its rows. The two newest stay, the others go once a newer one has its
name: a state that does not have the sums that were taken of it is not used, and training resumes from the one before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..models import processes
from ..models.errors import InputError
from ..models.folder import atomic_folder, file_sums, write_json
from ..models.foreign import read_object
from ..models.tensors import TensorFile
from .parallel import Trained, TrainedWeight

WEIGHTS, AVERAGE, OPTIMIZER = "model.safetensors", "average.safetensors", "optimizer.safetensors"
METRICS, SUMS = "metrics.jsonl", "sums.json"
Say = Callable[[str], None]
Optimizers = dict[str, torch.optim.Optimizer]


@dataclasses.dataclass
class Progress:
    """How far training is. `skipped` steps were not finite, the last `in_a_row` among them; `best_step` had the best
    held-out figure."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    in_a_row: int = 0
    best_step: int | None = None
    best_value: float | None = None


def states(folder: Path) -> list[Path]:
    """The states in a folder, the newest last."""
    return numbered(folder, "state")


def step_of(state: Path) -> int:
    return int(state.name.removeprefix("state-"))


def numbered(folder: Path, kind: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"{kind}-*") if path.name[len(kind) + 1 :].isdigit())


def save_state(
    trained: Trained,
    optimizers: Optimizers,
    average: Mapping[str, Tensor],
    folder: Path,
    progress: Progress,
    *,
    needed: Callable[[Sequence[Path]], Sequence[Path]] = lambda there: (),
) -> None:
    """Writes `folder/state-<step>/`, with what `folder/metrics.jsonl` has so far; then all but the newest two states
    and those `needed` of them go, and what was best before.

    Every process has to call it. Raises DiskError, in all of them, where the disk refuses."""
    target = folder / f"state-{progress.step:08d}"
    if processes.from_first(target.exists()):
        return
    # The folder has its name once all of it is on the disk. A run that is killed before that leaves a .partial folder
    # and the older state, from which the same steps come again, to the same bits.
    with processes.together(), written(target) as temporary:
        write_whole(place(temporary, WEIGHTS), model_parts(trained, {w.name: w.local for w in trained.weights}))
        if average:
            write_whole(place(temporary, AVERAGE), model_parts(trained, average))
        write_whole(place(temporary, OPTIMIZER), optimizer_tensors(trained, optimizers))
        if temporary is not None:
            write_json(temporary / "state.json", dataclasses.asdict(progress))
            if (folder / METRICS).exists():
                shutil.copyfile(folder / METRICS, temporary / METRICS)
            write_sums(temporary)
    if processes.rank() == 0:  # only now: at every moment one whole state is there
        there = states(folder)
        kept = {*there[-2:], *needed(there)}
        for old in (*states(folder), *numbered(folder, "best")):
            if old not in kept and old.name != f"best-{progress.best_step or 0:08d}":
                shutil.rmtree(old)


def save_best(trained: Trained, tensors: Mapping[str, Tensor], folder: Path, progress: Progress) -> None:
    """Writes the weights alone, as `folder/best-<step>/`; every process has to call it."""
    target = folder / f"best-{progress.step:08d}"
    if processes.from_first(target.exists()):
        return
    with processes.together(), written(target) as temporary:
        write_whole(place(temporary, WEIGHTS), model_parts(trained, tensors))
        if temporary is not None:
            write_json(temporary / "best.json", {"step": progress.step, "value": progress.best_value})
            write_sums(temporary)


def write_sums(folder: Path) -> None:
    write_json(folder / SUMS, file_sums(folder, sorted(folder.iterdir())))


def is_whole(folder: Path) -> bool:
    """Whether a state has the files that were written, as they were."""
    try:
        sums = read_object(folder / SUMS)
        return sums == file_sums(folder, [folder / name for name in sums], like=sums)
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def drop_damaged(folder: Path, say: Say) -> None:
    """Removes the states and bests in a folder that are not as they were written, and says so."""
    for path in (*states(folder), *numbered(folder, "best")):
        if not is_whole(path):
            say(f"{path} is damaged and not used: training resumes from what was saved before it")
            shutil.rmtree(path)


def written(target: Path) -> contextlib.AbstractContextManager[Path | None]:
    """The temporary folder in the first process, None in the others."""
    return atomic_folder(target) if processes.rank() == 0 else contextlib.nullcontext()


def place(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / name


def model_parts(trained: Trained, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, TrainedWeight | None, Tensor]]:
    """Every tensor of a model whose weights have these parts here, as `write_whole` takes it."""
    yield from ((weight.name, weight, parts[weight.name]) for weight in trained.weights)
    yield from ((name, None, tensor) for name, tensor in trained.carried().items())


def optimizer_tensors(trained: Trained, optimizers: Optimizers) -> Iterator[tuple[str, TrainedWeight | None, Tensor]]:
    """Every tensor of the optimizers' states as KIND/WEIGHT/FIELD, with the weight if it is split like it."""
    for kind, optimizer in sorted(optimizers.items()):
        for weight in trained.weights:
            for field, value in sorted(optimizer.state.get(weight.local, {}).items()):
                tensor = torch.as_tensor(value)
                yield f"{kind}/{weight.name}/{field}", weight if tensor.dim() else None, tensor


def write_whole(path: Path | None, tensors: Iterable[tuple[str, TrainedWeight | None, Tensor]]) -> None:
    """A file of tensors, each put together of the processes' parts when its turn comes. Where the path is None, parts
    are handed over and nothing is written.

    A disk that refuses is heard of when all parts are in: the others wait for no one meanwhile."""
    items = list(tensors)
    forms = {
        name: (part.dtype, (weight.shape if weight is not None else tuple(part.shape))) for name, weight, part in items
    }
    error: Exception | None = None
    with contextlib.ExitStack() as stack:
        file = None
        try:
            file = None if path is None else stack.enter_context(TensorFile(path, forms))
        except InputError as caught:
            error = caught
        for name, weight, part in items:
            whole = part if weight is None else weight.whole(part)
            if file is not None and error is None:
                try:
                    file.write(name, whole)
                except InputError as caught:
                    error = caught
        if error is not None:
            raise error


def load_state(
    trained: Trained, optimizers: Optimizers, average: dict[str, Tensor], folder: Path, say: Say = print
) -> Progress:
    """Fills model, optimizers and average from the newest whole state, and clears what a killed run has left. The lines
    of metrics.jsonl are those that were saved with it."""
    with processes.together():
        if processes.rank() == 0:
            for leftover in (*folder.glob(".*.partial"), *folder.glob(".*.writing")):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            drop_damaged(folder, say)
            kept = states(folder)
            restore_metrics(folder, kept[-1] if kept else None)
    all_states = processes.from_first(states(folder))
    if not all_states:
        remove_bests(folder, 0)
        return Progress()
    newest = all_states[-1]  # as the first process sees it: on a shared disk another may not see it yet
    read_weights(trained, newest / WEIGHTS)
    if average and (newest / AVERAGE).exists():
        read_parts(newest / AVERAGE, trained, average)
    elif average:  # a run resumed with ema_decay added begins its average here
        for weight in trained.weights:
            average[weight.name].copy_(weight.local.detach())
    by_name = {weight.name: weight for weight in trained.weights}
    with safe_open(newest / OPTIMIZER, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            kind, name, field = key.split(
                "/"
            )  # AdamW's step is a scalar, whole everywhere; moments are split as weights
            weight, part = by_name[name], file.get_slice(key)
            value = part[weight.rows] if part.get_shape() else file.get_tensor(key)
            optimizers[kind].state[weight.local][field] = value.to(weight.local.device)
    # A best beyond the state is of steps that come again, and is written again then.
    try:
        progress = Progress(**read_object(newest / "state.json"))
    except TypeError:
        raise InputError(f"{newest / 'state.json'} is none of limbeck's; remove {newest}") from None
    remove_bests(folder, progress.step)
    if progress.best_step is not None and not processes.from_first(
        (folder / f"best-{progress.best_step:08d}").exists()
    ):
        progress.best_step = progress.best_value = None
    return progress


def remove_bests(folder: Path, step: int) -> None:
    """Removes those of later steps, which training has yet to reach."""
    if processes.rank() == 0:
        for path in numbered(folder, "best"):
            if int(path.name.removeprefix("best-")) > step:
                shutil.rmtree(path)


def read_weights(trained: Trained, path: Path) -> None:
    """Fills a model from a file of whole tensors."""
    read_parts(path, trained, {weight.name: weight.local for weight in trained.weights})
    trained.moved()


@torch.no_grad()
def fill_weights(trained: Trained, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Fills a model with whole tensors, of which each process takes its rows."""
    by_name, carried = {weight.name: weight for weight in trained.weights}, trained.carried()
    for name, tensor in tensors:
        if name in carried:
            carried[name].copy_(tensor)
        else:
            by_name[name].local.copy_(tensor[by_name[name].rows])
    trained.moved()


@torch.no_grad()
def read_parts(path: Path, trained: Trained, parts: Mapping[str, Tensor]) -> None:
    """Fills the parts of a model's weights that are here, and what it carries."""
    with safe_open(path, framework="pt") as file:
        targets = list(model_parts(trained, parts))
        assert set(file.keys()) == {name for name, _, _ in targets}, f"{path} is of another model"
        for name, weight, target in targets:
            rows = weight is not None and weight.shape
            target.copy_(file.get_slice(name)[weight.rows] if rows else file.get_tensor(name))  # type: ignore[union-attr]


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record, allow_nan=False) + "\n")


def restore_metrics(folder: Path, state: Path | None) -> None:
    """Makes metrics.jsonl what it was when a state was saved; without a state no line counts."""
    if state is None or not (state / METRICS).exists():
        (folder / METRICS).unlink(missing_ok=True)
        return
    temporary = folder / (METRICS + ".partial")
    shutil.copyfile(state / METRICS, temporary)
    os.replace(temporary, folder / METRICS)


def trim_lines(path: Path, step: int) -> None:
    """Drops what was logged beyond a step, and a line cut off by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def last_figures(folder: Path, names: Sequence[str]) -> dict[str, float]:
    """Those of the figures that a training's metrics.jsonl has of the weights that it left: its last line, or that of
    the step which was kept as the best."""
    try:
        records = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
        left = json.loads((folder / "limbeck.json").read_text(encoding="utf-8")).get("weights")
    except OSError:
        return {}
    best = left.get("step") if isinstance(left, dict) and left.get("kept") == "best" else None
    stage = records[-1].get("stage") if records else None  # of several, whose steps are counted through, the last's
    before = max((each.get("step", 0) for each in records if each.get("stage") != stage), default=0)
    of_best = [each for each in records if best is not None and each.get("step") == before + best]
    record = (of_best or records or [{}])[-1]
    return {name: record[name] for name in names if name in record}


def check_measured(evaluate_every: int, average_states: int) -> None:
    """Raises InputError where nothing measures what a training leaves: without evaluations, and a mean of states."""
    wrong = "evaluate_every is 0" if not evaluate_every else f"average_states is {average_states}"
    if not evaluate_every or average_states > 1:
        raise InputError(
            f"distill.train.{wrong}; picks are made by the held-out KL of the weights that are left, give 1"
        )
