"""The loss of a model that is cut in memory: what candidates of a search are measured by before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.linear_kl import linear_cross_entropy
from ..models.errors import CheckFailed, InputError
from ..models.hybrid import HybridLM
from .importance import TokenBatch
from .repair import Repair, repair_model
from .slice import Selection


@torch.no_grad()
def sliced_loss(
    model: HybridLM,
    selection: Selection,
    batches: Sequence[TokenBatch],
    repair: Repair | None = None,
    calibration: Sequence[TokenBatch] = (),
) -> float:
    """Cross-entropy (nats a token) of the model cut in memory, over the positions of `batches` whose label counts;
    repaired on `calibration` as `repair` says.

    Raises CheckFailed where it is not finite, InputError where nothing counts.
    """
    smaller = repair_model(model, selection, calibration, repair or Repair()).eval()
    device = smaller.head_weight.device
    total, tokens = 0.0, 0
    for batch in batches:
        labels = batch.labels.to(device).flatten()
        hidden = smaller.hidden_states(batch.input_ids.to(device), seq_idx=batch.seq_idx.to(device)).flatten(0, 1)
        found = linear_cross_entropy(hidden, smaller.head_weight, labels, normalizer=1.0)
        total += float(found.cross_entropy.double().sum())
        tokens += int((labels >= 0).sum())
    if not tokens:
        raise InputError("search: the data has no counted token; expected at least one sample of two tokens")
    if not abs(total) < float("inf"):
        raise CheckFailed(f"search: the loss of the model cut to {smaller.config.pattern} is {total}")
    return total / tokens
