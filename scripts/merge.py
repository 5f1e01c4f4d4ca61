"""`limbeck merge`: a straight line between two checkpoints of one config, read and written piece by piece.

The last step of Nemotron Nano 2's post-training (arXiv 2508.14444) is such an interpolation of two checkpoints.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..distill.average import merged_rows
from ..models.checkpoint import open_checkpoint, write_checkpoint
from ..models.cost.parameters import count_parameters
from ..models.errors import InputError
from ..models.tokenizer import check_agreement
from .run.resolve import model_folder
from .run.show import counted, progress, result, say
from .run.stage import stage


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
    """Writes the mean, each tensor in the dtype that `model` has it in."""
    model, other = model_folder(options.model), model_folder(options.other)
    inputs, chosen = {"model": model, "other": other}, {"weight": options.weight}
    with stage(options.output, "merge", inputs=inputs, options=chosen) as work:
        if not work.finished:
            for note in check_agreement(other, model):
                say(f"note: {note}")
            one, two = open_checkpoint(model), open_checkpoint(other)
            dtypes = {name: place.dtype for name, place in one.stored.items()}
            with progress("merging", 4 * count_parameters(one.config), in_bytes=True) as bar:  # computed in float32
                rows = counted(bar, merged_rows(one, two, options.weight))
                write_checkpoint(work.folder, one.config, rows, dtypes=dtypes, tokenizer_from=model)
    result(options.output, {"model": str(options.output), "weight": options.weight})
