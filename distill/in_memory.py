"""A distillation between models in memory: one stage, in this process, of which nothing stays on disk."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.generate.generate import end_tokens
from ..models.hybrid import HybridLM
from ..models.row_split import row_split
from .average import final_weights
from .hidden import Pairing, make_pairing
from .nested import Nest
from .options import DistillOptions
from .parallel import Trained, prepare, released
from .rollouts import stage_loss
from .stages import stage_batches
from .state import fill_weights
from .teaching import held_out_figures
from .text.mixture import Text
from .text.packing import Batch
from .trainer import set_layers, train

log = logging.getLogger("limbeck")


def distill_in_memory(
    teacher: HybridLM,
    student: HybridLM,
    text: Text,
    plan: DistillOptions,
    seed: int,
    nest: tuple[Trained, Nest] | None,
    measured: Sequence[Batch],
) -> tuple[list[Mapping[str, Any]], Mapping[str, HybridLM]]:
    """Trains the student in place, or the nested sizes that were cut out of it; `measured` are the rows that held-out
    figures are of. Returns every step's record, and the sizes by their names. The student is left with the
    weights that the options keep, in its own dtype, in evaluation mode."""
    dtype, how, records = student.head_weight.dtype, plan.train, list[Mapping[str, Any]]()
    pairing = None if not plan.loss.hidden_weighs else paired(teacher, student, text, plan, seed)
    loss: Any = stage_loss(teacher, plan, pairing, seed, end_tokens(student.config.eos_token_id))
    if nest is None:
        student.requires_grad_(True).train()
        trained, figures = prepare(student.float() if dtype.itemsize < 4 else student, dtype), held_out_figures
    else:
        trained, figures, loss = nest[0], nest[1].figures, nest[1].loss(loss, seed)
    evaluate = functools.partial(figures, teacher, sample=measured, context_parallel=how.context_parallel)
    try:
        with tempfile.TemporaryDirectory() as folder:
            train(
                trained, loss, functools.partial(stage_batches, text, plan, 0, seed), how, Path(folder),
                evaluate=evaluate if measured else None, on_step=lambda record: records.append(dict(record)),
                say=log.warning,
            )  # fmt: skip
            kept = final_weights(Path(folder), how)
            if kept.said["kept"] != "last":
                fill_weights(trained, kept.tensors())
    finally:
        teacher.requires_grad_(True)
        set_layers(trained.model, recompute=False, compiled=False)
        trained.model.to(dtype).eval()
        released(trained)
    return records, {} if nest is None else nest[1].models(trained.model)


def paired(teacher: HybridLM, student: HybridLM, text: Text, plan: DistillOptions, seed: int) -> Pairing:
    """Which hidden states are compared: nothing is known of what the student kept of the teacher. Raises InputError."""
    hidden = plan.loss.hidden
    rows = text.sample(batch_size=plan.rows, seq_len=plan.seq_len, seed=seed, max_tokens=hidden.fit_tokens)
    there = (row.to(student.head_weight.device) for row in rows)
    return make_pairing(teacher, student, hidden, None, there, row_split(plan.train.context_parallel))
