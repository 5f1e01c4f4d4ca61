"""Text for a model in memory: what `data` names, or texts themselves, and rows of it in sizes that fit both. Where they
are less than the commands take, the logger "limbeck" says so."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...models.errors import InputError, expect
from ...models.hybrid import HybridLM
from ...models.named import data_path
from ...models.quantities import check_seed, counted
from ...models.schema import checked
from . import resolve
from .documents import EmptySplit
from .mixture import Mixture, Text
from .packing import Batch
from .reading import TextData

Data = str | Path | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]
log = logging.getLogger("limbeck")


def read_text(model: HybridLM, data: Data, split: str) -> Text:
    """A split of `data` in the model's tokens; all of a list, and of what has no document in that split."""
    if model.tokenizer is None:
        raise InputError("the model has no tokenizer to read text with; give load(..., tokenizer=FOLDER)")
    folder = model.tokenizer.folder
    expect("data", data, (str, Path, Mapping, Iterable), "a path, a name, or a list of texts")
    if not isinstance(data, (str, Path, Mapping)):
        return resolve.text_in_tokens(list(data), "all", folder)
    path: resolve.NamedData = data_path(str(data)) if not isinstance(data, Mapping) else ""
    if isinstance(data, Mapping):
        named = checked(TextData, "data", **data)
        path = dataclasses.replace(named, path=data_path(named.path))
    try:
        return resolve.text_in_tokens(path, split, folder)
    except EmptySplit:
        log.warning("data=%s has no document in the split %r: all of it is read", data, split)
        return resolve.text_in_tokens(path, "all", folder)


def named_text(data: Data) -> str:
    """What errors and pages call it."""
    return str(data) if isinstance(data, (str, Path)) else "texts"


def fitted(model: HybridLM, text: Text, seq_len: int | None, batch: int | None, seed: int = 0) -> tuple[int, int]:
    """Tokens a row and rows a batch: as given, or the commands' 512 and 8, fewer where model or text has fewer. Raises
    InputError where these, or the seed of what is drawn, cannot be."""
    check_seed(seed)
    seq_len, batch = counted(seq_len=seq_len, batch=batch)
    parts = text.corpora if isinstance(text, Mixture) else (text,)
    if seq_len is None:
        seq_len = min(512, model.config.max_position_embeddings, *(part.tokens - 1 for part in parts))
        if seq_len < 512:
            log.warning("rows of %d tokens: model or text has no more", seq_len)
    if batch is None:
        batch = max(min(8, sum(part.rows(seq_len) for part in parts)), 1)
        if batch < 8:
            log.warning("batches of %d rows: the text has no more", batch)
    return seq_len, batch


def read_sample(
    model: HybridLM, data: Data, split: str, tokens: int, seq_len: int | None, batch: int | None, seed: int
) -> list[Batch]:
    (tokens,) = counted(tokens=tokens)
    text = read_text(model, data, split)
    seq_len, batch = fitted(model, text, seq_len, batch, seed)
    return list(text.sample(batch_size=batch, seq_len=seq_len, seed=seed, max_tokens=tokens))


def held_out_of(data: Data, held_out: Data | None) -> Data:
    """The text that a training is measured on. Raises InputError where there is none besides what it reads."""
    if held_out is None and not isinstance(data, (str, Path, Mapping)):
        raise InputError("distill: a list of texts is read as a whole; evaluate_every needs held_out=, text besides it")
    return data if held_out is None else held_out
