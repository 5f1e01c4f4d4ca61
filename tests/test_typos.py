"""Typos are answered before torch is imported, with what was probably meant; shares and counts as people write them;
what the shell completes."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from limbeck import api
from limbeck.models.errors import InputError
from limbeck.models.hints import SYNONYMS, near_options
from limbeck.models.named import SHIPPED
from limbeck.models.quantities import quantity, with_quantities
from limbeck.prune.scoring import Importance
from limbeck.scripts import compress
from limbeck.scripts.run.completion import SHELLS, completion, options_of
from limbeck.scripts.run.compose import build, compose_config
from limbeck.scripts.run.main import COMMANDS
from limbeck.scripts.run.mistakes import known_keys
from limbeck.tests.helpers import limbeck

WITHOUT_TORCH = """
import json, sys, time
from limbeck.scripts.run.main import main
answers = []
for line in json.loads(sys.argv[1]):
    begun = time.process_time()
    answers.append((main(line), time.process_time() - begun, "torch" in sys.modules))
begun = time.process_time()
import torch
print(json.dumps((time.process_time() - begun, answers)), file=sys.stderr)
"""
TYPOS = {
    "distil": "did you mean 'distill'?",
    "distill distil.train.lr=1": "did you mean 'distill.train.learning_rate'?",
    "distill --quiet epochs=3": "did you mean 'distill.train.steps'?",
    "compress num_hidden_layers=11": "did you mean 'target.layers'?",
    "compress targt.num_hidden_layers=11": "did you mean 'target.layers'?",
    "compress distill.batch_size=4": "did you mean 'distill.batch'?",
    "compress distill.train.learningRate=1": "did you mean 'distill.train.learning_rate'?",
    "score calibration_tokens=1": "did you mean 'importance.tokens'?",
    "compress distill.tokens=1M": "did you mean 'distill.train.steps'?",
    "score data=x data.trainon=all": "did you mean 'data.train_on'?",
    "compress hardware=a10": "did you mean 'a10g'?",
    "compress recipe=tiney": "did you mean 'tiny'?",
    "distill +distil.train.steps=1": "did you mean 'distill.train.steps'?",
    "distill teacher=zoo student=zoo data=x output=y +quux=1": "'quux' is no option of limbeck distill",
    "evaluate teacher=zoo dataset=x": "did you mean 'data'?",
    "distill teacher=zoo student=zoo output=x": "data is missing",
}


def test_typos_are_answered_before_torch_is_imported() -> None:
    lines = [line.split() for line in (*TYPOS, "--help", "score --help", "--completion zsh")]
    ran = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, json.dumps(lines)], capture_output=True, text=True,
                         check=True)  # fmt: skip
    *errors, last = ran.stderr.splitlines()
    assert len(errors) == len(TYPOS), ran.stderr
    for (line, says), error in zip(TYPOS.items(), errors, strict=True):
        assert says in error and error.startswith("limbeck: "), (line, error)
    import_of_torch, answers = json.loads(last)
    for line, (code, seconds, torch) in zip(lines, answers, strict=True):
        assert code == (2 if " ".join(line) in TYPOS else 0) and not torch, line
        assert seconds < import_of_torch, (line, seconds, import_of_torch)  # of the processor's time


def test_a_typo_takes_less_than_a_second() -> None:
    """Of the processor, Python's own start included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run([sys.executable, "-m", "limbeck", "distill", "distil.train.lr=1"], capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ran.returncode == 2 and b"distill.train.learning_rate" in ran.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_every_synonym_leads_to_an_option() -> None:
    """Of some command there is a key of every name that a hint may give, but for tensorboard's and the like none of it
    is another option's own name."""
    known = {command: known_keys(command) for command in COMMANDS}
    leaves = {key.rpartition(".")[2] for keys in known.values() for key in keys}
    assert set(SYNONYMS) <= leaves, set(SYNONYMS) - leaves
    for name, others in SYNONYMS.items():
        (command, *_) = [command for command, keys in known.items() if any(k.rpartition(".")[2] == name for k in keys)]
        for other in others:
            near = near_options(other, known[command])
            assert near and (other in leaves or name in {key.rpartition(".")[2] for key in near}), (
                command,
                other,
                near,
            )


def test_hints_of_what_is_like_nothing() -> None:
    assert near_options("qqq", known_keys("compress")) == []
    assert near_options("traget.layers", ["target.layers", "rules.layers"]) == ["target.layers"]


@pytest.mark.parametrize(("text", "share", "value"), (
    ("75%", True, 0.75), ("73.5 %", True, 0.735), ("100%", True, 1.0), ("5B", True, 5 * 10**9), ("5g", True, 5 * 10**9),
    ("8.888227328B", True, 8_888_227_328), ("500M", False, 5 * 10**8), ("1.5M", False, 1_500_000),
    ("8k", False, 8_000), (".5M", False, 500_000), ("1T", False, 10**12),
    ("101%", True, "101%"), ("0%", True, "0%"), ("50%", False, "50%"), ("1.0001k", False, "1.0001k"),
    ("5 apples", True, "5 apples"), ("-5M", True, "-5M"), ("", True, ""), ("B", True, "B"),
))  # fmt: skip
def test_quantities(text: str, share: bool, value: float | str) -> None:
    found = quantity(text, share)
    assert found == value and type(found) is type(value)


def test_quantities_stand_wherever_parameters_or_tokens_are_expected() -> None:
    words = ["model=zoo", "data=x", "output=y", "evaluate_tokens=1.5M", "importance.tokens=1e6", "repair.tokens=32k"]
    stages = "distill.stages=[{tokens: 1.5M}, {tokens: 2M, seq_len: 1024}]"
    options = build(compress.Options, compose_config("compress", [*words, "target.parameters=75%", stages]))
    assert options.target == compress.Target(parameters=0.75) and options.evaluate_tokens == 1_500_000
    assert options.importance.tokens == 1_000_000 and getattr(options.repair, "tokens") == 32_000  # noqa: B009
    assert [stage.tokens for stage in options.distill.stages] == [1.5e6, 2e6]
    rounds = "rounds=[{name: depth, target: {parameters: 90%}}, {name: width, target: {parameters: 5M}}]"
    options = build(compress.Options, compose_config("compress", [*words, rounds]))
    assert [one.target.parameters for one in options.plan()] == [0.9, 5e6]
    assert with_quantities({"model": "5M", "prompt": "75%"}) == {"model": "5M", "prompt": "75%"}  # names stay
    assert api.checked(Importance, "score", method="activation", remove_layers=None, pairs=False, min_layers={},
                       tokens="16k").tokens == 16_000  # fmt: skip
    with pytest.raises(InputError, match="lr is no option here; did you mean 'learning_rate'"):
        api.checked(api.TrainOptions, "distill", steps=1, lr=1)


@pytest.mark.parametrize(("word", "says"), (
    ("target.parameters=150%", "target.parameters is '150%'; expected a share of at most 100%"),
    ("target.parameters=5Q", "or a count, such as 5B"), ("evaluate_tokens=many", "a whole number, such as 500000 or"),
    ("evaluate_tokens=50%", "evaluate_tokens is '50%'"), ("importance.tokens=1.5", "importance.tokens is 1.5"),
))  # fmt: skip
def test_quantities_that_are_none(word: str, says: str) -> None:
    code, _, err = limbeck("compress", "model=zoo", "data=x", "output=/nonexistent/x", "target.layers=11", word)
    assert code == 2 and says in err and err.count("\n") == 1, err


def test_completion_knows_every_option() -> None:
    for command in COMMANDS:
        names = {option.name for option in options_of(command)}
        keys = set(known_keys(command))
        leaves = {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
        assert names <= keys and {key for key in leaves if not key.startswith("experiment.")} <= names, command
        assert all("\n" not in option.text for option in options_of(command))
    (model,) = (option for option in options_of("score") if option.name == "model")
    assert set(SHIPPED) < set(model.choices)


BASH_CASES = {
    "limbeck comp": "compress", "limbeck compress hardware.us": "hardware.usable_gib=",
    "limbeck compress hardware=l4": "l4 l40s",
    "limbeck distill distill.train.learn": "distill.train.learning_rate=",
    "limbeck compress recipe=tin": "tiny-long tiny-moe tiny",
    "limbeck compress distill.train.comp": "distill.train.compile=", "limbeck distill shard=": "true false",
    "limbeck score importance=ta": "taylor", "limbeck --completion z": "zsh", "limbeck score --q": "--quiet",
    "limbeck memory-fit model=nemotron-h": "nemotron-h-4b nemotron-h-8b", "limbeck score nothing": "",
}  # fmt: skip


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes(tmp_path: Path) -> None:
    script = tmp_path / "completion"
    calls = "\n".join(
        f"COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}; COMPREPLY=(); _limbeck; echo \"${{COMPREPLY[*]}}\""
        for line in BASH_CASES
    )
    script.write_text(f"compopt() {{ :; }}\n{completion('bash', COMMANDS)}\ncd {tmp_path}\n{calls}\n")
    ran = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True)
    assert dict(zip(BASH_CASES, ran.stdout.splitlines(), strict=True)) == BASH_CASES and not ran.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_the_scripts_of_other_shells_are_read_by_them(shell: str, tmp_path: Path) -> None:
    code, out, _ = limbeck("--completion", shell)
    assert code == 0 and all(each in out for each in (*COMMANDS, "distill.train.learning_rate", "a10g", "tiny"))
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    (tmp_path / "script").write_text(out)
    ran = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, text=True)
    assert ran.returncode == 0 and not ran.stderr, ran.stderr


def test_a_shell_that_is_not_known() -> None:
    for words in (("--completion", "zhs"), ("--completion=tcsh",), ("--completion",)):
        code, _, err = limbeck(*words)
        assert code == 2 and "known: bash, zsh, fish" in err and err.count("\n") == 1
