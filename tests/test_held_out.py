"""One book, or a dozen files: a part of the text is held out, the same by every command, and said."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from limbeck.distill.text import resolve
from limbeck.distill.text.documents import EmptySplit
from limbeck.distill.text.packing import Corpus
from limbeck.models.tokenizer import load_tokenizer
from limbeck.tests.helpers import TEXT, compress_command, limbeck


def splits(data: Path, model: Path) -> dict[str, Corpus]:
    found = {split: resolve.corpus(str(data), split, model) for split in ("train", "validation", "test", "all")}
    assert all(isinstance(text, Corpus) for text in found.values())
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("files", (1, 2, 12))
def test_the_parts_are_apart_and_all_there_is(files: int, workshop: Path, tmp_path: Path) -> None:
    for number in range(files):
        (tmp_path / f"p{number}.txt").write_text(f"# part {number}\n" + TEXT[number * 900 :])
    texts = splits(tmp_path if files > 1 else tmp_path / "p0.txt", workshop / "model")
    whole = texts["all"]
    assert sum(texts[split].tokens for split in ("train", "validation", "test")) == whole.tokens
    for number in range(files):
        tokens = [
            texts[split].ids[slice(*texts[split].starts[number : number + 2])]
            for split in ("train", "validation", "test")
        ]
        assert np.array_equal(np.concatenate(tokens), whole.ids[slice(*whole.starts[number : number + 2])])
    assert texts["train"].tokens == pytest.approx(0.9 * whole.tokens, abs=files)
    assert f"train has {texts['train'].tokens:,} of {whole.tokens:,} tokens" in texts["train"].notes[-1]


def test_conversations_stay_whole(workshop: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    model = tmp_path / "model"
    model.mkdir()
    for file in (workshop / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "chat_template.jinja").write_text(template)
    roles = ("user", "assistant")
    rows = [[{"role": role, "content": f"this is {number}"} for role in roles] for number in range(3)]
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    texts = splits(data, model)
    assert [len(texts[split]) for split in ("train", "validation", "test", "all")] == [1, 1, 1, 3]
    names = {name for split in ("train", "validation", "test") for name in texts[split].names}
    assert names == set(texts["all"].names)
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": rows[0]}) + "\n")
    with pytest.raises(EmptySplit, match="leave no validation text"):
        resolve.corpus(str(tmp_path / "one.jsonl"), "validation", model)


@pytest.mark.slow
def test_compress_of_one_book(workshop: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    book = tmp_path / "book.txt"
    book.write_text(TEXT)
    words = [word for word in compress_command(workshop, tmp_path / "out") if not word.startswith("data=")]
    with caplog.at_level(logging.WARNING, "limbeck"):
        code, _, err = limbeck(*words, f"data={book}", "distill.train.steps=2")
    assert code == 0, err
    tokens = len(load_tokenizer(workshop / "model").encode(TEXT)) + 2
    assert any(f"of {tokens:,} tokens" in record.getMessage() for record in caplog.records)
    gap = json.loads((tmp_path / "out" / "gap" / "gap.json").read_text())
    assert gap["documents"] == 1 and gap["models"]["distilled"]["kl"]["low"] is None
