"""Tables of lm-evaluation-harness, each model's answers kept by its contents."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...kernels.products import chosen
from ...models.errors import InputError, guess
from ...models.fingerprint import digest, fingerprint_of
from ...models.folder import cache_folder, sha256_file, write_json
from ...models.foreign import own_path, read_object
from ...models.hybrid import HybridLM
from ...models.placement import placed
from ...models.tokenizer import Tokenizer, load_tokenizer
from ..text.formats import first_line

SUFFIXES = (".yaml", ".yml")  # of task files
DATA_KEYS = ("dataset_path", "dataset_kwargs")  # of a task file
FORMAT = 2  # of kept answers; another number wherever a change of ours may change what a model answers
OnStep = Callable[[str, int, int], None]


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
        files = {name: own_path(name) for name in self.names if name.endswith(SUFFIXES)}
        for name, path in files.items():
            if not path.is_file():
                raise InputError(f"tasks: {name} does not exist; give a task's .yaml file, or a name of the harness")
        return files

    @property
    def harness_names(self) -> list[str]:
        """The names as the harness takes them."""
        return [str(self.files.get(name, name)) for name in self.names]

    def content(self) -> dict[str, Any]:
        """What the answers depend on besides the model: names, the task files, the local files that they name, and the
        code beside them, which `!function` takes functions from."""
        return {"names": [Path(name).name for name in self.names],
                "files": [read_by(path) for path in self.files.values()], "shots": self.shots,
                "limit": self.limit}  # fmt: skip


def read_by(path: Path) -> dict[str, str]:
    """The sha256 of a task file, of the local files and folders that it names, of what the task files that it includes
    name, and of the code beside it. Raises InputError where a task file cannot be read."""
    read: dict[str, str] = {}
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if str(file) in read:
            continue
        read[str(file)] = sha256_file(file)
        for text, is_data in texts_of(parsed(file)):
            for place in places_of(text, file.parent, is_data):
                if place.suffix in SUFFIXES and place.is_file():
                    waiting.append(place)
                else:
                    read[str(place)] = fingerprint_of(place)
        read |= {str(code): sha256_file(code) for code in sorted(file.parent.glob("*.py"))}
    return {os.path.relpath(place, path.parent): value for place, value in sorted(read.items())}


def parsed(path: Path) -> Any:
    """A YAML file's content, every scalar a text. Raises InputError."""
    import yaml

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"tasks: {path} cannot be read: {' '.join(str(error).split())}") from None


def places_of(text: str, beside: Path, is_data: bool) -> Iterator[Path]:
    """The files of this machine that a text names, as it stands or from a task file's folder; where data are named,
    also folders, and the files of a pattern."""
    for place in (text, os.path.join(beside, text)):
        if os.path.isfile(place) or (is_data and text and os.path.isdir(place)):  # Path's raise for a text too long
            yield Path(place)
        elif is_data and "*" in text:
            yield from (Path(name) for name in sorted(glob.glob(place, recursive=True)) if os.path.isfile(name))


def texts_of(content: Any, is_data: bool = False) -> Iterator[tuple[str, bool]]:
    """All texts within a YAML file's content, and whether each stands where a task says what its data are."""
    if isinstance(content, str):
        yield content, is_data
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from texts_of(value, is_data or key in DATA_KEYS)
    elif isinstance(content, Sequence):
        for value in content:
            yield from texts_of(value, is_data)


@dataclasses.dataclass(frozen=True)
class PlannedTasks:
    """Tasks that are known to be there: the file of each model's kept answers, what they depend on besides the model,
    and the harness's task manager where any are missing."""

    tasks: Tasks
    kept: Mapping[str, Path]
    facts: Mapping[str, Any]
    seed: int
    manager: Any


def plan_tasks(folders: Mapping[str, Path], tasks: Tasks, *, dtype: torch.dtype, seed: int) -> PlannedTasks:
    """Answers are kept in the folder that LIMBECK_CACHE names (else ~/.cache/limbeck), by the contents of the model and
    of the tasks, and by the versions of what asks. Raises InputError where the harness is missing, or a task is unknown
    or cannot be loaded."""
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
        **chosen(),
    }
    kept = {
        name: cache_folder() / "tasks" / f"{digest(facts | {'model': fingerprint_of(folder)})}.json"
        for name, folder in folders.items()
    }
    known = all(path.is_file() for path in kept.values())
    return PlannedTasks(tasks, kept, facts, seed, None if known else load_tasks(tasks))


def answer_tasks(
    models: Mapping[str, HybridLM],
    folders: Mapping[str, Path],
    plan: PlannedTasks,
    *,
    device: torch.device | None = None,
    on_step: OnStep | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """{model: {task: {metric: value}}}, the harness's standard errors among the metrics; each model answers on a
    `device` where one is given. `on_step(model, done, of)`. Raises InputError where a task cannot be answered."""
    answers = {}
    for name, kept in plan.kept.items():
        if not kept.is_file():
            with placed(models[name], device) as model:
                results = answers_of(name, model, load_tokenizer(folders[name]), plan, on_step)
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, {"results": results, **plan.facts})
        answers[name] = read_object(kept)["results"]
    return answers


def load_tasks(tasks: Tasks) -> Any:
    """The harness's task manager, once it has loaded each task. Raises InputError."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_defaults=len(tasks.files) < len(tasks.names))
    for name in tasks.names:
        if name not in tasks.files and name not in manager.all_tasks:
            raise InputError(f"tasks: {name!r} is no task of the harness{guess(name, list(manager.all_tasks))}")
    with errors_of(tasks):
        manager.load(tasks.harness_names)
    return manager


@contextlib.contextmanager
def errors_of(tasks: Tasks) -> Iterator[None]:
    """Turns what the harness raises of a wrong task, or of data that cannot be had, into InputError; it has no errors
    of its own, and raises many."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"tasks: {', '.join(tasks.harness_names)}: {type(error).__name__}: {first_line(error)}"
        ) from error


def answers_of(
    name: str, model: HybridLM, tokenizer: Tokenizer, plan: PlannedTasks, on_step: OnStep | None
) -> dict[str, dict[str, float]]:
    """One model's results."""
    from lm_eval.evaluator import simple_evaluate

    from .harness import HarnessModel  # needs lm_eval

    tasks, seed = plan.tasks, plan.seed
    told = None if on_step is None else functools.partial(on_step, name)
    with errors_of(tasks):
        content: Any = simple_evaluate(
            model=HarnessModel(model, tokenizer, on_step=told, seed=seed), tasks=tasks.harness_names,
            task_manager=plan.manager,
            num_fewshot=tasks.shots, limit=tasks.limit, random_seed=seed, numpy_random_seed=seed,
            torch_random_seed=seed, fewshot_random_seed=seed, bootstrap_iters=1000, log_samples=False,
        )  # fmt: skip
    return {
        task: {key: value for key, value in metrics.items() if isinstance(value, float)}
        for task, metrics in content["results"].items()
    }
