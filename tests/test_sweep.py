"""`--multirun`: a folder a job, here, through submitit, and as Slurm would get them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from limbeck.scripts.run.mistakes import explain
from limbeck.tests.helpers import limbeck


def words(work: Path, output: Path) -> list[str]:
    places = [f"teacher={work / 'model'}", f"student={work / 'model'}", f"data={work / 'text'}", f"output={output}"]
    few = ["steps=2", "log_every=1"]
    return [
        *places,
        *(f"distill.train.{word}" for word in few),
        "distill.seq_len=32",
        "distill.batch=2",
        "distill.evaluate_tokens=64",
        "device=cpu",
    ]


def test_every_combination_has_a_folder(workshop: Path, tmp_path: Path) -> None:
    command = ["distill", "--multirun", *words(workshop, tmp_path / "out")]
    code, out, err = limbeck(*command, "seed=3,4")
    assert code == 0, err
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert limbeck(*command, "seed=3")[0] == 0  # fewer jobs than there are
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())[1:] == rows[1:]
    assert [row["overrides"] for row in rows] == [["seed=3"], ["seed=4"]]
    for number, row in enumerate(rows):
        folder = tmp_path / "out" / str(number)
        assert row["folder"] == str(folder) and row["validation_kl"] >= 0
        assert json.loads((folder / "limbeck.json").read_text())["options"]["seed"] == 3 + number
        record = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert record["step"] == 2 and row["loss"] == record["loss"]
    assert "2 jobs" in out and not list(Path().glob("multirun"))
    for wrong, says in (
        ("distill.train.steps=0,2", "must be at least 1"),
        ("distill.train.stepps=1,2", "'distill.train.stepps' is no option of limbeck distill; did you mean"),
        ("hydra/launcher=sge", "sge"),
    ):
        code, _, err = limbeck(*command[:-3], f"output={tmp_path / 'no'}", wrong)
        assert code == 2 and says in err and err.count("\n") == 1, err
    code, _, err = limbeck("distill", "--multirun", "teacher=zoo", "seed=1,2")
    assert code == 2 and "output is missing" in err


def test_finished_jobs_are_listed_where_one_fails(workshop: Path, tmp_path: Path) -> None:
    command = ["distill", "--multirun", *words(workshop, tmp_path / "out"), "distill.train.steps=0,1,2"]
    command = [word for word in command if word != "distill.train.steps=2"]
    code, out, err = limbeck(*command)
    assert code == 2 and err.startswith("limbeck: job 0 (distill.train.steps=0): ") and err.count("\n") == 1, err
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row["overrides"] for row in rows] == [["distill.train.steps=1"], ["distill.train.steps=2"]]
    assert [Path(row["folder"]).name for row in rows] == ["1", "2"] and "2 jobs" in out
    assert not (tmp_path / "out" / "result.json").exists()
    command[-1] = "distill.train.steps=0"
    assert limbeck(*command)[0] == 2 and json.loads((tmp_path / "out" / "sweep.json").read_text()) == rows


def test_a_check_that_says_no_keeps_its_exit_code(tmp_path: Path) -> None:
    words = ["memory-fit", "--multirun", "model=nemotron-nano-9b-v2", "hardware=a10g", f"output={tmp_path / 'out'}"]
    code, _, err = limbeck(*words, "fit.context=131072", "fit.batch=1,8")
    assert code == 3 and "job 1 (fit.batch=8)" in err and err.count("\n") == 1, err
    assert [Path(row["folder"]).name for row in json.loads((tmp_path / "out" / "sweep.json").read_text())] == ["0"]


@pytest.mark.parametrize("content", ('{"mine": 1}', '[{"mine": 1}]', "no JSON", None))
def test_a_folder_of_something_else_is_left_alone(content: str | None, tmp_path: Path) -> None:
    """With a sweep.json of another program, or with none."""
    words = ["memory-fit", "--multirun", "model=zoo", "fit.context=512,1024", f"output={tmp_path / 'out'}"]
    (tmp_path / "out").mkdir()
    name = "thesis" if content is None else "sweep.json"
    (tmp_path / "out" / name).write_text(content or "mine")
    code, _, err = limbeck(*words)
    assert code == 2 and "not of limbeck --multirun" in err and err.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_text() == (content or "mine")


@pytest.mark.slow
def test_a_sweep_s_own_folder_or_an_empty_one_will_do(tmp_path: Path) -> None:
    words = ["memory-fit", "--multirun", "model=zoo", "fit.context=512,1024", f"output={tmp_path / 'out'}"]
    (tmp_path / "out").mkdir()
    code, _, err = limbeck(*words)
    assert code == 0, err
    rows = (tmp_path / "out" / "sweep.json").read_text()
    code, _, err = limbeck(*words)
    assert code == 2 and "job 0 (fit.context=512): " in err and "exists already" in err
    assert (tmp_path / "out" / "sweep.json").read_text() == rows  # the jobs of before are there
    code, _, err = limbeck(*words[:-1], f"output={tmp_path / 'new'}", "fit.contxt=1")
    assert code == 2 and "fit.contxt" in err and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_dry_runs_are_not_listed_and_options_are_not_printed(tmp_path: Path) -> None:
    words = ["compress", "model=zoo", "dry_run=true", f"output={tmp_path / 'out'}", "target.layers=10,11"]
    code, _, err = limbeck(*words, "--multirun", "--cfg", "job")
    assert code == 2 and "--multirun" in err and err.count("\n") == 1 and not (tmp_path / "out").exists()
    code, out, err = limbeck(*words, "--multirun")
    assert code == 0 and "job 1 wrote nothing: target.layers=11" in out, err
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == []
    assert json.loads((tmp_path / "out" / "result.json").read_text())["jobs"] == []


def test_a_launcher_that_is_not_installed() -> None:
    for what in ("In 'hydra/launcher/slurm': Could not load 'hydra/launcher/submitit_slurm'.",
                 "In 'hydra/config': Could not find 'hydra/launcher/submitit_local'"):  # fmt: skip
        assert "pip install 'limbeck[slurm]'" in explain("distill", [], ValueError(what))


def test_slurm_launcher_composes() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from hydra import compose, initialize_config_module

    with initialize_config_module("limbeck.conf", version_base="1.3"):
        found = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu"]
        launcher = compose("distill", overrides=found, return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher") and launcher.partition == "gpu"
    assert launcher.tasks_per_node == launcher.gpus_per_node == 8 and launcher.max_num_timeout > 0


@pytest.mark.slow
def test_two_tasks_of_a_submitted_job_are_two_processes(workshop: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    command = [
        sys.executable,
        "-m",
        "limbeck.scripts.run.main",
        "distill",
        "--multirun",
        *words(workshop, tmp_path / "out"),
    ]
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2", "hydra.launcher.timeout_min=5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run([*command, *launcher], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = sorted((tmp_path / "out" / "hydra" / ".submitit").rglob("*_log.out"))
    assert len(logs) == 2 and [("result: " in log.read_text()) for log in logs] == [True, False]  # the first speaks
    assert (tmp_path / "out" / "0" / "model.safetensors").exists()


def test_a_job_is_the_command_without_multirun(workshop: Path, tmp_path: Path) -> None:
    """Products as matmul= says, a group after the recipe, options of data=, and what is refused."""
    places = [f"model={workshop / 'model'}", f"data={workshop / 'text'}", "device=cpu", "seq_len=32", "batch=2"]
    few = ["importance.tokens=64", "importance.depth_tokens=64", "matmul=bfloat16"]
    assert limbeck("score", *places, *few, f"output={tmp_path / 'alone'}")[0] == 0
    code, _, err = limbeck("score", "--multirun", *places, *few, f"output={tmp_path / 'out'}", "seed=0,1")
    assert code == 0, err
    alone, job = (json.loads((folder / "limbeck.json").read_text()) for folder in
                  (tmp_path / "alone", tmp_path / "out" / "0"))  # fmt: skip
    assert alone["options"] == job["options"] and alone["options"]["matmul"] == "bfloat16"
    same = "scores.safetensors"
    assert (tmp_path / "alone" / same).read_bytes() == (tmp_path / "out" / "0" / same).read_bytes()
    recipe = tmp_path / "own.yaml"
    recipe.write_text("hardware:\n  usable_gib: 3\n")
    search = ["search", "model=nemotron-nano-9b-v2", "space.layers=[56]", f"recipe={recipe}", "hardware=l4"]
    assert limbeck(*search, f"output={tmp_path / 's'}")[0] == 0
    assert limbeck(*search, "--multirun", f"output={tmp_path / 'm'}")[0] == 0
    budgets = [json.loads((folder / "candidates.json").read_text())["budget_bytes"]
               for folder in (tmp_path / "s", tmp_path / "m" / "0")]  # fmt: skip
    assert budgets[0] == budgets[1]
    code, _, err = limbeck("score", "--multirun", *places, "importance=random", f"output={tmp_path / 'n'}", "seed=-1")
    assert code == 2 and "seed" in err
    words = [*places, "importance=random", "data.special_tokens=true"]
    assert limbeck("score", "--multirun", *words, f"output={tmp_path / 'd'}")[0] == 0
    code, _, err = limbeck("score", "--multirun", *places, "data.no=1", f"output={tmp_path / 'e'}")
    assert code == 2 and "data.no is no option" in err
