"""`limbeck score`: importance of every layer and width of a model, from activations on calibration text.

Runs in one process, or in many (torchrun, accelerate launch) that share the samples.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from ..distill.parallel import process_device
from ..distill.report.words import DEPTH_METRICS, removal_steps
from ..distill.text.packing import Batch, joined
from ..models import processes
from ..models.checkpoint import load_config, open_checkpoint
from ..models.config import HybridConfig
from ..models.device import torch_device, torch_dtype
from ..models.matmul import Multiplied
from ..models.offload import open_layers
from ..models.quantities import check_between
from ..prune.depth import random_layers, score_layers
from ..prune.depth_metrics import METRICS
from ..prune.importance import score_widths
from ..prune.scores import Scores, load_scores, write_scores
from ..prune.scoring import Importance
from .run.resolve import NamedData, data_input, model_folder, sample
from .run.show import progress, result, table
from .run.stage import many_processes, stage


@dataclasses.dataclass(frozen=True)
class Options(Multiplied):
    model: str
    data: NamedData
    output: Path
    seq_len: PositiveInt
    batch: PositiveInt
    seed: int
    device: str
    dtype: str
    importance: Importance
    offload: Literal["auto", "none", "disk"] = "auto"
    streams_gib: PositiveFloat = 4.0

    def __post_init__(self) -> None:
        check_between(self, "", 0, 100_000, "streams_gib", above=True)

    @property
    def stream_bytes(self) -> int:
        return int(self.streams_gib * 2**30)


def run(options: Options) -> None:
    with many_processes(options.device), processes.together():
        source, chosen = model_folder(options.model), {"importance": options.importance, "seed": options.seed}
        inputs: dict[str, Path | str] = {"model": source, "data": data_input(options.data)}
        chosen |= {"seq_len": options.seq_len, "dtype": options.dtype}
        with stage(options.output, "score", inputs=inputs, options=chosen) as work:
            if not work.finished:
                scores = score(source, options)
                if processes.rank() == 0:
                    write_scores(work.folder, scores)
        if processes.rank() == 0:
            print_order(options.output, load_config(source))
            result(options.output, {"scores": str(options.output)})


def score(source: Path, options: Options) -> Scores:
    with processes.together():
        checkpoint = open_checkpoint(source)
        config, how = checkpoint.config, options.importance.settled(checkpoint.config)
        assert how.remove_layers is not None
        remove = how.remove_layers * config.block_size  # whole blocks
        limits: dict[str, Any] = {"remove": remove, "pairs": how.pairs, "min_layers": how.min_layers}
        if how.method != "random":
            device, dtype = process_device(torch_device(options.device)), torch_dtype(options.dtype)
            layers = open_layers(source, dtype, device, offload=options.offload, stream_bytes=options.stream_bytes)
            depth_metric = METRICS[how.depth_metric](layers)
    if how.method == "random":
        order = random_layers(config, seed=options.seed, **limits)
    else:
        batches = calibration(source, options, how.depth_tokens, how.depth_batch)
        with progress("scoring layers") as bar:
            order = score_layers(
                layers, batches, metric=depth_metric, iterative=how.iterative, table=how.depth_table, **limits,
                stream_bytes=options.stream_bytes, on_step=bar.set,
            )  # fmt: skip
    metric, uses = how.width_metric(options.seed), dict[int, Tensor]()
    if metric.observed:
        batches = calibration(source, options, how.tokens, options.batch)
        with progress("scoring widths", len(batches)) as bar:
            widths = score_widths(
                layers, batches, metric, stream_bytes=options.stream_bytes, on_step=bar.set, uses=uses
            )
    else:
        widths = metric.scores(config, checkpoint.tensor, {})
    facts: dict[str, Any] = {"method": how.method, "data": str(options.data), "seed": options.seed}
    facts["pattern"] = config.pattern
    if uses:
        facts["expert_uses"] = {str(layer): [int(count) for count in counts] for layer, counts in uses.items()}
    return Scores(widths, order, facts)


def calibration(source: Path, options: Options, tokens: int, batch: int) -> list[Batch]:
    """This process's share of the sample, rows dealt out in turn, `batch` of them at a time."""
    with processes.together():
        rows = sample(
            options.data, "train", source, tokens=tokens, seq_len=options.seq_len, batch=1, seed=options.seed
        )[processes.rank() :: processes.count()]
    return [joined(rows[start : start + batch]) for start in range(0, len(rows), batch)]


def print_order(folder: Path, config: HybridConfig) -> None:
    """The layers, numbered as the config's num_hidden_layers: blocks, where the family has them."""
    scores, size = load_scores(folder), config.block_size

    def named(layer: int) -> str:
        return f"{layer // size} ({config.pattern[layer : layer + size]})"

    rows = [
        (number, ", ".join(named(layer) for layer in layers if layer % size == 0), f"{value:.4g}")
        for number, (layers, value) in enumerate(removal_steps(scores.layers.order, scores.layers.values), 1)
    ]
    if rows:
        name = DEPTH_METRICS[scores.layers.metric]
        table("Layers in the order of their removal", ("step", "layer", name), rows)
