"""Text to batches: documents, a split that does not leak, packed rows with the documents' boundaries kept.

A document is `<s> tokens </s>`. An epoch permutes the documents, lays them end to end and cuts rows of T tokens;
where a document is cut it goes on in the next row, with an empty state. Which batch comes when follows from the seed
alone, so that any batch can be sought by its number. Shapes: [B] rows, [T] tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..models.errors import InputError
from ..models.tokenizer import Tokenizer

SPLITS = ("train", "validation", "test")
TEXT_SUFFIXES = (".py", ".txt", ".md", ".rst")
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Document:
    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of packed tokens. `labels` are the next tokens, -100 where there is none in the same document; `seq_idx`
    numbers the documents along a row; `n_bytes` are the UTF-8 bytes that a label stands for; `doc_id` numbers the
    documents of the corpus. All [B, T]."""

    input_ids: Tensor
    labels: Tensor
    seq_idx: Tensor
    n_bytes: Tensor
    doc_id: Tensor

    def rows(self, start: int, stop: int) -> Batch:
        """Some of the rows."""
        return Batch(*(getattr(self, field.name)[start:stop] for field in dataclasses.fields(self)))


def split_of(name: str) -> str:
    """The split of a document, by the sha256 of its name: 90% train, 5% validation, 5% test.

    By name and not by content: a library's file differs a little from version to version, and must not be in one
    version's training text and in another's test."""
    number = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100
    return "train" if number < 90 else "validation" if number < 95 else "test"


def keep_split(documents: list[Document], split: str, where: str) -> list[Document]:
    """The documents of a split ("all" for every one). Raises InputError where there are none."""
    if split not in (*SPLITS, "all"):
        raise InputError(f"data: split {split!r} is unknown; known: {', '.join(SPLITS)}, all")
    kept = documents if split == "all" else [document for document in documents if split_of(document.name) == split]
    if not kept:
        raise InputError(
            f"{where}: no document falls in the split {split!r} ({len(documents)} in all); give more text or split=all"
        )
    return kept


def stdlib_documents() -> list[Document]:
    """The standard library's sources of the running Python: every .py file in UTF-8, each content once."""
    root = Path(sysconfig.get_paths()["stdlib"])
    apart = {"site-packages", "dist-packages", "__pycache__"}
    files = sorted(
        (path.relative_to(root).as_posix() for path in root.rglob("*.py")),
    )
    documents = []
    for name in files:
        if apart.isdisjoint(name.split("/")):
            try:
                documents.append(Document(name, (root / name).read_bytes().decode()))
            except (OSError, UnicodeDecodeError):
                continue
    return distinct(documents)


def folder_documents(path: Path, suffixes: Sequence[str] = TEXT_SUFFIXES) -> list[Document]:
    """The text of a file, or of every file below a folder with one of the suffixes (.jsonl: a record's "text" each;
    .parquet: the "text" column).

    Raises InputError where the path is missing, empty, unreadable or not UTF-8.
    """
    if not path.exists():
        raise InputError(f"data: {path} does not exist; expected a folder, a text, .jsonl or .parquet file, or a name")
    wanted = (*suffixes, ".jsonl", ".parquet")
    if path.is_dir():
        try:
            found = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in wanted)
        except OSError as error:
            raise InputError(f"data: {path} cannot be read: {error.strerror}") from None
    else:
        found = [path]
    documents: list[Document] = []
    base = path if path.is_dir() else path.parent
    for file in found:
        name = file.relative_to(base).as_posix()
        if file.suffix in (".jsonl", ".parquet"):
            documents += record_documents(file, name)
        else:
            documents.append(Document(name, read_text(file)))
    documents = distinct(documents)
    if not documents:
        raise InputError(f"data: {path} holds no text; looked for {', '.join(wanted)}")
    return documents


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise InputError(f"data: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"data: {path} is not UTF-8 (byte {error.start}); convert it") from None


def record_documents(path: Path, name: str) -> list[Document]:
    """A document for each record of a .jsonl or .parquet file."""
    if path.suffix == ".parquet":
        import datasets

        try:
            table = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
        except Exception as error:
            raise InputError(f"data: {path} is no Parquet file: {str(error).splitlines()[0]}") from None
        if "text" not in table.column_names:
            raise InputError(f"data: {path} has no column 'text'; it has {', '.join(table.column_names)}")
        texts = list(table["text"])
    else:
        texts = []
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                raise InputError(f"data: {path}, line {number} is no JSON") from None
            texts.append(record.get("text") if isinstance(record, dict) else None)
            if not isinstance(texts[-1], str):
                raise InputError(f"data: {path}, line {number} has no 'text'")
    return [Document(f"{name}:{number}", text) for number, text in enumerate(texts)]


def distinct(documents: list[Document]) -> list[Document]:
    """The documents with text, each text once; the first name counts."""
    seen: set[bytes] = set()
    kept = []
    for document in documents:
        digest = hashlib.sha256(document.text.encode()).digest()
        if document.text and digest not in seen:
            seen.add(digest)
            kept.append(document)
    return kept


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenised documents: ids laid end to end, and where each begins (one more entry than documents)."""

    ids: np.ndarray
    starts: np.ndarray
    names: tuple[str, ...]
    token_bytes: Tensor
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.names)

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def stream(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The documents in an order, end to end: ids, and the number of each token's document."""
        parts = [self.ids[self.starts[i] : self.starts[i + 1]] for i in order]
        return np.concatenate(parts), np.repeat(order, [len(part) for part in parts])

    def windows(self, order: np.ndarray, seq_len: int, pad: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The stream cut into rows [rows, seq_len + 1], the last token of a row being the first of the next: ids and
        documents. What is left over is dropped, or padded (document -1)."""
        ids, owner = self.stream(order)
        if pad:
            missing = -len(ids) % seq_len + 1
            ids = np.concatenate((ids, np.full(missing, self.pad_token_id, ids.dtype)))
            owner = np.concatenate((owner, np.full(missing, -1, owner.dtype)))
        count = (len(ids) - 1) // seq_len
        shape = (count, seq_len + 1)
        return tuple(  # type: ignore[return-value]
            np.lib.stride_tricks.as_strided(
                values, shape, (seq_len * values.itemsize, values.itemsize), writeable=False
            )
            for values in (ids, owner)
        )

    def batch(self, ids: np.ndarray, owner: np.ndarray) -> Batch:
        """Windows [rows, T + 1] as a batch [rows, T]."""
        tokens, labels = torch.from_numpy(ids[:, :-1].astype(np.int64)), torch.from_numpy(ids[:, 1:].astype(np.int64))
        documents, following = (torch.from_numpy(part.astype(np.int64)) for part in (owner[:, :-1], owner[:, 1:]))
        labels = labels.masked_fill((documents != following) | (documents < 0), IGNORED)
        n_bytes = torch.where(labels >= 0, self.token_bytes[labels.clamp_min(0)], 0)
        change = torch.zeros_like(documents)
        change[:, 1:] = documents[:, 1:] != documents[:, :-1]
        return Batch(tokens, labels, change.cumsum(1).to(torch.int32), n_bytes.to(torch.int32), documents)


def tokenize(
    documents: Sequence[Document], tokenizer: Tokenizer, on_progress: Callable[[int, int], None] | None = None
) -> Corpus:
    """Documents to tokens, `<s> ... </s>` each; `on_progress(done, total)` counts documents."""
    parts: list[np.ndarray] = []
    for start in range(0, len(documents), 256):
        for ids in tokenizer.encode_many([document.text for document in documents[start : start + 256]]):
            parts.append(np.array([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], dtype=np.int32))
        if on_progress is not None:
            on_progress(min(start + 256, len(documents)), len(documents))
    starts = np.concatenate(([0], np.cumsum([len(part) for part in parts])))
    names = tuple(document.name for document in documents)
    return Corpus(np.concatenate(parts), starts, names, tokenizer.token_bytes, tokenizer.pad_token_id)


def batches_per_epoch(corpus: Corpus, batch_size: int, seq_len: int) -> int:
    """How many whole batches a corpus fills. Raises InputError where it fills none."""
    found = (corpus.tokens - 1) // seq_len // batch_size
    if found < 1:
        raise InputError(
            f"data: {corpus.tokens} tokens do not fill one batch of {batch_size} rows x {seq_len} tokens;"
            " give more text, or a smaller batch or length"
        )
    return found


def train_batches(corpus: Corpus, *, batch_size: int, seq_len: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """Batches without end, from number `start` on; epoch e is permuted by torch's generator seeded with seed + e.

    Documents are permuted first, then the rows that they are cut into; the rest of an epoch that fills no batch is
    left out. Raises InputError where an epoch does not fill one batch.
    """
    per_epoch = batches_per_epoch(corpus, batch_size, seq_len)
    number = start
    while True:
        epoch = number // per_epoch
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(len(corpus), generator=generator).numpy()
        ids, owner = corpus.windows(order, seq_len)
        shuffled = torch.randperm(len(ids), generator=generator).numpy()
        while number // per_epoch == epoch:
            place = number % per_epoch * batch_size
            chosen = shuffled[place : place + batch_size]
            yield corpus.batch(ids[chosen], owner[chosen])
            number += 1


def sample_batches(
    corpus: Corpus, *, batch_size: int, seq_len: int, seed: int | None = None, max_tokens: int | None = None
) -> list[Batch]:
    """Rows for measuring, the last one padded: every token once, or up to `max_tokens` of them.

    The seed permutes the documents; of more tokens than wanted it picks rows here and there, so that many documents
    are among them (without a seed: evenly spaced rows). At least one row.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    count = len(corpus)
    order = np.arange(count) if generator is None else torch.randperm(count, generator=generator).numpy()
    ids, owner = corpus.windows(order, seq_len, pad=True)
    wanted = len(ids) if max_tokens is None else min(len(ids), max(max_tokens // seq_len, 1))
    if wanted < len(ids):
        spread = np.linspace(0, len(ids) - 1, wanted).astype(np.int64)
        picked = (
            spread if generator is None else torch.randperm(len(ids), generator=generator)[:wanted].sort()[0].numpy()
        )
        ids, owner = ids[picked], owner[picked]
    return [
        corpus.batch(ids[start : start + batch_size], owner[start : start + batch_size])
        for start in range(0, wanted, batch_size)
    ]
