"""How often each expert of a model is chosen at the tokens that a measurement counts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...models.hybrid import HybridLM
from ...models.moe import Router

Uses = dict[int, Tensor]  # by layer, of each expert [E] how many tokens chose it, float64 on the CPU


@contextlib.contextmanager
def counting_uses(model: HybridLM, uses: Uses, counted: Tensor) -> Iterator[None]:
    """Passes of the model over whole rows [B, T] meanwhile add to `uses`, of the tokens where `counted` [B, T]."""
    handles = []
    for layer, block in enumerate(model.layers):
        router = getattr(block.mixer, "gate", None)
        if isinstance(router, Router):
            hook = functools.partial(add_choices, uses, layer, counted.flatten())
            handles.append(router.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_choices(
    uses: Uses, layer: int, counted: Tensor, router: Router, inputs: Any, outputs: tuple[Tensor, Tensor]
) -> None:
    """Adds the choices [n, k] of a pass, of the tokens that count."""
    chosen = outputs[0][counted.to(outputs[0].device)].flatten()
    add_uses(uses, layer, torch.bincount(chosen, minlength=len(router.weight)).cpu().double())


def add_uses(uses: Uses, layer: int, found: Tensor) -> None:
    uses[layer] = uses[layer] + found if layer in uses else found
