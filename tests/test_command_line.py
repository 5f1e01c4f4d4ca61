"""What ordinary command lines have: paths of any spelling, flags, recipes of one's own, and an order that counts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from limbeck.scripts import compress, distill, evaluate
from limbeck.scripts.run.compose import build, compose_config
from limbeck.tests.helpers import compress_command, limbeck

NAMES = ("lr=0.1,seed=0", "runs (1)", "größe", "a#b", "it's", 'say "x"', "${home}", "[1, 2]")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ("student.x", "+student.x"))
def test_students_paths_are_taken_as_the_shell_gives_them(key: str, name: str) -> None:
    words = ["teacher=zoo", "data=stdlib", "output=gap", f"{key}={name}", "student.other=b"]
    assert build(evaluate.Options, compose_config("evaluate", words)).student == {"x": name, "other": "b"}


def test_a_student_needs_a_mapping_and_a_path() -> None:
    for line in ("distill teacher=zoo student=zoo data=x output=y student.x=a", "evaluate student.x=",
                 "score model=zoo data=x output=y +student.x=a"):  # fmt: skip
        code, _, err = limbeck(*line.split())
        assert code == 2 and err.count("\n") == 1 and "student.x" in err, err


@pytest.mark.parametrize("name", ("teacher", "data", "scores", "prompt"))
def test_a_student_is_not_named_as_something_else(name: str, tmp_path: Path) -> None:
    places = ["teacher=zoo", f"student.{name}={tmp_path}", "data=stdlib", f"output={tmp_path / 'out'}"]
    code, _, err = limbeck("evaluate", *places)
    assert code == 2 and err.count("\n") == 1 and "stands for" in err and name in err, err


def test_evaluate_takes_what_model_takes(workshop: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(workshop / "model", tmp_path / "lr=0.1,s (1) #größe's")
    code, _, err = limbeck(
        "evaluate", f"teacher={workshop / 'model'}", f"student.x={folder}", f"data={workshop / 'text'}", "tokens=64",
        f"output={tmp_path / 'gap'}", "split=all", "seq_len=32", "batch=2", "details.prompts=0", "details.resamples=20",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads((tmp_path / "gap" / "gap.json").read_text())["models"]["x"]["kl"]["value"] == pytest.approx(0)


def options(*words: str, folders: tuple[Path, ...] = ()) -> Any:
    return build(compress.Options, compose_config("compress", ["data=x", "output=y", *words], folders))


def test_what_comes_later_wins() -> None:
    """A group that is chosen after the recipe is as its choice has it; one before it gives way to the recipe; a single
    KEY=VALUE goes before both wherever it stands."""
    tiny, short = options("recipe=tiny"), options("recipe=tiny", "distill=short")
    assert short.distill == options("model=zoo", "target.layers=11", "distill=short").distill != tiny.distill
    assert short.target == tiny.target and short.repair == tiny.repair
    assert options("distill=short", "recipe=tiny") == tiny
    assert options("distill.train.steps=7", "recipe=tiny", "distill=short").distill.train.steps == 7
    assert options("recipe=tiny", "distill=short", "distill.train.steps=7").distill.train.steps == 7
    for method in ("random", "magnitude"):  # of which a recipe's keys would not be read
        later = options("recipe=tiny", f"importance={method}", "importance.pairs=true")
        assert later.importance.method == method and later.importance.pairs and later.importance.remove_layers is None
    assert options("recipe=qwen3", "hardware=a10g").hardware.name == "a10g"


def test_recipes_of_ones_own(tmp_path: Path) -> None:
    text = yaml.safe_dump({"model": "zoo", "seed": 7, "target": {"layers": 9}, "distill": {"batch": 3}})
    own = tmp_path / "it's #1 (größe).yaml"
    own.write_text(text)
    made = options(f"recipe={own}")
    assert (made.seed, made.target.layers, made.distill.batch, made.model) == (7, 9, 3, "zoo")
    assert options(f"recipe={own}", "distill=short").distill.batch == 8
    (tmp_path / "conf" / "recipe").mkdir(parents=True)
    (tmp_path / "conf" / "distill").mkdir()
    (tmp_path / "conf" / "recipe" / "mine.yaml").write_text("# @package _global_\ndefaults:\n- tiny\n\nseed: 9\n")
    (tmp_path / "conf" / "distill" / "brief.yaml").write_text("defaults:\n- default\n- _self_\n\nseq_len: 99\n")
    made = options("recipe=mine", "distill=brief", folders=(tmp_path / "conf",))
    assert made.seed == 9 and made.target.layers == 11 and made.distill.seq_len == 99
    code, out, err = limbeck("compress", f"--config-dir={tmp_path / 'conf'}", "recipe=mine", "--cfg", "job")
    assert code == 0 and yaml.safe_load(out)["seed"] == 9, err
    (tmp_path / "odd.yaml").write_text("a: [1")
    (tmp_path / "list.yaml").write_text("- 1")
    for words, says in (
        (["recipe=none.yaml"], "no such file"), ([f"recipe={tmp_path / 'odd.yaml'}"], "is no YAML"),
        ([f"recipe={tmp_path / 'list.yaml'}"], "holds no options"), (["--config-dir", "nowhere"], "no such folder"),
        (["recipe=mine"], "no such recipe"), (["--cfg", "all"], "expected job"), (["--quick"], "'--quick' is no flag"),
    ):  # fmt: skip
        code, _, err = limbeck("compress", *words)
        assert code == 2 and err.count("\n") == 1 and says in err, err


def test_the_options_are_printed_and_nothing_is_done(tmp_path: Path) -> None:
    code, out, err = limbeck("distill", "teacher=zoo", f"output={tmp_path / 'x'}", "--cfg", "job", "dtype=bf16")
    content = yaml.safe_load(out)
    assert code == 0 and content["dtype"] == "bfloat16" and content["student"] == "???", err
    assert not (tmp_path / "x").exists() and content["distill"]["seq_len"] == 512
    code, out, err = limbeck("memory-fit", "model=zoo", "hardware=custom", "--cfg", "job")
    card = yaml.safe_load(out)["hardware"]
    assert code == 0 and (card["usable_gib"], card["total_gib"]) == ("???", "${hardware.usable_gib}"), err


def test_off_and_on_as_yaml_reads_them(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("wandb: off\ntensorboard: on\n")
    words = ["teacher=zoo", "student=zoo", "data=x", "output=y", f"recipe={tmp_path / 'mine.yaml'}"]
    made = build(distill.Options, compose_config("distill", words))
    assert (made.wandb, made.tensorboard) == ("off", "on")
    code, _, err = limbeck("distill", *words, "wandb=true")
    assert code == 2 and "wandb is 'on'; known: off, offline, online" in err


def test_an_option_that_is_taken_away() -> None:
    words = ["teacher=zoo", "student=zoo", "data=x", "output=y"]
    assert build(distill.Options, compose_config("distill", [*words, "~wandb"])).wandb == "off"
    for word, says in (("~seed", "seed is missing"), ("~sed", "'sed' is no option"), ("~", "is no override")):
        code, _, err = limbeck("distill", *words, word)
        assert code == 2 and err.count("\n") == 1 and says in err, err


def test_a_reader_that_has_had_enough() -> None:
    """`limbeck --help | head -1`, and of a command: no traceback, exit code 0; `python -m limbeck` is the command."""
    for words in (["--help"], ["compress", "--help"]):
        process = subprocess.Popen([sys.executable, "-m", "limbeck", *words], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": ""})  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=60) == 0
        process.stderr.close()


@pytest.mark.parametrize(("word", "says"), [
    ("export_dtype=int7", "int7"), ("fit.weight_dtype=int7", "fit.weight_dtype 'int7'"), ("dtype=bf61", "bf61"),
    ("fit.kv_dtype=x", "fit.kv_dtype"), ("device=cuda", "sees no GPU"), ("hardware=custom", "hardware.usable_gib"),
])  # fmt: skip
def test_every_option_is_checked_before_the_first_stage(word: str, says: str, workshop: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [each for each in compress_command(workshop, out) if each.partition("=")[0] != word.partition("=")[0]]
    code, _, err = limbeck(*words, word)
    assert code == 2 and err.count("\n") == 1 and says in err, err
    assert list(tmp_path.iterdir()) == [], "the output is poisoned"
