"""What model= and data= may be: a folder, a file, or a name."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...distill.text import resolve
from ...distill.text.mixture import Mixture, Text
from ...distill.text.notes import say as say_notes
from ...distill.text.packing import Batch, Sample
from ...distill.text.resolve import NamedData as NamedData
from ...models import named, processes
from ...models.checkpoint import load_config
from ...models.device import DTYPES as DTYPES
from ...models.device import torch_device as torch_device
from ...models.device import torch_dtype as torch_dtype
from ...models.device import training_dtype as training_dtype
from ...models.errors import InputError
from ...models.errors import check_counts as check_counts
from ...models.fingerprint import read_provenance
from ...models.named import SHIPPED, data_path, model_weights, names, quantisation
from ...models.named import model_config as model_config
from .show import progress, say, table

if TYPE_CHECKING:
    from ...distill.options import DistillOptions
    from ...models.cost.fit import Estimate, Fit
    from ...models.cost.hardware import Hardware
    from ...models.cost.stored_weights import StoredWeights

ZOO = SHIPPED["zoo"]


def model_folder(name: str) -> Path:
    """`named.model_folder`; says what the weights are quantised as, where they are."""
    folder = named.model_folder(name)
    if kinds := named.quantised_as(folder)[1]:
        say_format(f"note: {name} is quantised: {kinds}")
    return folder


say_format = functools.lru_cache(maxsize=64)(say)  # once in a command


def model_names() -> list[str]:
    return names("model")


def named_data(data: NamedData) -> NamedData:
    """data= with a name in conf/data/ as its mixture's file."""
    return data_path(data) if isinstance(data, str) else dataclasses.replace(data, path=data_path(data.path))


@contextlib.contextmanager
def reading(what: str, in_bytes: bool) -> Iterator[resolve.OnProgress]:
    """A bar for text that is read."""
    with progress(what, in_bytes=in_bytes) as bar:
        yield lambda done, total: bar.set(done, total or None)


def data_input(data: NamedData) -> Path | str:
    return resolve.data_input(named_data(data))


def documents(data: NamedData, split: str) -> Iterator[resolve.Document]:
    return resolve.documents(named_data(data), split)


def corpus(data: NamedData, split: str, model: Path) -> Text:
    return resolve.corpus(named_data(data), split, model, reading)


def text_in_tokens(data: NamedData, split: str, tokenizer_from: Path) -> Text:
    return resolve.text_in_tokens(named_data(data), split, tokenizer_from, reading)


def sample(data: NamedData, split: str, model: Path, *, tokens: int, seq_len: int, **size: int) -> list[Batch]:
    """See `resolve.sample`; says so where the text is less than was requested, and where rows are longer than the model
    is made for."""
    rows = resolve.sample(named_data(data), split, model, tokens=tokens, seq_len=seq_len, **size, progress=reading)
    say_sampled(rows, data, split, model, tokens, seq_len)
    return list(rows)


def held_out(data: NamedData, folder: Path, how: DistillOptions, seed: int) -> list[Batch]:
    """What a stage is measured on, in the tokens of a folder; as many rows at once as go through a model in training,
    where many processes share a batch and each measures all rows."""
    size = {"tokens": how.evaluate_tokens, "seq_len": how.seq_len, "batch": how.rows, "seed": seed}
    found = sample(data, "validation", folder, **size)
    most = how.train.micro_batch or max(1, how.batch * how.train.context_parallel // processes.count())
    return [rows.rows(start, start + most) for rows in found for start in range(0, len(rows.input_ids), most)]


def say_sampled(rows: Sample, data: NamedData, split: str, model: Path, tokens: int, seq_len: int) -> None:
    """Says so where a sample is less than was requested, since there are no more rows, or where its rows are longer
    than the model is made for."""
    most, notes = load_config(model).max_position_embeddings, []
    taken = sum(int((batch.doc_id >= 0).sum()) for batch in rows) if rows.whole else tokens
    if taken < max(tokens // seq_len * seq_len, min(tokens, seq_len)):
        notes.append(f"its {split} split has {taken:,} tokens in its rows, of {tokens:,} that were requested")
    if seq_len > most:
        notes.append(f"rows of {seq_len:,} tokens are beyond the {most:,} that {model} is made for (its config's"
                     " max_position_embeddings)")  # fmt: skip
    say_notes(notes, f"data={data}")


def say_epochs(text: Text, plan: Sequence[tuple[int, int]]) -> None:
    """Says of a mixture how often each source is read in a plan of (rows, seq_len). Raises InputError where that is
    more than the source's `epochs`."""
    if isinstance(text, Mixture):
        table("The mixture", ("source", "share", "documents", "tokens", "epochs"), text.reading(plan))


def check_scores(folder: Path, model: str, name: str) -> None:
    """Raises InputError where scores are of another model than that of this sum, though of one of its shape."""
    made = read_provenance(folder)
    if made.get("made_by") == "limbeck score" and made["inputs"].get("model") != model:
        raise InputError(f"scores={folder} are of another model than {name}; give the scores of this one")


def held_weights(model: str, fit: Fit) -> StoredWeights | None:
    """`named.model_weights` of a fit; says so where quantised weights count as plain, since their files cannot be
    read."""
    held = model_weights(model, torch_dtype(fit.weight_dtype), fit.tensor_parallel)
    if held is None and quantisation(model):
        say(f"note: {model} is quantised, but its files cannot be read: its weights are counted as plain ones")
    return held


def estimated(model: str, hardware: Hardware, fit: Fit) -> Estimate:
    """What a model takes of a card, quantised weights as `held_weights` counts them."""
    return fit.estimate(model_config(model), hardware, held_weights(model, fit))
