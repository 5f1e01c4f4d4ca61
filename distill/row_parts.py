"""A batch's rows split over processes (context parallelism): what of them a loss is given, and hidden states of either
whole rows or parts of them. Shapes: [B, T] rows and tokens, [t] tokens of a part.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from ..models.hybrid import HybridLM
from ..models.layer import Observe
from ..models.row_split import RowPart, RowSplit


@dataclasses.dataclass(frozen=True)
class PartRows:
    """This process's tokens [B, t] of rows, for a loss. Labels are the next tokens already, so that each counts in one
    part alone, the border's too. `whole` are the rows themselves."""

    whole: Any
    part: RowPart
    input_ids: Tensor
    labels: Tensor
    seq_idx: Tensor
    weights: Tensor | None


def part_rows(rows: Any, split: RowSplit | None) -> Any:
    """Rows as they are, or this process's part of them. Raises InputError where they are too short to be split."""
    if split is None:
        return rows
    part, weights = split.part(rows.input_ids.shape[1], rows.seq_idx), getattr(rows, "weights", None)
    ids, labels, seq_idx = (part.own(column) for column in (rows.input_ids, rows.labels, rows.seq_idx))
    return PartRows(rows, part, ids, labels, seq_idx, None if weights is None else part.own(weights))


def states_of(model: HybridLM, rows: Any, observe: Observe | None = None) -> Tensor:
    """What the head reads of rows, or of a part of them [B, T or t, hidden]."""
    part = getattr(rows, "part", None)
    return model.hidden_states(rows.input_ids, seq_idx=rows.seq_idx, observe=observe, part=part)


def whole_states(model: HybridLM, input_ids: Tensor, seq_idx: Tensor, split: RowSplit | None) -> Tensor:
    """What the head reads of whole rows [B, T, hidden], in every process; without gradients where rows are split."""
    if split is None:
        return model.hidden_states(input_ids, seq_idx=seq_idx)
    tokens = input_ids.shape[1]
    part = split.part(tokens, seq_idx)
    return split.whole(model.hidden_states(part.own(input_ids), seq_idx=part.own(seq_idx), part=part), tokens)
