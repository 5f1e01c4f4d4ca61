"""The inference path for real: the most that an allocator gave out at once.

On a GPU torch's caching allocator tells (`max_memory_allocated`), and can be capped as a smaller card would cap it. On
a CPU the profiler sees every allocation and release of torch's allocator, what operators take for themselves included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ..config import HybridConfig
from ..errors import CheckFailed, InputError
from ..generate.cache import Cache
from ..generate.decode import Decoder
from ..generate.generate import decode_one_token, prefill
from ..hybrid import HybridLM, initialize
from ..offload import free_memory
from .timing import clock


@dataclasses.dataclass(frozen=True)
class Measured:
    """Peak bytes, weights included; bytes that a GPU's allocator held in reserve for it (a CPU: the same); seconds of
    the prefill and of a decoding step (on a CPU with the profiler on)."""

    peak: int
    reserved: int
    device: str
    prefill_seconds: float
    step_seconds: float


@torch.no_grad()
def random_model(config: HybridConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> HybridLM:
    """A model of drawn weights, made on the device tensor by tensor."""
    model = HybridLM(config, device="meta", dtype=dtype)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(torch.empty_like(weight, device=device), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty_like(buffer, device=device))
    initialize(model, torch.Generator(device=device).manual_seed(seed))
    return model.eval()


def check_memory(config: HybridConfig, needed: int, device: torch.device, cap: float | None) -> None:
    """Before anything is allocated: raises CheckFailed where a run needs more than the cap, InputError where the
    machine has less."""
    name = f"{config.num_layers} layers, {needed / 2**30:.2f} GiB at the peak"
    if cap is not None and needed > cap:
        raise CheckFailed(f"measurement: {name}, do not fit the cap of {cap / 2**30:.2f} GiB; nothing was allocated")
    free = free_memory(device)
    if free is not None and needed > free:
        raise InputError(f"measurement: {name}; {device} has {free / 2**30:.2f} GiB free; nothing was allocated")


def measure(
    model: HybridLM,
    context: int,
    batch: int = 1,
    *,
    chunk: int = 512,
    steps: int = 1,
    ssm_dtype: torch.dtype = torch.float32,
    cap: float | None = None,
) -> Measured:
    """A run of `batch` sequences of `context` tokens, the last `steps` decoded greedily, the others prefilled in
    chunks; on a GPU under an allocator that gives out `cap` bytes at most. Raises InputError where steps leave no
    prompt.
    """
    if not 0 <= steps < context:
        raise InputError(f"measurement: {steps} steps leave no prompt of {context} tokens")
    head = model.head_weight
    weights = sum(tensor.untyped_storage().nbytes() for tensor in (*model.parameters(), *model.buffers()))
    if head.device.type == "cuda":
        with capped(head.device, cap):
            torch.cuda.reset_peak_memory_stats(head.device)
            others = torch.cuda.memory_allocated(head.device) - weights
            seconds = phase_seconds(model, context, batch, chunk, steps, ssm_dtype)
            peak = torch.cuda.max_memory_allocated(head.device) - max(others, 0)
            reserved = torch.cuda.max_memory_reserved(head.device)
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells standard error when it starts and stops
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            seconds = phase_seconds(model, context, batch, chunk, steps, ssm_dtype)
        peak = reserved = weights + highest(profiler)
    name = torch.cuda.get_device_name(head.device) if head.is_cuda else "cpu"
    return Measured(peak, reserved, name, seconds[0], seconds[1] / max(steps, 1))


@torch.inference_mode()
def phase_seconds(
    model: HybridLM, context: int, batch: int, chunk: int, steps: int, ssm_dtype: torch.dtype
) -> tuple[float, float]:
    """The seconds of the prefill, and of all steps together."""
    head = model.head_weight
    cache = Cache(model.config, batch, context, dtype=head.dtype, device=head.device, ssm_dtype=ssm_dtype)
    ids = torch.arange(batch * (context - steps), device=head.device).view(batch, -1)
    ids.remainder_(model.config.vocab_size)
    begin = clock(head)
    logits = prefill(model, ids, cache, chunk)
    between = clock(head)
    decoder = Decoder(model, cache) if head.is_cuda else None  # with the capture of its graph
    for _ in range(steps):
        token = logits.argmax(-1)
        logits = decoder.step(token) if decoder else decode_one_token(model, token, cache)
    return between - begin, clock(head) - between


@contextlib.contextmanager
def capped(device: torch.device, cap: float | None) -> Iterator[None]:
    """The allocator gives out at most `cap` bytes meanwhile, as a card with so much memory would."""
    total = torch.cuda.get_device_properties(device).total_memory
    if cap is not None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(cap / total, 1.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def highest(profiler: profile) -> int:
    """The most bytes that the profiled code had from the CPU's allocator at once."""
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        now += size
        most = max(most, now)
    return most
