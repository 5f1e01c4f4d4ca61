"""What a config costs: parameters, bytes, FLOPs, and whether it fits a card. No weights are needed.

Formulas: the sums of `axes.tensor_table`; key-value, SSM and convolution state as the layers keep them; vLLM's hybrid
allocator (vllm-project/vllm, v1/core/kv_cache_utils.py), which pads Mamba pages up to its attention block.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from .axes import tensor_table
from .config import HybridConfig
from .errors import InputError

GIB = 2**30


def count_parameters(config: HybridConfig) -> int:
    """Parameters, summed over the table of axes."""
    return sum(tensor.numel for tensor in tensor_table(config).values())


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
    table = tensor_table(config)
    products = sum(tensor.numel for tensor in table.values() if len(tensor.shape) == 2)
    if not config.tie_word_embeddings:
        products -= table["embeddings.weight"].numel
    attention = len(config.layers_of("*")) * config.num_attention_heads * config.head_dim * 2 * context / 2
    chunk, state = min(config.chunk_size, max(context, 1)), config.ssm_state_size
    scan = len(config.layers_of("M")) * (
        config.n_groups * state * chunk  # C B^T
        + config.d_inner * chunk  # (L o C B^T) x
        + 2 * config.d_inner * state  # into the state, and out of it
    )
    return 2.0 * (products + attention + scan)
