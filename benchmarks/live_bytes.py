"""Bytes of tensors alive while a piece of code runs: now, and at the highest.

A dispatch mode sees what every operator gives, inside `autograd.Function` and the backward pass, too, and weak
references tell which storages are still there. Of real tensors and fake ones alike, and of storages that change their
size, as FSDP2's do; what an operator allocates and frees within itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes(standing) as live:` counts the storages of `standing` and all that appear in the block, each
    once, as `live.now` and `live.peak`. `live.restart()` makes the peak what is there now."""

    def __init__(self, standing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.seen: dict[int, weakref.ref[Any]] = {}
        for tensor in standing:
            self.count(tensor)
        self.restart()

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.seen:
            self.seen[key] = weakref.ref(storage, lambda _: self.seen.pop(key, None))

    @property
    def now(self) -> int:
        alive = (reference() for reference in list(self.seen.values()))
        return sum(storage.nbytes() for storage in alive if storage is not None)

    def restart(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        self.peak = max(self.peak, self.now)
        return found
