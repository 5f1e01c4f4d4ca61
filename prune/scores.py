"""What scoring found out about a model, and its file: a folder with scores.safetensors and scores.json.

Width scores hold one float64 tensor an axis, on the CPU, larger = more important:
hidden [num_layers + 1, hidden] (a row for each layer's norm and one for the final norm), ffn(i) [ffn],
attn_heads(i) [heads], ssm_state(i) [groups * state], and mamba_heads(i) [heads, head_dim], which ranks heads and head
channels both: a head's score counts only the channels that are kept, so that it is known no earlier than choose.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..models.axes import HIDDEN, Axis, axis_sizes, columns_of, holds_units
from ..models.checkpoint import load_config
from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.folder import atomic_folder, write_json
from ..models.foreign import LARGEST, MOST_LAYERS, check_regular, own_path
from ..models.schema import Read, Real, read_as
from ..models.tensors import save_tensors

WidthScores = dict[Axis, Tensor]


@dataclasses.dataclass(frozen=True)
class LayerScores:
    """The order in which layers may go, and why.

    order: source layers, the first to be removed first. values: per step, what its removal costs in the `metric`
    (see depth.py; the smaller, the better). candidates: per step, the same for each candidate that was measured to the
    end, by its first layer: in the first step all. layer_evaluations: layers run, each over the whole calibration set.
    """

    order: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    candidates: tuple[dict[int, float], ...] = ()
    layer_evaluations: float = 0
    metric: str = "mse"


@dataclasses.dataclass(frozen=True)
class Scores:
    """The contents of a scores folder; `metadata` (JSON-able) says how they came about."""

    widths: WidthScores
    layers: LayerScores
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class StoredLayers(Read):
    """LayerScores in scores.json."""

    order: list[Annotated[int, Field(ge=0, lt=MOST_LAYERS)]]
    values: list[Real]
    candidates: list[dict[Annotated[str, Field(pattern=r"^[0-9]{1,4}$")], Real]]
    layer_evaluations: Real
    metric: str


class StoredScores(Read):
    """scores.json."""

    layers: StoredLayers
    pattern: str = ""


def width_score_shapes(config: HybridConfig) -> dict[Axis, tuple[int, ...]]:
    """The axes that are scored and the shapes of their scores."""
    sizes = axis_sizes(config)
    shapes: dict[Axis, tuple[int, ...]] = {}
    for axis, size in sizes.items():
        if axis == HIDDEN:
            shapes[axis] = (config.num_layers + 1, size)
        elif axis.row.within is None and not holds_units(axis.row):
            shapes[axis] = (size, *(sizes[columns] for columns in columns_of(axis)))
    return shapes


def check_width_scores(config: HybridConfig, widths: WidthScores, where: str) -> None:
    """Raises InputError unless `widths` are finite and are scores of a model of this config. Scores that were made
    before a kind of axis could be cut have none of it."""
    scored = {axis.kind for axis in widths}
    shapes = {
        axis: shape for axis, shape in width_score_shapes(config).items() if axis.kind in scored or axis == HIDDEN
    }
    for axis in shapes.keys() | widths.keys():
        found = tuple(widths[axis].shape) if axis in widths else None
        if found != shapes.get(axis):
            raise InputError(
                f"{where}: {axis} has scores of shape {found}, the model needs {shapes.get(axis)};"
                " expected the scores of this very model"
            )
        if not torch.isfinite(widths[axis]).all():
            raise InputError(f"{where}: scores of {axis} are not finite; expected a model whose activations are")


def write_scores(folder: Path, scores: Scores) -> None:
    """Writes the two files into an existing folder; the same scores give the same bytes."""
    save_tensors(folder / "scores.safetensors", {tensor_name(axis): values for axis, values in scores.widths.items()})
    layers = dataclasses.asdict(scores.layers)
    layers["candidates"] = [{str(layer): value for layer, value in step.items()} for step in scores.layers.candidates]
    write_json(folder / "scores.json", {**scores.metadata, "layers": layers})


def save_scores(path: str | Path, scores: Scores) -> None:
    """Writes a new scores folder, whole or not at all. Raises InputError when `path` exists."""
    with atomic_folder(Path(path)) as folder:
        write_scores(folder, scores)


def load_scores(path: str | Path) -> Scores:
    """Reads a scores folder. Raises InputError when it is not one."""
    tensor_file, json_file = Path(path) / "scores.safetensors", Path(path) / "scores.json"
    for file in (tensor_file, json_file):
        if not file.exists():
            raise InputError(f"scores: {file} does not exist; expected a folder that `limbeck score` wrote")
    check_regular(tensor_file)
    try:
        with safe_open(tensor_file, framework="pt") as tensors:
            widths = {axis_of(name): tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"scores: {tensor_file} cannot be read ({error}); expected `limbeck score`'s file") from None
    for axis, values in widths.items():
        if values.dtype != torch.float64:
            raise InputError(f"scores: {tensor_file}: {tensor_name(axis)} has dtype {values.dtype}, expected float64")
    metadata = read_as(StoredScores, json_file, LARGEST)
    stored = metadata.pop("layers")
    layers = LayerScores(
        order=tuple(stored["order"]),
        values=tuple(map(float, stored["values"])),
        candidates=tuple({int(layer): float(value) for layer, value in step.items()} for step in stored["candidates"]),
        layer_evaluations=float(stored["layer_evaluations"]),
        metric=stored["metric"],
    )
    return Scores(widths, layers, metadata)


def tensor_name(axis: Axis) -> str:
    return axis.kind if axis.layer is None else f"{axis.kind}.{axis.layer}"


def axis_of(name: str) -> Axis:
    kind, _, layer = name.partition(".")
    return Axis(kind, int(layer) if layer else None)


def scores_folder(name: str, teacher: Path) -> Path:
    """A folder of `limbeck score`. Raises InputError where it is none, or of another model than the teacher."""
    folder = own_path(name)
    if not (folder / "scores.json").is_file():
        raise InputError(f"scores={name} is no folder of limbeck score; expected scores.json in it")
    scores, config = load_scores(folder), load_config(teacher)
    if scores.metadata.get("pattern") != config.pattern:
        raise InputError(f"scores={name} are of another model than the teacher, {teacher}; expected its own")
    check_width_scores(config, scores.widths, f"scores={name}")
    return folder
