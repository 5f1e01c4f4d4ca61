"""What vLLM's hybrid allocator makes of a config: blocks, pages, requests, and the flags to start it with.

Source: vllm-project/vllm 0.32, vllm/v1/core/kv_cache_utils.py, vllm/platforms/interface.py and, for the check of
--max-num-seqs, vllm/config/compilation.py; flags: vllm/config/cache.py, and vllm/engine/arg_utils.py for the defaults.
Attention and Mamba layers share one pool of blocks. An attention block is made so many tokens long that a Mamba state
fits a page of it, the page of a Mamba layer is padded up to that, and layers are put in groups of equal size: a block
is one page of each layer of one group. The pool keeps one block, its null block, for itself. Letters: g layers a
group, t bytes of a token's keys and values in a layer.
"""

from __future__ import annotations

import dataclasses
import math

from ..errors import InputError
from .hardware import Hardware
from .state_formats import state_flags

# States of a request that a Mamba-2 layer keeps, by which of them are kept for a common beginning of prompts: the one
# that it has; or those of two blocks and, where a prefill goes beyond the end of one, that at the end
# (vllm/v1/kv_cache_interface.py, vllm/model_executor/layers/mamba/mamba_mixer2.py).
STATES = {"none": 1, "align": 3}
MODES = tuple(STATES)
LARGE_GIB, LARGEST_GIB = 70, 160  # memory of a card from which on vLLM takes more tokens at once


@dataclasses.dataclass(frozen=True)
class VllmReport:
    """What the allocator does with the cache: tokens a block, blocks and bytes of a request of that length, and
    (0 where no budget was given) of the budget: all blocks, the null block among them, requests of that length at
    once, and the largest --max-num-seqs and --max-model-len (whole blocks of tokens) with which it starts."""

    block_size: int
    bytes_per_request: int
    max_num_seqs: int = 0
    mode: str = "none"
    blocks_per_request: int = 0
    bytes_per_block: int = 0
    blocks: int = 0
    largest_max_num_seqs: int = 0
    largest_max_model_len: int = 0


def allocate(
    attention: int,
    mamba: int,
    context: int,
    kv_token: int,
    mamba_layer: int,
    headroom: float | None,
    mode: str,
) -> VllmReport:
    """For `attention` and `mamba` layers, t = `kv_token`, bytes of a Mamba layer's state, and `headroom` bytes free.

    Modes (--mamba-cache-mode): "none" keeps one state a request, "align" three. Raises InputError for another mode.
    """
    if mode not in MODES:
        raise InputError(f"vLLM: Mamba cache mode {mode!r} is unknown; known: {', '.join(MODES)}")
    headroom = max(headroom or 0, 0)
    if not attention:
        states = STATES[mode]
        per_request = mamba * mamba_layer * states
        blocks = int(headroom // (mamba * mamba_layer)) if mamba else 0
        requests = max(blocks - 1, 0) // states
        return VllmReport(0, per_request, requests, mode, states, mamba * mamba_layer, blocks, blocks)
    block = 16 * max(1, math.ceil(mamba_layer / (16 * kv_token)))
    small, large = sorted((attention, mamba or attention))
    group = large if large < 1.5 * small else small
    per_block = group * block * kv_token
    blocks = int(headroom // per_block)
    usable = max(blocks - 1, 0)

    def needed(tokens: int) -> int:
        return math.ceil(attention / group) * math.ceil(tokens / block) + math.ceil(mamba / group) * STATES[mode]

    per_request = per_block * needed(context)
    longest = 0  # in whole blocks of tokens, each of which costs at least one of the pool's
    low, high = 0, usable
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle * block) <= usable else (low, middle - 1)
    longest = low * block
    # Every sequence that decodes needs a Mamba block, or vLLM refuses to capture its CUDA graphs.
    at_most = blocks if mamba and longest else 0
    return VllmReport(
        block, per_request, usable // needed(context), mode, needed(context), per_block, blocks, at_most, longest
    )


def default_batched_tokens(card: Hardware) -> int:
    """--max-num-batched-tokens where nobody gives it, by the card's memory and name (vllm/engine/arg_utils.py)."""
    if card.device != "cuda":
        return 2048
    if card.total_gib >= LARGEST_GIB:
        return 16384
    return 8192 if card.total_gib >= LARGE_GIB and "a100" not in card.name else 2048


def sequences(report: VllmReport, card: Hardware, mamba: bool) -> int:
    """The --max-num-seqs to give. A step has a token of each sequence at least: vLLM refuses more sequences than tokens
    of a step (vllm/config/scheduler.py)."""
    return min(max(report.max_num_seqs, 1), batched_tokens(report, card, mamba))


def largest_sequences(report: VllmReport, card: Hardware, mamba: bool) -> int:
    """The largest --max-num-seqs that starts beside the other flags."""
    tokens = batched_tokens(report, card, mamba)
    return min(report.largest_max_num_seqs, tokens) if mamba else tokens


def batched_tokens(report: VllmReport, card: Hardware, mamba: bool) -> int:
    """Tokens of a step: the card's default, or a block where a step has to take a whole one at once (mode "align")."""
    default = default_batched_tokens(card)
    return max(default, report.block_size) if mamba and report.mode != "none" else default


def flags(
    report: VllmReport,
    card: Hardware,
    *,
    context: int,
    utilization: float,
    ssm_dtype: str,
    kv_dtype: str,
    dtype: str,
    mamba: bool,
    tensor_parallel: int = 1,
) -> list[str]:
    """The arguments of `vllm serve` for requests of `context` tokens. Prefix caching, and with it the Mamba cache mode,
    is given always: its default has changed between versions. Where a step has to take a whole block at once (mode
    "align"), it is given at least as many tokens."""
    found = [
        f"--dtype {dtype}",
        f"--max-model-len {context}",
        f"--max-num-seqs {sequences(report, card, mamba)}",
        f"--gpu-memory-utilization {math.floor(utilization * 1000) / 1000:g}",
        "--no-enable-prefix-caching" if report.mode == "none" else "--enable-prefix-caching",
    ]
    if tensor_parallel > 1:
        found.append(f"--tensor-parallel-size {tensor_parallel}")
    if kv_dtype != dtype:
        found.append(f"--kv-cache-dtype {'fp8' if kv_dtype.startswith('float8') else kv_dtype}")
    if mamba:
        found += state_flags(ssm_dtype, card)
        if report.mode != "none":
            found.append(f"--mamba-cache-mode {report.mode}")
            if (tokens := batched_tokens(report, card, mamba)) > default_batched_tokens(card):
                found.append(f"--max-num-batched-tokens {tokens}")
    return found
