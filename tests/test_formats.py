"""Files of records and of text, plain and packed: what each gives, what is left out and said, what is refused."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from limbeck.distill.text import formats, resolve
from limbeck.distill.text.documents import read_documents
from limbeck.distill.text.formats import kind_of
from limbeck.distill.text.records import Notes
from limbeck.models.errors import InputError

TEXTS = [f'document number {i} has some words, {"a, " * i}\n"é" and 数' for i in range(7)]
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "\n".join(map(json.dumps, ROWS)).encode()
PRETTY = "\n".join(json.dumps(row, indent=2, ensure_ascii=False) for row in ROWS).encode()


def table(delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ("id", "text"), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def zst(content: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    target = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(target, "zstd") as stream:
        stream.write(content)
    return target.getvalue().to_pybytes()


def plain(content: bytes) -> bytes:
    return content


FILES = {
    "array.json": json.dumps(ROWS).encode(), "pretty.json": json.dumps(ROWS, indent=1).encode(), "lines.json": LINES,
    "objects.json": PRETTY, "a.jsonl": LINES, "a.ndjson": LINES + b"\n\n", "A.JSONL": LINES,
    "mark.jsonl": b"\xef\xbb\xbf" + LINES, "mark.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "strings.json": json.dumps(TEXTS).encode(),
    "a.csv": table(","), "mark.CSV": b"\xef\xbb\xbf" + table(","), "a.tsv": table("\t"),
}  # fmt: skip


@pytest.mark.parametrize("pack", (plain, gzip.compress, zst), ids=("", ".gz", ".zst"))
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("piece", (2**20, 7))
def test_records(
    name: str, pack: Callable[[bytes], bytes], piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "PIECE", piece)
    path = tmp_path / (name + {plain: "", gzip.compress: ".gz", zst: ".zst"}[pack])
    path.write_bytes(pack(FILES[name]))
    told: list[tuple[int, int]] = []
    found = list(read_documents(str(path), on_progress=lambda *done: told.append(done)))
    assert [document.text for document in found] == TEXTS
    assert [document.name for document in found] == [f"{path.name}:{i}" for i in range(7)]
    size = path.stat().st_size
    assert told[-1] == (size, size) and told == sorted(told)


def test_text_is_unpacked_and_marks_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n")
    (tmp_path / "b.TXT.gz").write_bytes(gzip.compress(b"two") + gzip.compress(b" parts"))
    (tmp_path / "c.md.zst").write_bytes(zst(b"three") + zst(b" parts"))
    (tmp_path / "no suffix").write_text("four")
    assert [d.text for d in read_documents(str(tmp_path))] == ["one\r\n", "two parts", "three parts"]
    assert [d.text for d in read_documents(str(tmp_path / "no suffix"))] == ["four"]
    assert [kind_of(Path(name)) for name in ("x.JSON.GZ", "v1.2/x", "a.b.Csv", ".zst")] == [".json", "", ".csv", ""]


def test_tables_and_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"id": list(range(7)), "text": TEXTS})
    table.to_parquet(str(tmp_path / "pq" / "part-0.parquet"))
    table.select([]).to_parquet(str(tmp_path / "pq" / "part-1.parquet"))
    assert [d.text for d in read_documents(str(tmp_path / "pq"))] == TEXTS
    table.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    loaded = datasets.load_from_disk(str(tmp_path / "saved"))
    loaded.map(
        lambda row: {"text": "not of it " + row["text"]}, cache_file_name=str(tmp_path / "saved" / "cache-1.arrow")
    )
    assert [d.text for d in read_documents(str(tmp_path / "saved"))] == TEXTS
    splits = datasets.DatasetDict({"train": table, "test": table.select([0])})
    splits.save_to_disk(str(tmp_path / "splits"))
    assert [d.text for d in read_documents(str(tmp_path / "splits"))] == TEXTS
    assert [d.text for d in read_documents(str(tmp_path / "splits" / "test"))] == TEXTS[:1]
    datasets.DatasetDict({"odd": table}).save_to_disk(str(tmp_path / "odd"))
    with pytest.raises(InputError, match=r"without a split train.*: odd$"):
        list(read_documents(str(tmp_path / "odd")))


def test_a_folder_of_many_kinds(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content.replace(b"number", name.encode()))
    (tmp_path / "config.json").write_text('{"version": 1}')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    notes = Notes()
    found = list(read_documents(str(tmp_path), notes=notes))
    assert len(found) == 7 * len(FILES)
    assert [line.partition(" ")[0] for line in notes] == ["1", "1"]
    assert any("picture.png" in line for line in notes) and any("config.json" in line for line in notes)


@pytest.mark.parametrize("form", ("parquet", "arrow"))
def test_all_columns_of_a_table_are_named(form: str, tmp_path: Path) -> None:
    """Also those beside columns that go with a conversation and hold no text alone."""
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"system": ["s"], "question": ["q"], "response": ["r"]})
    if form == "parquet":
        table.to_parquet(str(tmp_path / "a.parquet"))
    else:
        table.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError, match=r"row 0 has the columns 'system', 'question', 'response'; expected"):
        list(read_documents(str(tmp_path)))
    found = list(read_documents(str(tmp_path), ["question", "response"]))
    assert [document.text for document in found] == ["q\nr"]


def test_skipped_files_are_told_wherever_the_folder_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ".cache" / "text"
    (folder / ".git").mkdir(parents=True)
    for name in ("a.txt", "b.png", ".git/index"):
        (folder / name).write_text("x")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (str(folder), "../.cache/text"):
        notes = Notes()
        list(read_documents(path, notes=notes))
        (line,) = notes
        assert line.startswith("1 files of other kinds") and "b.png" in line


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    """Under their own names, those that lie below the folder; a loop ends."""
    data, other = tmp_path / "data", tmp_path / "other"
    (data / "z").mkdir(parents=True)
    (other / "deep").mkdir(parents=True)
    for number, name in enumerate(("data/z/1.txt", "other/2.txt", "other/deep/3.txt", "beside.txt")):
        (tmp_path / name).write_text(f"text {number}")
    plain = resolve.data_input(str(data))
    for link, target in (("a", data / "z"), ("b", other), ("c", other), ("loop", data), ("up", tmp_path)):
        (data / link).symlink_to(target)
    (other / "back").symlink_to(data / "z")
    assert [d.name for d in read_documents(str(data))] == ["b/2.txt", "b/deep/3.txt", "z/1.txt"]
    linked = resolve.data_input(str(data))
    assert plain == data and isinstance(linked, str)
    (other / "deep" / "3.txt").write_text("changed")
    assert resolve.data_input(str(data)) not in (plain, linked)


def test_null_texts_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "null.jsonl").write_bytes(LINES + b'\n{"text": null}\n{"text": "last"}\n{"text": null}')
    for _ in range(2):  # made, and read again: said once in a run
        found = list(resolve.documents(str(tmp_path / "null.jsonl"), "all"))
    assert [d.text for d in found] == [*TEXTS, "last"] and found[-1].name == "null.jsonl:8"
    assert [record.message for record in caplog.records] == [
        f"data={tmp_path}/null.jsonl: 2 records whose text is null are skipped (the first:"
        f" {tmp_path}/null.jsonl, line 8)"
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    (
        ("a.jsonl", b'{"text": "a"}\n{"body": "b", "n": 1}', r"line 2 has the columns 'body', 'n'; expected"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}', "line 2 has no 'text' that is a text"),
        ("a.jsonl", b'{"text": "a"}\n[1]', "line 2 is no record but list"),
        ("a.jsonl", b'{"text": "a"}\n{', "line 2 is no JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is nested too deeply"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "line 1 is no JSON: Exceeds"),
        ("a.jsonl", b'{"text": "a"}\n\xff', "not UTF-8 .byte 14"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a", "text": "b"}', "line 2 is no JSON: 'text' stands twice"),
        ("a.jsonl", b'{"messages": [{"role": "user", "role": "assistant"}]}', "line 1 is no JSON: 'role' stands twice"),
        ("a.json", b'[{"text": "a"},\n{"text": "a", "text": "b"}]', "line 2 is no JSON: 'text' stands twice"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"} {"text": "c"}]', "line 2: expected , or ]"),
        ("a.json", b'[{"text": "a"},\n\n{"text": }]', "line 3 is no JSON"),
        ("a.json", b'{"version": 1,\n "license": ""}', "line 1 has the columns 'version', 'license'"),
        ("a.json", b'[{"text": "\xff"}]', "not UTF-8"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.csv", b"id,body\n1,hello\n", "line 2 has the columns 'id', 'body'"),
        ("a.csv", b"text,text\n1,hello\n", "names a column twice"),
        ("a.csv", b"id,text\n1,hello,there\n", "line 2 has 3 cells, the first line 2"),
        ("a.csv", b'id,text\n1,"hel\n', "line [23]: unexpected end"),
        ("a.jsonl.gz", b"no gzip", "cannot be unpacked"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-20], "cannot be unpacked"),
        ("a.jsonl.zst", b"no zst", "cannot be read"),
        ("records", LINES, "looks like records"),
        ("a.parquet", b"nonsense", "no Parquet"),
        ("a.arrow", b"nonsense", "no Arrow"),
        ("a.json", b"[]", "holds no text"),
        ("a.csv", b"id,text\n", "holds no text"),
    ),
)  # fmt: skip
def test_what_is_refused(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as raised:
        list(read_documents(str(tmp_path / name)))
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


def test_a_column_that_is_there_twice_is_none(tmp_path: Path) -> None:
    """Of those that are read."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays([pyarrow.array([text]) for text in "abcd"], ["text", "text", "id", "body"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        for columns in ([], ["text"], ["body", "text"]):
            with pytest.raises(InputError, match="names a column twice: ") as raised:
                list(read_documents(str(tmp_path / name), columns))
            assert "\n" not in str(raised.value) and name in str(raised.value)
        assert [document.text for document in read_documents(str(tmp_path / name), ["body"])] == ["d"]


def test_columns_of_what_has_none_are_refused(tmp_path: Path) -> None:
    for name, content in (("a.txt", "x"), ("b.py.gz", ""), ("c", "x"), ("d.jsonl", '"x"'), ("e.json", '["x"]')):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=r"(is plain text|is a text), without columns; leave columns=\['a'\] out"):
            list(read_documents(str(tmp_path / name), ["a"]))
    (tmp_path / "texts").mkdir()
    (tmp_path / "a.txt").rename(tmp_path / "texts" / "a.txt")
    for path in (str(tmp_path / "texts"), "stdlib"):
        with pytest.raises(InputError, match="is plain text, without columns"):
            list(read_documents(path, ["a"]))
    (tmp_path / "texts" / "b.jsonl").write_text('{"a": "y"}')  # beside what has some, prose is prose
    assert [document.text for document in read_documents(str(tmp_path / "texts"), ["a"])] == ["x", "y"]


def test_cells_and_lines_of_a_table_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small packed file does not take all memory; a cell over many lines counts as one."""
    monkeypatch.setattr(formats, "CELL", 40)
    monkeypatch.setattr(formats, "LINE", 80)
    cases = (("x" * 41, "cell of more than 40"), ('"' + "x\n" * 21 + '"', "cell of more than 40"),
             ("x," * 40, "line 2 has more than 80"))  # fmt: skip
    for content, said in cases:
        (tmp_path / "a.csv.gz").write_bytes(gzip.compress(f"text\n{content}\n".encode()))
        with pytest.raises(InputError, match=said) as raised:
            list(read_documents(str(tmp_path / "a.csv.gz")))
        assert "write it as .jsonl" in str(raised.value) and "\n" not in str(raised.value)
    for content in ("x" * 40, '"' + "x\n" * 20 + '"'):
        (tmp_path / "a.csv").write_text(f"text,b\n{content},{'y' * 30}\n")
        assert len(list(read_documents(str(tmp_path / "a.csv")))) == 1


def test_pipes_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match="no regular file"):
        list(read_documents(str(tmp_path / "pipe.txt")))


def test_a_json_array_takes_the_memory_of_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PIECE", 1000)
    longest = 0
    more = formats.JsonText.more

    def watched(self: Any, size: int) -> None:
        nonlocal longest
        more(self, size)
        longest = max(longest, len(self.text))

    monkeypatch.setattr(formats.JsonText, "more", watched)
    (tmp_path / "a.json").write_text(json.dumps([{"text": f"{i} {'word ' * 40}"} for i in range(500)]))
    assert len(list(read_documents(str(tmp_path / "a.json")))) == 500
    assert 0 < longest < 5000
