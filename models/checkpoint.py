"""Checkpoint folders in the public layout: config.json, safetensors (one file or shards), tokenizer, limbeck.json.

Reading goes tensor by tensor; names, shapes and dtypes are checked against `axes.tensor_table` from the headers,
before any weight is read. Writing streams, one shard in memory at a time, and the folder appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .axes import TensorAxes, tensor_table
from .config import HybridConfig
from .errors import InputError
from .families import from_checkpoint_name, is_ignored, to_checkpoint_name
from .folder import atomic_folder, write_json
from .hybrid import HybridLM

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
# What belongs to the tokenizer and goes along with the weights.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies: the file, its name there, and the dtype."""

    file: Path
    name: str
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

    def tensor(self, name: str) -> Tensor:
        """One tensor, read from its file. Raises InputError where it holds NaN or infinity."""
        place = self.stored[name]
        with open_file(place.file) as file:
            tensor = file.get_tensor(place.name)
        if not torch.isfinite(tensor).all():
            kind = "NaN" if torch.isnan(tensor).any() else "infinity"
            raise InputError(f"{place.file}: tensor {place.name} holds {kind}; expected finite numbers")
        return tensor


def open_file(path: Path) -> Any:
    """A safetensors file, memory-mapped. Raises InputError where it is not a whole one."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        size = path.stat().st_size
        what = "is empty" if not size else f"is truncated or no safetensors file ({size} bytes: {error})"
        raise InputError(f"{path} {what}; copy it again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; expected a folder with config.json and safetensors") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no valid JSON: {error}") from None


def load_config(path: Path | str) -> HybridConfig:
    """The config of a checkpoint folder. Raises InputError."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is no folder; expected a checkpoint folder with config.json and safetensors")
    content = read_json(path / "config.json")
    if not isinstance(content, dict):
        raise InputError(f"{path / 'config.json'} holds {type(content).__name__}, expected an object")
    try:
        return HybridConfig.from_hf(content)
    except InputError as error:
        raise InputError(f"{path / 'config.json'}: {error}") from None


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a folder and checks every tensor's name, shape and dtype. Raises InputError, naming file and tensor."""
    path = Path(path)
    config = load_config(path)
    table = tensor_table(config)
    stored: dict[str, Stored] = {}
    for file in weight_files(path):
        with open_file(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                found = check_tensor(file, name, opened.get_slice(name), config, table)
                if found is None:
                    continue
                if found in stored:
                    raise InputError(f"{file}: tensor {name} is also in {stored[found].file.name}; expected it once")
                stored[found] = Stored(file, name, DTYPES[opened.get_slice(name).get_dtype()])
    missing = [name for name in table if name not in stored]
    if missing:
        names = ", ".join(to_checkpoint_name(config, name) for name in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"{path}: tensor {names}{more} missing; config.json asks for {len(table)} tensors")
    return Checkpoint(path, config, {name: stored[name] for name in table})


def weight_files(path: Path) -> list[Path]:
    """The folder's safetensors files: the single one, or the shards that the index names."""
    if (path / SINGLE).exists():
        return [path / SINGLE]
    if not (path / INDEX).exists():
        raise InputError(f"{path}: no weights; expected {SINGLE} or {INDEX}")
    index = read_json(path / INDEX)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise InputError(f"{path / INDEX} has no weight_map")
    files = [path / name for name in sorted(set(index["weight_map"].values()))]
    for file in files:
        if file.parent != path or not file.exists():
            raise InputError(f"{file} is missing; {INDEX} names it")
    return files


def check_tensor(file: Path, name: str, part: Any, config: HybridConfig, table: Mapping[str, TensorAxes]) -> str | None:
    """The table's name of a stored tensor, once its shape and dtype are right; None for a tied head stored again,
    and for what is ignored."""
    found = from_checkpoint_name(config, name)
    if (found == "lm_head.weight" and config.tie_word_embeddings) or is_ignored(config, name):
        return None
    if found is None or found not in table:
        expected = to_checkpoint_name(config, "embeddings.weight")
        raise InputError(f"{file}: unexpected tensor {name}; config.json describes none of that name (as {expected})")
    shape, dtype = tuple(part.get_shape()), part.get_dtype()
    if shape != table[found].shape:
        raise InputError(f"{file}: tensor {name} has shape {list(shape)}, expected {list(table[found].shape)}")
    if dtype not in DTYPES:
        raise InputError(f"{file}: tensor {name} has dtype {dtype}, expected one of {', '.join(DTYPES)}")
    return found


def load_model(path: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> HybridLM:
    """A model from a folder, every weight in `dtype` on `device`, in evaluation mode. Raises InputError."""
    checkpoint = open_checkpoint(path)
    model = HybridLM(checkpoint.config, device="meta")
    for name in checkpoint.names():
        place, _, field = name.rpartition(".")
        weight = checkpoint.tensor(name).to(device=device, dtype=dtype)
        setattr(model.get_submodule(place), field, torch.nn.Parameter(weight))
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
    """Writes a model as a folder; see `write_checkpoint`."""
    with atomic_folder(Path(path)) as folder:
        write_checkpoint(
            folder,
            model.config,
            model_tensors(model),
            dtype=dtype,
            tokenizer_from=tokenizer_from,
            provenance=provenance,
            max_shard_bytes=max_shard_bytes,
        )


def write_checkpoint(
    folder: Path,
    config: HybridConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    tokenizer_from: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Fills an existing, empty folder (see `folder.atomic_folder`) with config, weights and tokenizer.

    `tensors` yields (name, tensor) in the order of the table, each once; a shard is written as soon as it is full,
    so that memory holds one shard. `dtype` None keeps each tensor's. `tokenizer_from` is a folder whose tokenizer
    files are copied; `provenance` becomes limbeck.json.
    """
    content = config.to_hf()  # what cannot be written is refused before the first weight is
    table = tensor_table(config)
    expected = iter(table)
    shards: list[dict[str, int]] = []
    pending: dict[str, Tensor] = {}
    saved_dtypes: dict[torch.dtype, int] = {}

    def flush() -> None:
        shards.append({name: tensor.numel() * tensor.element_size() for name, tensor in pending.items()})
        path = folder / f"shard-{len(shards)}.safetensors"
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors leaves it to its owner alone
        pending.clear()

    for name, tensor in tensors:
        assert name == next(expected), name
        assert tuple(tensor.shape) == table[name].shape, (name, tensor.shape, table[name].shape)
        tensor = tensor.detach().to(dtype or tensor.dtype).contiguous()
        size = tensor.numel() * tensor.element_size()
        if pending and size + sum(t.numel() * t.element_size() for t in pending.values()) > max_shard_bytes:
            flush()
        pending[to_checkpoint_name(config, name)] = tensor
        saved_dtypes[tensor.dtype] = saved_dtypes.get(tensor.dtype, 0) + tensor.numel()
    assert next(expected, None) is None, "a tensor of the table was not given"
    flush()
    name_shards(folder, shards)
    main_dtype = max(saved_dtypes, key=lambda key: saved_dtypes[key])
    write_json(folder / "config.json", content | {"torch_dtype": str(main_dtype).removeprefix("torch.")})
    for name in COMPANIONS if tokenizer_from is not None else ():
        if (Path(tokenizer_from) / name).is_file():  # type: ignore[arg-type]
            shutil.copyfile(Path(tokenizer_from) / name, folder / name)  # type: ignore[arg-type]
    if provenance is not None:
        write_json(folder / "limbeck.json", dict(provenance))


def name_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    """Gives the shards their final names, now that their number is known, and writes the index."""
    if len(shards) == 1:
        (folder / "shard-1.safetensors").rename(folder / SINGLE)
        return
    weight_map = {}
    for number, sizes in enumerate(shards, 1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}.safetensors").rename(folder / final)
        weight_map.update(dict.fromkeys(sizes, final))
    total = sum(sum(sizes.values()) for sizes in shards)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def model_tensors(model: HybridLM) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of a model in the table's order, on the CPU."""
    weights = model.state_dict()
    for name in tensor_table(model.config):
        yield name, weights[name].cpu()


def stream_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of a checkpoint in the table's order, read one at a time."""
    for name in checkpoint.names():
        yield name, checkpoint.tensor(name)
