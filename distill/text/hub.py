"""Data sets of the Hugging Face hub, by their names and commits."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ...models.errors import InputError
from .formats import Row, check_columns, first_line
from .notes import Notes
from .records import Document, OnProgress, row_document

HUB = "hf:"


@dataclasses.dataclass(frozen=True)
class Hub:
    """A data set of the hub, written hf:OWNER/NAME[@REVISION][:CONFIG][:SPLIT]; `streaming` downloads only what is
    read, and `limit` is the number of rows that are (0: all)."""

    name: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    limit: int = 0

    @classmethod
    def parse(cls, text: str, **options: Any) -> Hub:
        """Raises InputError where the text is none."""
        parts = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([\w.+-]*))?(?::([\w.+-]+))?", text)
        if parts is None:
            raise InputError(f"data={text}: expected hf:OWNER/NAME[@REVISION][:CONFIG][:SPLIT]")
        name, revision, config, split = parts.groups()
        return cls(name, revision, config or None, split or "train", **options)

    @property
    def text(self) -> str:
        """As `parse` reads it."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{HUB}{self.name}{revision}:{self.config or ''}:{self.split}"

    def resolved(self) -> Hub:
        """With the commit that the revision stands for now, so that the same name later is the same data. Raises
        InputError where the hub does not answer; a revision given as a commit needs no answer."""
        if self.revision is not None and re.fullmatch(r"[0-9a-f]{40}", self.revision):
            return self
        import huggingface_hub

        try:
            commit = huggingface_hub.HfApi().dataset_info(self.name, revision=self.revision).sha
        except Exception as error:
            raise InputError(
                f"data={self.text}: the hub does not tell its commit ({first_line(error)}); without a network give a"
                " folder, or name the commit as hf:OWNER/NAME@COMMIT where the data set is in the local cache"
            ) from None
        return dataclasses.replace(self, revision=commit)

    def documents(
        self, columns: Sequence[str] = (), on_progress: OnProgress | None = None, notes: Notes | None = None
    ) -> Iterator[Document]:
        """Raises InputError where the data set cannot be loaded or has not these columns."""
        import datasets

        try:
            table = datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=self.streaming
            )
        except Exception as error:
            raise InputError(f"data={self.text} cannot be loaded: {first_line(error)}") from None
        if table.column_names is not None:
            check_columns(columns, table.column_names, self.text)
        total = self.limit if self.streaming else min(self.limit or len(table), len(table))
        for number, record in enumerate(rows_of(table, self.text)):
            if self.limit and number >= self.limit:
                break
            name, row = f"{self.name}:{self.config or ''}:{self.split}", Row(record, f"{self.text}, row {number}")
            if (document := row_document(row, name, number, columns, notes)) is not None:
                yield document
            if on_progress is not None:
                on_progress(number + 1, total)


def rows_of(table: Iterable[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    """The rows of a table of `datasets`, which raises anything. Raises InputError."""
    number = 0
    try:
        for number, record in enumerate(table, 1):  # noqa: B007 - rows read before one breaks
            yield record
    except Exception as error:  # a broken file, a network that has gone
        raise InputError(f"data: {where} cannot be read at row {number}: {first_line(error)}") from None
