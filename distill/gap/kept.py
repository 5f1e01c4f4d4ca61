"""What an evaluation has measured so far, in a folder: stopped and run again, it measures the rest.

A part is a file named after its number or its name, and after the checksum of what is in it: one that is damaged or
cut off is made anew. What was made by other models or options is not told apart here: the folder belongs to one stage.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...kernels.linear_figures import LinearFigures
from ...models.fingerprint import digest
from ...models.folder import file_sum, write_json
from ...models.tensors import save_tensors
from .expert_uses import Uses, add_uses

Value = TypeVar("Value")
SUM = 16  # characters of a checksum in a file's name


class Kept:
    """The parts in `folder`, which need not be there yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def figures(
        self, number: int, names: Sequence[str], measure: Callable[[Mapping[str, Uses]], list[LinearFigures]],
        uses: Mapping[str, Uses],
    ) -> list[LinearFigures]:  # fmt: skip
        """The figures [T] of every model in `names` on batch `number`, as `measure` gave them before or gives them now.
        The choices of experts, which it adds to what it is called with, are added to `uses`."""
        tensors = self.tensors(number)
        if tensors is None:
            own: dict[str, Uses] = {name: {} for name in names}
            results = measure(own)
            tensors = {}
            for place, (values, name) in enumerate(zip(results, names, strict=True)):
                tensors |= {f"{place}.{column}": values_of for column, values_of in values._asdict().items()}
                tensors |= {f"{place}.uses.{layer}": counts for layer, counts in own[name].items()}
            self.keep(number, tensors)
        results = []
        for place, name in enumerate(names):
            results.append(LinearFigures(*(tensors[f"{place}.{column}"] for column in LinearFigures._fields)))
            prefix = f"{place}.uses."
            for key in (key for key in tensors if key.startswith(prefix)):
                add_uses(uses[name], int(key.removeprefix(prefix)), tensors[key])
        return results

    def value(self, name: str, make: Callable[[], Value]) -> Value:
        """What JSON can hold, as `make` gave it before or gives it now."""
        path = self.folder / f"{name}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["sum"] == digest(content["value"]):
                return content["value"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            pass
        value: Any = json.loads(json.dumps(make()))  # the same types as when it is read
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"value": value, "sum": digest(value)})
        return value

    def tensors(self, number: int) -> dict[str, Tensor] | None:
        """The whole file of a batch; None where there is none."""
        for path in sorted(self.folder.glob(f"{number}-*.safetensors")):
            try:
                if path.stem == f"{number}-{sum_of(path)}":
                    return load_file(path)
            except (OSError, SafetensorError):
                continue
        return None

    def keep(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{number}.safetensors"
        save_tensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()})
        path.rename(self.folder / f"{number}-{sum_of(path)}.safetensors")


def sum_of(path: Path) -> str:
    return file_sum(path).rpartition(":")[2][:SUM]
