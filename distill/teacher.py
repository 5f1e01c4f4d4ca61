"""A teacher's answers, its top-k tokens or draws from its distribution, written once, and read in any order, batch
size or number of processes.

What a teacher says at a token follows from the row it stands in: the tokens before it, back to where its document or
the row began. So a row is known by its content, a 128-bit hash of its token ids and of where documents begin in it, and
whoever holds the row finds the teacher's answer: no numbering of rows, seeds or batches has to agree, a row that occurs
twice is kept once, and data or a tokenizer that has changed finds nothing instead of the wrong thing. Answers kept by
document would be of use to more rows, but not true: the teacher would have read what the student has not.

A file `rows-NNNNN.safetensors` holds for each of its rows the key [16], and for each token the ids of the top-k tokens
(the low 16 bits, and bits 16 to 23 in a byte where the vocabulary has more than 65,536), their log-probabilities
and the logarithm of all others' mass; or the ids that were drawn, the id of the argmax, and the entropy. What is drawn
at a row follows from its key. Shapes: [B] rows, [T] tokens, [k] top-k tokens or draws.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kernels.linear_draws_kl import Draws, linear_draws, linear_draws_kl
from ..kernels.linear_topk_kl import LinearTopKKL, TopK, linear_topk, linear_topk_kl
from ..models import processes
from ..models.errors import CheckFailed, InputError
from ..models.fingerprint import read_provenance
from ..models.folder import file_sum, write_json
from ..models.foreign import read_object
from ..models.hybrid import HybridLM
from ..models.row_split import RowSplit
from ..models.tensors import save_tensors
from .row_parts import whole_states

INDEX = "cache.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LOW = 65536
KEY = 16
TOP_K, SAMPLE = "top_k", "sample"
METHODS = (TOP_K, SAMPLE)


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """By `method` the top `k` tokens of a position, or `k` draws ("sample"); log-probabilities and entropies in
    `dtype`, files of about `shard_bytes`."""

    k: int = 64
    dtype: str = "float16"
    shard_bytes: int = 2**27
    method: str = TOP_K

    def __post_init__(self) -> None:
        if self.k < 1 or self.shard_bytes < 1:
            raise InputError(f"cache: k ({self.k}) and shard_bytes ({self.shard_bytes}) must be at least 1")
        if self.dtype not in DTYPES:
            raise InputError(f"cache: dtype {self.dtype!r} is unknown; known: {', '.join(DTYPES)}")
        if self.method not in METHODS:
            raise InputError(f"cache: method {self.method!r} is unknown; known: {', '.join(METHODS)}")

    @property
    def chosen(self) -> dict[str, Any]:
        """The options that a fingerprint is made of: those of a cache from before there were methods stay its."""
        return {name: value for name, value in dataclasses.asdict(self).items() if (name, value) != ("method", TOP_K)}

    def bytes_per_token(self, vocabulary: int) -> int:
        """Without the key, 16 bytes a row."""
        width, name = DTYPES[self.dtype].itemsize, 2 + (vocabulary > LOW)
        return (self.k + 1) * name + width if self.method == SAMPLE else self.k * (name + width) + width


def row_keys(input_ids: Tensor, seq_idx: Tensor) -> list[bytes]:
    """What the rows [B, T] are known by."""
    ids = input_ids.to("cpu", torch.int32).numpy()
    begins = (seq_idx[:, 1:] != seq_idx[:, :-1]).to("cpu", torch.uint8).numpy()
    return [
        hashlib.blake2b(row.tobytes() + mark.tobytes(), digest_size=KEY).digest()
        for row, mark in zip(ids, begins, strict=True)
    ]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("rows-*.safetensors"))


def read_keys(path: Path) -> list[bytes]:
    with open_shard(path) as file:
        keys: Tensor = file.get_tensor("keys")
    return [bytes(key) for key in keys.numpy()]


def open_shard(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}; make the cache anew") from None


@torch.no_grad()
def write_cache(
    teacher: HybridLM,
    batches: Iterable[tuple[Any, int]],
    folder: Path,
    options: CacheOptions,
    on_rows: Callable[[int], None] | None = None,
) -> None:
    """The teacher's answers to all rows of the batches, given with how many rows of each go through it at once, as
    files in an existing folder. Rows that stand there already are skipped; of many processes each runs a whole
    teacher of its own on its share. `on_rows` is told of every row, skipped or not. Raises InputError where a top k is
    beyond the vocabulary.
    """
    vocabulary = teacher.config.vocab_size
    if options.method == TOP_K and options.k > vocabulary:
        raise InputError(f"cache: k is {options.k}, beyond the vocabulary's {vocabulary}")
    if processes.rank() == 0:
        for leftover in folder.glob("rows-*.partial"):  # of a kill
            leftover.unlink()
    written = shards(folder)
    known = {key for path in written for key in read_keys(path)}
    number = int(written[-1].stem[5:]) + 1 if written else 0
    number = max(processes.gather(number)) + processes.rank()
    pending: list[dict[str, Tensor]] = []
    size = options.bytes_per_token(vocabulary)
    missing = 0

    def flush() -> None:
        nonlocal number, pending
        if pending:
            tensors = {name: torch.cat([part[name] for part in pending]) for name in pending[0]}
            save_tensors(folder / f"rows-{number:05d}.safetensors", tensors)
            number, pending = number + processes.count(), []

    for batch, at_once in batches:
        tokens = batch.input_ids.shape[1]
        if pending and pending[0]["ids"].shape[1] != tokens:
            flush()
        mine: list[int] = []
        keys = row_keys(batch.input_ids, batch.seq_idx)
        for row, key in enumerate(keys):
            if key not in known:
                known.add(key)
                if missing % processes.count() == processes.rank():
                    mine.append(row)
                missing += 1
        for start in range(0, len(mine), at_once):
            rows = mine[start : start + at_once]
            pending.append(answers_to(teacher, batch, rows, [keys[row] for row in rows], options))
            if sum(len(part["keys"]) for part in pending) * tokens * size >= options.shard_bytes:
                flush()
        if on_rows is not None:
            on_rows(len(keys))
    flush()


def answers_to(
    teacher: HybridLM, batch: Any, rows: Sequence[int], keys: Sequence[bytes], options: CacheOptions
) -> dict[str, Tensor]:
    """What a file keeps of some rows of a batch."""
    device = teacher.head_weight.device
    ids, seq_idx = (tensor[list(rows)].to(device) for tensor in (batch.input_ids, batch.seq_idx))
    hidden = teacher.hidden_states(ids, seq_idx=seq_idx).flatten(0, 1)
    dtype, shape = DTYPES[options.dtype], tuple(ids.shape)
    kept = {"keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(len(keys), KEY)}
    named: dict[str, Tensor] = {}
    if options.method == SAMPLE:
        drawn = linear_draws(hidden, teacher.head_weight, options.k, row_offsets(keys, shape[1]).flatten().to(device))
        named |= {"ids": drawn.ids.sort(-1).values.reshape(*shape, options.k), "first": drawn.first.reshape(shape)}
        kept["entropy"] = drawn.entropy.to(dtype).reshape(shape)
    else:
        top = linear_topk(hidden, teacher.head_weight, options.k)
        named["ids"] = top.ids.reshape(*shape, options.k)
        kept |= {"log_probs": top.log_probs.to(dtype).reshape(*shape, options.k)}
        kept |= {"log_tail": top.log_tail.to(dtype).reshape(shape)}
    for name, numbers in named.items():
        kept[name] = (numbers % LOW).to(torch.int32).to(torch.int16)  # the same 16 bits
        if teacher.config.vocab_size > LOW:
            kept[f"{name}_high"] = (numbers // LOW).to(torch.uint8)
    return {name: tensor.cpu() for name, tensor in kept.items()}


def row_offsets(keys: Sequence[bytes], tokens: int) -> Tensor:
    """The random numbers [B, T] in [0, 1) of the draws of some rows, each from its key."""
    generators = [torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1) for key in keys]
    return torch.stack([torch.rand(tokens, dtype=torch.float64, generator=each) for each in generators])


def finish_cache(folder: Path, vocabulary: int, tokenizer: str, options: CacheOptions) -> dict[str, Any]:
    """Writes what the files together are into cache.json, and returns it; `tokenizer` is the sha256 of its file."""
    rows = tokens = 0
    for path in shards(folder):
        with open_shard(path) as file:
            shape = file.get_slice("ids").get_shape()
        rows, tokens = rows + shape[0], tokens + shape[0] * shape[1]
    facts = {
        "method": options.method,
        "k": options.k,
        "dtype": options.dtype,
        "vocab_size": vocabulary,
        "tokenizer": tokenizer,
        "rows": rows,
        "tokens": tokens,
        "bytes_per_token": sum(path.stat().st_size for path in shards(folder)) / max(tokens, 1),
    }
    write_json(folder / INDEX, facts)
    return facts


class CachedTeacher:
    """The teacher's answers in a folder. Raises InputError where the folder is no finished cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            facts = read_object(folder / INDEX)
            self.vocab_size, self.k, self.tokenizer = facts["vocab_size"], facts["k"], facts["tokenizer"]
            self.method = facts.get("method", TOP_K)  # caches from before there were methods
        except (OSError, ValueError, KeyError):
            raise InputError(
                f"{folder} is no finished cache of a teacher ({INDEX} is missing or broken);"
                " limbeck cache-teacher makes one"
            ) from None
        if self.method not in METHODS:
            raise InputError(
                f"{folder} was made by the method {self.method!r}; known: {', '.join(METHODS)} (a newer version's?)"
            )
        self.paths, self.sound = shards(folder), set[int]()
        self.files = [open_shard(path) for path in self.paths]
        keys = [read_keys(path) for path in self.paths]
        self.places = {key: (file, row) for file, own in enumerate(keys) for row, key in enumerate(own)}
        if (there := sum(map(len, keys))) != facts.get("rows"):
            raise InputError(
                f"{folder} holds {there} rows, and {INDEX} says {facts.get('rows')}: files are missing; copy it again,"
                " or make it anew"
            )
        self.sums = read_provenance(folder).get("files", {})

    def file(self, number: int) -> Any:
        """A shard, whose sum is compared with that of limbeck.json when it is first read. Raises InputError."""
        if number not in self.sound:
            path = self.paths[number]
            expected = self.sums.get(path.name)
            if expected is not None and file_sum(path, expected) != expected:
                raise InputError(f"{path} is damaged: it is not what limbeck.json says; make the cache anew")
            self.sound.add(number)
        return self.files[number]

    def __len__(self) -> int:
        return len(self.places)

    def holds(self, rows: Any) -> bool:
        return all(key in self.places for key in row_keys(rows.input_ids, rows.seq_idx))

    def check_holds(self, batches: Iterable[Any]) -> None:
        """Raises InputError where there is no answer to one of these batches, which will be read."""
        if not all(self.holds(batch) for batch in batches):
            for number in range(len(self.paths)):
                self.file(number)  # where the key of a row is damaged
            raise InputError(
                f"teacher_cache={self.folder} lacks rows that will be read: it holds {len(self)}, made for fewer"
                " steps or with another seed, seq_len, batch, repack or evaluate_tokens; make it with distill's options"
            )

    def targets(self, rows: Any) -> TopK | Draws:
        """The answers to rows [B, T], as [B * T, k]; of a part of rows, to its tokens alone. Raises InputError where a
        row is not there."""
        parts: dict[str, list[Tensor]] = {}
        part, whole = getattr(rows, "part", None), getattr(rows, "whole", rows)
        own = slice(None) if part is None else slice(part.start, part.stop)
        for number, key in enumerate(row_keys(whole.input_ids, whole.seq_idx)):
            if key not in self.places:
                raise InputError(
                    f"{self.folder} does not hold row {number} of a batch (it holds {len(self.places)} rows); it was"
                    " made of other data, another tokenizer, seed or length, or fewer tokens"
                )
            file, row = self.places[key]
            shard = self.file(file)
            for name in shard.keys():  # noqa: SIM118 - no mapping
                if name != "keys":
                    parts.setdefault(name, []).append(shard.get_slice(name)[row : row + 1, own][0])
        device = rows.input_ids.device
        stored = {name: torch.cat(tensors).to(device) for name, tensors in parts.items()}

        def tokens(name: str) -> Tensor:
            numbers = stored[name].to(torch.int64) % LOW
            return numbers + stored[high].to(torch.int64) * LOW if (high := f"{name}_high") in stored else numbers

        if self.method == SAMPLE:
            return Draws(tokens("ids"), stored["entropy"].float(), tokens("first"))
        return TopK(tokens("ids"), stored["log_probs"].float(), stored["log_tail"].float())


def answer_loss(
    hidden: Tensor, head: Tensor, target: TopK | Draws, *, tail: bool = True, **options: Any
) -> LinearTopKKL:
    """The loss of hidden states [T, H] under a head [V, H] against a cache's answers: `linear_topk_kl`, where `tail`
    counts, or `linear_draws_kl`, of the same further options."""
    if isinstance(target, Draws):
        return linear_draws_kl(hidden, head, target, **options)
    return linear_topk_kl(hidden, head, target, tail=tail, **options)


@torch.no_grad()
def cached_gap(
    teacher: CachedTeacher, student: HybridLM, batches: Iterable[Any], split: RowSplit | None = None
) -> dict[str, float]:
    """A student's held-out figures against the answers of a cache: cross-entropy (nats a token), bits per byte, KL over
    the k + 1 buckets (never more than that of all tokens) or its estimate from the draws, and the share of tokens with
    the same argmax. With a `split` rows go through the student in parts.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    tokens = text_bytes = 0
    for batch in batches:
        rows = batch.to(student.head_weight.device)
        hidden = whole_states(student, rows.input_ids, rows.seq_idx, split).flatten(0, 1)
        labels = rows.labels.flatten()
        loss = answer_loss(hidden, student.head_weight, teacher.targets(rows), labels=labels)
        assert loss.cross_entropy is not None
        sums += torch.stack([part.double().sum() for part in (loss.cross_entropy, loss.kl, loss.agreement)]).cpu()
        tokens, text_bytes = tokens + int((labels >= 0).sum()), text_bytes + int(rows.n_bytes.sum())
    nats, kl, agreed = sums.tolist()
    if not (math.isfinite(nats) and math.isfinite(kl)):
        raise CheckFailed("distill: the student's held-out figures are not finite; try a wider dtype, or a lower rate")
    return {
        "validation_loss": nats / tokens,
        "validation_bits_per_byte": nats / math.log(2) / text_bytes,
        "validation_kl": kl / tokens,
        "validation_agreement": agreed / tokens,
    }
