"""The laws of the house: who may import whom, what ships, what is pinned, and what never appears."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
from limbeck.scripts.run.compose import build, compose_config
from limbeck.scripts.run.main import COMMANDS, importlib
from limbeck.tests.helpers import limbeck

ROOT = Path(__file__).parents[1]
CODE = ("benchmarks", "conf", "distill", "kernels", "models", "prune", "scripts", "tests")
ALLOWED = {
    "kernels": {"kernels"},
    "models": {"kernels", "models"},
    "prune": {"kernels", "models", "prune"},
    "distill": {"kernels", "models", "distill"},
    "scripts": {"kernels", "models", "prune", "distill", "scripts"},
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources() -> list[Path]:
    return [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere; our own as `limbeck.FOLDER`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = ("limbeck", *path.relative_to(ROOT).parent.parts)
                module = ".".join((*package[: len(package) - node.level + 1], *filter(None, [module])))
            found.add(module)
    return {".".join(name.split(".")[: 2 if name.startswith("limbeck.") else 1]) for name in found}


def test_direction_of_imports() -> None:
    for path in sources():
        folder = path.relative_to(ROOT).parts[0]
        if folder in ALLOWED:
            ours = {name.split(".")[1] for name in imports(path) if name.startswith("limbeck.")}
            assert ours <= ALLOWED[folder] | {""}, f"{path} imports {ours - ALLOWED[folder]}"
        if folder not in ("scripts", "tests"):
            assert not imports(path) & {"hydra", "omegaconf"}, f"{path} knows Hydra"


def test_no_test_imports_another() -> None:
    """What tests share stands in a module that is none; a script that a test writes may import its own test."""
    for path in (ROOT / "tests").glob("*.py"):
        others = set(re.findall(r"\btests\.(test_\w+)", path.read_text())) - {path.stem}
        assert not others, f"{path} imports {others}"


def test_packages_name_every_code_folder() -> None:
    folders = {".".join(path.relative_to(ROOT).parent.parts) for path in sources()}
    tops = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith((".", "build"))}
    named = set(PROJECT["tool"]["setuptools"]["packages"])
    assert named == {"limbeck", *(f"limbeck.{folder}" for folder in folders)} and tops == set(CODE)


def test_only_conf_is_a_regular_package() -> None:
    """A package called `kernels` at the root would shadow Hugging Face's, which transformers imports."""
    found = {path.parent.name for path in ROOT.glob("*/__init__.py") if not path.parent.name.startswith(".")}
    assert found == {"conf"} and (ROOT / "conf" / "__init__.py").read_text() == ""


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


def test_shipped_model(tmp_path: Path) -> None:
    """The model in models/zoo opens, is small enough, and knows Python."""
    folder = ROOT / "models" / "zoo"
    assert (folder / "model.safetensors").stat().st_size < 20e6
    for name in ("README.md", "metrics.jsonl", "curve.png"):
        assert (folder / name).stat().st_size > 0
    code, out, _ = limbeck("generate", "prompt=import os\nimport", "max_new_tokens=12")
    assert code == 0 and out.startswith("import os\nimport")
    assert limbeck("memory-fit", "model=zoo", f"output={tmp_path / 'fit'}", "fit.context=4096")[0] == 0
