"""What a config costs: parameters, bytes, FLOPs, tokens a second, and whether it fits a card. No weights are needed.

Formulas: the sums of `axes.tensor_table`; key-value, SSM and convolution state as the layers keep them; vLLM's hybrid
allocator (vllm-project/vllm, v1/core/kv_cache_utils.py), which pads Mamba pages up to its attention block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Mapping
from typing import Any

import torch

from .axes import tensor_table
from .config import HybridConfig
from .errors import InputError

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
class VllmReport:
    """What vLLM's allocator does with the cache: tokens a block, bytes a request of the asked length, and (0 where no
    budget was given) the requests that the budget's blocks hold: `max_num_seqs` may not exceed them."""

    block_size: int
    bytes_per_request: int
    max_num_seqs: int = 0


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes at a context length and batch: weights, key-value cache, SSM and convolution states."""

    context: int
    batch: int
    weights: int
    kv: int
    ssm: int
    conv: int
    vllm: VllmReport

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.ssm + self.conv


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
) -> MemoryReport:
    """Bytes that `batch` sequences of `context` tokens need at least. KV and convolution states follow the weights'
    dtype unless told otherwise. `budget` (bytes, weights included) is for vLLM's count of requests.

    Raises InputError where context or batch is below 1.
    """
    if context < 1 or batch < 1:
        raise InputError(f"memory: context ({context}) and batch ({batch}) must be at least 1")
    attention, mamba = len(config.layers_of("*")), len(config.layers_of("M"))
    kv_token = kv_bytes(config, kv_dtype or weight_dtype)
    ssm_layer = config.d_inner * config.ssm_state_size * ssm_dtype.itemsize if mamba else 0
    conv_width = config.conv_dim * (config.conv_kernel - 1) if mamba else 0
    conv_layer = conv_width * (conv_dtype or weight_dtype).itemsize
    weights = count_parameters(config) * weight_dtype.itemsize
    return MemoryReport(
        context=context,
        batch=batch,
        weights=weights,
        kv=attention * kv_token * context * batch,
        ssm=mamba * ssm_layer * batch,
        conv=mamba * conv_layer * batch,
        vllm=vllm(config, context, kv_token, ssm_layer + conv_layer, None if budget is None else budget - weights),
    )


def kv_bytes(config: HybridConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token in one attention layer."""
    return 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize


def vllm(config: HybridConfig, context: int, kv_token: int, mamba_layer: int, room: float | None) -> VllmReport:
    """vLLM's hybrid allocator, with its default (no prefix caching of Mamba states: one page a request and layer)."""
    attention, mamba = len(config.layers_of("*")), len(config.layers_of("M"))
    if not attention:
        per_request = mamba * mamba_layer
        return VllmReport(0, per_request, int(max(room or 0, 0) // per_request) if per_request else 0)
    block = 16 * max(1, math.ceil(mamba_layer / (16 * kv_token)))
    small, large = sorted((attention, mamba or attention))
    group = large if large < 1.5 * small else small
    pages = math.ceil(attention / group) * math.ceil(context / block) + math.ceil(mamba / group)
    per_page = group * block * kv_token
    per_request = per_page * pages
    return VllmReport(block, per_request, int(max(room or 0, 0) // per_request))


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A card: memory in GiB (`usable_gib` is what a process can have of it), GB/s, dense bf16 TFLOP/s."""

    name: str
    total_gib: float
    usable_gib: float
    bandwidth_gb_s: float
    bf16_tflops: float
    compute_capability: str = ""

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
    fixed = report.weights + report.ssm + report.conv
    per_token = report.kv // report.context
    context = -1 if not per_token and budget >= fixed else 0
    if per_token:
        context = max(0, int((budget - fixed) // per_token))
    per_sequence = (report.kv + report.ssm + report.conv) / report.batch
    batch = max(0, int((budget - report.weights) // per_sequence)) if per_sequence else 0
    return Verdict(report.total <= budget, budget, budget - report.total, context, batch)


def flops_per_token(config: HybridConfig, context: int) -> float:
    """FLOPs (a multiply-add is two) of one token's forward pass in a sequence of `context` tokens: every matrix
    product, attention to half of the context on average, and the SSD scan in chunks. Embedding look-ups and
    element-wise work do not count."""
    products = config.vocab_size * config.hidden_size
    products += sum(config.pattern.count(kind) * size for kind, (_, size) in kind_sizes(config).items() if kind)
    attention = len(config.layers_of("*")) * config.num_attention_heads * config.head_dim * 2 * context / 2
    chunk, state = min(config.chunk_size, max(context, 1)), config.ssm_state_size
    scan = len(config.layers_of("M")) * (
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
        one = memory(config, input_tokens + output_tokens, 1, **dtypes)
        batch = verdict(config, one, budget).largest_batch if one.total > one.weights else int(one.total <= budget)
        if batch < 1:
            return None
    rate = hardware.bf16_tflops * 1e12 * compute_efficiency
    bandwidth = hardware.bandwidth_gb_s * 1e9 * bandwidth_efficiency
    middle = input_tokens + output_tokens // 2
    report = memory(config, middle, batch, **dtypes)
    head = config.vocab_size * config.hidden_size
    weights = report.weights - (0 if config.tie_word_embeddings else head * weight_dtype.itemsize)
    head_flops = 2.0 * head
    prefill_flops = input_tokens * (flops_per_token(config, input_tokens) - head_flops) + head_flops
    prefill = max(batch * prefill_flops / rate, weights / bandwidth)
    # A step's attention looks back on all of the context, a prefill's on half of it: hence twice.
    step_flops = batch * flops_per_token(config, 2 * middle)
    step = max(step_flops / rate, (weights + report.kv + 2 * (report.ssm + report.conv)) / bandwidth)
    return Throughput(batch, batch * output_tokens / (prefill + output_tokens * step), prefill, step)
