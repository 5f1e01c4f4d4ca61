"""Bytes of tensors alive while a piece of code runs: now, and at the highest.

A dispatch mode sees what every operator gives, inside `autograd.Function` and the backward pass, too, and a weak
reference tells when a storage is gone. Of real tensors and fake ones alike; what an operator allocates and frees within
itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes(standing) as live:` counts the storages of `standing` and all that appear in the block, each
    once, as `live.now` and `live.peak`. `live.restart()` makes the peak what is there now."""

    def __init__(self, standing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        for tensor in standing:
            self.count(tensor)

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or not size:
            return
        self.seen[key] = weakref.ref(storage, lambda _: self.forget(key)), size
        self.now += size
        self.peak = max(self.peak, self.now)

    def forget(self, key: int) -> None:
        self.now -= self.seen.pop(key)[1]

    def restart(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return found
