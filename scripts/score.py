"""`limbeck score`: importance of every layer and width of a model, from activations on calibration text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..distill.data import Batch
from ..models.checkpoint import load_model
from ..models.errors import InputError
from ..models.hybrid import HybridLM
from ..prune.depth import random_layers, score_layers
from ..prune.importance import score_magnitude, score_random, score_widths
from ..prune.scores import Scores, load_scores, write_scores
from .inputs import data_input, model_folder, sample, torch_device, torch_dtype
from .show import progress, result, table
from .stage import run_stage

METHODS = ("activation", "magnitude", "random")


@dataclasses.dataclass(frozen=True)
class Importance:
    """How to score; see conf/importance/, where each method has only what it reads."""

    method: str
    remove_layers: int
    pairs: bool
    min_layers: dict[str, int]
    depth_tokens: int = 8192
    tokens: int = 16384
    aggregate_batch: str = "l2"
    aggregate_sequence: str = "mean"
    mamba_source: str = "x"
    ffn_source: str = "pre"
    times_output: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"importance.method is {self.method!r}; known: {', '.join(METHODS)}")
        if self.tokens < 1 or self.depth_tokens < 1:
            raise InputError("importance.tokens and importance.depth_tokens must be at least 1")


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


def run(options: Options) -> None:
    source = model_folder(options.model)
    chosen = {"importance": options.importance, "seed": options.seed, "seq_len": options.seq_len}
    run_stage(
        options.output,
        name="score",
        inputs={"model": source, "data": data_input(options.data)},
        options=chosen | {"dtype": options.dtype},
        make=lambda folder, facts: fill(folder, source, options),
    )
    show(options.output)
    result(options.output, {"scores": str(options.output)})


def fill(folder: Path, source: Path, options: Options) -> None:
    """Scores the model into an existing folder: scores.safetensors and scores.json."""
    model = load_model(source, torch_dtype(options.dtype), torch_device(options.device))
    how = options.importance
    if how.method == "random":
        layers = random_layers(
            model.config, remove=how.remove_layers, seed=options.seed, pairs=how.pairs, min_layers=how.min_layers
        )
        widths = score_random(model.config, options.seed)
    else:
        layers = depth(model, source, options)
        widths = (
            score_magnitude(model.config, model.state_dict().__getitem__)
            if how.method == "magnitude"
            else activations(model, source, options)
        )
    facts = {"method": how.method, "data": options.data, "seed": options.seed, "pattern": model.config.pattern}
    write_scores(folder, Scores(widths, layers, facts))


def calibration(source: Path, options: Options, tokens: int) -> list[Batch]:
    return sample(
        options.data, "train", source,
        tokens=tokens, seq_len=options.seq_len, batch=options.batch, seed=options.seed,
    )  # fmt: skip


def activations(model: HybridLM, source: Path, options: Options) -> Any:
    how = options.importance
    batches = calibration(source, options, how.tokens)
    with progress("scoring widths", len(batches)) as bar:
        return score_widths(
            model,
            batches,
            aggregate_batch=how.aggregate_batch,
            aggregate_sequence=how.aggregate_sequence,
            mamba_source=how.mamba_source,
            ffn_source=how.ffn_source,
            times_output=how.times_output,
            on_step=lambda done, total: bar.set(done, total),
        )


def depth(model: HybridLM, source: Path, options: Options) -> Any:
    how = options.importance
    batches = calibration(source, options, how.depth_tokens)
    with progress("scoring layers") as bar:
        return score_layers(
            model,
            batches,
            remove=how.remove_layers,
            pairs=how.pairs,
            min_layers=how.min_layers,
            on_step=lambda done, total: bar.set(done, total),
        )


def show(folder: Path) -> None:
    scores = load_scores(folder)
    pattern = scores.metadata.get("pattern", "")
    rows = [
        (number, f"{layer} ({pattern[layer]})", f"{mse:.4g}")
        for number, (layer, mse) in enumerate(zip(scores.layers.order, scores.layers.mse, strict=False), 1)
    ]
    if rows:
        table("Layers in the order of their removal", ("step", "layer", "logit MSE"), rows)
