"""Every number that an option takes, of every command, by the types of its dataclasses: what is none, or is out of all
range, is refused in one line that names the option, before anything is read."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from limbeck.models.errors import InputError
from limbeck.models.quantities import with_quantities
from limbeck.prune.target import ByWidth, Target
from limbeck.scripts.run.bounds import check_content
from limbeck.scripts.run.compose import build, compose_config
from limbeck.scripts.run.main import COMMANDS

Way = tuple[str, ...]
PLACES = {"data": "stdlib", "output": "x", "scores": "x"}
PLACES |= dict.fromkeys(("model", "teacher", "student", "other"), "zoo")
# What a command cannot do without, and what opens the options within others.
WORDS = {
    "compress": ["target.parameters=0.75"],
    "distill": [
        "distill=on-policy", "+distill.teacher_correction={steps:5,tokens:0,learning_rate:0.1}",
        "distill.loss.kl_weight={start:1,end:0.5,steps:5,shape:linear}", "distill.rollouts.top_p=1",
    ],
    "experiment": ["experiment=loss"],
    "generate": ["prompt=x"],
    "search": ["space.hidden_size={min:8,max:16,step:8}"],
    "train-fit": ["target.parameters=0.75"],
}  # fmt: skip
NEVER = (math.nan, math.inf, -math.inf, 10**30, -(10**30), "many", "", True, [1], {"a": 1})
WHOLE = (1e30, 0.5)  # of which an option that counts makes no sense
BELOW = (-1, -1e30)
# Of figures that others have published, whatever their measure. (A target's sizes are between 1 and those of the model,
# and refused where that is read: tests/test_choose.py.)
ANY_SIGN = ("published",)


def kinds_of(kind: Any) -> set[Any]:
    """The types that a value may have, of a union each of them."""
    if typing.get_origin(kind) is typing.Annotated:
        return kinds_of(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return set().union(*map(kinds_of, typing.get_args(kind)))
    return {kind}


def numbers_of(cls: Any, content: Mapping[str, Any], where: Way = ()) -> Iterator[tuple[Any, Way, set[Any]]]:
    """The class of each option that takes a number, the way to it in the content, and the types that it may have."""
    hints = cls.option_types() if issubclass(cls, ByWidth) else typing.get_type_hints(cls)
    for name in hints.keys() & content.keys():
        kinds, value, way = kinds_of(hints[name]), content[name], (*where, name)
        if not isinstance(value, Mapping):
            if kinds & {int, float}:
                yield cls, way, kinds
            continue
        for kind in kinds:
            if dataclasses.is_dataclass(kind):
                yield from numbers_of(kind, value, way)
            elif typing.get_origin(kind) is dict:
                inner = typing.get_args(kind)[1]
                for key in value if inner in (int, float) or dataclasses.is_dataclass(inner) else ():
                    if dataclasses.is_dataclass(inner):
                        yield from numbers_of(inner, value[key], (*way, key))
                    else:
                        yield cls, (*way, key), {inner}


def changed(content: Mapping[str, Any], way: Way, value: Any) -> dict[str, Any]:
    key, *rest = way
    return {**content, key: changed(content[key], tuple(rest), value) if rest else value}


def given(command: str) -> list[str]:
    """A command line that is complete."""
    missing = {key for key, value in compose_config(command, WORDS.get(command, []), complete=False).items()
               if value in ("???", None)}  # fmt: skip
    return [f"{key}={value}" for key, value in PLACES.items() if key in missing] + WORDS.get(command, [])


@pytest.fixture(scope="module")
def done() -> set[tuple[Any, str]]:
    """Options of classes that an earlier command has, too: they are read alike."""
    return set()


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers(command: str, done: set[tuple[Any, str]]) -> None:
    options = importlib.import_module(f"limbeck.scripts.{command.replace('-', '_')}").Options
    content = compose_config(command, given(command))
    build(options, content)
    found = {(cls, way[-1]): (way, kinds) for cls, way, kinds in numbers_of(options, content)}
    assert found, "a command without a number"
    passed = []
    for (cls, name), (way, kinds) in found.items():
        if (cls, name) in done:
            continue
        done.add((cls, name))
        whole = WHOLE if float not in kinds else ()
        below = BELOW if name not in ANY_SIGN and cls is not Target else ()
        for value in (*NEVER, *whole, *below):
            if str in kinds and isinstance(value, str):
                continue
            if isinstance(value, list) and any(typing.get_origin(kind) is tuple for kind in kinds):
                continue
            try:
                read = with_quantities(changed(content, way, value))
                check_content(read)
                build(options, read)
                passed.append((way, value))
            except InputError as refused:
                said = str(refused)
                if name not in said or "\n" in said or len(said) > 500:
                    passed.append((way, value, said))
        for value in (0, 1e30, 2**62):  # which may be right: no other error comes of them
            with contextlib.suppress(InputError):
                build(options, changed(content, way, value))
    assert passed == []
