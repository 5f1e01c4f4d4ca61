"""limbeck: score, prune, distil and prove hybrid Mamba-2/Transformer language models, in plain PyTorch.

`limbeck.load`, `score`, `prune`, `distill`, `evaluate`, `memory_fit`, `generate` and `export` are the functions of
`limbeck.api`, imported when one is first used.
"""

from __future__ import annotations

import importlib
import types
from typing import Any

from . import distill, prune

__version__ = "0.1.0"
NAMES = ("distill", "evaluate", "export", "generate", "load", "memory_fit", "prune", "score")


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".api", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *NAMES})


class CallableFolder(types.ModuleType):
    """A folder of modules that is also the function of its name: an import of anything in prune/ or distill/ puts the
    folder where the function would be."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module(".api", __package__), name)(*arguments, **options)


for folder in (distill, prune):
    folder.__class__ = CallableFolder
