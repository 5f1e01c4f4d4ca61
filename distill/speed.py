"""How fast a training goes, and how much memory it takes."""

from __future__ import annotations

import resource
import sys

import torch

from ..models import processes
from ..models.config import HybridConfig
from ..models.cost.speed import training_flops


def speed_figures(
    student: HybridConfig,
    teacher: HybridConfig | None,
    seq_len: int,
    device: torch.device,
    peak: float | None,
    rate: float,
) -> dict[str, float]:
    """From the tokens a second, `rate`: the model's TFLOP/s (three passes of the student, one of the teacher; what runs
    twice for activation checkpointing counts once), their share of the cards' `peak` where that is known, and the
    memory."""
    tflops = rate * training_flops(student, teacher, seq_len) / 1e12
    share = {"mfu": tflops / (peak * processes.count())} if peak else {}
    return {"model_tflops": tflops, "memory_gib": peak_memory(device) / 2**30} | share


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
