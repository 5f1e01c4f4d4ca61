"""From conf/ and the overrides of a command line to frozen dataclasses: Hydra composes, pydantic checks and builds.

Hydra's Compose API reads the tree: no change of directory, no output folder of its own. What comes back is plain data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...models.axes import AXES
from ...models.dtype_names import dtype_name
from ...models.errors import InputError
from ...models.errors import guess as guess
from ...models.foreign import own_path, parse_yaml
from ...models.hints import guess_option
from ...models.quantities import with_quantities
from .bounds import check_content, check_words
from .outside import is_own_recipe, own_recipes, searched

CONF = Path(__file__).parents[2] / "conf"
# Paths, names and prompts are meant as the shell passes them, parentheses, quotes and all: Hydra's grammar does not
# see them. (conf/model/ holds named configs; to Hydra `model=` would name one of its groups.)
VERBATIM = (
    "model", "init", "teacher", "student", "teacher_cache", "base", "other", "against", "data", "output", "scores",
    "gap", "prompt", "prompts", "system", "also",
)  # fmt: skip
WIDTHS = "target/widths"  # which models/axes.py writes
BASES = {"train-fit": "compress"}  # whose options and recipes a command takes beside its own
Options = TypeVar("Options")


def compose_config(
    command: str, overrides: Sequence[str], folders: Sequence[Path] = (), *, complete: bool = True
) -> dict[str, Any]:
    """The composed config of a command as plain dicts; `folders` hold choices of groups beside those of conf/. What is
    not `complete` may lack options (`???`). Raises InputError, in one line, for what Hydra refuses."""
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationToMissingValueError

    overrides, of_data = split_data(overrides)
    texts, words = split_verbatim(command, overrides, folders=folders)
    with own_recipes(words) as (named, own), explained(command, named, [*folders, *own]):
        check_added(command, words)
        config = composed(command, named, [*folders, *own])
        for key in texts:
            top, _, below = key.partition(".")
            if top not in config.keys() or (below and not OmegaConf.is_dict(config[top])):  # noqa: SIM118 - `in` is
                raise no_option(command, key)  # false for a missing value
            if OmegaConf.is_missing(config, top):
                config[top] = ""
        try:
            content = OmegaConf.to_container(config, resolve=True, throw_on_missing=complete)
        except InterpolationToMissingValueError:
            if complete:
                raise
            content = OmegaConf.to_container(config)
    assert isinstance(content, dict)
    content.pop("recipe", None)
    content = with_texts(with_quantities(content), texts)
    if of_data:
        if "data" not in content:
            raise no_option(command, "data")
        given = content["data"]
        content["data"] = {**(given if isinstance(given, dict) else {"path": given}), **of_data}
    content = with_dtypes(content)
    check_content(content)
    return typing.cast(dict[str, Any], content)


def check_added(command: str, words: Sequence[str]) -> None:
    """Raises InputError where an option is added, as `+KEY=VALUE`, of which the command has not even the beginning;
    what it has not further down its dataclasses say."""
    added = {word.lstrip("+").partition("=")[0] for word in words if word.startswith("+")}
    if not added:
        return
    from .mistakes import known_keys, unknown

    known = known_keys(command)
    for key in sorted(added):
        if key.split(".")[0] not in known:
            raise InputError(unknown(command, key, known))


def split_data(overrides: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The overrides without those of data=, which is a text to Hydra, and these: `data.train_on=all`. Raises
    InputError."""
    others: list[str] = []
    options: dict[str, Any] = {}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if not key.startswith("data."):
            others.append(override)
            continue
        check_words([override])
        check_data_option(key)
        options[key.removeprefix("data.")] = parse_yaml(value, f"{override} (such as data.train_on=all)")
    return others, options


def check_data_option(key: str) -> None:
    """Raises InputError for an option that no text has; its value is checked where it is read."""
    from ...distill.text.reading import TextData

    known = [f"data.{field.name}" for field in dataclasses.fields(TextData) if field.name != "path"]
    if key not in known:
        raise InputError(f"{key} is no option here{guess_option(key, known)}; known: {', '.join(known)}")


def with_texts(content: dict[Any, Any], texts: Mapping[str, str]) -> dict[Any, Any]:
    """The content with texts that were taken as they are; `student.NAME` is one of the mapping `student`."""
    for key, value in texts.items():
        top, _, below = key.partition(".")
        if below:
            content[top] = {**content[top], below: value}
        elif key == "data" and isinstance(content.get(key), dict):  # a recipe's, with options of its own
            content[key] = {**content[key], "path": value}
        else:
            content[key] = None if value == "null" and content.get(key) is None else value
    return content


def composed(command: str, words: Sequence[str], folders: Sequence[Path]) -> Any:
    """`layered`, in which there may be keys below options that are null or empty by default."""
    from hydra.errors import ConfigCompositionException

    try:
        return layered(command, words, folders)
    except ConfigCompositionException:
        from .mistakes import with_free_keys

        free = with_free_keys(command, words, folders)
        if free == list(words):
            raise
    return layered(command, free, folders)


def layered(command: str, words: Sequence[str], folders: Sequence[Path]) -> Any:
    """The config in which what comes later wins: a group that is chosen after the recipe is as its choice has it. (To
    Hydra a recipe is the last of the defaults wherever it stands.) A single KEY=VALUE goes before both."""
    chosen = [word for word in words if word.partition("=")[0].lstrip("+~") in {*groups(command), "recipe"}]
    places = [place for place, word in enumerate(chosen) if word.startswith("recipe=")]
    later = [word.partition("=")[0] for word in chosen[places[-1] + 1 :]] if places else []
    config = hydra_config(command, words, folders)
    if not later:
        return config
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf, open_dict

    values = [word for word in words if word not in chosen]
    base = hydra_config(command, chosen, folders)
    plain = hydra_config(command, [word for word in chosen if not word.startswith("recipe=")], folders)
    with open_dict(base):
        for group in later:
            OmegaConf.update(base, group, OmegaConf.select(plain, group), merge=False)
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(values), base)
    return base


def with_dtypes(content: Any) -> Any:
    """The content with every dtype under its one name, so that bf16 and bfloat16 are the same options."""
    if isinstance(content, list):
        return [with_dtypes(each) for each in content]
    if not isinstance(content, dict):
        return content
    of_dtype = {key for key in content if isinstance(key, str) and (key == "dtype" or key.endswith("_dtype"))}
    return {
        key: dtype_name(value) if key in of_dtype and isinstance(value, str) else with_dtypes(value)
        for key, value in content.items()
    }


def hydra_config(command: str, words: Sequence[str], folders: Sequence[Path] = ()) -> Any:
    from hydra import compose, initialize_config_module

    register_widths()
    with initialize_config_module("limbeck.conf", version_base="1.3"):
        return compose(config_name=command, overrides=[*words, *searched(folders)])


def register_widths() -> None:
    """Makes known to Hydra an option for the width of every axis, of targets and search spaces: `target: widths`."""
    from hydra.core.config_store import ConfigStore

    group, name = WIDTHS.split("/")
    ConfigStore.instance().store(name=name, group=group, node={row.width: None for row in AXES.values()})


def config_text(name: str) -> str:
    """A config of conf/ by its name, such as "target/default"."""
    if name == WIDTHS:
        return "".join(f"{row.width}: null  # {row.title}\n" for row in AXES.values())
    return (CONF / f"{name}.yaml").read_text(encoding="utf-8")


@contextlib.contextmanager
def explained(command: str, words: Sequence[str], folders: Sequence[Path] = ()) -> Iterator[None]:
    """Turns an error of Hydra's into an InputError of one line. (Beside errors of its own it raises ValueError,
    AssertionError, RecursionError and others, for words that nobody thought of.)"""
    check_words(words)
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        from .mistakes import explain

        raise InputError(explain(command, words, error, folders)) from None


def no_option(command: str, key: str) -> InputError:
    from .mistakes import unknown

    return InputError(unknown(command, key))


def split_verbatim(
    command: str, overrides: Sequence[str], *, sweeping: bool = False, folders: Sequence[Path] = ()
) -> tuple[dict[str, str], list[str]]:
    """The texts that are taken as they are, and the overrides for Hydra. Raises InputError as `split` does."""
    texts: dict[str, str] = {}
    words: list[str] = []
    for override in overrides:
        key, value = split(command, override, sweeping=sweeping, folders=folders)
        name = key.lstrip("+")
        if name.startswith("student.") and value:
            texts[name] = value
        elif key in VERBATIM and not (key == "student" and value.startswith("{")):
            texts[key] = value
        elif override != "recipe=null":  # the default, which Hydra refuses to be told
            # What a mapping may hold its dataclass says; to Hydra an option that is {} by default has no keys at all.
            words.append(f"++{override}" if value.startswith("{") and key == name else override)
    return texts, words


def split(command: str, override: str, *, sweeping: bool = False, folders: Sequence[Path] = ()) -> tuple[str, str]:
    """KEY and VALUE of an override, or ~KEY, which takes an option away. Raises InputError where it is none, or picks
    what is not there. Where values are swept over, Hydra sees to itself and to the choices."""
    key, equals, value = override.partition("=")
    name = key.lstrip("+~")
    if not name or not (equals or key.startswith("~")):
        raise InputError(f"{override!r} is no override; expected KEY=VALUE (limbeck {command} --help lists the keys)")
    of_hydra = name.split(".")[0].split("/")[0] == "hydra"
    if sweeping and (of_hydra or "," in value):
        return key, value
    if of_hydra:
        raise no_option(command, name)
    if not equals:
        return key, value
    choices = groups(command) | {"recipe": list(recipes(command))}
    known = [*choices.get(name, ()), *(path.stem for folder in folders for path in (folder / name).glob("*.yaml"))]
    if name in choices and value not in known and override != "recipe=null" and not is_own_recipe(override):
        below = ", or a .yaml file" if name == "recipe" else f"; or {name}.KEY=VALUE"
        raise InputError(
            f"{override}: limbeck {command} has no such {name}; known: {', '.join(known) or 'none'}{below}"
            + guess(value, known)
        )
    if (key in VERBATIM or name.startswith("student.")) and not value and key != "prompt":
        raise InputError(f"{override} is empty; give {key}=VALUE (limbeck {command} --help)")
    return key, value


def groups(command: str) -> dict[str, list[str]]:
    """The groups that a command's config picks from, each with its choices, the default first."""
    chosen = groups(BASES[command]) if command in BASES else {}
    text = (CONF / f"{command}.yaml").read_text(encoding="utf-8").partition("# Options\n")[0]
    for group, default in re.findall(r"^  - (?:override )?([\w-]+): (\S+)$", text, re.M):
        if group != "recipe":
            names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
            chosen[group] = [default, *(name for name in names if name != default)]
    return chosen


def recipes(command: str) -> dict[str, str]:
    """The recipes of a command with what they are for; a recipe's second line says both."""
    purposes = {}
    for path in sorted((CONF / "recipe").glob("*.yaml")):
        line = path.read_text(encoding="utf-8").splitlines()[1]
        mark, _, purpose = line.partition(f"# For {BASES.get(command, command)}: ")
        if not mark and purpose:
            purposes[path.stem] = purpose
    return purposes


def build(cls: type[Options], content: Mapping[str, Any], where: str = "") -> Options:
    """A frozen dataclass, nested ones included, out of plain data, its annotations taken strictly. Raises InputError
    in one line, which begins with `where`."""
    from pydantic import ValidationError

    content = with_own_paths(cls, content)
    try:  # as JSON a list may become a tuple, and a text a path
        reader = reader_of(typing.cast(Any, cls), tuple(AXES))
        return typing.cast(Options, reader.validate_json(json.dumps([content]))[0])
    except ValidationError as error:
        errors = error.errors(include_url=False)
    for each in errors:
        if isinstance(refused := each.get("ctx", {}).get("error"), InputError):  # by a dataclass of ours
            raise refused from None
    numbers = [each for each in errors if each["type"] == "string_type" and type(each["input"]) in (int, float)]
    places = [each["loc"][1:] for each in numbers]
    if places:  # an unquoted name such as 9
        return build(cls, functools.reduce(with_text, places, content), where)
    from ...models.complaint import complaint

    raise InputError(where + complaint(errors, cls, content))


def with_own_paths(cls: Any, content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The content whose paths have `~` resolved, which a shell does not do within quotes. Raises InputError."""
    paths = {name for name, of in typing.get_type_hints(cls).items() if of is Path or Path in typing.get_args(of)}
    changed = {name: str(own_path(content[name])) for name in paths if isinstance(content.get(name), str)}
    return {**content, **changed}


@functools.lru_cache(maxsize=32)
def reader_of(cls: Any, axes: tuple[str, ...]) -> Any:
    """What reads a dataclass out of JSON, in a list, which gives the dataclasses this config. To make one takes longer
    than to read with it. The options that there are follow from the axes as well."""
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(list[cls], config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))


def with_text(content: Any, place: Sequence[Any]) -> Any:
    """The content with the number at a place of pydantic's turned into a text."""
    if not place:
        return str(content)
    key, *rest = place
    if isinstance(content, Mapping) and key in content:
        return {**content, key: with_text(content[key], rest)}
    if isinstance(content, list) and isinstance(key, int):
        return [*content[:key], with_text(content[key], rest), *content[key + 1 :]]
    return with_text(content, rest)  # the name of a union's member
