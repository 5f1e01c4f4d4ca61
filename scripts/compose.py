"""From conf/ and the overrides of a command line to a frozen dataclass. The only place that calls Hydra.

Hydra's Compose API reads the tree: no change of directory, no output folder of its own. What comes back is plain data.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..models.errors import InputError

CONF = Path(__file__).parents[1] / "conf"
Options = TypeVar("Options")


def compose_config(command: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The composed config of a command as plain dicts. Raises InputError, in one line, for what Hydra refuses."""
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for override in overrides:
        if "=" not in override:
            raise InputError(
                f"{override!r} is no override; expected KEY=VALUE (limbeck {command} --help lists the keys)"
            )
    # conf/model/ holds named configs, and model= may also be a folder: a value to Hydra, and no group.
    models = [override for override in overrides if override.startswith("model=")]
    try:
        with initialize_config_module("limbeck.conf", version_base="1.3"):
            config = compose(config_name=command, overrides=[word for word in overrides if word not in models])
        for override in models:
            OmegaConf.update(config, "model", override.removeprefix("model="))
        content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(command, overrides, error)) from None
    assert isinstance(content, dict)
    content.pop("recipe", None)
    return typing.cast(dict[str, Any], content)


def explain(command: str, overrides: Sequence[str], error: Exception) -> str:
    """One line for an error of Hydra's: which override, and what was probably meant."""
    known = known_keys(command)
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        group = CONF / key
        if group.is_dir() and key != "model":
            choices = sorted(path.stem for path in group.glob("*.yaml"))
            if value not in (*choices, "null"):
                return f"{key}={value}: there is no such {key}; known: {', '.join(choices)}" + guess(value, choices)
        elif key not in known:
            return f"{key!r} is no option of limbeck {command}" + guess(key, known) + f" (limbeck {command} --help)"
    missing = getattr(error, "full_key", None)
    if "Missing mandatory value" in str(error) and missing:
        return f"{missing} is missing; give {missing}=VALUE (limbeck {command} --help)"
    return " ".join(str(error).split())


def guess(word: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


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

    return [*walk(config, ""), *(path.name for path in CONF.iterdir() if path.is_dir())]


def build(cls: type[Options], content: Mapping[str, Any], where: str = "") -> Options:
    """A frozen dataclass, nested ones included, out of plain data. Raises InputError."""
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
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return convert(kind, value, where)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise InputError(f"{where} is {value!r}; expected options below it, such as {where}.KEY=VALUE")
        return build(kind, value, where + ".")  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where} is {value!r}; expected a list, such as {where}=[1,2]")
        return tuple(convert(arguments[0], item, where) for item in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"{where} is {value!r}; expected a mapping")
        return {str(key): convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # an unquoted name such as 9
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
    raise InputError(f"{where} is {value!r}; expected {names.get(kind, kind)}")
