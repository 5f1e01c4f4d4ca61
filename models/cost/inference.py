"""What a config costs: parameters, bytes, FLOPs, tokens a second, and whether it fits a card. No weights are needed.

Formulas: the sums of `axes.tensor_table`; key-value, SSM and convolution state as the layers keep them; what comes and
goes as `transient` counts it; vLLM's blocks as `vllm` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ..config import HybridConfig
from ..layer import StateBytes
from .hardware import GIB, Hardware, Place, libraries
from .parameters import count_parameters, num_tensors
from .transient import check_load, transient
from .vllm import VllmReport, allocate

__all__ = ["GIB", "Hardware", "count_parameters", "memory", "num_tensors", "verdict"]


@dataclasses.dataclass(frozen=True)
class Load:
    """How a run was asked for: tokens of a prefill chunk, bytes of a weight, a key or value, an SSM state's and a
    convolution state's number, and where it runs."""

    chunk: int
    weight_bytes: int
    kv_bytes: int
    ssm_bytes: int
    conv_bytes: int
    place: Place


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
    load: Load | None = None

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
) -> MemoryReport:
    """Bytes that `batch` sequences of `context` tokens need, the prompt prefilled in chunks of `chunk` tokens (None:
    weights and caches alone). KV and convolution states follow the weights' dtype unless told otherwise. `budget`
    (bytes, weights included) and the Mamba cache mode are for vLLM's count of requests.

    Raises InputError where context, batch or chunk is below 1.
    """
    check_load(context, batch, 1 if chunk is None else chunk)
    kv_type, conv_type = kv_dtype or weight_dtype, conv_dtype or weight_dtype
    states = layer_states(config, kv_type, ssm_dtype, conv_type)
    fixed = [state.ssm + state.conv for state in states if state.ssm + state.conv]
    growing = [state.token for state in states if state.token]
    weights = count_parameters(config) * weight_dtype.itemsize
    room = None if budget is None else budget - weights
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
            room,
            mamba_cache_mode,
            config.chunk_size,
        ),
    )
    if chunk is None:
        return report
    load = Load(chunk, weight_dtype.itemsize, kv_type.itemsize, ssm_dtype.itemsize, conv_type.itemsize, place)
    return at(config, dataclasses.replace(report, load=load), context, batch)


def at(config: HybridConfig, report: MemoryReport, context: int, batch: int) -> MemoryReport:
    """The report at another context and batch; what it says of vLLM stays."""
    changes: dict[str, Any] = {
        "kv": report.kv // (report.context * report.batch) * context * batch,
        "ssm": report.ssm // report.batch * batch,
        "conv": report.conv // report.batch * batch,
    }
    load = report.load
    if load is not None:
        passing = transient(config, context, batch, load.chunk, load.weight_bytes, load.ssm_bytes, load.place)
        changes |= {"prompt": 8 * max(context - 1, 1) * batch, "activations": passing.prefill}
        changes |= {"decode": passing.decode, "logits": passing.logits, "workspace": libraries(load.place, context)}
    return dataclasses.replace(report, context=context, batch=batch, **changes)


def layer_states(
    config: HybridConfig, kv_dtype: torch.dtype, ssm_dtype: torch.dtype, conv_dtype: torch.dtype
) -> list[StateBytes]:
    """Bytes that each layer keeps of a sequence."""
    sizes = [dtype.itemsize for dtype in (kv_dtype, ssm_dtype, conv_dtype)]
    return [kind.state_bytes(config, *sizes) for kind in config.kinds]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a report fits a budget, by how many bytes, and the largest context and batch that would (0: none)."""

    fits: bool
    budget: float
    margin: float
    largest_context: int
    largest_batch: int


def verdict(config: HybridConfig, report: MemoryReport, budget: float) -> Verdict:
    """Holds a report against a budget in bytes. The largest context is for the report's batch, and the other way
    round; a model without attention layers has no largest context (-1)."""

    def fits(context: int, batch: int) -> bool:
        return at(config, report, context, batch).peak <= budget

    # Without what comes and goes: no more than so many can fit.
    fixed, per_token = report.weights + report.ssm + report.conv, report.kv // report.context
    context = -1 if fits(report.context, report.batch) else 0
    if per_token:
        context = most(lambda count: fits(count, report.batch), max(0, int((budget - fixed) // per_token)))
    per_sequence = (report.kv + report.ssm + report.conv) / report.batch or (8 if report.load else 0)
    batch = 0
    if per_sequence:
        bound = max(0, int((budget - report.weights) // per_sequence))
        batch = most(lambda count: fits(report.context, count), bound)
    return Verdict(report.peak <= budget, budget, budget - report.peak, context, batch)


def most(fits: Callable[[int], bool], bound: int) -> int:
    """The largest number up to `bound` that fits, where smaller ones fit as well; 0 if none does."""
    low, high = 0, bound
    while low < high:
        middle = (low + high + 1) // 2 if high < bound else high
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclasses.dataclass(frozen=True)
class Change:
    """Something that could be done, the bytes that it saves, and whether the rest fits."""

    name: str
    saved: int
    fits: bool


def changes(config: HybridConfig, report: MemoryReport, budget: float, **asked: Any) -> list[Change]:
    """What would bring a report nearer to a budget, each on its own; `asked` as in `memory`."""
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
        less = memory(config, report.context, report.batch, **(asked | way))
        found.append(Change(name, report.peak - less.peak, less.peak <= budget))
    return [*found, *fewer_layers(config, report, budget, asked)]


def fewer_layers(config: HybridConfig, report: MemoryReport, budget: float, asked: dict[str, Any]) -> list[Change]:
    """The fewest layers to drop, last ones first and the most frequent kind each time; nothing where that is all."""
    pattern = config.pattern
    for count in range(1, config.num_layers):
        letter = max(dict.fromkeys(pattern), key=pattern.count)
        place = pattern.rindex(letter)
        pattern = pattern[:place] + pattern[place + 1 :]
        less = memory(config.replace(pattern=pattern), report.context, report.batch, **asked)
        if less.peak <= budget:
            gone = ", ".join(
                f"{config.pattern.count(kind) - pattern.count(kind)} {kind}"
                for kind in dict.fromkeys(config.pattern)
                if config.pattern.count(kind) > pattern.count(kind)
            )
            return [Change(f"{count} layers fewer ({gone})", report.peak - less.peak, True)]
    return []
