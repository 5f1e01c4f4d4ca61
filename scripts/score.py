"""`limbeck score`: importance of every layer and width of a model, from activations on calibration text.

Runs in one process, or in many (torchrun, accelerate launch) that share the samples.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ..distill.report.words import DEPTH_METRICS, removal_steps
from ..distill.text.packing import Batch
from ..models import processes
from ..models.checkpoint import open_checkpoint
from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.offload import OFFLOADS, Layers, open_layers
from ..prune.depth import METRICS, TABLES, random_layers, score_layers, step_size
from ..prune.importance import score_magnitude, score_random, score_widths
from ..prune.scores import LayerScores, Scores, WidthScores, load_scores, write_scores
from ..prune.width_metrics import ActivationScores, TaylorScores, WidthMetric
from .run.resolve import check_counts, data_input, model_folder, sample, torch_device, torch_dtype
from .run.show import progress, result, table
from .run.stage import many_processes, run_stage

METHODS = ("activation", "taylor", "magnitude", "random")


@dataclasses.dataclass(frozen=True)
class Importance:
    """How to score; see conf/importance/, where each method has only what it reads."""

    method: str
    remove_layers: int | None
    pairs: bool
    min_layers: dict[str, int]
    depth_tokens: int = 8192
    depth_batch: int = 1
    depth_metric: str = "mse"
    iterative: bool = True
    depth_table: str = "first"
    tokens: int = 16384
    aggregate_batch: str = "l2"
    aggregate_sequence: str = "mean"
    mamba_source: str = "x"
    ffn_source: str = "pre"
    times_output: bool = False

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("depth_metric", METRICS), ("depth_table", TABLES)):
            if getattr(self, name) not in known:
                raise InputError(f"importance.{name} is {getattr(self, name)!r}; known: {', '.join(known)}")
        check_counts(self, "tokens", "depth_tokens", "depth_batch", group="importance.")

    def width_metric(self) -> WidthMetric:
        """Where the method needs data, what scores the widths."""
        if self.method == "taylor":
            return TaylorScores()
        return ActivationScores(
            self.aggregate_batch, self.aggregate_sequence, self.mamba_source, self.ffn_source, self.times_output
        )

    def settled(self, config: HybridConfig, removed: int | None = None) -> Importance:
        """With the number of layers to put in order: where none is given as many as are `removed`, or one step's."""
        if self.remove_layers is not None:
            return self
        count = step_size(config, self.pairs) if removed is None else removed
        return dataclasses.replace(self, remove_layers=count)


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    data: str
    output: Path
    seq_len: int
    batch: int
    seed: int
    device: str
    dtype: str
    importance: Importance
    offload: str = "auto"
    streams_gib: float = 4.0

    def __post_init__(self) -> None:
        if self.offload not in OFFLOADS:
            raise InputError(f"offload is {self.offload!r}; known: {', '.join(OFFLOADS)}")
        if not 0 < self.streams_gib < float("inf"):
            raise InputError(f"streams_gib is {self.streams_gib}; expected more than 0")
        check_counts(self, "seq_len", "batch")

    @property
    def stream_bytes(self) -> int:
        return int(self.streams_gib * 2**30)


def run(options: Options) -> None:
    with many_processes(options.device), processes.together():
        source = model_folder(options.model)
        chosen = {"importance": options.importance, "seed": options.seed, "seq_len": options.seq_len}
        run_stage(
            options.output,
            name="score",
            inputs={"model": source, "data": data_input(options.data)},
            options=chosen | {"dtype": options.dtype},
            make=lambda folder, facts: fill(folder, source, options),
        )
        if processes.rank() == 0:
            show(options.output)
            result(options.output, {"scores": str(options.output)})


def fill(folder: Path, source: Path, options: Options) -> None:
    """Scores the model into an existing folder: scores.safetensors and scores.json."""
    with processes.together():
        checkpoint = open_checkpoint(source)
        config = checkpoint.config
        how = options.importance.settled(config)
        layers = None if how.method == "random" else opened(source, options)
    assert how.remove_layers is not None
    if layers is None:
        order = random_layers(
            config, remove=how.remove_layers, seed=options.seed, pairs=how.pairs, min_layers=how.min_layers
        )
        widths = score_random(config, options.seed)
    else:
        order = depth(layers, source, options, how.remove_layers)
        if how.method == "magnitude":
            widths = score_magnitude(config, checkpoint.tensor)
        else:
            widths = calibrated(layers, source, options)
    facts = {"method": how.method, "data": options.data, "seed": options.seed, "pattern": config.pattern}
    if processes.rank() == 0:
        write_scores(folder, Scores(widths, order, facts))


def opened(source: Path, options: Options) -> Layers:
    device = torch_device(options.device)
    if processes.count() > 1 and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # this process's own
    dtype = torch_dtype(options.dtype)
    return open_layers(source, dtype, device, offload=options.offload, stream_bytes=options.stream_bytes)


def calibration(source: Path, options: Options, tokens: int, batch: int) -> list[Batch]:
    """This process's share of the sample, rows dealt out in turn, `batch` of them at a time."""
    with processes.together():
        rows = sample(
            options.data, "train", source, tokens=tokens, seq_len=options.seq_len, batch=1, seed=options.seed
        )[processes.rank() :: processes.count()]
    return [joined(rows[start : start + batch]) for start in range(0, len(rows), batch)]


def joined(rows: list[Batch]) -> Batch:
    fields = [field.name for field in dataclasses.fields(Batch)]
    return Batch(*(torch.cat([getattr(row, name) for row in rows]) for name in fields))


def calibrated(layers: Layers, source: Path, options: Options) -> WidthScores:
    how = options.importance
    batches = calibration(source, options, how.tokens, options.batch)
    with progress("scoring widths", len(batches)) as bar:
        return score_widths(
            layers,
            batches,
            how.width_metric(),
            stream_bytes=options.stream_bytes,
            on_step=lambda done, total: bar.set(done, total),
        )


def depth(layers: Layers, source: Path, options: Options, remove: int) -> LayerScores:
    how = options.importance
    batches = calibration(source, options, how.depth_tokens, how.depth_batch)
    with progress("scoring layers") as bar:
        return score_layers(
            layers,
            batches,
            remove=remove,
            pairs=how.pairs,
            min_layers=how.min_layers,
            metric=how.depth_metric,
            iterative=how.iterative,
            table=how.depth_table,
            stream_bytes=options.stream_bytes,
            on_step=lambda done, total: bar.set(done, total),
        )


def show(folder: Path) -> None:
    scores = load_scores(folder)
    pattern = scores.metadata.get("pattern", "")
    rows = [
        (number, ", ".join(f"{layer} ({pattern[layer]})" for layer in layers), f"{value:.4g}")
        for number, (layers, value) in enumerate(removal_steps(scores.layers.order, scores.layers.values), 1)
    ]
    if rows:
        name = DEPTH_METRICS[scores.layers.metric]
        table("Layers in the order of their removal", ("step", "layer", name), rows)
