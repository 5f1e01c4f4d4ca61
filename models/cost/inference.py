"""The memory that generation takes, and whether it fits a card. No weights are needed.

Formulas: the sums of `axes.tensor_table`; key-value, SSM and convolution state as the layers keep them; vLLM's blocks
as `vllm` counts them. What comes and goes is found by `trace`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..config import HybridConfig
from ..layer import StateBytes
from .hardware import Place, check_load, libraries
from .parameters import weight_bytes
from .ranks import padded_vocabulary, rank_config, rank_counts
from .trace import transient
from .vllm import VllmReport, allocate

if TYPE_CHECKING:
    from .stored_weights import StoredWeights


@dataclasses.dataclass(frozen=True)
class InferenceLoad:
    """How a run is meant: tokens of a prefill chunk, bytes of a weight, a key or value, an SSM state's and a
    convolution state's number, where it runs, and over how many such places it is shared out (`ranks`)."""

    chunk: int
    weight_bytes: int
    kv_bytes: int
    ssm_bytes: int
    conv_bytes: int
    place: Place
    ranks: int = 1


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes at a context length and batch: weights, key-value cache, SSM and convolution states; and, where a chunk was
    given, the prompt's tokens, the highest moment of the prefill of a chunk, that of a decoding step, and beside it
    its logits, and what the matrix library keeps for itself."""

    context: int
    batch: int
    weights: int
    kv: int
    ssm: int
    conv: int
    vllm: VllmReport
    prompt: int = 0
    activations: int = 0
    decode: int = 0
    logits: int = 0
    workspace: int = 0
    load: InferenceLoad | None = None

    @property
    def total(self) -> int:
        """What is there all the time: weights and caches."""
        return self.weights + self.kv + self.ssm + self.conv

    @property
    def transient(self) -> int:
        """What comes and goes, at its highest: prefill and decoding never meet."""
        return max(self.activations, self.decode + self.logits)

    @property
    def peak(self) -> int:
        """The most that is allocated at once."""
        return self.total + self.prompt + self.transient + self.workspace


def memory(
    config: HybridConfig,
    context: int,
    batch: int = 1,
    *,
    weight_dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    ssm_dtype: torch.dtype = torch.float32,
    conv_dtype: torch.dtype | None = None,
    budget: float | None = None,
    chunk: int | None = 512,
    place: Place = Place(),  # noqa: B008 (frozen)
    mamba_cache_mode: str = "none",
    held: StoredWeights | None = None,
    tensor_parallel: int = 1,
) -> MemoryReport:
    """Bytes that `batch` sequences of `context` tokens need, the prompt prefilled in chunks of `chunk` tokens (None:
    weights and caches alone). KV and convolution states follow the weights' dtype unless told otherwise. `budget`
    (bytes, weights included) and the Mamba cache mode are for vLLM's count of requests. Quantised weights are what is
    `held`; what comes and goes is that of plain ones. With `tensor_parallel` GPUs it is what each of them holds
    (`ranks`), and so are `held` and `budget`.

    Raises InputError where context, batch or chunk is below 1, or the model does not share out over so many GPUs.
    """
    check_load(context, batch, 1 if chunk is None else chunk)
    whole = config
    if tensor_parallel > 1:
        config = rank_config(config, tensor_parallel)
    kv_type, conv_type = kv_dtype or weight_dtype, conv_dtype or weight_dtype
    states = layer_states(config, kv_type, ssm_dtype, conv_type)
    fixed = [state.ssm + state.conv for state in states if state.ssm + state.conv]
    growing = [state.token for state in states if state.token]
    weights = weight_bytes(config, weight_dtype) if held is None else held.total
    headroom = None if budget is None else budget - weights
    report = MemoryReport(
        context=context,
        batch=batch,
        weights=weights,
        kv=sum(growing) * context * batch,
        ssm=sum(state.ssm for state in states) * batch,
        conv=sum(state.conv for state in states) * batch,
        vllm=allocate(
            len(growing),
            len(fixed),
            context,
            max(growing, default=0),
            max(fixed, default=0),
            headroom,
            mamba_cache_mode,
        ),
    )
    if chunk is None:
        return report
    load = InferenceLoad(
        chunk, weight_dtype.itemsize, kv_type.itemsize, ssm_dtype.itemsize, conv_type.itemsize, place, tensor_parallel
    )
    return at(whole, dataclasses.replace(report, load=load), context, batch)


def at(config: HybridConfig, report: MemoryReport, context: int, batch: int) -> MemoryReport:
    """The report of a (whole) config at another context and batch; what it says of vLLM stays."""
    found = caches_at(report, context, batch)
    if found.load is None:
        return found
    load = found.load
    gathered = 0
    if load.ranks > 1:
        config, gathered = rank_config(config, load.ranks), padded_vocabulary(config)
    # States of one byte are those of a server: our own path, which is traced, keeps two at least.
    passing = transient(
        config, context, batch, load.chunk, load.weight_bytes, max(load.ssm_bytes, 2), load.place, gathered
    )  # fmt: skip
    return dataclasses.replace(
        found,
        prompt=8 * max(context - 1, 1) * batch,
        activations=passing.prefill,
        decode=passing.decode,
        logits=passing.logits,
        workspace=libraries(load.place, context),
    )


def caches_at(report: MemoryReport, context: int, batch: int) -> MemoryReport:
    """The report with the caches of another context and batch."""
    return dataclasses.replace(
        report,
        context=context,
        batch=batch,
        kv=report.kv // (report.context * report.batch) * context * batch,
        ssm=report.ssm // report.batch * batch,
        conv=report.conv // report.batch * batch,
    )


def sketch(
    config: HybridConfig, report: MemoryReport, contexts: Sequence[int], batches: Sequence[int]
) -> dict[int, list[MemoryReport]]:
    """Reports at ascending contexts for ascending batches, for a picture: what comes and goes is found at a few of them
    (the report's own among them), and between these lies on straight lines."""
    chunk = 0 if report.load is None else report.load.chunk
    longer = next((context for context in contexts if context > chunk), contexts[0])
    ends = sorted({contexts[0], longer, report.context, contexts[-1]})
    counts = sorted({batches[0], report.batch, batches[-1]})
    found = [[at(config, report, context, batch) for context in ends] for batch in counts]
    passing: dict[str, Any] = {}
    for name in ("prompt", "activations", "decode", "logits", "workspace"):
        by_context = [np.interp(contexts, ends, [getattr(each, name) for each in row]) for row in found]
        passing[name] = [np.interp(batches, counts, column) for column in np.transpose(by_context)]
    return {
        batch: [
            dataclasses.replace(
                caches_at(report, context, batch),
                **dict[str, Any]({name: int(values[column][row]) for name, values in passing.items()}),
            )
            for column, context in enumerate(contexts)
        ]
        for row, batch in enumerate(batches)
    }


def layer_states(
    config: HybridConfig, kv_dtype: torch.dtype, ssm_dtype: torch.dtype, conv_dtype: torch.dtype
) -> list[StateBytes]:
    """Bytes that each layer keeps of a sequence."""
    sizes = [dtype.itemsize for dtype in (kv_dtype, ssm_dtype, conv_dtype)]
    of_kind = {kind: kind.state_bytes(config, *sizes) for kind in dict.fromkeys(config.kinds)}
    return [of_kind[kind] for kind in config.kinds]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a report fits a budget, by how many bytes, and the largest context and batch that would (0: none)."""

    fits: bool
    budget: float
    margin: float
    largest_context: int
    largest_batch: int


MOST_SEQUENCES = 2**20  # of a batch


def verdict(config: HybridConfig, report: MemoryReport, budget: float) -> Verdict:
    """Holds a report against a budget in bytes. The largest context is for the report's batch, and the other way
    round; a model without attention layers has no largest context (-1)."""

    # Without what comes and goes: no more than so many can fit.
    fixed, per_token = report.weights + report.ssm + report.conv, report.kv // report.context
    context = -1 if report.peak <= budget else 0
    if per_token:
        context = longest(config, report, budget, max(0, int((budget - fixed) // per_token)))
    per_sequence = (report.kv + report.ssm + report.conv) / report.batch or (8 if report.load else 0)
    batch = 0
    if per_sequence:
        bound = min(MOST_SEQUENCES, max(0, int((budget - report.weights) // per_sequence)))
        batch = largest(lambda count: at(config, report, report.context, count).peak, budget, bound, report.batch)
    return Verdict(report.peak <= budget, budget, budget - report.peak, context, batch)


def longest(config: HybridConfig, report: MemoryReport, budget: float, bound: int) -> int:
    """The largest context up to `bound`: first in whole chunks, whose tokens change nothing but the past."""

    def peak(context: int) -> int:
        return at(config, report, context, report.batch).peak

    if report.load is None:
        return largest(peak, budget, bound, report.context)
    chunk = report.load.chunk
    whole = (
        largest(lambda count: peak(count * chunk + 1), budget, (bound - 1) // chunk, report.context // chunk) * chunk
    )
    return whole + largest(lambda more: peak(whole + more), budget, min(chunk, bound - whole))


def largest(size: Callable[[int], float], limit: float, bound: int, near: int = 1) -> int:
    """The largest number from 1 to `bound` whose size is within a limit, where smaller ones are smaller; 0 if none is.

    Sizes are looked at where a straight line between the nearest known ones meets the limit, first at `near`: where
    they grow evenly four or five are enough. Every fifth look halves what is left instead.
    """
    low, high, under, over = 0, bound + 1, 0.0, 0.0
    for look in itertools.count():
        if high - low <= 1:
            return low
        if not low:
            number = near if look == 0 else 1
        elif high > bound:
            number = bound
        elif look % 5 == 4:
            number = (low + high) // 2
        else:
            number = low + int((limit - under) / (over - under) * (high - low))
        number = min(max(number, low + 1), high - 1)
        found = size(number)
        if found <= limit:
            low, under = number, found
        else:
            high, over = number, found
    raise AssertionError


@dataclasses.dataclass(frozen=True)
class Change:
    """Something that could be done, the bytes that it saves, and whether the rest fits."""

    name: str
    saved: int
    fits: bool


def changes(config: HybridConfig, report: MemoryReport, budget: float, **options: Any) -> list[Change]:
    """What would bring a report nearer to a budget, each on its own; `options` as in `memory`."""
    ways: dict[str, dict[str, Any]] = {}
    if report.kv and report.load and report.load.kv_bytes > 1:
        ways["8-bit keys and values (vLLM: --kv-cache-dtype fp8)"] = {"kv_dtype": torch.float8_e4m3fn}
    if report.ssm and report.load and report.load.ssm_bytes > 2:
        ways["SSM states in bfloat16"] = {"ssm_dtype": torch.bfloat16}
    if report.load and report.load.chunk > 128:
        ways["prefill in chunks of 128 tokens"] = {"chunk": 128}
    if len(ways) > 1:
        ways["all of these"] = {name: value for way in ways.values() for name, value in way.items()}
    found = []
    for name, way in ways.items():
        less = memory(config, report.context, report.batch, **(options | way))
        found.append(Change(name, report.peak - less.peak, less.peak <= budget))
    return [*found, *fewer_layers(config, report, budget, options), *more_gpus(config, report, budget, options)]


def more_gpus(config: HybridConfig, report: MemoryReport, budget: float, options: dict[str, Any]) -> list[Change]:
    """The fewest GPUs that hold the model together, where its weights are plain."""
    on_gpu = report.load is not None and report.load.place.device == "cuda"
    for count in rank_counts(config) if on_gpu and options.get("held") is None else ():
        if count > options.get("tensor_parallel", 1):
            less = memory(config, report.context, report.batch, **options | {"tensor_parallel": count})
            if less.peak <= budget:
                return [Change(f"{count} GPUs (tensor_parallel={count})", report.peak - less.peak, True)]
    return []


def fewer_layers(config: HybridConfig, report: MemoryReport, budget: float, options: dict[str, Any]) -> list[Change]:
    """The fewest layers to drop, last ones first and the most frequent kind each time; nothing where that is all. Where
    a family's layers are blocks, whole blocks go."""
    pattern, size = config.pattern, config.block_size
    for count in range(1, config.num_layers // size):
        blocks = [pattern[start : start + size] for start in range(0, len(pattern), size)]
        frequent = max(dict.fromkeys(blocks), key=blocks.count)
        place = size * (len(blocks) - 1 - blocks[::-1].index(frequent))
        pattern = pattern[:place] + pattern[place + size :]
        if options.get("held") is not None:
            for layer in range(place + size - 1, place - 1, -1):
                options = options | {"held": options["held"].without(layer)}
        less = memory(config.replace(pattern=pattern), report.context, report.batch, **options)
        if less.peak <= budget:
            gone = ", ".join(
                f"{config.pattern.count(kind) - pattern.count(kind)} {kind}"
                for kind in dict.fromkeys(config.pattern)
                if config.pattern.count(kind) > pattern.count(kind)
            )
            number = "1 layer" if count == 1 else f"{count} layers"
            return [Change(f"{number} fewer ({gone})", report.peak - less.peak, True)]
    return []
