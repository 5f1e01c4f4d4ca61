"""The laws of the house: who may import whom, how large things are, what they are called, what ships and is pinned."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from limbeck.models.named import SHIPPED
from limbeck.scripts.run.compose import build, compose_config
from limbeck.scripts.run.main import COMMANDS
from limbeck.tests.helpers import limbeck
from limbeck.tests.source_helpers import (
    CODE,
    ROOT,
    code_lines,
    definitions,
    imports,
    letter_comparisons,
    long_functions,
    name_of,
    sources,
)

ALLOWED = {
    "kernels": {"kernels"},
    "models": {"kernels", "models"},
    "prune": {"kernels", "models", "prune"},
    "distill": {"kernels", "models", "distill"},
    "scripts": {"kernels", "models", "prune", "distill", "scripts"},
    "__init__.py": {"api", "distill", "prune"},
    "api.py": {"kernels", "models", "prune", "distill"},
}
KIND_FILES = tuple(f"models/{name}.py" for name in ("layer", "kinds", "mamba2", "attention", "mlp", "moe", "parallel"))
GIVEN_UP = {  # a word that was given up, and the one that stands for it
    r"mend(s|ed|ing)?": "repair",
    r"foret(old|ell)s?": "predicted",
    r"likeliest": "argmax, top-k",
    r"witness(es)?": "estimate, simulate, measure",
    r"pass(es|ed|ing)? over": "skip",
    r"(go|goes|going|went|gone) on": "resume, continue",
    r"behind": "after",
    r"asked": "requested, expected",
    r"room": "headroom, reserve",
}
NAMELESS = {"asked", "fill", "found", "make", "show", "walk"}  # a function's name is a noun of the field, or says what
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def judge(law: str, violations: Sequence[str]) -> None:
    assert not violations, f"{law}: {len(violations)}\n" + "\n".join(violations)


def test_direction_of_imports() -> None:
    for path in sources():
        place, modules = path.relative_to(ROOT).parts[0], imports(path)
        ours = {name.split(".")[1] for name in modules if name.startswith("limbeck.")} & {*CODE, "api"}
        if place in ALLOWED:
            assert ours <= ALLOWED[place], f"{path} imports {ours - ALLOWED[place]}"
        if place not in ("scripts", "tests"):
            assert not {name.split(".")[0] for name in modules} & {"hydra", "omegaconf"}, f"{path} knows Hydra"
    judge(
        "scripts/run is imported by scripts alone",
        [
            name_of(path)
            for path in sources("scripts", "tests")
            if "limbeck.scripts.run" in " ".join(imports(path)) and path != ROOT / "__main__.py"  # python -m limbeck
        ],
    )


def test_no_test_imports_another() -> None:
    """What tests share stands in a module that is none; a script that a test writes may import its own test."""
    for path in (ROOT / "tests").glob("*.py"):
        others = set(re.findall(r"\btests\.(test_\w+)", path.read_text())) - {path.stem}
        assert not others, f"{path} imports {others}"


def test_only_a_kind_compares_its_letter() -> None:
    found = {path: letter_comparisons(path) for path in sources("tests") if name_of(path) not in KIND_FILES}
    judge("letters", [f"{name_of(path)}:{line}" for path, lines in found.items() for line in lines])


def test_sizes() -> None:
    """A file, a function (kernels aside), a command's page, the commands in all."""
    judge(
        "lines of a file",
        [f"{name_of(path)}: {count}" for path in sources() if (count := len(path.read_text().splitlines())) > 400],
    )
    judge(
        "lines of a function",
        [f"{name_of(path)}: {said}" for path in sources("kernels", "tests") for said in long_functions(path, 60)],
    )
    judge(
        "lines of a command",
        [
            f"{path.name}: {count}"
            for path in sorted((ROOT / "scripts").glob("*.py"))
            if (count := len(path.read_text().splitlines())) > 200
        ],
    )
    scripts = [path for path in (ROOT / "scripts").rglob("*.py") if path.parent.name != "experiments"]
    lines = sum(code_lines(path) for path in scripts)
    assert lines <= 3_500, f"scripts/ has {lines} lines of code"


def test_names() -> None:
    """A search for a class ends at one place; a command's `Options` and `run` aside."""
    classes: Counter[tuple[str, str]] = Counter()
    nameless = []
    for path in sources("tests", "benchmarks"):
        for node in definitions(path):
            if isinstance(node, ast.ClassDef):
                classes[path.relative_to(ROOT).parts[0], node.name] += node.name != "Options"
            elif node.name in NAMELESS or (node.name == "run" and path.parent.name != "scripts"):
                nameless.append(f"{name_of(path)}: {node.name}")
    judge("class names", [f"{folder}: {name}" for (folder, name), count in classes.items() if count > 1])
    judge("function names", nameless)


def test_words_that_were_given_up() -> None:
    """CONTRIBUTING.md's glossary has the words to use; what is dated, in LOG.md and CHANGELOG.md, keeps its own."""
    files = [path for path in sources() if path.name not in ("test_house.py", "source_helpers.py", "mistakes.py")]
    files += [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *(ROOT / "conf").rglob("*.yaml")]
    files += [path for path in (ROOT / "docs").glob("*.md") if path.name != "LOG.md"]
    files += [*(ROOT / "distill").rglob("*.jinja")]
    violations = []
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for word, better in GIVEN_UP.items():
                for match in re.finditer(rf"(?<![a-z]){word}(?![a-z])", line, re.I):
                    violations.append(f"{name_of(path)}:{number}: {match.group()} ({better})")
    judge("words", violations)


def test_packages_name_every_code_folder() -> None:
    folders = {".".join(path.relative_to(ROOT).parent.parts) for path in sources()} - {"", "tests"}
    tops = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith((".", "build"))}
    named = set(PROJECT["tool"]["setuptools"]["packages"])
    assert named == {"limbeck", *(f"limbeck.{folder}" for folder in folders)} and tops == set(CODE)


def test_the_source_archive_has_docs_and_tests_and_the_wheel_neither() -> None:
    """By the configuration; tests/test_compose.py builds a wheel (slow)."""
    manifest = (ROOT / "MANIFEST.in").read_text().splitlines()
    assert {"graft docs", "graft tests"} <= set(manifest)
    included = next(line for line in manifest if line.startswith("include ")).split()[1:]
    assert {"Makefile", "constraints.txt", "CHANGELOG.md", "CONTRIBUTING.md"} <= set(included)
    assert all((ROOT / name).is_file() for name in included)
    setup = PROJECT["tool"]["setuptools"]
    assert setup["include-package-data"] is False and "limbeck.tests" not in setup["packages"]
    patterns = setup["package-data"]
    assert patterns["limbeck"] == ["py.typed"], "a pattern at the root takes docs and tests"
    for place, globs in patterns.items():
        folder = ROOT.joinpath(*place.split(".")[1:])
        assert all(list(folder.glob(each)) for each in globs), place


def test_only_conf_is_a_regular_package() -> None:
    """A package called `kernels` at the root would shadow Hugging Face's, which transformers imports. Below the top
    folders only models/cost is one, for the two public names that it re-exports."""
    found = {str(path.parent.relative_to(ROOT)) for folder in CODE for path in (ROOT / folder).rglob("__init__.py")}
    assert found == {"conf", "models/cost"} and (ROOT / "conf" / "__init__.py").read_text() == ""


def test_public_names_of_cost_import_nothing_else() -> None:
    """`limbeck.models.cost` alone imports no torch; its two names are those of their files."""
    code = (
        "import sys, limbeck.models.cost as cost; assert 'torch' not in sys.modules;"
        "from limbeck.models.cost import count_parameters, memory;"
        "from limbeck.models.cost.inference import memory as same;"
        "assert memory is same and callable(count_parameters) and not hasattr(cost, 'verdict')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_dependency_is_pinned() -> None:
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [*PROJECT["project"]["dependencies"], *(text for extra in extras for text in extra)]
    names = {re.match(r"[\w-]+", text).group().lower().replace("_", "-") for text in wanted}  # type: ignore[union-attr]
    assert names <= pinned


def test_nothing_forbidden() -> None:
    words = ("pic" + "kle", "torch.sa" + "ve(", "torch.lo" + "ad(", "trust_remote_" + "code", "TO" + "DO")
    for path in sources():
        for word in words:
            assert word not in path.read_text(), f"{path} has {word}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_config_composes(command: str) -> None:
    module = importlib.import_module(f"limbeck.scripts.{command.replace('-', '_')}")
    fill = {
        "model": "zoo",
        "teacher": "zoo",
        "student": "zoo",
        "data": "stdlib",
        "output": "x",
        "scores": "x",
        "other": "zoo",
    }
    body = (ROOT / "conf" / f"{command}.yaml").read_text()
    given = [f"{key}={value}" for key, value in fill.items() if re.search(rf"^{key}: (\?\?\?|null)", body, re.M)]
    given += ["prompt=x"] if "prompt:" in body else []
    given += ["target.parameters=0.75"] if command == "compress" else []
    build(module.Options, compose_config(command, given))
    groups = [group for group in ("importance", "hardware", "distill") if f"- {group}:" in body]
    for group in groups:
        for choice in (ROOT / "conf" / group).glob("*.yaml"):
            extra = ["hardware.usable_gib=1"] if choice.stem in ("custom", "cpu") else []
            build(module.Options, compose_config(command, [*given, f"{group}={choice.stem}", *extra]))


def test_readme_commands_exist() -> None:
    """Every `limbeck COMMAND` and `make TARGET` that the documents name is there, recipes included."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    recipes = {path.stem for path in (ROOT / "conf" / "recipe").glob("*.yaml")}
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        text = document.read_text()
        blocks = "\n".join(re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.S))
        assert set(re.findall(r"^make ([a-z-]+)", blocks, re.M)) <= targets, document
        assert set(re.findall(r"^limbeck ([a-z-]+)", blocks, re.M)) <= set(COMMANDS), document
        assert set(re.findall(r"recipe=([\w-]+)", blocks)) <= recipes, document


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_model(name: str, tmp_path: Path) -> None:
    """A model that ships opens, is small enough, and knows Python."""
    folder = ROOT / "models" / name
    assert (folder / "model.safetensors").stat().st_size < 20e6
    for file in ("README.md", "metrics.jsonl", "curve.png"):
        assert (folder / file).stat().st_size > 0
    code, out, _ = limbeck("generate", f"model={name}", "prompt=import os\nimport", "max_new_tokens=12")
    assert code == 0 and out.startswith("import os\nimport")
    assert limbeck("memory-fit", f"model={name}", f"output={tmp_path / 'fit'}", "fit.context=4096")[0] == 0
