"""The weights of a hub's model by the headers of its files, for who counts their bytes: the files stay there."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from .checkpoint import Checkpoint, checkpoint_of, load_config, open_checkpoint
from .config import HybridConfig
from .families.family import published_name, stored_tensors
from .foreign import first_line
from .hub import HubModel, has_weights
from .stored import SHAPE, Header

log = logging.getLogger("limbeck")


def hub_checkpoint(text: str, folder: Path) -> Checkpoint | None:
    """A model hf:OWNER/NAME whose config.json lies in `folder`, the cache's; None where neither the folder has its
    files nor the hub gives their headers, which is said. Raises InputError where they are not what config.json asks
    for."""
    if has_weights(folder):
        return open_checkpoint(folder)
    headers = hub_headers(text, folder)
    if headers is None:
        return None
    config = load_config(folder)
    if not any(header.name.startswith("mtp.") for header in headers):
        config = config.replace(mtp_steps=0)
    return checkpoint_of(folder, config, [with_shape(config, header) for header in headers])


def hub_headers(text: str, folder: Path) -> list[Header] | None:
    """What the files say of their tensors, some KB of each; None where they cannot be reached."""
    import huggingface_hub

    model = HubModel.parse(text)
    try:
        found = huggingface_hub.HfApi().get_safetensors_metadata(model.name, revision=model.revision or folder.name)
    except Exception as error:  # no network, offline mode, a gated model, no safetensors
        log.warning("%s: the headers of its weights cannot be read (%s)", text, first_line(error))
        return None
    return [
        Header(folder / file, name, tensor.dtype, tuple(tensor.shape))
        for file, content in found.files_metadata.items()
        for name, tensor in content.tensors.items()
    ]


def with_shape(config: HybridConfig, header: Header) -> Header:
    """A `weight_shape` beside packed numbers with its two numbers, which no header has and config.json says."""
    weight = header.name.removesuffix(SHAPE)
    stored = stored_tensors(config).get(published_name(config, weight)) if weight != header.name else None
    return header if stored is None else dataclasses.replace(header, numbers=stored.shape)
