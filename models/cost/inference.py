"""What a config costs: parameters, bytes, FLOPs, tokens a second, and whether it fits a card. No weights are needed.

Formulas: the sums of `axes.tensor_table`; key-value, SSM and convolution state as the layers keep them; what comes and
goes as `transient` counts it; vLLM's blocks as `vllm` does.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..axes import tensor_table
from ..config import HybridConfig
from ..errors import InputError
from .transient import Place, check_load, libraries, transient
from .vllm import VllmReport, allocate

GIB = 2**30


def count_parameters(config: HybridConfig) -> int:
    """Parameters, summed over the table of axes."""
    return sum(config.pattern.count(kind) * numel if kind else numel for kind, (numel, _) in kind_sizes(config).items())


def kind_sizes(config: HybridConfig) -> Mapping[str, tuple[int, int]]:
    """Elements of all tensors, and of the matrices among them: of one layer of each kind by its letter, and of what
    is outside of the layers under "". Layers of a kind are alike, so that the table is asked for one of each."""
    kinds = "".join(sorted(set(config.pattern)))
    return shape_sizes(config.replace(pattern=kinds, bos_token_id=None, eos_token_id=None, pad_token_id=None))


@functools.lru_cache(maxsize=1024)
def shape_sizes(config: HybridConfig) -> Mapping[str, tuple[int, int]]:
    """`kind_sizes` of a config whose pattern names each kind once; a search asks for thousands, many of them alike."""
    sizes = dict.fromkeys(("", *config.pattern), (0, 0))
    for tensor in tensor_table(config).values():
        kind = "" if tensor.layer is None else config.pattern[tensor.layer]
        numel, matrices = sizes[kind]
        size = tensor.numel
        sizes[kind] = numel + size, matrices + (size if len(tensor.dimensions) == 2 else 0)
    return types.MappingProxyType(sizes)


def num_tensors(config: HybridConfig) -> int:
    """Tensors of a checkpoint of this config."""
    return len(tensor_table(config))


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
    attention, mamba = config.pattern.count("*"), config.pattern.count("M")
    kv_type, conv_type = kv_dtype or weight_dtype, conv_dtype or weight_dtype
    kv_token = kv_bytes(config, kv_type)
    ssm_layer = config.d_inner * config.ssm_state_size * ssm_dtype.itemsize if mamba else 0
    conv_layer = config.conv_dim * (config.conv_kernel - 1) * conv_type.itemsize if mamba else 0
    weights = count_parameters(config) * weight_dtype.itemsize
    room = None if budget is None else budget - weights
    report = MemoryReport(
        context=context,
        batch=batch,
        weights=weights,
        kv=attention * kv_token * context * batch,
        ssm=mamba * ssm_layer * batch,
        conv=mamba * conv_layer * batch,
        vllm=allocate(
            attention, mamba, context, kv_token, ssm_layer + conv_layer, room, mamba_cache_mode, config.chunk_size
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


def kv_bytes(config: HybridConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token in one attention layer."""
    return 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A card: memory in GiB (`usable_gib` is what a process can have of it), GB/s, dense bf16 TFLOP/s."""

    name: str
    total_gib: float
    usable_gib: float
    bandwidth_gb_s: float
    bf16_tflops: float
    compute_capability: str = ""
    multiprocessors: int = 132
    device: str = "cuda"

    @property
    def place(self) -> Place:
        """What of it the formulas ask for; a CPU works with as many threads as torch has."""
        processors = self.multiprocessors if self.device == "cuda" else torch.get_num_threads()
        return Place(self.device, processors, self.compute_capability or Place().capability)

    def budget(self, framework_share: float, reserve_gib: float, overhead_gib: float) -> float:
        """Bytes left for weights and caches: usable x (1 - share) - reserve - overhead."""
        return (self.usable_gib * (1 - framework_share) - reserve_gib - overhead_gib) * GIB


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
    attention, mamba = (letter in config.pattern for letter in "*M")
    ways: dict[str, dict[str, Any]] = {}
    if attention and report.load and report.load.kv_bytes > 1:
        ways["8-bit keys and values (vLLM: --kv-cache-dtype fp8)"] = {"kv_dtype": torch.float8_e4m3fn}
    if mamba and report.load and report.load.ssm_bytes > 2:
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


def flops_per_token(config: HybridConfig, context: int) -> float:
    """FLOPs (a multiply-add is two) of one token's forward pass in a sequence of `context` tokens: every matrix
    product, attention to half of the context on average, and the SSD scan in chunks. Embedding look-ups and
    element-wise work do not count."""
    products = config.vocab_size * config.hidden_size
    products += sum(config.pattern.count(kind) * size for kind, (_, size) in kind_sizes(config).items() if kind)
    attention = config.pattern.count("*") * config.num_attention_heads * config.head_dim * 2 * context / 2
    chunk, state = min(config.chunk_size, max(context, 1)), config.ssm_state_size
    scan = config.pattern.count("M") * (
        config.n_groups * state * chunk  # C B^T
        + config.d_inner * chunk  # (L o C B^T) x
        + 2 * config.d_inner * state  # into the state, and out of it
    )
    return 2.0 * (products + attention + scan)


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Tokens a second that a card would write for `batch` sequences at once, all of them together; seconds of the
    prefill of the batch, and of a decoding step half way through the output."""

    batch: int
    tokens_per_second: float
    prefill_seconds: float
    step_seconds: float


def throughput(
    config: HybridConfig,
    hardware: Hardware,
    *,
    input_tokens: int,
    output_tokens: int,
    batch: int | None = None,
    budget: float | None = None,
    compute_efficiency: float = 0.5,
    bandwidth_efficiency: float = 0.7,
    weight_dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    ssm_dtype: torch.dtype = torch.float32,
    conv_dtype: torch.dtype | None = None,
) -> Throughput | None:
    """A roofline estimate for `batch` requests of `input_tokens` that write `output_tokens` each; where `batch` is
    None, for as many as fit `budget` (bytes) at full length (one, where a model has no caches).

    Prefill and every decoding step take whichever is longer: their FLOPs at compute_efficiency x the card's bf16
    rate, or their bytes at bandwidth_efficiency x its bandwidth. A step reads all weights but the embedding (of which
    it needs a row a sequence), reads the keys and values so far, and reads and writes the SSM and convolution states;
    prefill reads the weights once, and the head works on the last token alone. Launches, sampling and the scheduler
    are not in it: it ranks configs on one card, and says nothing of a serving stack. The default efficiencies are
    assumptions, the bandwidth's such that the published 9B comes out within 2% of the 156.42 tokens/s measured on an
    A10G (arXiv 2508.14444: 8k in, 16k out, batch 8).

    None where the profile has no bandwidth or rate, or not one sequence fits.
    Raises InputError where tokens or batch are below 1, or an efficiency is not in (0, 1].
    """
    if input_tokens < 1 or output_tokens < 1 or (batch is not None and batch < 1):
        raise InputError(
            f"throughput: input_tokens ({input_tokens}), output_tokens ({output_tokens}) and batch ({batch})"
            " must be at least 1"
        )
    if not (0 < compute_efficiency <= 1 and 0 < bandwidth_efficiency <= 1):
        raise InputError(
            f"throughput: compute_efficiency ({compute_efficiency}) and bandwidth_efficiency ({bandwidth_efficiency})"
            " must be in (0, 1]"
        )
    if hardware.bandwidth_gb_s <= 0 or hardware.bf16_tflops <= 0:
        return None
    dtypes: dict[str, Any] = {
        "weight_dtype": weight_dtype, "kv_dtype": kv_dtype, "ssm_dtype": ssm_dtype, "conv_dtype": conv_dtype
    }  # fmt: skip
    if batch is None:
        if budget is None:
            raise InputError("throughput: give a batch, or a budget in bytes that the batch has to fit")
        one = memory(config, input_tokens + output_tokens, 1, chunk=None, **dtypes)
        batch = verdict(config, one, budget).largest_batch if one.total > one.weights else int(one.total <= budget)
        if batch < 1:
            return None
    rate = hardware.bf16_tflops * 1e12 * compute_efficiency
    bandwidth = hardware.bandwidth_gb_s * 1e9 * bandwidth_efficiency
    middle = input_tokens + output_tokens // 2
    report = memory(config, middle, batch, chunk=None, **dtypes)
    head = config.vocab_size * config.hidden_size
    weights = report.weights - (0 if config.tie_word_embeddings else head * weight_dtype.itemsize)
    head_flops = 2.0 * head
    prefill_flops = input_tokens * (flops_per_token(config, input_tokens) - head_flops) + head_flops
    prefill = max(batch * prefill_flops / rate, weights / bandwidth)
    # A step's attention looks back on all of the context, a prefill's on half of it: hence twice.
    step_flops = batch * flops_per_token(config, 2 * middle)
    step = max(step_flops / rate, (weights + report.kv + 2 * (report.ssm + report.conv)) / bandwidth)
    return Throughput(batch, batch * output_tokens / (prefill + output_tokens * step), prefill, step)
