"""From a command line to options: what is refused, what is read, what is shown."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models.axes import Role, tensor_table
from limbeck.models.config import HybridConfig
from limbeck.models.cost.hardware import GIB
from limbeck.models.cost.parameters import count_parameters, num_tensors
from limbeck.models.errors import InputError
from limbeck.models.named import SHIPPED
from limbeck.prune.rounds import plan_cuts
from limbeck.prune.search import find_candidates, find_depths, ranked
from limbeck.prune.slice import Selection, slice_rows, slice_tensors
from limbeck.prune.width_metrics import RandomScores
from limbeck.scripts import compress, score, search
from limbeck.scripts.run.compose import BASES, build, compose_config, groups, recipes
from limbeck.scripts.run.main import COMMANDS, EXAMPLES
from limbeck.scripts.run.mistakes import known_keys
from limbeck.scripts.run.resolve import model_config, model_names
from limbeck.tests.helpers import limbeck

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float
    flag: bool = False


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    count: int
    place: Path | None
    names: dict[str, str]
    sizes: tuple[int, ...] = ()
    either: tuple[int, ...] | Inner | None = None


GOOD: dict[str, Any] = {"inner": {"rate": 1}, "count": 3, "place": None, "names": {"a": "b"}}


def test_build_makes_nested_frozen_dataclasses() -> None:
    assert build(Outer, GOOD) == Outer(Inner(1.0), 3, None, {"a": "b"})
    found = build(Outer, GOOD | {"place": "here", "sizes": [1, 2]})
    assert found.place == Path("here") and found.sizes == (1, 2)
    assert build(Outer, GOOD | {"either": [1]}).either == (1,)
    assert build(Outer, GOOD | {"either": {"rate": 2}}).either == Inner(2.0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"count": "three"}, "count is 'three'; expected a whole number"),
        ({"count": 1.5}, "whole number"),
        ({"count": True}, "whole number"),
        ({"count": None}, "whole number"),
        ({"inner": 3}, "inner.KEY=VALUE"),
        ({"inner": {"rate": "fast"}}, "inner.rate is 'fast'; expected a number"),
        ({"inner": {"rate": float("nan")}}, "inner.rate is nan"),
        ({"inner": {"rate": 1, "flag": 1}}, "inner.flag is 1; expected true or false"),
        ({"inner": {"rtae": 1}}, "inner.rtae is no option here; did you mean 'rate'?"),
        ({"inner": {}}, "inner.rate is missing"),
        ({"sizes": 3}, "expected a list"),
        ({"sizes": [1, "x"]}, "sizes[1] is 'x'"),
        ({"names": "a"}, "expected a mapping"),
        ({"either": 3}, "either is 3; expected a list"),
        ({"either": {"flag": True}}, "either.rate is missing"),
    ],
)
def test_build_refuses(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        build(Outer, GOOD | change)


@pytest.mark.parametrize(
    "text", ["def f(x):", "a, b = {1: 2}", '${x} "y', "null", "???", "[1", "", "1.50", "~a=b", "é\n"]
)
def test_texts_are_taken_as_the_shell_gives_them(text: str) -> None:
    assert compose_config("generate", [f"prompt={text}"])["prompt"] == text
    if text:
        assert compose_config("generate", [f"model={text}", "prompt=x"])["model"] == text


def test_an_option_that_is_a_mapping_takes_one() -> None:
    """Whether it has keys by default, or none."""
    for word in ("importance.min_layers={mamba: 1}", "importance.min_layers.mamba=1", "+importance.min_layers.mamba=1"):
        content = compose_config("score", ["model=zoo", "data=stdlib", "output=x", word])
        assert build(score.Options, content).importance.min_layers == {"mamba": 1}
    content = compose_config("compress", ["model=zoo", "distill.train={steps: 3, keep: best}"], complete=False)
    assert content["distill"]["train"]["steps"] == 3 and content["distill"]["train"]["learning_rate"] is not None


def test_null_only_where_nothing_is_the_default() -> None:
    assert compose_config("memory-fit", ["model=zoo", "output=null"])["output"] is None
    assert compose_config("memory-fit", ["model=zoo", "output=here"])["output"] == "here"


def test_keys_below_options_that_are_null_or_empty_by_default(tmp_path: Path) -> None:
    """They need no `+`, whatever a recipe has set there."""
    words = ["distill.rollouts.share=0.5", "distill.teacher_correction.tokens=1e6", "distill.nested.teacher=largest"]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("distill: {rollouts: {new_tokens: 9}, stages: [{tokens: 5}]}")
    for own in ([], [f"recipe={recipe}", "distill.stages.0.seq_len=7"]):
        made = compose_config("compress", ["model=zoo", *own, *words], complete=False)["distill"]
        assert made["rollouts"] == {"share": 0.5} | ({"new_tokens": 9} if own else {})
        assert (made["teacher_correction"], made["nested"]) == ({"tokens": 1000000}, {"teacher": "largest"})
        assert made["stages"] == ([{"tokens": 5, "seq_len": 7}] if own else [])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("score model=zoo hardware=a10g", "'hardware' is no option of limbeck score"),
        ("prune teacher=zoo", "'teacher' is no option of limbeck prune"),
        ("prune recipe=tiny", "limbeck prune has no such recipe"),
        ("pretrain recipe=tiny", "known: zoo"),
        ("memory-fit model=zoo hardware=null", "known: a10g"),
        ("memory-fit model=zoo hardware=custom", "hardware.usable_gib is missing"),
        ("memory-fit model=", "model= is empty"),
        ("memory-fit model=zoo =3", "'=3' is no override"),
        ("memory-fit model=zoo -m", "output is missing"),
        ("memory-fit model=zoo -q", "'-q' is no flag"),
        ("memory-fit model=zoo fit=3", "fit.KEY=VALUE"),
        ("memory-fit model=zoo +foo=3", "'foo' is no option"),
        ("memory-fit model=zoo ~steps=64", "steps is missing"),
        ("memory-fit model=zoo fit.batch=[1", "'fit.batch=[1' cannot be read"),
        ("memory-fit model=zoo fit.batch=1,2", "give one value"),
        ("memory-fit model=zoo fit.batch=two", "fit.batch is 'two'; expected a whole number"),
        ("memory-fit model=zoo hydra.job.chdir=true", "'hydra.job.chdir' is no option"),
        ("distill teacher=zoo student=zoo data=stdlib output=/dev/null/x", "/dev/null/x cannot be written"),
        ("score model=zoo importance=random importance.mamba_source=z", "importance.mamba_source is not read"),
        (
            "WHOLE importance.expert_source=banana",
            "importance.expert_source is 'banana'; known: reap, freq",
        ),
        (
            "WHOLE importance.mamba_source=X",
            "importance.mamba_source is 'X'; known: x, z, out",
        ),
        (
            "WHOLE importance.aggregate_sequence=l3",
            "importance.aggregate_sequence is 'l3'; known: mean, l2",
        ),
        (
            "WHOLE importance.min_layers={foo:1}",
            "importance.min_layers names the unknown kind 'foo'",
        ),
        (
            "WHOLE importance.min_layers={mamba:-1}",
            "importance.min_layers.mamba is -1; expected at least 0",
        ),
        (
            "WHOLE importance.min_layers={mamba:x}",
            "importance.min_layers.mamba is 'x'; expected a whole",
        ),
        ("WHOLE importance.min_layers.foo=1", "importance.min_layers names the unknown kind 'foo'"),
        ("WHOLE importance.minlayers={mamba:1}", "did you mean 'min_layers'"),
        ("score model=zoo min_layers={mamba:1}", "'min_layers' is no option of limbeck score"),
        ("score model=zoo data=stdlib output=x streams_gib=1e300", "streams_gib is 1e+300; expected more than 0"),
        ("score model=zoo data=stdlib output=x device=meta", "device 'meta': torch"),
        ("compress model=zoo dry_run=true target.layers=2 importance.expert_source=banana", "known: reap, frequency"),
        ("score model=zoo importance=magnitude importance.tokens=9", "importance.tokens is not read"),
        ("evalute", "did you mean 'evaluate'?"),
        ("distill distill=on-policy distill.rollouts.share=0.5 teacher=zoo student=zoo output=x", "data is missing"),
        ("compress recipe=qwen3 dry_run=true hardware=custom rounds.1.target.layers=3", "usable_gib is missing"),
        ("WHOLE importance.min_layers.attention=1 tokens=5", "'tokens' is no option"),
        ("distill teacher=zoo student=zoo data=x output=y distill.rollouts.sahre=1", "did you mean 'share'?"),
        ("compress recipe=qwen3 dry_run=true rounds.7.target.layers=3", "rounds[7] is not there; give the whole list"),
        ("compress recipe=qwen3 dry_run=true rounds.x=3", "'rounds.x' is no option"),
        ("compress recipe=qwen3 dry_run=true recipe.x=3", "'recipe.x' is no option"),
        ("evaluate teacher=zoo student=zoo data=x output=y", "expected a mapping, such as student.NAME=FOLDER"),
        ("bench model=zoo batch=fits", "batch is 'fits'; expected a whole number, or fit"),
        ("bench model=zoo batch=0", "batch is 0; expected at least 1, or fit"),
    ],
)
def test_wrong_words_give_one_line(line: str, says: str) -> None:
    code, _, err = limbeck(*shlex.split(line.replace("WHOLE", "score model=zoo data=stdlib output=x")))
    assert code == 2 and says in err and err.count("\n") == 1 and len(err) < 300, err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_option_and_its_example_composes(command: str) -> None:
    code, out, _ = limbeck(command, "--help")
    assert code == 0
    module = importlib.import_module(f"limbeck.scripts.{command.replace('-', '_')}")
    told = [field for field in dataclasses.fields(module.Options) if field.name not in ("words", "folders")]
    for field in told:  # those are the command line itself
        assert re.search(rf"^  {field.name}:", out, re.M), field.name
    for group, choices in groups(command).items():
        assert all(choice in out for choice in (group, *choices))
        keys = [key.rpartition(".")[2] for key in known_keys(command) if key.startswith(f"{group}.")]
        assert keys and all(f" {key}:" in out or f' "{key}":' in out or f"{{{key}:" in out for key in keys)
    assert all(f"recipe={name}" in out for name in recipes(command))
    assert EXAMPLES[command] in out
    build(module.Options, compose_config(command, shlex.split(EXAMPLES[command])))


@pytest.mark.parametrize(
    "command", ("search", "memory-fit", "train-fit", pytest.param("bench", marks=pytest.mark.slow))
)
def test_examples_that_need_neither_text_nor_weights_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As --help prints them; of the others the options compose."""
    monkeypatch.chdir(tmp_path)
    code, _, err = limbeck(command, *shlex.split(EXAMPLES[command]))
    assert code == 0, err


def test_every_recipe_is_of_a_command() -> None:
    named = [name for command in COMMANDS if command not in BASES for name in recipes(command)]
    assert sorted(named) == sorted(path.stem for path in (ROOT / "conf" / "recipe").glob("*.yaml"))


@pytest.mark.parametrize(("command", "name"), [(command, name) for command in COMMANDS for name in recipes(command)])
def test_every_recipe_composes(command: str, name: str) -> None:
    module = importlib.import_module(f"limbeck.scripts.{command.replace('-', '_')}")
    options = build(module.Options, compose_config(command, [f"recipe={name}", "data=x", "output=x"]))
    assert options.model in (*SHIPPED, *model_names())
    assert options.output == Path("x") and options.data == "x"


# Parameters, tensors, GiB of weights and caches, whether the source fits the card, the named config of that size: as
# published (arXiv 2508.14444; 2504.11409, whose files are 8.97 GB together), and ours.
FINAL: dict[str, tuple[int, int, float, bool, str | None]] = {
    "nemotron-nano-9b-v2": (8_888_227_328, 341, 18.69, False, "nemotron-nano-9b-v2"),
    "nemotron-h-4b": (4_489_223_040, 311, 8.57, True, "nemotron-h-4b"),
    "qwen3": (6_153_925_632, 333, 20.84, False, None),
    "granite-4-h": (5_428_104_768, 586, 18.54, False, None),
    "falcon-h1": (2_368_558_080, 515, 16.79, True, None),
    # 128 to 104 experts in each of 23 layers: 23 x 24 x 2 tensors of 6,243 fewer.
    "nemotron-3-nano-22b": (22_276_865_600, 5_139, 41.74, True, None),
}
REMOVED = {"nemotron-nano-9b-v2": [(7, 52, 8, 48, 17, 18)]}  # what turns the 12B's published pattern into the 9B's


QUICK = ("nemotron-nano-9b-v2", "qwen3", "tiny")  # the others run with those that are slow


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in recipes("compress")]
)
def test_the_model_half_of_a_recipe_at_real_size(name: str) -> None:
    """Every round on tensors of the model's size that have no memory: shapes, counts, and whether it fits the card."""
    options = build(compress.Options, compose_config("compress", [f"recipe={name}", "dry_run=true"]))
    config = model_config(options.model)
    for step in plan_cuts(config, [one.cut for one in options.plan()], REMOVED.get(name, ())):
        check_slices(step.before, step.selection, step.after)
        config = step.after
    estimate = options.fit.estimate(config, options.hardware)
    assert estimate.fits
    if name in FINAL:
        parameters, tensors, size, source_fits, named = FINAL[name]
        assert (count_parameters(config), num_tensors(config)) == (parameters, tensors)
        assert round(estimate.memory.total / GIB, 2) == size
        before = options.fit.estimate(model_config(options.model), options.hardware)
        assert before.fits == source_fits
        assert named is None or config.to_hf() == model_config(named).to_hf()


def test_the_sizes_that_the_search_recipe_finds_at_real_size() -> None:
    """Its best three are of the published parameters; the first of them is sliced without memory."""
    options = build(search.Options, compose_config("search", ["recipe=nemotron-nano-a10g-search", "output=x"]))
    config = model_config(options.model)
    depths = find_depths(config, options.space, options.rules, None)
    budget = options.budget.limit(options.hardware)
    found = ranked(find_candidates(config, options.space, depths, budget, options.hardware).candidates, options.rank)
    assert [round(candidate.parameters / 1e9, 2) for candidate in found[:3]] == [8.97, 8.92, 8.89]
    check_slices(config, found[0].selection(config, RandomScores(0).scores(config)), found[0].config)


def check_slices(before: HybridConfig, selection: Selection, after: HybridConfig) -> None:
    """Both ways of slicing, on bfloat16 tensors without memory, give each tensor of the table once, in its shape."""
    table, source = tensor_table(after), tensor_table(before)
    tensors = {axes.name: torch.empty(axes.shape, dtype=torch.bfloat16, device="meta") for axes in source.values()}
    whole = {name: tuple(tensor.shape) for name, tensor in slice_tensors(tensors.__getitem__, before, selection)}
    assert whole == {name: axes.shape for name, axes in table.items()}
    parameters = (shape for name, shape in whole.items() if table[name].role is not Role.BUFFER)
    assert sum(math.prod(shape) for shape in parameters) == count_parameters(after)
    rows = dict.fromkeys(table, 0)
    pieces = slice_rows(
        lambda name, start, stop: tensors[name][start:stop],
        before,
        selection,
        dtypes=dict.fromkeys(source, torch.bfloat16),
    )
    for name, piece in pieces:
        assert piece.shape[1:] == whole[name][1:] and piece.dtype == torch.bfloat16
        rows[name] += piece.shape[0]
    assert rows == {name: shape[0] for name, shape in whole.items()}


def test_the_compressions_of_the_recipes_page_compose() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.S)
    lines = [line for line in "".join(blocks).replace("\\\n", " ").splitlines() if line.startswith("limbeck compress")]
    assert len(lines) > 5
    for line in lines:
        build(compress.Options, compose_config("compress", shlex.split(line)[2:]))


def test_the_command_line_goes_before_a_recipe() -> None:
    words = ["recipe=qwen3", "dry_run=true", "hardware=a10g", "rounds.1.target.hidden_size=3840", "fit.batch=1"]
    options = build(compress.Options, compose_config("compress", words))
    assert options.hardware.name == "a10g" and options.fit.batch == 1
    assert [found.target.hidden_size for found in options.plan()] == [None, 3840]


def test_constraints_pin_one_version_each() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+==\d[\w.]*", line) for line in lines)
    names = [re.sub(r"[-_]+", "-", line.split("==")[0]).lower() for line in lines]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_a_wheel_has_everything(tmp_path: Path) -> None:
    """Every tracked kind of file in the code folders is in the wheel."""
    skip = shutil.ignore_patterns(".*", "*.egg-info", "build", "demo-out", "__pycache__", "docs")
    shutil.copytree(ROOT, tmp_path / "source", ignore=skip)
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir"]
    subprocess.run([*wheel, str(tmp_path), str(tmp_path / "source")], check=True, capture_output=True)
    (found,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(found).namelist())
    folders = ("benchmarks", "conf", "distill", "kernels", "models", "prune", "scripts")
    wanted = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    wanted = [path for path in wanted if "__pycache__" not in path.parts]
    missing = {f"limbeck/{path.relative_to(ROOT).as_posix()}" for path in wanted} - names
    assert not missing and "limbeck/py.typed" in names
    assert not [name for name in names if name.startswith(("limbeck/tests/", "limbeck/docs/"))]
