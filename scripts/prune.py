"""`limbeck prune`: a smaller checkpoint from a model, its scores and a target size, streamed tensor by tensor, and
with calibration data repaired on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..distill.data import Batch
from ..models.checkpoint import load_config, open_checkpoint, write_checkpoint
from ..models.config import HybridConfig
from ..models.cost import count_parameters, num_tensors
from ..models.errors import InputError
from ..models.folder import write_json
from ..prune.choose import Target, select
from ..prune.compensate import Repair, repair_tensors
from ..prune.scores import load_scores
from ..prune.slice import Selection, slice_config
from .inputs import data_input, model_folder, sample, torch_device, torch_dtype
from .show import Bar, progress, result, table
from .stage import run_stage

WIDTHS = (
    ("layers", "num_layers"),
    ("hidden", "hidden_size"),
    ("FFN", "intermediate_size"),
    ("attention heads", "num_attention_heads"),
    ("Mamba heads", "mamba_num_heads"),
    ("Mamba head_dim", "mamba_head_dim"),
)


@dataclasses.dataclass(frozen=True)
class CalibratedRepair(Repair):
    """What to mend, and on how many tokens."""

    tokens: int = 32768

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1:
            raise InputError(f"repair.tokens is {self.tokens}; expected at least 1")


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    scores: Path
    output: Path
    target: Target
    repair: CalibratedRepair
    data: str | None
    seq_len: int
    batch: int
    seed: int
    device: str
    dtype: str

    def __post_init__(self) -> None:
        if self.repair.needs_data and self.data is None:
            raise InputError("prune: repair.rotate, repair.least_squares and repair.norms=measured need data=")


def run(options: Options) -> None:
    source = make(options)
    show(load_config(source), load_config(options.output))
    result(options.output, {"model": str(options.output), "parameters": count_parameters(load_config(options.output))})


def make(options: Options) -> Path:
    """The stage without its table and result.json; returns the source's folder."""
    source = model_folder(options.model)
    inputs: dict[str, Path | str] = {"model": source, "scores": options.scores}
    chosen: dict[str, Any] = {"target": options.target, "repair": options.repair}
    if options.repair.needs_data:
        assert options.data is not None
        inputs["data"] = data_input(options.data)
        chosen |= {"seed": options.seed, "seq_len": options.seq_len, "batch": options.batch, "dtype": options.dtype}
    run_stage(
        options.output,
        name="prune",
        inputs=inputs,
        options=chosen,
        make=lambda folder, facts: fill(folder, source, options),
    )
    return source


def fill(folder: Path, source: Path, options: Options) -> None:
    """Writes the pruned checkpoint into an existing folder, with selection.json, which says what was kept."""
    checkpoint = open_checkpoint(source)
    scores = load_scores(options.scores)
    selection = select(checkpoint.config, scores.widths, scores.layers.order, options.target)
    config = slice_config(checkpoint.config, selection)
    batches: list[Batch] = []
    if options.repair.needs_data:
        assert options.data is not None
        batches = sample(
            options.data, "train", source,
            tokens=options.repair.tokens, seq_len=options.seq_len, batch=options.batch, seed=options.seed,
        )  # fmt: skip
    with progress("pruning" if not batches else "pruning and repairing") as bar:
        tensors = repair_tensors(
            checkpoint.tensor,
            checkpoint.config,
            selection,
            batches,
            options.repair,
            device=torch_device(options.device),
            dtype=torch_dtype(options.dtype),
            on_step=lambda done, total: bar.set(done, total),
        )
        if not batches:
            tensors = counted(tensors, bar, num_tensors(config))
        write_checkpoint(folder, config, tensors, tokenizer_from=source)
    write_json(folder / "selection.json", readable(selection, options.repair))


def counted(tensors: Iterator[tuple[str, Tensor]], bar: Bar, total: int) -> Iterator[tuple[str, Tensor]]:
    for done, item in enumerate(tensors, 1):
        bar.set(done, total)
        yield item


def readable(selection: Selection, repair: Repair) -> dict[str, Any]:
    """What stays; after a rotation no channels of the source do, but a number of its principal directions."""
    kept = {str(axis): list(units) for axis, units in selection.kept.items()}
    found = {"layers": list(selection.layers), "kept": kept}
    return found | {"principal_directions": len(kept.pop("hidden"))} if repair.rotate and "hidden" in kept else found


def show(before: HybridConfig, after: HybridConfig) -> None:
    rows = [(name, getattr(before, field), getattr(after, field)) for name, field in WIDTHS if getattr(before, field)]
    counts = count_parameters(before), count_parameters(after)
    rows += [("parameters", f"{counts[0]:,}", f"{counts[1]:,} ({counts[1] / counts[0]:.1%})")]
    table(f"Pruned to {after.pattern}", ("", "before", "after"), rows)
