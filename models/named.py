"""What stands under a name: the models that ship, and in conf/ configs without weights, data and hardware."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter import base_folder, merged_folder
from .checkpoint import load_config, load_model, open_checkpoint
from .config import HybridConfig
from .cost.hardware import Hardware
from .errors import InputError, guess
from .fingerprint import check_files, checked_files
from .foreign import own_path
from .hub import HUB, hub_folder, is_hub_name, origins
from .hybrid import HybridLM
from .shards import ADAPTER_SETTINGS, INDEX, SINGLE
from .stored import quantization_of

if TYPE_CHECKING:
    import torch

    from .checkpoint import Checkpoint
    from .cost.stored_weights import StoredWeights

CONF = Path(__file__).parents[1] / "conf"
SHIPPED = {name: Path(__file__).parent / name for name in ("zoo", "zoo-moe")}


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def is_adapter(folder: Path) -> bool:
    """Whether a folder has an adapter, and no weights of a model."""
    return (folder / ADAPTER_SETTINGS).exists() and not any((folder / name).exists() for name in (SINGLE, INDEX))


def is_here(name: str) -> bool:
    """Whether a name is that of a model's folder here, which goes before a model that ships or a named config."""
    return any((own_path(name) / file).is_file() for file in ("config.json", ADAPTER_SETTINGS))


def model_folder(name: str) -> Path:
    """The folder of a model with weights: one that ships, a path, or hf:OWNER/NAME[@REVISION] of the hub; of a PEFT
    adapter that of the model with it merged. Raises InputError where there is none."""
    path = hub_folder(name) if name.startswith(HUB) else own_path(name)
    if name in SHIPPED and not is_here(name):
        path = SHIPPED[name]
    if path.is_dir():
        return merged_folder(path) if is_adapter(path) else path
    if name in names("model"):
        raise InputError(
            f"model {name!r} is a named config without weights; give a checkpoint folder, or one of"
            f" {', '.join(SHIPPED)}"
        )
    known = [*SHIPPED, *names("model")]
    near = f"; of the hub it is {HUB}{name}" if is_hub_name(name) else guess(name, known)
    raise InputError(f"model {name!r} is neither a folder nor a name; known: {', '.join(known)}{near}")


def model_config(name: str) -> HybridConfig:
    """The config of a named model, of a checkpoint folder, or of a model of the hub, whose weights stay there."""
    if name in names("model") and not is_here(name):
        return HybridConfig.from_hf(read_yaml(CONF / "model" / f"{name}.yaml"))
    folder = config_folder(name)
    check_files(folder, ("config.json",))
    return load_config(folder)


def config_folder(name: str) -> Path:
    """The folder with a model's config.json; of one of the hub without its weights."""
    if not name.startswith(HUB):
        return model_folder(name)
    folder = hub_folder(name, weights=False)
    return base_folder(folder, weights=False) if is_adapter(folder) else folder


def quantisation(name: str) -> dict[str, Any]:
    """What the config.json of `model_config` says of quantised weights; nothing of plain ones."""
    if name in names("model") and not is_here(name):
        return {}
    return quantization_of(config_folder(name))


def model_weights(name: str, dtype: torch.dtype, ranks: int = 1) -> StoredWeights | None:
    """What the weights of `model_config` weigh, plain ones in `dtype`, where some are quantised, or those that one of
    so many GPUs holds, of a model of the hub by the headers of its files; None where none is, and where the files
    cannot be reached."""
    from .cost.stored_weights import of_checkpoint

    if not quantisation(name):
        return None
    checkpoint = counted_checkpoint(name)
    return None if checkpoint is None else of_checkpoint(checkpoint, dtype, ranks)


def counted_checkpoint(name: str) -> Checkpoint | None:
    """The tensors of `model_config` as the files have them, none of a hub's fetched; None where there are none."""
    from .hub_weights import hub_checkpoint

    if not name.startswith(HUB):
        folder = model_folder(name)
        return open_checkpoint(folder) if any(folder.glob("*.safetensors")) else None
    folder = hub_folder(name, weights=False)
    return None if is_adapter(folder) else hub_checkpoint(name, folder)


def quantised_as(folder: Path) -> tuple[dict[str, int], str]:
    """What a folder's tensors are quantised as, and how many; and that in words. Neither of plain weights, nor of what
    is no model or a broken one: who reads it says so."""
    try:
        checkpoint = open_checkpoint(folder)
    except InputError:
        return {}, ""
    if not (formats := checkpoint.formats()):
        return {}, ""
    kinds = ", ".join(f"{count} tensors of {kind}" for kind, count in formats.items())
    return formats, f"{kinds}; they are read as {str(checkpoint.dtype()).removeprefix('torch.')}"


def input_notes(inputs: Mapping[str, Path | str]) -> dict[str, Any]:
    """What limbeck.json says of a stage's inputs: their `sources` (see `origins`), and what those are quantised as that
    are: the model as `source_format`, another one as its own (`teacher_format`)."""
    sources = origins(inputs)
    notes: dict[str, Any] = {"sources": sources} if sources else {}
    for key, value in inputs.items():
        if isinstance(value, Path) and (formats := quantised_as(value)[0]):
            notes["source_format" if key == "model" else f"{key}_format"] = formats
    return notes


def load_checked(folder: Path, dtype: torch.dtype, device: torch.device) -> HybridLM:
    """The model of a folder. Raises InputError where the folder is not as a stage has left it: its sums are taken while
    the weights are read."""
    with checked_files(folder):
        return load_model(folder, dtype, device)


def data_path(data: str) -> str:
    """data= with a name in conf/data/ as its mixture's file."""
    named = data in names("data") and not Path(data).exists()
    return str(CONF / "data" / f"{data}.yaml") if named else data


def read_hardware(name: str) -> Hardware:
    """A profile of conf/hardware/. Raises InputError for one that leaves the memory open."""
    if name not in names("hardware"):
        known = names("hardware")
        raise InputError(f"hardware {name!r} is unknown; known: {', '.join(known)}{guess(str(name), known)}")
    content = read_yaml(CONF / "hardware" / f"{name}.yaml")
    if not isinstance(content["usable_gib"], (int, float)):
        raise InputError(f"hardware {name!r} leaves usable_gib open; give a Hardware with the memory that there is")
    return Hardware(**content)


def read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content
