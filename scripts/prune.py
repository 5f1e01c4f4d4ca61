"""`limbeck prune`: a smaller checkpoint from a model, its scores and a target size, streamed tensor by tensor, and
with calibration data repaired on the way."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import PositiveInt
from torch import Tensor

from ..distill.text.packing import Batch
from ..models.axes import tensor_table
from ..models.cautions import cautions
from ..models.checkpoint import (
    SHARD_BYTES,
    finished_shards,
    load_config,
    open_checkpoint,
    plan_shards,
    write_checkpoint,
)
from ..models.config import HybridConfig
from ..models.cost.parameters import count_parameters, size_rows
from ..models.device import torch_device, torch_dtype
from ..models.errors import InputError
from ..models.fingerprint import plain
from ..models.folder import write_json
from ..prune.choose import select
from ..prune.nested import check_as_trained, nested_size
from ..prune.repair import RepairOptions, kept_units, repair_tensors
from ..prune.scores import load_scores
from ..prune.slice import slice_rows, source_name, written_config
from ..prune.target import Target
from .run.resolve import NamedData, check_scores, data_input, model_folder, sample
from .run.show import counted, progress, result, say, table
from .run.stage import stage


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    scores: Path | None
    output: Path
    target: Target
    repair: RepairOptions
    data: NamedData | None
    seq_len: PositiveInt
    batch: PositiveInt
    seed: int
    device: str
    dtype: str
    max_shard_bytes: PositiveInt = SHARD_BYTES
    nested: str | None = None

    def __post_init__(self) -> None:
        if (self.scores is None) == (self.nested is None):
            raise InputError("prune: give scores=FOLDER (limbeck score makes it), or nested=SIZE of a nested student")
        if self.nested is not None:
            check_as_trained(self.nested, self.target, self.repair, self.data is not None)
        if self.data is None and self.repair.repair(with_data=False).needs_data:
            raise InputError(
                "prune: repair.rotate, repair.least_squares, repair.norms=measured, repair.whole_experts and"
                " repair.local_steps need data="
            )

    @property
    def fingerprint(self) -> dict[str, Any]:
        repair = self.repair.repair(with_data=self.data is not None)
        chosen = {"target": self.target, "repair": plain(repair), "max_shard_bytes": self.max_shard_bytes}
        if repair.needs_data:
            chosen |= {name: getattr(self, name) for name in ("seed", "seq_len", "batch", "dtype")}
            chosen["tokens"] = self.repair.tokens
        return chosen if self.nested is None else chosen | {"nested": self.nested}


def run(options: Options) -> None:
    prune(options)
    print_sizes(load_config(model_folder(options.model)), load_config(options.output))
    result(options.output, {"model": str(options.output), "parameters": count_parameters(load_config(options.output))})


def prune(options: Options) -> None:
    """The stage: the checkpoint, and selection.json, which says what was kept. Finished shards of an interrupted run
    are not made again."""
    scored = None if options.scores is None else (load_scores(options.scores), options.target)
    source, repair = model_folder(options.model), options.repair.repair(with_data=options.data is not None)
    scores, target = scored or nested_size(source, str(options.nested))
    inputs: dict[str, Path | str] = {"model": source}
    inputs |= {} if options.scores is None else {"scores": options.scores}
    if options.data is not None and not repair.needs_data:
        say("note: data= is not read: the repair needs no text (repair=auto or repair=full would)")
    if repair.needs_data:
        assert options.data is not None
        inputs["data"] = data_input(options.data)
    with stage(options.output, "prune", inputs=inputs, options=options.fingerprint, resumes=True) as work:
        if work.finished:
            return
        checkpoint = open_checkpoint(source)
        selection = select(checkpoint.config, scores.widths, scores.layers.order, target)
        config = written_config(checkpoint.config, selection)
        stored = {name: place.dtype for name, place in checkpoint.stored.items()}
        dtypes = {name: stored[source_name(name, selection)] for name in tensor_table(config)}
        shards = plan_shards(config, dtypes, options.max_shard_bytes)
        finished = finished_shards(work.folder, config, shards)

        units = [selection]  # and what the repair chooses instead, which knows no sooner

        def check() -> None:
            check_scores(
                options.scores or source, work.content()["inputs"]["model"], options.model
            )  # waits for the sums

        # Both ways give generators: no weight is read before write_checkpoint takes its first rows. (The stage hashes
        # the inputs' files in a thread of its own meanwhile.)
        tensors: Iterator[tuple[str, Tensor]]
        with contextlib.ExitStack() as stack:
            if repair.needs_data:
                check()
                bar = stack.enter_context(progress("pruning and repairing"))
                tensors = repair_tensors(
                    checkpoint.tensor, checkpoint.config, selection, calibration(options, source), repair,
                    device=torch_device(options.device), dtype=torch_dtype(options.dtype),
                    on_step=bar.set, on_selection=units.append,
                    finished=dict.fromkeys(finished.stored, finished.tensor),
                )  # fmt: skip
            else:
                total = sum(shard.bytes for shard in shards if not (work.folder / shard.file).exists())
                rows = slice_rows(
                    checkpoint.rows, checkpoint.config, selection,
                    dtypes=stored, rescale_norms=repair.norms == "count", skip=finished.stored,
                )  # fmt: skip
                tensors = counted(stack.enter_context(progress("pruning", total, in_bytes=True)), rows)
            write_checkpoint(
                work.folder, config, tensors,
                dtypes=dtypes, tokenizer_from=source, max_shard_bytes=options.max_shard_bytes,
                sums=work.sums,
            )  # fmt: skip
        check()  # only now: plain pruning is done while the inputs are being read
        write_json(work.folder / "selection.json", kept_units(units[-1], checkpoint.config, repair))


def calibration(options: Options, source: Path) -> list[Batch]:
    """What the repair reads."""
    assert options.data is not None
    rows = {"seq_len": options.seq_len, "batch": options.batch, "seed": options.seed}
    return sample(options.data, "train", source, tokens=options.repair.tokens, **rows)


def print_sizes(before: HybridConfig, after: HybridConfig) -> None:
    table(f"Pruned to {after.pattern}", ("", "before", "after"), size_rows(before, after))
    for caution in cautions(after):
        say(f"caution: {caution}")
