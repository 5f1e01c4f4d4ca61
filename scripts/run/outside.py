"""What a command line has beside KEY=VALUE: flags as Hydra has them, and recipes and groups of the user's own."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...models.errors import InputError
from ...models.foreign import own_path, read_text, read_yaml

FLAGS = "--help, --multirun (-m), --cfg job, --config-dir FOLDER"


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """The overrides in their order; `folders` are searched for groups' choices beside conf/."""

    overrides: tuple[str, ...]
    folders: tuple[Path, ...] = ()
    shows_config: bool = False
    sweeps: bool = False

    @classmethod
    def parse(cls, words: Sequence[str]) -> CommandLine:
        """Raises InputError for an unknown flag, one without its value, and two that exclude each other."""
        overrides: list[str] = []
        folders: list[Path] = []
        switches = {"shows_config": False, "sweeps": False}
        line = iter(words)
        for word in line:
            flag, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
            if flag in ("-m", "--multirun"):
                switches["sweeps"] = True
            elif flag in ("-c", "--cfg", "-cd", "--config-dir"):
                value = value if equals else next(line, "")
                if flag in ("-cd", "--config-dir"):
                    folders.append(config_folder(flag, value))
                elif value != "job":
                    raise InputError(f"{flag} is {value!r}; expected job, which prints the options and does nothing")
                else:
                    switches["shows_config"] = True
            elif word.startswith("-"):
                raise InputError(f"{word!r} is no flag; known: {FLAGS}; options are KEY=VALUE")
            else:
                overrides.append(word)
        if all(switches.values()):
            raise InputError("--cfg job prints the options of one job, --multirun runs several; leave one of them out")
        return cls(tuple(overrides), tuple(folders), **switches)


def config_folder(flag: str, value: str) -> Path:
    folder = own_path(value)
    if not value or not folder.is_dir():
        raise InputError(f"{flag} {value}: no such folder; expected one with groups as conf/ has them, such as recipe/")
    return folder.resolve()


def is_own_recipe(word: str) -> bool:
    key, _, value = word.partition("=")
    return key == "recipe" and value.endswith((".yaml", ".yml"))


@contextlib.contextmanager
def own_recipes(words: Sequence[str], place: Path | None = None) -> Iterator[tuple[list[str], list[Path]]]:
    """The words with `recipe=FILE.yaml` as the name of a recipe, and the folder in which that is found: `place`, which
    stays (jobs elsewhere read it later), or a temporary one."""
    texts = {f"given_{number}": read_recipe(word) for number, word in enumerate(words) if is_own_recipe(word)}
    if not texts:
        yield list(words), []
        return
    named = [f"recipe=given_{number}" if is_own_recipe(word) else word for number, word in enumerate(words)]
    with contextlib.ExitStack() as stack:
        if place is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="limbeck-recipe-")))
        (place / "recipe").mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (place / "recipe" / f"{name}.yaml").write_text(text, encoding="utf-8")
        yield named, [place.resolve()]


def read_recipe(word: str) -> str:
    """A recipe's text, which sets options from the top whether it says so or not. Raises InputError."""
    path = own_path(word.partition("=")[2])
    if not path.exists():
        raise InputError(f"{word}: no such file; expected a recipe's .yaml, or a name")
    content = read_yaml(path)
    text = read_text(path).removeprefix("\ufeff")
    if not isinstance(content, dict):
        raise InputError(f"{word} holds no options; expected KEY: VALUE, as the recipes in conf/recipe/ have them")
    return text if text.startswith("# @package") else f"# @package _global_\n{text}"


def quoted(text: str) -> str:
    """A text as one value of Hydra's grammar: to backslashes before a quote, and to those alone, it adds some."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def searched(folders: Sequence[Path]) -> list[str]:
    """The override that has Hydra look into folders, too; none without any."""
    paths = ",".join(quoted(f"file://{folder}") for folder in folders)
    return [f"hydra.searchpath=[{paths}]"] if folders else []
