"""From conf/ and the overrides of a command line to a frozen dataclass. The only place that calls Hydra.

Hydra's Compose API reads the tree: no change of directory, no output folder of its own. What comes back is plain data.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...models.errors import InputError
from ...models.errors import guess as guess

CONF = Path(__file__).parents[2] / "conf"
# Paths, names and prompts are meant as the shell passes them, parentheses, quotes and all: Hydra's grammar does not
# see them. (conf/model/ holds named configs; to Hydra `model=` would name one of its groups.)
VERBATIM = (
    "model", "init", "teacher", "student", "teacher_cache", "base", "other", "against", "data", "output", "scores",
    "gap", "prompt", "prompts", "system", "also",
)  # fmt: skip
BASES = {"train-fit": "compress"}  # whose options and recipes a command takes beside its own
Options = TypeVar("Options")


def compose_config(command: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The composed config of a command as plain dicts. Raises InputError, in one line, for what Hydra refuses."""
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    texts: dict[str, str] = {}
    words: list[str] = []
    for override in overrides:
        key, value = split(command, override)
        if key in VERBATIM and not (key == "student" and value.startswith("{")):
            texts[key] = value
        elif override != "recipe=null":  # the default, which Hydra refuses to be told
            words.append(override)
    try:
        with initialize_config_module("limbeck.conf", version_base="1.3"):
            config = compose(config_name=command, overrides=words)
        for key in texts:
            if key not in config.keys():  # noqa: SIM118 - `in` is false for a missing value
                raise InputError(no_option(command, key))
            if OmegaConf.is_missing(config, key):
                config[key] = ""
        content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(command, words, error)) from None
    assert isinstance(content, dict)
    content.pop("recipe", None)
    for key, value in texts.items():
        content[key] = None if value == "null" and content[key] is None else value
    return typing.cast(dict[str, Any], content)


def split(command: str, override: str, *, sweeping: bool = False) -> tuple[str, str]:
    """KEY and VALUE of an override. Raises InputError where it is none, or picks what is not there. Where values are
    swept over, Hydra sees to itself and to the choices."""
    key, equals, value = override.partition("=")
    name = key.lstrip("+~")
    if not (name and equals):
        raise InputError(f"{override!r} is no override; expected KEY=VALUE (limbeck {command} --help lists the keys)")
    if sweeping and (name.split(".")[0].split("/")[0] == "hydra" or "," in value):
        return key, value
    if name.split(".")[0].split("/")[0] == "hydra":
        raise InputError(no_option(command, name))
    choices = groups(command) | {"recipe": list(recipes(command))}
    if name in choices and not (name == "recipe" and value == "null"):
        if value not in choices[name]:
            known = ", ".join(choices[name]) or "none"
            raise InputError(
                f"{override}: limbeck {command} has no such {name}; known: {known}" + guess(value, choices[name])
            )
    elif key in VERBATIM and not value and key != "prompt":
        raise InputError(f"{override} is empty; give {key}=VALUE (limbeck {command} --help)")
    return key, value


def groups(command: str) -> dict[str, list[str]]:
    """The groups that a command's config picks from, each with its choices, the default first."""
    found = groups(BASES[command]) if command in BASES else {}
    for line in (CONF / f"{command}.yaml").read_text(encoding="utf-8").splitlines():
        group, _, default = line.removeprefix("  - ").removeprefix("override ").partition(": ")
        if line.startswith("  - ") and group != "recipe" and (CONF / group).is_dir():
            names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
            found[group] = [default, *(name for name in names if name != default)]
    return found


def recipes(command: str) -> dict[str, str]:
    """The recipes of a command with what they are for; a recipe's second line says both."""
    found = {}
    for path in sorted((CONF / "recipe").glob("*.yaml")):
        mark, _, purpose = (
            path.read_text(encoding="utf-8").splitlines()[1].partition(f"# For {BASES.get(command, command)}: ")
        )
        if not mark and purpose:
            found[path.stem] = purpose
    return found


def explain(command: str, overrides: Sequence[str], error: Exception) -> str:
    """One line for an error of Hydra's: which override, and what was probably meant."""
    known = known_keys(command)
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key not in known:
            return no_option(command, key, known)
    missing = getattr(error, "full_key", None)
    if "Missing mandatory value" in str(error) and missing:
        return f"{missing} is missing; give {missing}=VALUE (limbeck {command} --help)"
    what = str(error).strip().splitlines()[0]
    if what.startswith("Ambiguous value"):
        return f"{what}; give one value, or a list as KEY=[A,B]"
    for key in (override.lstrip("+~").partition("=")[0] for override in overrides):
        if what.startswith(f"Could not override '{key}'"):
            return f"{key} is not read with what else was chosen; leave it out (limbeck {command} --help)"
    unread = getattr(error, "override", None)
    return f"{unread!r} cannot be read: {what}; quote a value with special characters" if unread else what


def no_option(command: str, key: str, known: Sequence[str] = ()) -> str:
    near = guess(key, known or known_keys(command))
    return f"{key!r} is no option of limbeck {command}{near} (limbeck {command} --help)"


def known_keys(command: str) -> list[str]:
    """Every dotted key that a command's config has, the groups' keys among them."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    with initialize_config_module("limbeck.conf", version_base="1.3"):
        config = OmegaConf.to_container(compose(config_name=command), resolve=False)

    def walk(content: Any, prefix: str) -> list[str]:
        if not isinstance(content, Mapping):
            return []
        return [found for key in content for found in (prefix + key, *walk(content[key], f"{prefix}{key}."))]

    return [*walk(config, ""), *groups(command), "recipe"]


def build(cls: type[Options], content: Mapping[str, Any], where: str = "") -> Options:
    """A frozen dataclass, nested ones included, out of plain data. Raises InputError."""
    if hasattr(cls, "option_types"):
        types_of = cls.option_types()
        for key in content:
            if key not in types_of:
                raise InputError(f"{where}{key} is no option here" + guess(str(key), list(types_of)))
        given = {key: convert(types_of[key], value, where + key) for key, value in content.items() if value is not None}
        return cls(**given)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in content:
        if key not in fields:
            raise InputError(f"{where}{key} is no option here" + guess(str(key), list(fields)))
    values = {}
    for name, field in fields.items():
        if name in content:
            values[name] = convert(hints[name], content[name], where + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}{name} is missing; give {where}{name}=VALUE")
    return cls(**values)


def convert(kind: Any, value: Any, where: str) -> Any:
    """A value checked against its annotation: numbers, texts, paths, tuples, dicts, dataclasses, and unions of them."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        if len(kinds) > 1:  # a list, or options below it
            kinds = [kind for kind in kinds if dataclasses.is_dataclass(kind) == isinstance(value, Mapping)]
        return convert(kinds[0], value, where)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise InputError(f"{where} is {value!r}; expected options below it, such as {where}.KEY=VALUE")
        return build(kind, value, where + ".")  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where} is {value!r}; expected a list, such as {where}=[1,2]")
        return tuple(convert(arguments[0], item, f"{where}[{n}]") for n, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"{where} is {value!r}; expected a mapping")
        return {str(key): convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is Any:
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # an unquoted name such as 9
    if isinstance(value, kind) and kind is not float and not (kind is int and isinstance(value, bool)):
        return value
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
    raise InputError(f"{where} is {value!r}; expected {names.get(kind, kind)}")
