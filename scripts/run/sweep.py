"""`limbeck COMMAND --multirun`: a job for each combination of comma-separated values, by Hydra's sweeper and launchers.

Jobs run here one after the other, or where `hydra/launcher=` says: `slurm` (conf/hydra/launcher/) and submitit's own.
Job N makes OUTPUT/N; what Hydra and submitit write for themselves is in OUTPUT/hydra.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...models.errors import InputError, Stopped
from ...models.folder import owned
from ...models.foreign import own_path
from .compose import compose_config, explained, register_widths, split_data, split_verbatim
from .jobs import list_jobs, marked
from .main import finish, prepared
from .mistakes import with_free_keys
from .outside import own_recipes, quoted, searched


class Job:
    """One combination, run as the same command without --multirun would be: Hydra's overrides of the job beside the
    `words` of texts and data, which it does not read, and `folders` of choices of groups."""

    def __init__(self, command: str, words: Sequence[str], output: Path, folders: Sequence[Path]) -> None:
        self.command, self.words, self.output, self.folders = command, list(words), output, list(folders)

    def __call__(self, config: Any) -> str | Exception:
        """Runs the command, and answers with its folder, or with what went wrong: the other jobs are listed, and Hydra
        would say it in its own way."""
        from hydra.core.hydra_config import HydraConfig

        job = HydraConfig.get()
        join_tasks()
        folder = self.output / str(job.job.num)
        words = [*job.overrides.task, *self.words, f"output={folder}"]
        try:
            with apart():
                content = compose_config(self.command, words, self.folders)
            prepared(self.command, content, words, self.folders)()
        except Stopped as error:  # not this job alone
            raise SystemExit(finish(128 + error.signal, str(error))) from None
        except Exception as error:
            return error
        return str(folder)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Leaves the running Hydra alone, so that another one may compose; there can be one at a time."""
    from hydra.core.global_hydra import GlobalHydra

    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = running


def join_tasks() -> None:
    """Tells torch.distributed of the tasks that submitit has started for one job, as torchrun would."""
    if "WORLD_SIZE" in os.environ or "SUBMITIT_EXECUTOR" not in os.environ:
        return
    import submitit

    if submitit.JobEnvironment().num_tasks > 1:
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


def sweep(command: str, overrides: Sequence[str], folders: Sequence[Path] = ()) -> None:
    """Runs every job, and lists their folders in OUTPUT/sweep.json, those that could be made. Raises InputError, and
    what the first job raised that could not."""
    from hydra import version
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_automatic_config_search_path
    from hydra.core.global_hydra import GlobalHydra

    others, _ = split_data(overrides)
    texts, words = split_verbatim(command, others, sweeping=True, folders=folders)
    if "output" not in texts:
        raise InputError(f"output is missing; give output=FOLDER, in which each job of --multirun has its own"
                         f" (limbeck {command} --help)")  # fmt: skip
    out = own_path(texts.pop("output"))
    fixed_words = [f"{key}={value}" for key, value in texts.items()]
    fixed_words += [word for word in overrides if word not in others]
    fixed = {
        "hydra/job_logging": "none", "hydra/hydra_logging": "none", "hydra.output_subdir": "null",
        "hydra.job.name": f"limbeck-{command}", "hydra.job.chdir": "false",
        "hydra.sweep.dir": quoted(str(out / "hydra")), "hydra.sweep.subdir": "${hydra.job.num}",
    }  # fmt: skip
    version.setbase("1.3")
    register_widths()
    hidden = [f"{key}={value}" for key, value in fixed.items()]
    given = [word for word in words if not word.lstrip("+~").startswith("hydra")]
    with owned(out), marked(out), own_recipes(words, out / "hydra") as (words, own), explained(command, given):
        words, hidden = with_free_keys(command, words, [*folders, *own]), hidden + searched([*folders, *own])
        try:
            search = create_automatic_config_search_path(None, None, "pkg://limbeck.conf")
            hydra = Hydra.create_main_hydra2(task_name=f"limbeck-{command}", config_search_path=search)
            job = Job(command, fixed_words, out, [*folders, *own])
            batches = hydra.multirun(command, job, [*words, *hidden], with_log_configuration=False)
        finally:
            GlobalHydra.instance().clear()
    list_jobs(out, [job for batch in batches for job in batch])
