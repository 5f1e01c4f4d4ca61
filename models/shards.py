"""The files of a checkpoint's weights, before they are written: which tensors go where, and the disk for them."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .config import HybridConfig
from .errors import DiskError
from .families.family import StoredTensor, stored_tensors, tensor_table_of
from .folder import write_json
from .tensors import Form

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_SETTINGS, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # of PEFT
SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of weights, before it is written: its name, and the tensors by their stored names."""

    file: str
    forms: Mapping[str, Form]

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.forms.values())


def plan_shards(
    config: HybridConfig, dtypes: torch.dtype | Mapping[str, torch.dtype], max_shard_bytes: int = SHARD_BYTES
) -> tuple[Shard, ...]:
    """The files of a checkpoint: its tensors in the table's order, as many to a file as `max_shard_bytes` hold."""
    table = tensor_table_of(config)

    def form_of(tensor: StoredTensor) -> Form:
        ours = tensor.pieces[0].ours
        dtype = dtypes[ours] if isinstance(dtypes, Mapping) else table[ours].dtype(dtypes)
        return dtype, tensor.shape

    return shared_out(({name: form_of(tensor)} for name, tensor in stored_tensors(config).items()), max_shard_bytes)


def shared_out(units: Iterable[Mapping[str, Form]], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Files of as many units as `max_shard_bytes` hold, in their order; tensors of a unit lie together."""
    groups: list[dict[str, Form]] = [{}]
    filled = 0
    for unit in units:
        size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in unit.values())
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append({})
            filled = 0
        groups[-1] |= unit
        filled += size
    if len(groups) == 1:
        return (Shard(SINGLE, groups[0]),)
    return tuple(
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group) for number, group in enumerate(groups, 1)
    )


def check_disk(folder: Path, needed: int) -> None:
    """Raises DiskError where the disk of a folder has less space."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskError(
            f"{folder.parent}: the weights take {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB left;"
            " free space, or give an output elsewhere"
        )


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """The index of a folder of several files."""
    if len(shards) > 1:
        weight_map = {name: shard.file for shard in shards for name in shard.forms}
        total = sum(shard.bytes for shard in shards)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def main_dtype(shards: Sequence[Shard]) -> torch.dtype:
    """The dtype that most of the numbers have."""
    counts: dict[torch.dtype, int] = {}
    for shard in shards:
        for dtype, shape in shard.forms.values():
            counts[dtype] = counts.get(dtype, 0) + math.prod(shape)
    return max(counts, key=lambda key: counts[key])


Dtypes = torch.dtype | Mapping[str, torch.dtype]


def untied(config: HybridConfig, dtypes: Dtypes) -> tuple[HybridConfig, Dtypes]:
    """Config and dtypes as they are written: with a head where the family's class ties none to the embeddings."""
    if not config.tie_word_embeddings or config.family_record.ties:
        return config, dtypes
    if not isinstance(dtypes, torch.dtype):
        dtypes = {**dtypes, "lm_head.weight": dtypes["embeddings.weight"]}
    return config.replace(tie_word_embeddings=False), dtypes


def with_head(tensors: Iterable[tuple[str, Tensor]], finished: Callable[[], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, and the embeddings once more as the head; where they are not given, since they are written
    already, those that are `finished`."""
    given = False
    for name, rows in tensors:
        yield name, rows
        if name == "embeddings.weight":
            given = True
            yield "lm_head.weight", rows
    if not given:
        yield "lm_head.weight", finished()
