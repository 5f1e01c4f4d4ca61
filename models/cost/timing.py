"""How fast a model reads prompts and writes tokens, on the path that generates, and how that compares with a card's
limits. Shapes: [B] sequences."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError
from ..generate.cache import Cache
from ..generate.decode import Decoder
from ..generate.generate import prefill
from ..hybrid import HybridLM
from .hardware import GIB, Hardware
from .speed import Load, Speed

WARM_UP_STEPS = 3
PROBE_SIDE = 1024  # of the matrices that a CPU's rate is probed with
PROBE_BYTES = 2**28  # read to probe its bandwidth: more than a cache holds


@torch.inference_mode()
def measure(
    model: HybridLM,
    load: Load,
    *,
    prefill_chunk: int = 512,
    steps: int = 32,
    ssm_dtype: torch.dtype = torch.float32,
) -> Speed:
    """Reads one prompt of random tokens, copies its state to the other rows (their prefill takes as long), and decodes
    greedily: every token where `steps` do not fit three times into the output, else `steps` at its start, middle and
    end, weighted by Simpson's rule. A short run before is not counted.

    Raises InputError where the load is beyond the model's positions or the memory that is free.
    """
    from ..generate.engine import check_cache_memory  # imports tokenizers, which `clock` has no need of

    config, head = model.config, model.head_weight
    load.check_length(config)
    total = load.input_tokens + load.output_tokens
    check_cache_memory(model, load.batch, total, ssm_dtype)
    cache = Cache(config, load.batch, total, dtype=head.dtype, device=head.device, ssm_dtype=ssm_dtype)
    decoder = Decoder(model, cache)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(config.vocab_size, (1, load.input_tokens), generator=generator).to(head.device)

    def decode(count: int) -> float:
        tokens = [1] * load.batch
        begin = clock(head)
        for _ in range(count):
            tokens = decoder.step(tokens).argmax(-1).tolist()
        return (clock(head) - begin) / count

    read(model, cache, prompt[:, :prefill_chunk], prefill_chunk)
    decode(min(WARM_UP_STEPS, load.output_tokens))
    for row in range(load.batch):
        cache.clear(row)
    begin = clock(head)
    read(model, cache, prompt, prefill_chunk)
    first = clock(head) - begin
    for row in range(1, load.batch):
        cache.move(0, row)
    if load.output_tokens <= 3 * steps:
        return Speed(first, decode(load.output_tokens))
    spots = (0, (load.output_tokens - steps) // 2, load.output_tokens - steps)
    found = []
    for spot in spots:
        cache.lengths = [load.input_tokens + spot] * load.batch  # what the caches hold does not change the speed
        found.append(decode(steps))
    return Speed(first, (found[0] + 4 * found[1] + found[2]) / 6)


def read(model: HybridLM, cache: Cache, prompt: Tensor, chunk: int) -> int:
    """A prompt [1, T] into row 0, chunk by chunk; the most probable token after it."""
    logits = prefill(model, prompt, cache.rows(0, 1), chunk)
    cache.lengths[0] = prompt.shape[1]
    return int(logits.argmax())


def clock(on: Tensor) -> float:
    """Seconds, once what a device was told to do is done."""
    if on.is_cuda:
        torch.cuda.synchronize(on.device)
    return time.perf_counter()


def this_cpu(now: Callable[[], float] = time.perf_counter) -> Hardware:
    """A profile of the CPU as it is now: bytes a second that a sum over memory reads, and FLOP/s of a float32 matrix
    product, the best of five each, with torch's threads, by a clock."""
    memory = torch.ones(PROBE_BYTES // 4)
    square = torch.randn(PROBE_SIDE, PROBE_SIDE)
    reading = best(lambda: memory.sum(), now)
    product = best(lambda: square @ square, now)
    return Hardware(
        "this CPU",
        total_gib=0.0,
        usable_gib=0.0,
        bandwidth_gb_s=PROBE_BYTES / reading / 1e9,
        bf16_tflops=2 * PROBE_SIDE**3 / product / 1e12,
    )


def best(work: Callable[[], object], now: Callable[[], float]) -> float:
    """The least seconds of five runs."""
    times = []
    for _ in range(5):
        begin = now()
        work()
        times.append(now() - begin)
    return min(times)


def check_weights_fit(parameters: int, dtype: torch.dtype, free: int | None, name: str) -> None:
    """Raises InputError where a model's weights take more memory than is free."""
    needed = parameters * dtype.itemsize
    if free is not None and needed > free:
        raise InputError(
            f"{name}: the weights take {needed / GIB:,.2f} GiB, {free / GIB:,.2f} GiB are free; measure=false estimates"
            " from the config alone"
        )
