"""`limbeck prune`: a smaller checkpoint from a model, its scores and a target size, streamed tensor by tensor, and
with calibration data repaired on the way."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models.axes import tensor_table
from ..models.checkpoint import (
    SHARD_BYTES,
    finished_shards,
    load_config,
    open_checkpoint,
    plan_shards,
    write_checkpoint,
)
from ..models.config import HybridConfig
from ..models.cost.parameters import count_parameters
from ..models.errors import InputError
from ..models.fingerprint import plain
from ..models.folder import write_json
from ..prune.choose import select
from ..prune.repair import Repair, repair_tensors
from ..prune.scores import load_scores
from ..prune.slice import Selection, slice_config, slice_rows, source_name
from ..prune.target import Target
from .run.resolve import check_counts, data_input, model_folder, sample, torch_device, torch_dtype
from .run.show import Bar, progress, result, table
from .run.stage import run_stage

WIDTHS = (
    ("layers", "num_layers"),
    ("hidden", "hidden_size"),
    ("FFN", "intermediate_size"),
    ("attention heads", "num_attention_heads"),
    ("Mamba heads", "mamba_num_heads"),
    ("Mamba head_dim", "mamba_head_dim"),
)


@dataclasses.dataclass(frozen=True)
class Mending:
    """`compensate.Repair`, and on how many tokens; what is None is done where there is data."""

    rotate: bool | None = None
    norms: str = "count"
    least_squares: bool | None = None
    ridge: float = 0.01
    tokens: int = 32768

    def __post_init__(self) -> None:
        self.repair(None)
        check_counts(self, "tokens", group="repair.")

    def repair(self, data: str | None) -> Repair:
        rotate, fit = (data is not None if wish is None else wish for wish in (self.rotate, self.least_squares))
        return Repair(rotate, self.norms, fit, self.ridge)


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    scores: Path
    output: Path
    target: Target
    repair: Mending
    data: str | None
    seq_len: int
    batch: int
    seed: int
    device: str
    dtype: str
    max_shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        if self.data is None and self.mend.needs_data:
            raise InputError("prune: repair.rotate, repair.least_squares and repair.norms=measured need data=")
        if self.max_shard_bytes < 1:
            raise InputError(f"prune: max_shard_bytes is {self.max_shard_bytes}; expected at least 1")
        check_counts(self, "seq_len", "batch")

    @property
    def mend(self) -> Repair:
        return self.repair.repair(self.data)


def run(options: Options) -> None:
    source = make(options)
    show(load_config(source), load_config(options.output))
    result(options.output, {"model": str(options.output), "parameters": count_parameters(load_config(options.output))})


def make(options: Options) -> Path:
    """The stage without its table and result.json; returns the source's folder."""
    source = model_folder(options.model)
    inputs: dict[str, Path | str] = {"model": source, "scores": options.scores}
    chosen: dict[str, Any] = {"target": options.target, "repair": plain(options.mend)}
    chosen |= {"max_shard_bytes": options.max_shard_bytes}
    if options.mend.needs_data:
        assert options.data is not None
        inputs["data"] = data_input(options.data)
        chosen |= {
            "tokens": options.repair.tokens,
            "seed": options.seed,
            "seq_len": options.seq_len,
            "batch": options.batch,
            "dtype": options.dtype,
        }
    run_stage(
        options.output,
        name="prune",
        inputs=inputs,
        options=chosen,
        make=lambda folder, facts: fill(folder, source, options),
        resumes=True,
    )
    return source


def fill(folder: Path, source: Path, options: Options) -> None:
    """Writes the pruned checkpoint into an existing folder, with selection.json, which says what was kept.

    Finished shards of an interrupted run are found there and not made again.
    """
    checkpoint = open_checkpoint(source)
    scores = load_scores(options.scores)
    selection = select(checkpoint.config, scores.widths, scores.layers.order, options.target)
    config = slice_config(checkpoint.config, selection)
    stored = {name: place.dtype for name, place in checkpoint.stored.items()}
    dtypes = {name: stored[source_name(name, selection)] for name in tensor_table(config)}
    shards = plan_shards(config, dtypes, options.max_shard_bytes)
    finished = finished_shards(folder, config, shards)
    with contextlib.ExitStack() as stack:
        if options.mend.needs_data:
            assert options.data is not None
            batches = sample(
                options.data, "train", source,
                tokens=options.repair.tokens, seq_len=options.seq_len, batch=options.batch, seed=options.seed,
            )  # fmt: skip
            bar = stack.enter_context(progress("pruning and repairing"))
            tensors = repair_tensors(
                checkpoint.tensor,
                checkpoint.config,
                selection,
                batches,
                options.mend,
                device=torch_device(options.device),
                dtype=torch_dtype(options.dtype),
                on_step=lambda done, total: bar.set(done, total),
                finished=dict.fromkeys(finished.stored, finished.tensor),
            )
        else:
            total = sum(shard.bytes for shard in shards if shard.forms.keys() - finished.stored.keys())
            bar = stack.enter_context(progress("pruning", total, in_bytes=True))
            rescale = options.mend.norms == "count"
            tensors = counted(
                bar,
                slice_rows(
                    checkpoint.rows,
                    checkpoint.config,
                    selection,
                    dtypes=stored,
                    rescale_norms=rescale,
                    skip=finished.stored,
                ),
            )
        write_checkpoint(
            folder,
            config,
            tensors,
            dtypes=dtypes,
            tokenizer_from=source,
            max_shard_bytes=options.max_shard_bytes,
        )
    write_json(folder / "selection.json", readable(selection, options.mend))


def counted(bar: Bar, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same pieces; the bar counts their bytes once they are written."""
    done = 0
    for name, rows in tensors:
        yield name, rows
        done += rows.numel() * rows.element_size()
        bar.set(done)


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
