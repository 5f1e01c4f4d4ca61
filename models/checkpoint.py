"""Checkpoint folders in the public layout: config.json, safetensors (one file or shards), tokenizer, limbeck.json.

Reading goes tensor by tensor, or rows by rows; names, shapes and dtypes are checked against `axes.tensor_table` from
the headers, before any weight is read. Writing streams too: memory holds what is handed over at a time, whatever the
size of a shard. A shard has its name once it is whole, so that unfinished work resumes after the last one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .axes import tensor_table
from .companions import companions, copy_companions
from .config import HybridConfig
from .errors import CheckFailed, InputError
from .families.family import (
    StoredTensor,
    assembled,
    is_ignored,
    pieces_of,
    published_name,
    scattered,
    stored_tensors,
    tensor_table_of,
)
from .folder import atomic_folder, write_json
from .foreign import SETTINGS, read_object
from .hybrid import HybridLM, set_tensor
from .lora import MERGED, read_adapter
from .shards import (
    ADAPTER_SETTINGS,
    INDEX,
    SHARD_BYTES,
    SINGLE,
    Shard,
    check_disk,
    main_dtype,
    plan_shards,
    untied,
    with_head,
    write_index,
)
from .stored import (
    DTYPES,
    PACKED,
    Header,
    Quantised,
    StoredPlace,
    dtype_of_numbers,
    is_companion,
    open_file,
    quantised_weight,
    quantization_of,
    read_headers,
    states_tied,
    without_weights,
)
from .tensors import Finishing, TensorFile, ahead

PIECE_BYTES = 2**24  # of a tensor in memory, where it is streamed
PIECES_AHEAD = 4  # read while others are written: with one, reading and writing wait for each other


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor of the table lies: the places of what it is stored as, by published names, and their dtype."""

    places: Mapping[str, StoredPlace]
    dtype: torch.dtype


class Checkpoint:
    """A folder whose every tensor is known to be there, in the right shape; made by `open_checkpoint`."""

    def __init__(self, path: Path, config: HybridConfig, stored: Mapping[str, Stored]) -> None:
        self.path, self.config, self.stored = path, config, stored

    def names(self) -> list[str]:
        """The tensors' names, in the order of the table."""
        return list(self.stored)

    def dtype(self) -> torch.dtype:
        """The dtype that most of the weights have."""
        table = tensor_table(self.config)
        counts: dict[torch.dtype, int] = {}
        for name, place in self.stored.items():
            counts[place.dtype] = counts.get(place.dtype, 0) + table[name].numel
        return max(counts, key=lambda dtype: counts[dtype])

    def formats(self) -> dict[str, int]:
        """What tensors are quantised as, and how many: nothing for plain ones."""
        counts: dict[str, int] = {}
        for place in {place for stored in self.stored.values() for place in stored.places.values()}:
            if place.quantised is not None:
                counts[place.quantised.kind] = counts.get(place.quantised.kind, 0) + 1
        return counts

    def tensor(self, name: str) -> Tensor:
        """One tensor, read from its file. Raises InputError where it holds NaN or infinity."""
        return self.rows(name, 0, None)

    def loaded(self, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """One tensor as a model of `dtype` has it, on a device. Raises InputError as `tensor`."""
        return self.tensor(name).to(device=device, dtype=tensor_table_of(self.config)[name].dtype(dtype))

    def rows(self, name: str, start: int, stop: int | None) -> Tensor:
        """Rows start..stop-1 of one tensor. They lie in the file until they are used. Raises InputError as above."""
        places = self.stored[name].places
        if stop is None:
            stop = tensor_table_of(self.config)[name].shape[0]
        return assembled(self.config, name, start, stop, lambda stored, *rows: places[stored].rows(*rows))


def load_config(path: Path | str) -> HybridConfig:
    """The config of a checkpoint folder; the head is its own where its files or its class say so. Raises InputError."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is no folder; expected a checkpoint folder with config.json and safetensors")
    if not (path / "config.json").exists():
        if (path / ADAPTER_SETTINGS).exists():
            raise without_weights(path, "config.json")
        raise InputError(f"{path / 'config.json'} is missing; expected a folder with config.json and safetensors")
    content = read_object(path / "config.json", SETTINGS)
    try:
        config = HybridConfig.from_hf(content)
    except InputError as error:
        raise InputError(f"{path / 'config.json'}: {error}") from None
    tied = config.tie_word_embeddings and config.family_record.ties and not has_own_head(path, config)
    steps = 0 if config.mtp_steps and lacks_ahead(path) else config.mtp_steps
    return config.replace(tie_word_embeddings=tied, mtp_steps=steps)


def has_own_head(path: Path, config: HybridConfig) -> bool:
    """Whether the files hold a head though config.json ties it to the embeddings, another matrix than they are:
    transformers keeps it, too."""
    outer, headers = config.family_record.outer, dict[str, Header]()
    for header in read_headers(weight_files(path)) if (path / SINGLE).exists() or (path / INDEX).exists() else ():
        headers[published_name(config, header.name.removesuffix(PACKED))] = header
    head, table = (headers.get(str(outer[name])) for name in ("lm_head.weight", "embeddings.weight"))
    shape = (config.vocab_size, config.hidden_size)
    if not (head and table) or not {head.dtype, table.dtype} <= {*DTYPES} or {head.shape, table.shape} != {shape}:
        return head is not None  # `check_tensor` says what is wrong with it
    both = [StoredPlace(each.file, each.name, DTYPES[each.dtype]) for each in (head, table)]
    return any(not torch.equal(*(each.rows(*rows) for each in both)) for rows in row_blocks(shape, both[1].dtype))


def lacks_ahead(path: Path) -> bool:
    """Whether a folder's weights have none of multi-token prediction: transformers drops it, and config.json stays."""
    if not ((path / SINGLE).exists() or (path / INDEX).exists()):
        return False
    return not any(name.startswith("mtp.") for file in weight_files(path) for name in open_file(file).keys())  # noqa: SIM118


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a folder and checks every tensor's name, shape and dtype. Raises InputError, naming file and tensor."""
    config = load_config(Path(path))
    return checkpoint_of(Path(path), config, list(read_headers(weight_files(Path(path)))))


def checkpoint_of(path: Path, config: HybridConfig, headers: Sequence[Header]) -> Checkpoint:
    """A folder with the headers of its files, which need not be here. Raises InputError."""
    expected = stored_tensors(config)
    places: dict[str, StoredPlace] = {}
    names = {header.name: header for header in headers}
    settings = quantization_of(path)
    adapter = read_adapter(path / MERGED, config, expected) if (path / MERGED).is_dir() else None
    for header in headers:
        if is_companion(header.name, names):
            continue
        known = published_name(config, header.name.removesuffix(PACKED))
        if is_unread(config, known):
            continue
        quantised = quantised_weight(header, names, settings)
        check_tensor(header, known, expected, quantised, settings)
        if known in places:
            raise InputError(
                f"{header.file}: tensor {header.name} is also in {places[known].file.name}; expected it once"
            )
        dtype = DTYPES[header.dtype] if quantised is None else dtype_of_numbers(path)
        place = StoredPlace(header.file, header.name, dtype, quantised)
        places[known] = place if adapter is None else adapter.place(known, place)
    head, table = (str(config.family_record.outer[name]) for name in ("lm_head.weight", "embeddings.weight"))
    if head in expected and table in places and states_tied(path):  # which the family's class does not do
        places.setdefault(head, places[table])
    missing = [name for name in expected if name not in places]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(
            f"{path}: tensor {', '.join(missing[:3])}{more} missing; config.json asks for {len(expected)} tensors"
        )
    return Checkpoint(path, config, stored_as(config, places))


def stored_as(config: HybridConfig, places: Mapping[str, StoredPlace]) -> dict[str, Stored]:
    """The tensors of the table whose every piece has a place, by published name. Raises InputError where the pieces of
    one have several dtypes."""
    stored: dict[str, Stored] = {}
    for name, pieces in pieces_of(config).items():
        if all(piece.stored in places for piece in pieces):
            own = {piece.stored: places[piece.stored] for piece in pieces}
            first, *others = own.values()
            for other in others:
                if other.dtype != first.dtype:
                    raise InputError(
                        f"{other.file}: tensor {other.name} has dtype {other.dtype}, but {first.name} {first.dtype};"
                        " expected one for both, which belong together"
                    )
            stored[name] = Stored(own, first.dtype)
    return stored


def weight_files(path: Path) -> list[Path]:
    """The folder's safetensors files: the single one, or the shards that the index names."""
    if (path / SINGLE).exists():
        return [path / SINGLE]
    if not (path / INDEX).exists():
        raise without_weights(path, f"{SINGLE} or {INDEX}")
    from .schema import read_index

    files = [path / name for name in sorted(set(read_index(path / INDEX).values()))]
    for file in files:
        if not file.exists():
            raise InputError(f"{file} is missing; {INDEX} names it")
    return files


def is_unread(config: HybridConfig, known: str) -> bool:
    """Whether a tensor of that published name is a tied head stored again, or says nothing that the config does not."""
    head = config.family_record.outer["lm_head.weight"]
    return (known == head and config.tie_word_embeddings) or is_ignored(config, known)


def check_tensor(
    header: Header, known: str, expected: Mapping[str, StoredTensor], quantised: Quantised | None,
    settings: Mapping[str, Any],
) -> None:  # fmt: skip
    """Raises InputError unless a tensor has the name, shape and dtype of one that is expected."""
    where = f"{header.file}: tensor {header.name}"
    if known not in expected:
        method = settings.get("quant_method")
        method = "" if method is None else f", whose quantization {method!r} may not be read"
        raise InputError(
            f"{header.file}: unexpected tensor {header.name}; config.json{method} describes none of that name (as"
            f" {next(iter(expected))})"
        )
    shape = header.shape if quantised is None else quantised.shape
    if shape != expected[known].shape:
        raise InputError(f"{where} has shape {list(shape)}, expected {list(expected[known].shape)}")
    if quantised is None and header.dtype not in DTYPES:
        method = settings.get("quant_method")
        by = f" of the quantization {method!r}, which is not read" if method else ""
        raise InputError(f"{where} has dtype {header.dtype}{by}; expected one of {', '.join(DTYPES)}")


def load_model(
    path: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, ahead: bool = True
) -> HybridLM:
    """A model from a folder, in `dtype` (`TensorSpec.dtype`) on `device`, in evaluation mode; without `ahead` its
    multi-token prediction stays where it is. Raises InputError."""
    checkpoint = open_checkpoint(path)
    config = checkpoint.config if ahead else checkpoint.config.replace(mtp_steps=0)
    model = HybridLM(config, device="meta")
    for name in tensor_table(config):
        set_tensor(model, name, checkpoint.loaded(name, dtype, device))
    return model.eval()


def save_model(
    model: HybridLM,
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    tokenizer_from: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model as a folder; see `write_checkpoint`. `dtype` None keeps each tensor's."""
    with atomic_folder(Path(path)) as folder:
        write_checkpoint(
            folder,
            model.config,
            model_tensors(model),
            dtypes=dtype or model_dtypes(model),
            tokenizer_from=tokenizer_from,
            provenance=provenance,
            max_shard_bytes=max_shard_bytes,
        )


def write_checkpoint(
    folder: Path,
    config: HybridConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtypes: torch.dtype | Mapping[str, torch.dtype],
    tokenizer_from: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    sums: dict[str, str] | None = None,
) -> None:
    """Fills an existing folder (see `folder.atomic_folder`) with config, weights and tokenizer.

    `tensors` yields (name, tensor) of the table, or (name, rows), one run of rows after the other; they are stored in
    `dtypes`, one for all or one for each name. Shards that are in the folder already stay, and what is yielded for
    them is skipped: see `finished_shards`. `tokenizer_from` is a folder whose tokenizer files are copied;
    `provenance` becomes limbeck.json. The checksums of the shards that are written go into `sums`, if given.
    Raises InputError where the config cannot be written, DiskError where the disk has less space than the weights take
    or refuses a write.
    """
    given, (config, dtypes) = config, untied(config, dtypes)
    content = config.to_hf()  # what cannot be written is refused before the first weight is
    along = companions(tokenizer_from) if tokenizer_from not in (None, folder) else []
    shards = plan_shards(config, dtypes, max_shard_bytes)
    if config != given:
        tensors = with_head(tensors, lambda: finished_shards(folder, config, shards).tensor("embeddings.weight"))
    missing = [shard for shard in shards if not (folder / shard.file).exists()]
    check_disk(folder, sum(shard.bytes for shard in missing))
    place = {name: shard for shard in missing for name in shard.forms}
    rows_done: dict[str, int] = {}
    files: dict[str, TensorFile] = {}
    with Finishing(sums) as finishing:
        try:
            for ours, rows in ahead(tensors, PIECES_AHEAD, size=lambda item: item[1].nbytes // PIECE_BYTES):
                start = rows_done.get(ours, 0)
                rows_done[ours] = start + len(rows)
                for name, row, part in scattered(config, ours, start, rows.detach()):
                    if name not in place:
                        continue
                    shard = place[name]
                    if shard.file not in files:
                        files[shard.file] = TensorFile(folder / shard.file, shard.forms)
                    file = files[shard.file]
                    file.write(name, part.to(shard.forms[name][0]), row)
                    if file.complete:
                        finishing.add(files.pop(shard.file))
                        place = {other: where for other, where in place.items() if where is not shard}
        finally:
            for file in files.values():
                file.discard()
    assert not place, f"tensors of the checkpoint that were not given: {sorted(place)}"
    write_index(folder, shards)
    write_json(folder / "config.json", content | {"torch_dtype": str(main_dtype(shards)).removeprefix("torch.")})
    copy_companions(along, folder)
    if provenance is not None:
        write_json(folder / "limbeck.json", dict(provenance))


def finished_shards(folder: Path, config: HybridConfig, shards: Iterable[Shard]) -> Checkpoint:
    """What an earlier, interrupted `write_checkpoint` has left in a folder: a checkpoint of some of the tensors."""
    places = {
        name: StoredPlace(folder / shard.file, name, dtype)
        for shard in shards
        if (folder / shard.file).exists()
        for name, (dtype, _) in shard.forms.items()
    }
    return Checkpoint(folder, config, stored_as(config, places))


def model_dtypes(model: HybridLM) -> dict[str, torch.dtype]:
    """The dtype of every tensor of a model."""
    weights = model.state_dict()
    return {name: weights[name].dtype for name in tensor_table(model.config)}


def model_tensors(model: HybridLM) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of a model in the table's order, on the CPU."""
    weights = model.state_dict()
    for name in tensor_table(model.config):
        yield name, weights[name].cpu()


def stream_rows(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Every (name, rows) of a checkpoint in the table's order, `PIECE_BYTES` at a time."""
    for name, axes in tensor_table(checkpoint.config).items():
        for start, stop in row_blocks(axes.shape, checkpoint.stored[name].dtype):
            yield name, checkpoint.rows(name, start, stop)


def row_blocks(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """The rows of a tensor in runs (start, stop) of `PIECE_BYTES` at most, a row at least."""
    step = max(1, PIECE_BYTES // (math.prod(shape[1:]) * dtype.itemsize))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


@torch.no_grad()
def check_forward(models: Mapping[str, HybridLM]) -> None:
    """Runs two tokens through each model, so that what is wrong with a device, an operator or the weights shows before
    any text is read. Raises CheckFailed where the hidden states are not finite."""
    for name, model in models.items():
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.head_weight.device)
        if not model.hidden_states(ids).isfinite().all():
            raise CheckFailed(f"the hidden states of {name} are not finite; try a wider dtype")
