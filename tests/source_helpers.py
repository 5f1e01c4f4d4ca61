"""Shared by the tests of the house: what stands in a source file, read from its syntax tree."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = ("benchmarks", "conf", "distill", "kernels", "models", "prune", "scripts", "tests")
LETTERS = frozenset("M*-E")
SURE = LETTERS - set("*-")  # the others are also products, differences and hyphens
SUBJECTS = ("pattern", "letter", "kind", "block")
METHODS = ("count", "index", "find", "rfind", "replace", "startswith", "endswith", "split", "strip", "partition")
LITERAL = (ast.Tuple, ast.List, ast.Set)


def sources(*apart: str) -> list[Path]:
    """Python files of the package, without those of some folders; the root's own come first."""
    folders = (folder for folder in CODE if folder not in apart)
    return [*sorted(ROOT.glob("*.py")), *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, by their whole names."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = ("limbeck", *path.relative_to(ROOT).parent.parts)
                module = ".".join((*package[: len(package) - node.level + 1], *filter(None, [module])))
            modules |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return modules


def code_lines(path: Path) -> int:
    """Lines without blank ones, comments and docstrings."""
    text = path.read_text()
    apart = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in apart:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def definitions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node


def long_functions(path: Path, limit: int) -> list[str]:
    functions = (node for node in definitions(path) if not isinstance(node, ast.ClassDef))
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    return [f"{name} has {length} lines" for name, length in lengths.items() if length > limit]


def is_letter(node: ast.AST, letters: frozenset[str] = LETTERS) -> bool:
    """Whether an expression is a layer letter, a run of them, or a literal collection of them."""
    if isinstance(node, LITERAL):
        return bool(node.elts) and all(is_letter(element, letters) for element in node.elts)
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and {""} < {"", *node.value} <= {"", *letters}


def speaks_of_layers(*nodes: ast.AST | None) -> bool:
    words = (
        getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "arg", None) or ""
        for tree in nodes
        if tree is not None
        for node in ast.walk(tree)
    )
    return any(subject in word for word in words for subject in SUBJECTS)


def is_sure(node: ast.AST) -> bool:
    return any(
        isinstance(part, ast.Constant) and isinstance(part.value, str) and set(part.value) & SURE
        for part in ast.walk(node)
    )


def letter_comparisons(path: Path) -> list[int]:
    """Lines on which code tells layer kinds apart by a letter: in a comparison, a `match`, a look-up or a dictionary,
    a loop over letters, or as a string method's argument. `*` and `-` count where names speak of layers."""
    lines = set()
    for node in ast.walk(ast.parse(path.read_text())):
        letters: list[ast.AST] = []
        beside: list[ast.AST | None] = []
        if isinstance(node, ast.Compare):
            letters = [side for side in (node.left, *node.comparators) if is_letter(side)]
            beside = [side for side in (node.left, *node.comparators) if not is_letter(side)]
        elif isinstance(node, ast.MatchValue):
            letters, beside = [node.value] * is_letter(node.value), [node.value]
        elif isinstance(node, ast.Subscript):
            letters, beside = [node.slice] * is_letter(node.slice), [node.value]
        elif isinstance(node, ast.Dict) and len(node.keys) > 1:
            keys = [key for key in node.keys if key is not None]
            letters = keys if all(is_letter(key) for key in keys) else []  # type: ignore[assignment]
        elif isinstance(node, ast.For | ast.comprehension):
            letters, beside = [node.iter] * is_letter(node.iter), [node.target]
        elif isinstance(node, ast.Call):
            letters = [argument for argument in node.args[:1] if is_letter(argument)]
            named = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if not (named in METHODS or speaks_of_layers(node.func) or named == "layers_of"):
                letters = []
            beside = [node.func]
        if letters and (any(map(is_sure, letters)) or speaks_of_layers(*beside)):
            lines.add(getattr(node, "lineno", None) or node.iter.lineno)  # type: ignore[attr-defined]
    return sorted(lines)
