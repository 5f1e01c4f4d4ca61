"""What pydantic's errors say to whoever gave the options of a dataclass: one line, and what was probably meant."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import guess
from .hints import guess_option
from .quantities import COUNTS, SHARES

EXPECTED = {
    "int": "a whole number", "float": "a number", "finite": "a number", "string": "a text", "bool": "true or false",
    "path": "a path",
}  # fmt: skip


def complaint(errors: Sequence[Any], cls: Any, content: Any) -> str:
    """One line for pydantic's errors of a dataclass: what was given, where, and what would be right."""
    error = min(errors, key=rank)
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    names = names_of(error["loc"][1:], content, kind)
    where = ".".join(names)
    if kind == "unexpected_keyword_argument":
        near = guess_option(names[-1], fields_at(cls, [name.partition("[")[0] for name in names[:-1]]))
        return f"{where} is no option here{near or '; leave it out'}"
    if kind == "missing":
        return f"{where} is missing; give {where}=VALUE"
    if kind == "dataclass_type":
        expected = f"options below it, such as {where}.KEY=VALUE"
    elif kind == "dict_type":
        expected = f"a mapping, such as {where}.NAME={'FOLDER' if where == 'student' else 'VALUE'}"
    elif kind in ("tuple_type", "list_type"):
        expected = f"a list, such as {where}=[1,2]"
    elif kind == "literal_error":
        known = re.findall(r"'([^']*)'", context["expected"])
        return f"{where} is {given!r}; known: {', '.join(known)}" + guess(str(given), known)
    elif kind == "greater_than":
        expected = f"at least {context['gt'] + 1}" if isinstance(context["gt"], int) else f"more than {context['gt']:g}"
    elif kind == "greater_than_equal":
        expected = f"at least {context['ge']:g}"
    elif names[-1] in SHARES and isinstance(given, str):
        expected = "a share of at most 100%, such as 0.75 or 75%, or a count, such as 5B"
    elif names[-1].endswith(COUNTS) and isinstance(given, str):
        expected = "a whole number, such as 500000 or 1.5M"
    else:
        expected = EXPECTED.get(kind.partition("_")[0], error["msg"])
    words = [each["ctx"]["expected"] for each in errors if each["type"] == "literal_error" and each["input"] == given]
    expected += "".join(f", or {word}".replace("'", "") for word in words)  # of a union's other member
    return f"{where} is {given!r}; expected {expected}"


def rank(error: Any) -> int:
    """Among the errors of a union's members those say most that are of the member that was meant."""
    if error["type"] == "unexpected_keyword_argument":
        return 0
    other = error["type"] == "dataclass_type" or (error["type"] != "missing" and isinstance(error["input"], Mapping))
    return 2 if other else 1


def names_of(place: Sequence[Any], content: Any, kind: str) -> list[str]:
    """The keys on the way to a place of pydantic's, an item's number in brackets; the names of a union's members, which
    stand there too, are left out."""
    names: list[str] = []
    for number, key in enumerate(place, 1):
        if isinstance(content, Mapping) and key in content:
            content = content[key]
            names.append(str(key))
        elif isinstance(content, (list, tuple)) and isinstance(key, int):
            content = content[key]
            names[-1] += f"[{key}]"
        elif kind == "missing" and number == len(place):
            names.append(str(key))
    return names


def fields_at(kind: Any, names: Sequence[str]) -> list[str]:
    """The fields of the dataclasses at a place within a type."""
    if dataclasses.is_dataclass(kind):
        if not names:
            return [field.name for field in dataclasses.fields(kind)]
        return fields_at(typing.get_type_hints(kind).get(names[0]), names[1:])
    rest = names[1:] if typing.get_origin(kind) is dict else names
    return [field for argument in typing.get_args(kind) for field in fields_at(argument, rest)]
