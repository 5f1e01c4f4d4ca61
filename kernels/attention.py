"""Grouped-query attention: of a whole prompt, and of one token over a key-value cache.

On a GPU one token takes flash-decoding (arXiv 2311.01282): the cache is split among programs, and their shares are
added up in a fixed order. A prompt takes torch's SDPA, with packed documents FlexAttention, which skips the blocks of
other documents and needs no [T, L] mask. A CPU takes SDPA always; one token's query heads stand there as that many
tokens of their key-value head, so that keys and values are not repeated for them.
Shapes: [B] batch, [T] query tokens, [L] tokens to look at, [H] query heads, [K] key-value heads, [D] head_dim.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .launch import Launch, capability, power_of_two, takes_triton, triton_module
from .rows import cdiv, multiprocessors
from .tracing import STATE

# Tokens that a program takes at a time, and its warps, by bytes an element; and how many such blocks are on their way
# at once, by compute capability: two stages of keys and values fit the 99 KiB of 86 and 89 twice over. float32 has no
# tensor cores at full precision, and needs the threads for its registers.
BLOCK = {2: (64, 4), 4: (32, 8)}
STAGES = {80: 3, 86: 2, 89: 2, 90: 3, 100: 1, 120: 1}
MOST_SPLITS, DOCUMENT_BLOCK = 64, 128


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v [B, H, T, D] of q [B, H, T, D] over k and v [B, K, L, D].

    Without a mask token t sees all up to token L - T + t. A mask is a tensor of bools [B or 1, 1, T, L], or what
    `document_mask` gives. Query head h belongs to key-value head h K / H.
    """
    tokens, past = q.shape[2], k.shape[2] - q.shape[2]
    if mask is None and tokens == 1 and takes_triton(q) and not (torch.is_grad_enabled() and q.requires_grad):
        return decode_attention(q.squeeze(2), k, v).unsqueeze(2)
    if mask is None and tokens == 1 and not torch.is_grad_enabled():
        return grouped(q.squeeze(2), k, v).unsqueeze(2)
    if mask is not None and not isinstance(mask, Tensor):
        return flex_attention()(q, k, v, block_mask=mask, enable_gqa=True)
    if mask is None and past and tokens > 1:
        flash = q.dtype in (torch.bfloat16, torch.float16) and q.shape[3] % 8 == 0
        if STATE.gpu or (q.device.type == "cuda" and flash):
            # SDPA's own "causal" is aligned to the first token; that of the kernel that it calls to the last.
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        index = torch.arange(k.shape[2], device=q.device)
        mask = index <= index[past:, None]
    causal = mask is None and tokens > 1
    q = q if q.stride(-1) == 1 else q.contiguous()  # else a CPU's SDPA would copy keys and values for every query head
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """[B, H, D] of one query token a sequence q [B, H, D] over k and v [B, K, L, D], any strides; without gradient.

    `lengths` [B] says how many tokens of each sequence count (None: all L; of none the answer is 0). Raises ValueError
    where shapes disagree.
    """
    batch, heads, size = q.shape
    if k.shape != v.shape or k.dim() != 4 or (k.shape[0], k.shape[3]) != (batch, size) or heads % k.shape[1]:
        raise ValueError(
            f"decode_attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together"
        )
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"decode_attention: lengths has shape {tuple(lengths.shape)}, expected ({batch},)")
    if takes_triton(q):
        return decode_attention_op(q, k, v, lengths)
    if lengths is None:
        return grouped(q, k, v)
    # Neighbours of equal length go together, and nothing beyond a length is read: what lies there may be NaN.
    y = torch.zeros_like(q)
    start = 0
    for length, run in itertools.groupby(lengths.tolist()):
        count = len(list(run))
        if length:
            k_run, v_run = (tensor[start : start + count, :, :length] for tensor in (k, v))
            if count == batch:
                return grouped(q, k_run, v_run)
            y[start : start + count] = grouped(q[start : start + count], k_run, v_run)
        start += count
    return y


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, D] of q [B, H, D] over all of k and v [B, K, L, D]."""
    q_grouped = q.reshape(q.shape[0], k.shape[1], q.shape[1] // k.shape[1], q.shape[2])
    return F.scaled_dot_product_attention(q_grouped, k, v).reshape(q.shape)


@torch.library.custom_op("limbeck::decode_attention", mutates_args=())
def decode_attention_op(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    """decode_attention by Triton."""
    y = q.new_empty(q.shape)
    if q.numel():
        for launch in decode_launches(q, k, v, lengths, y):
            launch.enqueue(q)
    return y


decode_attention_op.register_fake(lambda q, k, v, lengths: q.new_empty(q.shape))


def decode_launches(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, y: Tensor) -> tuple[Launch, Launch]:
    """The shares, and their sum. How many shares there are depends on batch, heads and device alone, so that a cache
    that grows compiles nothing anew."""
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    batch, heads, size = q.shape
    groups = k.shape[1]
    splits = decode_splits(batch, groups, multiprocessors(q.device))
    parts = torch.empty((batch, heads, splits, size), dtype=torch.float32, device=q.device)
    logs = torch.empty((batch, heads, splits), dtype=torch.float32, device=q.device)
    block = max(power_of_two(size), 16)
    tokens, warps = BLOCK[q.element_size()]
    stages = STAGES[capability(q.device)]
    kernels = triton_module("attention_triton")
    arguments = {
        "q": q, "k": k, "v": v, "lengths": None if lengths is None else lengths.contiguous(), "parts": parts,
        "logs": logs, "length": k.shape[2], "scale": size**-0.5, "stride_qb": q.stride(0), "stride_qh": q.stride(1),
        "stride_kb": k.stride(0), "stride_kh": k.stride(1), "stride_kt": k.stride(2),
        "stride_vb": v.stride(0), "stride_vh": v.stride(1), "stride_vt": v.stride(2),
        "HEADS": groups, "GROUP": heads // groups, "SIZE": size, "SPLITS": splits,
        "BLOCK_G": max(power_of_two(heads // groups), 16), "BLOCK_D": block, "BLOCK_T": tokens, "STAGES": stages,
    }  # fmt: skip
    join = {"parts": parts, "logs": logs, "y": y, "SIZE": size, "SPLITS": splits, "BLOCK_D": block}
    return (
        Launch(kernels.decode_parts, (batch * groups, splits), arguments, warps, stages),
        Launch(kernels.decode_join, (batch * heads,), join, 4, 1),
    )


def decode_splits(batch: int, groups: int, processors: int) -> int:
    """Shares of the cache, such that about two programs fall to each multiprocessor."""
    return min(power_of_two(cdiv(2 * processors, batch * groups)), MOST_SPLITS)


def decode_workspace(batch: int, heads: int, groups: int, size: int, processors: int) -> tuple[int, int]:
    """Bytes of the two buffers that `decode_launches` fills beside its answer: the shares, and their logarithms."""
    shares = batch * heads * decode_splits(batch, groups, processors)
    return 4 * shares * size, 4 * shares


def flash_workspace(batch: int, heads: int, tokens: int, length: int, size: int, processors: int) -> tuple[int, int]:
    """Bytes of the two float32 buffers of torch's FlashAttention where it shares few queries' keys out, else (0, 0).

    Its rule (Dao-AILab/flash-attention, csrc/flash_attn/flash_api.cpp, num_splits_heuristic): the fewest shares, up to
    128, that keep the multiprocessors, taken twice, busy for 85% of the best that any number would."""
    blocks = batch * heads * cdiv(tokens, 64)
    parts = cdiv(length, 256 if size <= 64 else 128 if size <= 128 else 64)
    slots = 2 * processors
    if blocks >= 0.8 * slots:
        return 0, 0
    numbers = [n for n in range(1, min(128, slots, parts) + 1) if n == 1 or cdiv(parts, n) != cdiv(parts, n - 1)]
    busy = {n: blocks * n / slots / cdiv(blocks * n, slots) for n in numbers}
    splits = next(n for n in numbers if busy[n] >= 0.85 * max(busy.values()))
    rows = splits * batch * heads * tokens if splits > 1 else 0
    return 4 * rows * cdiv(size, 32) * 32, 4 * rows


def flash_backward_workspace(q: Tensor, k: Tensor) -> tuple[int, ...]:
    """Bytes of torch's FlashAttention backward beside its answer: the queries' gradient in float32, and where query
    heads share keys and values, the gradients of these for each query head."""
    expanded = q.numel() * q.element_size() if k.shape[1] < q.shape[1] else 0
    return 4 * q.numel(), expanded, expanded


def cpu_workspace(tokens: int, length: int, size: int, threads: int) -> tuple[int]:
    """Bytes of the float32 buffer that torch's FlashAttention on a CPU fills beside its answer: for each thread the
    scores, maxima, sums and answers of a block of queries (pytorch, aten/src/ATen/native/cpu/FlashAttentionKernel.cpp).
    """
    block = min(tokens, 256 if tokens >= 768 else 64 if tokens >= 192 else 32)
    return (4 * threads * block * (min(length, 512) + 2 + size),)


@functools.cache
def flex_attention() -> Callable[..., Tensor]:
    """FlexAttention, compiled: without that it would fill in all scores."""
    from torch.nn.attention import flex_attention as flex

    return torch.compile(flex.flex_attention)


def document_mask(document: Tensor, past: int = 0) -> Any:
    """FlexAttention's mask of packed documents: causal, and inside one document; `document` [B, past + T] counts
    upwards, and the last T tokens are queries.

    Documents are runs, so the blocks that a block of queries needs are a range that ends with its own tokens.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = query + past
        return (own >= key) & (document[batch, own] == document[batch, key])

    length = document.shape[1]
    begins, ends = block_ends(0, length, document.device)  # [keys' blocks]
    from_, to = block_ends(past, length, document.device)  # [queries' blocks]
    first, last = document[:, begins], document[:, ends - 1]  # the documents that a block begins and ends with
    own_first, own_last = document[:, from_], document[:, to - 1]
    before = ends <= from_[:, None]  # [queries' blocks, keys' blocks]: all keys come before all queries
    whole = (to - from_ == DOCUMENT_BLOCK)[:, None]
    full = before & whole & (first[:, None, :] == own_last[:, :, None])
    partly = (begins < to[:, None]) & (last[:, None, :] >= own_first[:, :, None]) & ~full
    return BlockMask.from_kv_blocks(
        *listed(partly), *listed(full), BLOCK_SIZE=DOCUMENT_BLOCK, mask_mod=sees, seq_lengths=(length - past, length)
    )


def block_ends(start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the blocks of tokens start to stop begin, and where they end."""
    begins = torch.arange(start, stop, DOCUMENT_BLOCK, device=device)
    return begins, (begins + DOCUMENT_BLOCK).clamp(max=stop)


def listed(needed: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries needs [B, 1, blocks], and which: those first, in their order."""
    needed = needed[:, None]
    order = needed.int().argsort(dim=-1, descending=True, stable=True)
    return needed.sum(-1, dtype=torch.int32), order.int()
