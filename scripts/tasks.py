"""`limbeck evaluate tasks=[...]`: tables of lm-evaluation-harness, each model's answers kept by its contents."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from .. import __version__
from ..distill.corpus_cache import cache_folder
from ..distill.report_gap import task_rows
from ..models.checkpoint import load_model
from ..models.errors import InputError
from ..models.folder import sha256_file, write_json
from ..models.tokenizer import load_tokenizer
from .compose import guess
from .show import progress, read_json, table
from .stage import digest, fingerprint_of

FORMAT = 1  # of kept answers; another number wherever a change of ours may change what a model answers


@dataclasses.dataclass(frozen=True)
class Tasks:
    """names: tasks of the harness, or .yaml files of one each; shots: solved examples before each question (None: the
    task's own number); limit: the first so many questions of each (None: all)."""

    names: tuple[str, ...] = ()
    shots: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("shots", self.shots, 0), ("limit", self.limit, 1)):
            if value is not None and value < least:
                raise InputError(f"details.task_{name} is {value}; expected at least {least}")

    @property
    def files(self) -> dict[str, Path]:
        """The names that are files. Raises InputError where one does not exist."""
        found = {name: Path(name).expanduser() for name in self.names if name.endswith((".yaml", ".yml"))}
        for name, path in found.items():
            if not path.is_file():
                raise InputError(f"tasks: {name} does not exist; give a task's .yaml file, or a name of the harness")
        return found

    def content(self) -> dict[str, Any]:
        """What the answers depend on besides the model: names, the task files, the local files that they name, and the
        code beside them, which `!function` takes functions from."""
        return {"names": [Path(name).name for name in self.names],
                "files": [read_by(path) for path in self.files.values()], "shots": self.shots,
                "limit": self.limit}  # fmt: skip


def read_by(path: Path) -> dict[str, str]:
    """The sha256 of a task file, of the local files that it names, and of the code beside it."""
    read = {path.name: sha256_file(path)}
    for text in texts_of(yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)):
        for place in (Path(text), path.parent / text):
            if os.path.isfile(place):  # where Path.is_file raises for a text too long for a name
                read[text] = sha256_file(place)
    return read | {code.name: sha256_file(code) for code in sorted(path.parent.glob("*.py"))}


def texts_of(content: Any) -> Iterator[str]:
    """All texts within a YAML file's content."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from texts_of(value)
    elif isinstance(content, Sequence):
        for value in content:
            yield from texts_of(value)


def answer(
    folders: Mapping[str, Path], tasks: Tasks, *, dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """{model: {task: {metric: value}}}, the harness's standard errors among the metrics.

    Answers are kept in the folder that LIMBECK_CACHE names (else ~/.cache/limbeck), by the contents of the model and of
    the tasks, and by the versions of what asks. Raises InputError where the harness is missing, or a task is unknown or
    cannot be loaded.
    """
    try:
        version = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise InputError("tasks need lm-evaluation-harness: pip install 'limbeck[eval]'") from None
    facts = {
        "limbeck": __version__,
        "format": FORMAT,
        "tasks": tasks.content(),
        "lm_eval": version,
        "dtype": str(dtype),
        "seed": seed,
        "torch": torch.__version__,
    }
    found = {}
    loaded: Any = None
    for name, folder in folders.items():
        kept = cache_folder() / "tasks" / f"{digest(facts | {'model': fingerprint_of(folder)})}.json"
        if not kept.is_file():
            loaded = loaded or load_tasks(tasks)
            answers = asked(name, folder, loaded, tasks, dtype, device, seed)
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, {"results": answers} | facts)
        found[name] = read_json(kept)["results"]
    return found


def load_tasks(tasks: Tasks) -> Any:
    """(the harness's task manager, the tasks' names in it). Raises InputError."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_defaults=len(tasks.files) < len(tasks.names))
    for name in tasks.names:
        if name not in tasks.files and name not in manager.all_tasks:
            raise InputError(f"tasks: {name!r} is no task of the harness{guess(name, list(manager.all_tasks))}")
    return manager


def asked(
    name: str, folder: Path, manager: Any, tasks: Tasks, dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, dict[str, float]]:
    """One model's results."""
    from lm_eval.evaluator import simple_evaluate

    from ..distill.harness import HarnessModel  # needs lm_eval

    names = [str(tasks.files.get(each, each)) for each in tasks.names]
    with progress(f"tasks: {name}", 1) as bar:
        model = HarnessModel(
            load_model(folder, dtype, device), load_tokenizer(folder), on_step=lambda done, total: bar.set(done, total)
        )
        try:
            found: Any = simple_evaluate(
                model=model, tasks=names, task_manager=manager, num_fewshot=tasks.shots, limit=tasks.limit,
                random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
                bootstrap_iters=1000, log_samples=False,
            )  # fmt: skip
        except (OSError, ValueError, KeyError) as error:  # a task file that is wrong, a data set that cannot be had
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"tasks: {', '.join(names)}: {type(error).__name__}: {str(error).splitlines()[0]}"
            ) from None
    return {
        task: {key: value for key, value in metrics.items() if isinstance(value, float)}
        for task, metrics in found["results"].items()
    }


def show_tasks(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """A row for each task and metric, a column for each model, with standard errors; nothing where none was asked."""
    if found:
        table("Tasks (lm-evaluation-harness)", ("task, metric", *found), [*task_rows(found)])
