"""From a command line to options, and from options to a folder: what is refused, what resumes, what is shown."""

from __future__ import annotations

import dataclasses
import importlib
import json
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
from limbeck.models.fingerprint import fingerprint_of
from limbeck.models.named import SHIPPED
from limbeck.prune.rounds import plan_cuts
from limbeck.prune.search import find_candidates, find_depths, ranked
from limbeck.prune.slice import Selection, slice_rows, slice_tensors
from limbeck.prune.width_metrics import RandomScores
from limbeck.scripts import compress, search
from limbeck.scripts.run.compose import BASES, build, compose_config, groups, recipes
from limbeck.scripts.run.main import COMMANDS, EXAMPLES
from limbeck.scripts.run.mistakes import known_keys
from limbeck.scripts.run.resolve import model_config, model_names
from limbeck.scripts.run.stage import stage
from limbeck.tests.helpers import lasting, limbeck

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


def test_null_only_where_nothing_is_the_default() -> None:
    assert compose_config("memory-fit", ["model=zoo", "output=null"])["output"] is None
    assert compose_config("memory-fit", ["model=zoo", "output=here"])["output"] == "here"


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
        ("score model=zoo importance=magnitude importance.tokens=9", "importance.tokens is not read"),
        ("evalute", "did you mean 'evaluate'?"),
    ],
)
def test_wrong_words_give_one_line(line: str, says: str) -> None:
    code, _, err = limbeck(*shlex.split(line))
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


@pytest.mark.parametrize("name", recipes("compress"))
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


def made(folder: Path, source: Path, seed: int = 0, scratch: str | None = None, fail: Exception | None = None) -> bool:
    """A stage that counts its runs in the source's neighbour, and leaves one file; whether it had to be made."""
    with stage(folder, "test", inputs={"source": source}, options={"seed": seed}, scratch=scratch) as work:
        if work.finished:
            return False
        with (source.parent / "runs").open("a") as stream:
            stream.write("x")
        if scratch is not None and not isinstance(fail, InputError):
            (work.folder / scratch).mkdir(exist_ok=True)
            with (work.folder / scratch / "steps").open("a") as stream:
                stream.write("s")
        if fail is not None:
            raise fail
        (work.folder / "weights").write_text("w")
    return True


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    (path / "a").write_text("1")
    return path


@pytest.mark.parametrize("scratch", [None, "work"])
def test_a_finished_stage_is_not_done_again(scratch: str | None, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert made(out, source, scratch=scratch)
    assert sorted(path.name for path in out.iterdir()) == ["limbeck.json", "weights"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert not made(out, source, scratch=scratch) and (tmp_path / "runs").read_text() == "x"
    with pytest.raises(InputError, match=r"made otherwise \(seed was 0, now 5\)"):
        made(out, source, seed=5, scratch=scratch)
    (source / "a").write_text("2")
    with pytest.raises(InputError, match=r"inputs\.source has changed"):
        made(out, source, scratch=scratch)


def test_equal_work_gives_equal_bytes(source: Path, tmp_path: Path) -> None:
    made(tmp_path / "one", source)
    made(tmp_path / "two", source, scratch="work")
    for name in ("limbeck.json", "weights"):
        assert lasting(tmp_path / "one" / name) == lasting(tmp_path / "two" / name)


def test_unfinished_work_is_found_again_if_it_is_of_the_same_facts(source: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            made(out, source, scratch="work", fail=KeyboardInterrupt())  # type: ignore[arg-type]
    assert not out.exists() and (partial / "work" / "steps").read_text() == "ss"
    with pytest.raises(KeyboardInterrupt):
        made(out, source, seed=1, scratch="work", fail=KeyboardInterrupt())  # type: ignore[arg-type]
    assert (partial / "work" / "steps").read_text() == "s", "work of another seed was resumed"
    assert made(out, source, seed=1, scratch="work")


def test_killed_between_the_rename_and_the_cleaning(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(out, source, scratch="work")
    (out / "work").mkdir()
    (out / "begun.json").write_text("")
    assert not made(out, source, scratch="work")
    assert sorted(path.name for path in out.iterdir()) == ["limbeck.json", "weights"]


@pytest.mark.parametrize("scratch", [None, "work"])
def test_refused_input_leaves_nothing(scratch: str | None, source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="no"):
        made(tmp_path / "out", source, scratch=scratch, fail=InputError("no"))
    (tmp_path / "runs").unlink()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_foreign_folder_is_left_alone(content: str | None, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if content is not None:
        (out / "limbeck.json").write_text(content)
    with pytest.raises(InputError, match="not of limbeck"):
        made(out, source)
    assert len(list(out.iterdir())) == (content is not None)


def test_fingerprint_of_our_folder_is_of_its_contents(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(out, source)
    before = fingerprint_of(out)
    (out / "result.json").write_text(json.dumps({"path": str(out)}))
    assert fingerprint_of(out) == before
    (out / "weights").write_text("v")
    with pytest.raises(InputError, match="weights is not as it was left"):
        fingerprint_of(out)
    (out / "limbeck.json").unlink()  # taken as it is
    assert fingerprint_of(out) != before
    plain = fingerprint_of(source)
    (source / "result.json").write_text("data of the user's own")
    assert fingerprint_of(source) != plain


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
