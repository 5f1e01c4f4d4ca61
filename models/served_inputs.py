"""What a server's products read: where a folder's weights are quantised and its config.json has activations rounded
token by token (compressed-tensors' `input_activations`, strategy "token", dynamic), the model rounds them alike.

Reading a folder leaves activations as they are, since weights may be pruned or trained; who measures or runs what a
server computes says so (`served`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .checkpoint import load_model, open_checkpoint
from .hybrid import HybridLM
from .stored import objects, quantization_of

if TYPE_CHECKING:
    from .rounding import Rounding

log = logging.getLogger("limbeck")


def load_served(path: Path, dtype: torch.dtype, device: torch.device | str) -> HybridLM:
    """`load_model`, as a server computes. Raises InputError."""
    return served(load_model(path, dtype, device), path)


def served(model: HybridLM, path: Path) -> HybridLM:
    """The model of a folder, whose quantised matrices now read what a server's do; one whose inputs are rounded in a
    way that is not known reads them as they are, which is said."""
    settings = quantization_of(path)
    checkpoint = open_checkpoint(path) if settings else None
    if checkpoint is None or not checkpoint.formats() or not rounds_inputs(settings):
        return model
    rounding = token_rounding(settings)
    if rounding is None:
        log.warning(
            "%s: a server rounds what its quantised weights multiply in a way that is not computed here; it stays as it"
            " is",
            path,
        )
        return model
    from .quantise import rounded_input

    parts = (name for name, stored in checkpoint.stored.items()
             if any(place.quantised for place in stored.places.values()))  # fmt: skip
    owners = {model.get_submodule(name.rpartition(".")[0]) for name in parts if has_part(model, name)}

    def round_input(module: nn.Module, x: Tensor) -> Tensor:
        return rounded_input(x, rounding) if module in owners else x

    model.round_input = round_input
    return model


def has_part(model: HybridLM, name: str) -> bool:
    """Whether a model was read with a tensor: multi-token prediction may be left out."""
    return hasattr(model, name.partition(".")[0])


def activations_of(settings: Mapping[str, Any]) -> list[Any]:
    groups = settings.get("config_groups")
    return [group.get("input_activations") for group in objects(groups.values())] if isinstance(groups, dict) else []


def rounds_inputs(settings: Mapping[str, Any]) -> bool:
    """Whether a quantization_config has a server round activations: where it does not list groups, all known ones do
    (ModelOpt's FP8, DeepSeek's and transformers' "fp8") unless their weights are packed."""
    if "config_groups" in settings:
        return any(activations_of(settings))
    return "fp8" in str(settings.get("quant_algo") or settings.get("quant_method")).lower()


def token_rounding(settings: Mapping[str, Any]) -> Rounding | None:
    """How each token is rounded by a scale of its own; None where inputs are rounded otherwise."""
    given = activations_of(settings)
    if len(given) != 1 or not isinstance(given[0], dict):
        return None
    how = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
    if any(given[0].get(name, value) != value for name, value in how.items()):
        return None
    from .rounding import ROUNDINGS

    kinds = {rounding.kind: rounding for rounding in ROUNDINGS.values() if rounding.activations}
    return kinds.get(str(given[0].get("type")))
