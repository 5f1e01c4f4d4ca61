"""Files as rows: text, JSON lines, JSON, CSV, Parquet and Arrow, plain or packed (.gz, .zst), read in bounded memory.

A file of text is one row; of records each is one. What a suffix stands for does not depend on its letters' case. Lines
and rows are numbered as an editor has them, from 1 on, and rows of Parquet and Arrow from 0 on.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ...models.errors import InputError
from ...models.foreign import each_once

PACKED = (".gz", ".zst")
PROSE = (".py", ".txt", ".md", ".rst")
PIECE = 2**20  # characters of a JSON file that are read at once, more where one record is longer
UNBOUNDED = "write it as .jsonl, whose texts may be of any length"
AT_ONCE = 256  # rows of a table in memory
CELL, LINE = 2**24, 2**26  # characters of a table's at most: the reader of cells takes up to twelve bytes for each
JSON = json.JSONDecoder(object_pairs_hook=each_once)  # made once: json.loads makes one for each text
TEXTS, PAIR = {"text", "messages", "conversations"}, {"prompt", "completion"}  # any of the first, or both, hold text
NAMED = {*TEXTS, *PAIR, "system", "tools"}  # read unless others are named


@dataclasses.dataclass(frozen=True)
class Row:
    """A record, or a file's text; where it stands, for errors; how many bytes of its file are read with it. `alone`: it
    is the one object of a JSON file, which need not be a record at all; `prose`: it is a whole file."""

    value: Any
    where: str
    done: int = 0
    alone: bool = False
    prose: bool = False


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def kind_of(path: Path) -> str:
    """What a file is read as: its suffix in small letters, without that of its packing."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in PACKED), "")


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what the system refuses to read, or cannot unpack, into InputError."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"data: {path} cannot be unpacked: {first_line(error)}") from None
    except OSError as error:
        where, why = error.filename or path, error.strerror or first_line(error)
        raise InputError(f"data: {where} cannot be read: {why}") from None


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """A file's bytes, unpacked, and what tells how many of its own are read. Raises InputError."""
    with readable(path):
        if not path.is_file():  # a pipe or a device may never end
            raise InputError(f"data: {path} is no regular file")
        with path.open("rb") as raw:
            suffix = path.suffix.lower()
            if suffix == ".gz":
                with gzip.open(raw) as stream:
                    yield stream, raw.tell  # type: ignore[misc]
            elif suffix == ".zst":
                import pyarrow  # a dependency of datasets

                with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd") as packed:
                    yield io.BufferedReader(packed, PIECE), raw.tell
            else:
                yield raw, raw.tell


def decoded(path: Path, content: bytes, begin: int = 0) -> str:
    """The text of a file's bytes from `begin` on. Raises InputError where it is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"data: {path} is not UTF-8 (byte {begin + error.start}); convert it") from None


def without_mark(content: bytes) -> bytes:
    """Without the byte order mark that some editors put before UTF-8."""
    return content.removeprefix(codecs.BOM_UTF8)


def whole_text(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Raises InputError where a file of no known suffix is one of records: it is not to be read as prose."""
    with unpacked(path) as (stream, tell):
        text = decoded(path, without_mark(stream.read()))  # the bytes go before the text is worked on
        done = tell()
    if kind_of(path) not in PROSE and begins_with_json(text):
        raise InputError(f"data: {path} looks like records; name it .jsonl or .json, or .txt for prose")
    yield Row(text, str(path), done, prose=True)


def begins_with_json(text: str) -> bool:
    """Whether a text's first line is an object or an array of JSON."""
    first = re.match(r"\s*([\[{].*)", text)
    with contextlib.suppress(ValueError, RecursionError):
        return first is not None and json.loads(first[1]) is not None
    return False


def loaded(text: str, where: str) -> Any:
    """Raises InputError where a text is no JSON, none that Python reads (depth, digits), or says a key twice."""
    try:
        return JSON.decode(text)
    except RecursionError:
        raise InputError(f"data: {where} is nested too deeply") from None
    except ValueError as error:
        said = "" if isinstance(error, json.JSONDecodeError) else f": {first_line(error)}"
        raise InputError(f"data: {where} is no JSON{said}") from None


def json_lines(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """A row for each line that is not empty. (The reader of `datasets` takes 8 times as long, makes dates of texts that
    look like one, and names no line.)"""
    with unpacked(path) as (stream, tell):
        number = begin = 0
        for line in stream:  # a line and its text go before its record is worked on: they may be long
            number += 1  # noqa: SIM113 - enumerate would hold the line
            text = decoded(path, without_mark(line) if number == 1 else line, begin)
            begin += len(line)
            del line
            if text and not text.isspace():
                # Of an unpacked file what is read is counted by lines, since its buffer is ahead of them.
                done, where = tell() if path.suffix.lower() in PACKED else begin, f"{path}, line {number}"
                row = Row(loaded(text, where), where, done)
                del text
                yield row


def json_values(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The records of an array, or the objects of a file one after another, on a line each or not."""
    with unpacked(path) as (stream, tell):
        source = JsonText(path, stream)
        is_array = source.take("[")
        waiting: Row | None = None
        count = 0
        while not (source.take("]") if is_array else source.ended()):
            if is_array and count and not source.take(","):
                raise InputError(f"data: {path}, line {source.line}: expected , or ] after record {count}")
            where = f"{path}, line {source.line_of_next()}"
            value = source.value()
            if waiting is not None:
                yield waiting
            waiting, count = Row(value, where, tell()), count + 1
        if waiting is not None:
            yield dataclasses.replace(waiting, alone=count == 1 and not is_array)


class JsonText:
    """The values of a JSON file, read piece by piece: what memory holds is the longest of them."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self.stream = path, stream
        self.decoder, self.bytes = JSON, codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.place, self.line, self.at_end = "", 0, 1, False

    def more(self, size: int) -> None:
        with readable(self.path):
            content = self.stream.read(size)
        self.at_end = not content
        try:
            following = self.bytes.decode(content, final=self.at_end)
        except UnicodeDecodeError:
            raise InputError(f"data: {self.path} is not UTF-8, after line {self.line}; convert it") from None
        self.text, self.place = self.text[self.place :] + following, 0

    def move(self, place: int) -> None:
        self.line += self.text.count("\n", self.place, place)
        self.place = place

    def line_of_next(self) -> int:
        """The line of the next letter that is no white space."""
        while True:
            place = self.place
            while place < len(self.text) and self.text[place] in " \t\r\n":
                place += 1
            self.move(place)
            if place < len(self.text) or self.at_end:
                return self.line
            self.more(PIECE)

    def take(self, letter: str) -> bool:
        """Whether that letter is next; it is taken if so."""
        self.line_of_next()
        if taken := self.text[self.place : self.place + 1] == letter:
            self.move(self.place + 1)
        return taken

    def ended(self) -> bool:
        self.line_of_next()
        return self.place >= len(self.text)

    def value(self) -> Any:
        size = PIECE
        while True:
            try:
                value, place = self.decoder.raw_decode(self.text, self.place)
                if place < len(self.text) or self.at_end:  # else a number may have more digits
                    self.move(place)
                    return value
            except RecursionError:
                raise InputError(f"data: {self.path}, line {self.line} is nested too deeply") from None
            except ValueError as error:
                if self.at_end or not isinstance(error, json.JSONDecodeError):
                    raise InputError(f"data: {self.path}, line {self.line} is no JSON: {first_line(error)}") from None
            self.more(size)
            size *= 2  # a long value is not begun again too often


def bounded_lines(path: Path, text: TextIO) -> Iterator[str]:
    """Raises InputError where a line is longer than memory is to be taken for."""
    for number in itertools.count(1):
        line = text.readline(LINE)
        if len(line) == LINE:
            raise InputError(f"data: {path}, line {number} has more than {LINE:,} characters; {UNBOUNDED}")
        if not line:
            return
        yield line


def separated(delimiter: str) -> Callable[[Path, Sequence[str]], Iterator[Row]]:
    """The rows of a table whose first line names the columns."""

    def rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
        csv.field_size_limit(CELL)
        with unpacked(path) as (stream, tell):
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            reader = csv.reader(bounded_lines(path, text), delimiter=delimiter, strict=True)
            try:
                names = next(reader, [])
                check_names(names, str(path))
                for cells in reader:
                    where = f"{path}, line {reader.line_num}"
                    if len(cells) not in (0, len(names)):
                        raise InputError(f"data: {where} has {len(cells)} cells, the first line {len(names)}")
                    if cells:
                        yield Row(dict(zip(names, cells, strict=True)), where, tell())
            except csv.Error as error:
                where = f"data: {path}, line {reader.line_num}"
                if "field limit" in str(error):
                    raise InputError(f"{where} has a cell of more than {CELL:,} characters; {UNBOUNDED}") from None
                raise InputError(f"{where}: {error}") from None
            except UnicodeDecodeError:
                raise InputError(f"data: {path} is not UTF-8, after line {reader.line_num}; convert it") from None

    return rows


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Row group by row group, of the columns wanted (none: all); files without rows have none."""
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's own, or the system's
        raise InputError(f"data: {path} is no Parquet file: {first_line(error)}") from None
    with file:
        names = columns_to_read(columns, file.schema_arrow.names, str(path))
        yield from table_rows(path, file.iter_batches(AT_ONCE, columns=names))


def arrow_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """A part of a folder that `datasets` has saved."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                reader = pyarrow.ipc.open_stream(source)
                batches: Iterable[Any] = reader
            except pyarrow.ArrowInvalid:
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            names = columns_to_read(columns, reader.schema.names, str(path))
            parts = (
                batch.slice(start, AT_ONCE).select(names)
                for batch in batches
                for start in range(0, batch.num_rows, AT_ONCE)
            )
            yield from table_rows(path, parts)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"data: {path} is no Arrow file: {first_line(error)}") from None


def table_rows(path: Path, batches: Iterable[Any]) -> Iterator[Row]:
    number = 0
    try:
        for batch in batches:
            for record in records_of(batch):
                yield Row(record, f"{path}, row {number}")
                number += 1
    except InputError:
        raise
    except Exception as error:  # a broken file
        raise InputError(f"data: {path} cannot be read at row {number}: {first_line(error)}") from None


def records_of(batch: Any) -> Iterator[Any]:
    """The records of some rows of a table, of long ones a few at a time."""
    at_once = max(1, PIECE * batch.num_rows // max(batch.nbytes, PIECE))
    for start in range(0, batch.num_rows, at_once):
        yield from batch.slice(start, at_once).to_pylist()


def columns_to_read(columns: Sequence[str], known: Sequence[str], where: str) -> list[str]:
    """The columns given, or those that say by their names what they hold; all where these hold no text: the error tells
    them."""
    check_columns(columns, known, where)
    holds = bool(TEXTS & set(known)) or set(known) >= PAIR
    read = list(columns) or [name for name in known if name in NAMED or not holds]
    check_names([name for name in known if name in read], where)
    return read


def check_names(names: Sequence[str], where: str) -> None:
    if len(set(names)) < len(names):
        raise InputError(f"data: {where} names a column twice: {', '.join(names)}")


def check_columns(columns: Sequence[str], known: Sequence[str], where: str) -> None:
    for column in columns:
        if column not in known:
            raise InputError(f"data: {where} has no column {column!r}; it has {', '.join(known)}")


READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[Row]]] = {
    **dict.fromkeys(PROSE, whole_text),
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_values,
    ".csv": separated(","),
    ".tsv": separated("\t"),
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}


def is_prose(path: Path) -> bool:
    """Whether a file is one text, and none of records."""
    return READERS.get(kind_of(path), whole_text) is whole_text


def rows_of_file(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a file; one of no known suffix is text."""
    return READERS.get(kind_of(path), whole_text)(path, columns)
