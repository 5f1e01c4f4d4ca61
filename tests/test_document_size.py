"""What a long document takes of memory while it becomes tokens: so much for each of its bytes, and nothing for its
tokens, which are written as they come."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from limbeck.distill.text import pieces, resolve
from limbeck.models.named import SHIPPED
from limbeck.tests.helpers import TEXT

SIZE = 600_000  # characters
FIXED = 500_000  # bytes for a piece, and what else does not grow with the document
WIDE = "\N{GRINNING FACE}"  # Python then has four bytes for every character


# Times the document's bytes. Of a text its bytes and its characters are there together; of a record its line, its
# characters, and for a moment what the reader of JSON puts together.
@pytest.mark.parametrize(("name", "wide", "most"), [
    ("a.txt", False, 2.5), ("a.jsonl", True, 8.5),
    *(pytest.param(name, False, most, marks=pytest.mark.slow) for name, most in (("a.jsonl", 2.5), ("a.json", 4.0))),
])  # fmt: skip
def test_memory_by_the_byte(
    name: str, wide: bool, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 2**13)
    monkeypatch.setattr(pieces, "OVERLAP", 2**10)
    text = (WIDE if wide else "") + f"# {name}\n" + TEXT * (SIZE // len(TEXT))
    (tmp_path / name).write_text(text if name == "a.txt" else json.dumps({"text": text}) + "\n")
    size = (tmp_path / name).stat().st_size
    del text
    resolve.text_in_tokens([TEXT], "all", SHIPPED["zoo"])  # what comes once
    tracemalloc.start()
    try:
        corpus = resolve.text_in_tokens(str(tmp_path / name), "all", SHIPPED["zoo"])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert corpus.tokens > SIZE / 5 and len(corpus) == 1
    assert peak - FIXED < most * size, f"{(peak - FIXED) / size:.2f} bytes a byte"
