"""What a row of a file is as a document: its text, by the columns that are named or by those that speak for themselves.
What has no text is left out and counted; what holds nothing known is refused with the columns that it has.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from ...models.errors import InputError
from .conversations import Conversation, read_conversation
from .formats import Row
from .notes import Notes

OnProgress = Callable[[int, int], None]  # how much is read, of how much in all (0: not known); bytes of files, or rows
CHATS = ("messages", "conversations")
EXPECTED = "a column 'text', messages, conversations, or prompt and completion; or name others as data.columns=[...]"


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, or a conversation, of which `text` is what is said in it."""

    name: str
    text: str
    chat: Conversation | None = None

    @property
    def content(self) -> str:
        """What makes two documents the same one."""
        return self.text if self.chat is None else as_json([self.chat.messages, self.chat.tools])


def as_json(content: Any) -> str:
    """The JSON of a record's values, dates and other types of a table as their texts."""
    return json.dumps(content, sort_keys=True, default=str)


def shape_of(record: Any, columns: Sequence[str]) -> str | None:
    """ "text" for the columns named, or a column of that name, "chat" for a conversation, None for neither."""
    if not isinstance(record, dict):
        return None
    if columns:
        return "text"
    if any(name in record for name in CHATS) or {"prompt", "completion"} <= record.keys():
        return "chat"
    return "text" if "text" in record else None


def known_shape(value: Any, columns: Sequence[str]) -> bool:
    return isinstance(value, str) or shape_of(value, columns) is not None


def row_document(row: Row, name: str, number: int, columns: Sequence[str], notes: Notes | None) -> Document | None:
    """The document of a row of the file `name`; None where its text is null. Raises InputError where the row holds
    nothing known."""
    record = row.value
    if isinstance(record, str):
        if columns and not row.prose:
            raise InputError(f"data: {row.where} is a text, without columns; leave columns={list(columns)} out")
        return Document(name if row.prose else f"{name}:{number}", scalar_text(record))
    shape = shape_of(record, columns)
    if shape is None:
        raise InputError(f"data: {row.where} {holding(record)}; expected {EXPECTED}")
    wanted = list(columns) or ["text"]
    chat = read_conversation(record, row.where) if shape == "chat" else None
    if chat is not None:
        return Document(f"{name}:{number}", scalar_text(chat.text), chat)
    if shape == "chat" or any(record.get(column, "") is None for column in wanted):
        if notes is not None:
            notes.add("records whose text is null are skipped", row.where)
        return None
    return Document(f"{name}:{number}", joined(record, wanted, row.where))


def holding(record: Any) -> str:
    if isinstance(record, dict):
        return f"has the columns {', '.join(map(repr, record))}" if record else "has no columns"
    return f"is no record but {type(record).__name__}"


def joined(record: dict[str, Any], columns: Sequence[str], where: str) -> str:
    """The texts of a record's columns, a line between. Raises InputError where one is missing or no text."""
    for column in columns:
        if not isinstance(record.get(column), str):
            raise InputError(f"data: {where} has no {column!r} that is a text; it {holding(record)}")
    return scalar_text("\n".join(record[column] for column in columns))


def scalar_text(text: str) -> str:
    """The text with "?" for halves of surrogate pairs, which JSON may spell and UTF-8 may not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text
