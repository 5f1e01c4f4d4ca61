"""What losses on hidden states and a head share: the chunks of tokens of the torch path, and products of both paths.

Shapes: [T] tokens, [t] tokens of a chunk or a piece of one, [V] vocabulary, [H] hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .linear import linear
from .products import CHOSEN, narrowed
from .tracing import STATE, iterations

CACHED = 2**19  # elements of the logits that a CPU works through at a time, so that they stay in its cache
VOCABULARY_BLOCK = 16384  # rows of the head's gradient at a time, where cuBLAS cannot add to float32 itself

# Works through a piece's logits [t, V] in place: they give way to their gradient times the factors [t, 1] where that is
# needed, `values` [F, t] receives the figures, and returns whether the argmaxes agree [t]. The slices are the
# piece's place in its chunk and among all tokens.
Piece = Callable[[Tensor, slice, slice, Tensor, Tensor, bool], Tensor]


class ChunkedLoss(torch.autograd.Function):
    """Values and gradients together, chunk by chunk: the loss is a number, so that its gradients are known up to the
    factor that arrives later. `open_chunk(rows)` gives what works through the chunk's pieces; the last of the
    `figures` is the loss per token. Answers (loss, the other figures [T]..., agreement [T])."""

    @staticmethod
    def forward(ctx, hidden, head, weights, scale, figures, chunk_tokens, open_chunk):
        tokens, work = hidden.shape[0], weights.dtype
        need_hidden, need_head = ctx.needs_input_grad[:2]
        dtypes = hidden.dtype, head.dtype
        if need_hidden or need_head:
            hidden, head = narrowed(tokens, hidden, head)
        values = torch.zeros(figures, tokens, dtype=work, device=hidden.device)
        first = torch.empty(tokens, dtype=torch.bool, device=hidden.device)
        dhidden = torch.empty_like(hidden, dtype=dtypes[0]) if need_hidden else None
        # float32 whatever the head's dtype: a sum over many chunks would stop growing in bfloat16's eight bits.
        dhead = torch.zeros(head.shape, dtype=work, device=head.device) if need_head else None
        size = max(1, CACHED // head.shape[0])
        for start in iterations(range(0, tokens, chunk_tokens)):
            rows = slice(start, min(start + chunk_tokens, tokens))
            logits = linear(hidden[rows], head).to(work)
            piece: Piece = open_chunk(rows)
            # Products want many rows at once, the softmaxes want their logits in the cache: two sizes of blocks.
            for begin in iterations(range(0, logits.shape[0], size)):
                inner = slice(begin, min(begin + size, logits.shape[0]))
                outer = slice(start + inner.start, start + inner.stop)
                factors = weights[outer, None] * scale
                need = need_hidden or need_head
                first[outer] = piece(logits[inner], inner, outer, values[:, outer], factors, need)
                if need:  # an ignored token's logits may be anything, and 0 times infinity is none
                    logits[inner].masked_fill_(factors == 0, 0)
            gradient = logits.to(head.dtype) if need_hidden or need_head else logits
            if dhidden is not None:
                dhidden[rows] = gradient @ head
            if dhead is not None:
                accumulate(dhead, gradient.to(hidden.dtype), hidden[rows])
            del logits, gradient, piece  # before the next chunk's
        values.masked_fill_(weights == 0, 0)  # an ignored token's figures are of whatever label 0 would be
        loss = (values[-1] * weights).sum() * scale
        # The gradients are kept, and not the logits: [T, H] and [V, H] in place of [T, V].
        ctx.save_for_backward(dhidden, dhead)
        ctx.dtypes = dtypes
        outputs = (*values[:-1].unbind(), first & (weights != 0))
        ctx.mark_non_differentiable(*outputs)
        return loss, *outputs

    @staticmethod
    def backward(ctx, dloss, *_):
        scaled = [
            None if gradient is None else (gradient * dloss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, *[None] * 5


def gradients_wanted(hidden: Tensor, head: Tensor) -> bool:
    """Whether a loss is to give gradients of them; products for values alone stay float32."""
    return torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)


def product(a: Tensor, b: Tensor, full: bool) -> Tensor:
    """a b, and in float32 where `full`, straight from the product's float32 sums."""
    if not full or a.dtype == torch.float32:
        return a @ b
    return torch.ops.aten.mm.dtype(a, b, torch.float32) if a.device.type == "cuda" else a.float() @ b.float()


def accumulate(total: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """total [V, H] += dlogits^T [V, t] hidden [t, H], in float32."""
    if STATE.gpu:  # adds without a tensor beside, whatever the dtypes
        return
    if hidden.dtype == total.dtype:
        total.addmm_(dlogits.T, hidden)
    elif adds_to_float32(hidden.device, hidden.dtype):
        torch.ops.aten.addmm.dtype_out(total, dlogits.T, hidden, torch.float32, out=total)
    else:
        for part, rows in zip(total.split(VOCABULARY_BLOCK), dlogits.T.split(VOCABULARY_BLOCK), strict=True):
            part += product(rows, hidden, full=not CHOSEN.narrow)


@functools.cache
def adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch's addmm takes a float32 sum beside bfloat16 or float16 factors (some versions refuse)."""
    if device.type != "cuda":
        return False
    total = torch.ones(16, 16, device=device)
    factor = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, factor, factor, torch.float32, out=total)
    except (RuntimeError, NotImplementedError):
        return False
    return bool((total == 17).all())
