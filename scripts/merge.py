"""`limbeck merge`: a straight line between two checkpoints of one config, read and written piece by piece.

The last step of Nemotron Nano 2's post-training (arXiv 2508.14444) is such an interpolation of two checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ..distill.agreement import check_agreement
from ..distill.average import merged_rows
from ..models.checkpoint import open_checkpoint, write_checkpoint
from ..models.cost.parameters import count_parameters
from ..models.errors import InputError
from .run.resolve import model_folder
from .run.show import progress, result, say
from .run.stage import run_stage


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    other: str
    output: Path
    weight: float

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError(f"weight is {self.weight}; expected 0 (all model) to 1 (all other)")


def run(options: Options) -> None:
    places = {"model": model_folder(options.model), "other": model_folder(options.other)}
    run_stage(
        options.output,
        name="merge",
        inputs=places,
        options={"weight": options.weight},
        make=lambda folder, facts: fill(folder, places["model"], places["other"], options.weight),
    )
    result(options.output, {"model": str(options.output), "weight": options.weight})


def fill(folder: Path, model: Path, other: Path, weight: float) -> None:
    """Writes the mean into an existing folder, each tensor in the dtype that `model` has it in."""
    for note in check_agreement(other, model):
        say(f"note: {note}")
    one, two = open_checkpoint(model), open_checkpoint(other)
    dtypes = {name: place.dtype for name, place in one.stored.items()}
    with progress("merging", count_parameters(one.config)) as bar:

        def pieces() -> Iterator[tuple[str, Tensor]]:
            done = 0
            for name, rows in merged_rows(one, two, weight):
                yield name, rows
                done += rows.numel()
                bar.set(done)

        write_checkpoint(folder, one.config, pieces(), dtypes=dtypes, tokenizer_from=model)
