"""`limbeck prune`: a smaller checkpoint from a model, its scores and a target size, streamed tensor by tensor."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..models.checkpoint import load_config, open_checkpoint, write_checkpoint
from ..models.config import HybridConfig
from ..models.cost import count_parameters
from ..models.folder import write_json
from ..prune.choose import Target, select
from ..prune.scores import load_scores
from ..prune.slice import Selection, slice_config, slice_tensors
from .inputs import model_folder
from .show import progress, result, table
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
class Options:
    model: str
    scores: Path
    output: Path
    target: Target
    rescale_norms: bool


def run(options: Options) -> None:
    source = make(options)
    show(load_config(source), load_config(options.output))
    result(options.output, {"model": str(options.output), "parameters": count_parameters(load_config(options.output))})


def make(options: Options) -> Path:
    """The stage without its table and result.json; returns the source's folder."""
    source = model_folder(options.model)
    run_stage(
        options.output,
        name="prune",
        inputs={"model": source, "scores": options.scores},
        options={"target": options.target, "rescale_norms": options.rescale_norms},
        make=lambda folder, facts: fill(folder, source, options),
    )
    return source


def fill(folder: Path, source: Path, options: Options) -> None:
    """Writes the pruned checkpoint into an existing folder, with selection.json, which says what was kept."""
    checkpoint = open_checkpoint(source)
    scores = load_scores(options.scores)
    selection = select(checkpoint.config, scores.widths, scores.layers.order, options.target)
    config = slice_config(checkpoint.config, selection)
    tensors = slice_tensors(checkpoint.tensor, checkpoint.config, selection, rescale_norms=options.rescale_norms)
    with progress("pruning", len(checkpoint.names())) as bar:

        def counted() -> Any:
            for done, item in enumerate(tensors, 1):
                bar.set(done)
                yield item

        write_checkpoint(folder, config, counted(), tokenizer_from=source)
    write_json(folder / "selection.json", readable(selection))


def readable(selection: Selection) -> dict[str, Any]:
    return {"layers": list(selection.layers), "kept": {str(axis): list(kept) for axis, kept in selection.kept.items()}}


def show(before: HybridConfig, after: HybridConfig) -> None:
    rows = [(name, getattr(before, field), getattr(after, field)) for name, field in WIDTHS if getattr(before, field)]
    counts = count_parameters(before), count_parameters(after)
    rows += [("parameters", f"{counts[0]:,}", f"{counts[1]:,} ({counts[1] / counts[0]:.1%})")]
    table(f"Pruned to {after.pattern}", ("", "before", "after"), rows)
