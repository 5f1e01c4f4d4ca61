"""Files that are not ours, read within bounds: whatever lies in a folder gives its content, or one line says why not.

A file has to be a regular one of a bounded size, its text UTF-8; JSON and YAML have a bounded depth and bounded
numbers, and say each thing once. What the content has to be is schema.py's matter.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import InputError

LARGEST = 2**28  # bytes; the largest public tokenizer.json have 33 MB, the largest indices of shards 20 MB
AT_ONCE = 2**20  # bytes that are read together
SETTINGS = 2**20  # bytes of what people write by hand
LARGEST_WIDTH = 2**24  # the widest public vocabularies have 2**18
MOST_LAYERS = 4096  # the deepest public models have 252, a block's counted one by one
DEEPEST = 64  # levels of lists and objects; a tokenizer.json has 8
DIGITS = 40  # tokenizer_config.json files say model_max_length=1000000000000000019884624838656
NODES = 200_000  # values in a YAML file, an alias counting each time that it stands somewhere
POINTS_TO_CODE = ("auto_map", "custom_pipelines", "custom_generate")  # in files that transformers writes
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # how JSON spells half of a surrogate pair
HALVES = re.compile("[\ud800-\udfff]")
HALF = "spells half of a surrogate pair; expected whole characters"


def check_regular(path: Path, largest: int | None = None) -> None:
    """Raises InputError unless a path is a regular file (or a link to one), of `largest` bytes at most: a pipe would be
    waited for, a device has no end."""
    try:
        kind = path.stat()
    except (OSError, ValueError) as error:  # a name with a null byte
        raise unreadable(path, error) from None
    if not stat.S_ISREG(kind.st_mode):
        what = "a folder" if stat.S_ISDIR(kind.st_mode) else "a pipe or a device"
        raise InputError(f"{path} is {what}; expected a regular file")
    if largest is not None and kind.st_size > largest:
        raise InputError(f"{path} has {kind.st_size:,} bytes; expected {largest:,} at most")


def unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} is missing")
    return InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """The bytes of a regular file. Raises InputError."""
    check_regular(path, largest)
    try:
        with path.open("rb") as stream:
            parts, size = [], 0
            # A file of /proc says that it has none; and to ask for all that there may be would reserve as much.
            while size <= largest and (part := stream.read(AT_ONCE)):
                parts.append(part)
                size += len(part)
    except OSError as error:
        raise unreadable(path, error) from None
    if size > largest:
        raise InputError(f"{path} has more than {largest:,} bytes, the most that is read of it")
    return b"".join(parts)


def read_text(path: Path, largest: int = LARGEST) -> str:
    """The text of a regular file. Raises InputError, also where it is not UTF-8."""
    try:
        return read_bytes(path, largest).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); convert it") from None


def read_json(path: Path, largest: int = LARGEST) -> Any:
    """The content of a JSON file, as `parse_json` gives it. Raises InputError."""
    return parse_json(read_text(path, largest), str(path))


def read_object(path: Path, largest: int = LARGEST) -> dict[str, Any]:
    """The content of a JSON file that holds an object. Raises InputError."""
    content = read_json(path, largest)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {kind_of(content)}; expected an object")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that has one on each line. Raises InputError, naming the line."""
    records = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        record = parse_json(line, f"{path}, line {number},")
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}, holds {kind_of(record)}; expected an object")
        records.append(record)
    return records


def parse_json(text: str, where: str) -> Any:
    """The content of a JSON text, in which Infinity is a number (published configs have it) and NaN is none.

    Raises InputError, which begins with `where`, for what is no JSON, for more than `DEEPEST` levels, whole numbers of
    more than `DIGITS` digits, keys with two different values, and text that is half a surrogate pair.
    """
    try:
        content = json.loads(text, parse_int=whole_number, parse_constant=constant, object_pairs_hook=each_once)
        check_depth(content)
        if HALF_PAIR.search(text):
            check_values(content, where)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is no valid JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{where}: {too_deep()}") from None
    except InputError:
        raise
    except ValueError as error:  # of the functions below
        raise InputError(f"{where}: {error}") from None
    return content


def whole_number(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"the number {text[:12]}... has {len(text)} digits; expected {DIGITS} at most")
    return int(text)


def constant(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN stands where a number should")
    return math.inf if text == "Infinity" else -math.inf


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        for key, value in pairs:
            if type(content[key]) is not type(value) or content[key] != value:
                raise ValueError(f"{key!r} stands twice, with different values; expected it once")
    return content


def too_deep() -> str:
    return f"lists and objects within each other go deeper than {DEEPEST} levels"


def check_depth(content: Any, most: float = math.inf) -> None:
    """Raises ValueError where content goes too deep, or has more than `most` values in all; what it holds in several
    places counts in each."""
    level, count = [content], 0
    for _ in range(DEEPEST + 1):
        if not level:
            return
        within: list[Any] = []
        for value in level:
            if isinstance(value, (dict, list)):
                within.extend(value.values() if isinstance(value, dict) else value)
                if (count + len(within)) > most:
                    raise ValueError(f"it stands for more than {most:,} values (aliases within aliases)")
        count += len(within)
        level = [value for value in within if isinstance(value, (dict, list))]
    raise ValueError(too_deep())


def read_yaml(path: Path, largest: int = SETTINGS // 4) -> Any:
    """The content of a YAML file, as `parse_yaml` gives it. Raises InputError."""
    return parse_yaml(read_text(path, largest), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The content of a YAML text, plain data of a bounded size, each key said once. Raises InputError, which begins
    with `where`."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            """As it is written: what stands beside a merged mapping may say its keys again."""
            node = super().compose_mapping_node(anchor)
            keys = [(key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
            each_once([(key.value, (value.tag, value.value)) for key, value in keys])
            return node

    try:
        content = yaml.load(text, Loader)
        check_depth(content, NODES)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is no YAML: {' '.join(str(error).split())[:200]}") from None
    except RecursionError:
        raise InputError(f"{where}: {too_deep()}") from None
    except MemoryError:
        raise
    except Exception as error:  # the library's own readers of dates and numbers raise anything
        raise InputError(f"{where} is no YAML that can be read: {first_line(error)}") from None
    check_values(content, where)
    return content


def check_values(content: Any, where: str) -> None:
    """Raises InputError where a whole number has more than `DIGITS` digits, or a text half a surrogate pair."""
    pending = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, int) and abs(value) >= 10**DIGITS:
            raise InputError(f"{where}: a number has more than {DIGITS} digits; expected {DIGITS} at most")
        if isinstance(value, str) and HALVES.search(value):
            raise InputError(f"{where} {HALF}")
        if isinstance(value, (dict, list)):
            pending.extend([*value, *value.values()] if isinstance(value, dict) else value)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


KINDS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (lambda value: value is None, "null"),
    (lambda value: isinstance(value, bool), "true or false"),
    (lambda value: isinstance(value, (int, float)), "a number"),
    (lambda value: isinstance(value, str), "a text"),
    (lambda value: isinstance(value, list), "a list"),
    (lambda value: isinstance(value, Mapping), "an object"),
)


def kind_of(value: Any) -> str:
    """What a value of JSON is, in words."""
    return next((name for holds, name in KINDS if holds(value)), type(value).__name__)


def without_code(content: Any) -> Any:
    """The same content (of JSON) without what points to code, and infinity as transformers writes it, since plain JSON
    has none."""
    if isinstance(content, Mapping):
        return {key: without_code(value) for key, value in content.items() if key not in POINTS_TO_CODE}
    if isinstance(content, float) and math.isinf(content):
        return {"__float__": "Infinity" if content > 0 else "-Infinity"}
    return [without_code(value) for value in content] if isinstance(content, list) else content


def shown(value: Any) -> str:
    """A value as JSON has it, cut short."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def own_path(path: str | Path) -> Path:
    """A path with `~` and `~user` resolved, and an absolute one for `.` and `..`: whoever writes a folder puts files
    beside it, by its name. Raises InputError where there is no such user."""
    try:
        found = Path(path).expanduser()
        return found.resolve() if found.name in ("", "..") else found
    except RuntimeError:
        raise InputError(f"{path}: {os.fspath(path).split('/')[0]} is no user here; give a path") from None
