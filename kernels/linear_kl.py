"""Head and loss in one: divergence from a teacher, or cross-entropy, without the [T, V] logits of a whole batch.

Tokens go through in chunks: two matrix products give a chunk's logits, the per-token sums and the gradient of the
logits follow in place, and two more products turn that into gradients of the hidden states and of the head, added
up in float32. On a GPU one Triton kernel does all between the products; the logits have the dtype of the hidden states
where a gradient is wanted, and are float32 where only values are. Sources: arXiv 1503.02531 (distillation and its T^2);
the idea of the fused head is Liger-Kernel's.
Shapes: [T] tokens, [V] vocabulary, [Hs] and [Ht] the hidden widths of student and teacher.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .divergence import DIVERGENCES, Divergence
from .fused_loss import accumulate, product
from .launch import Launch, takes_triton, triton_module
from .linear_kl_torch import Options, torch_linear_kl

IGNORED = -100
# On every device; elements of a row that a program takes at a time, warps, and blocks on their way at once.
BLOCK, WARPS, STAGES = 2048, 8, 2


class LinearKL(NamedTuple):
    """The loss, and per token [T] (no gradient, 0 where ignored): the divergence at the temperature (without the
    T^2), cross-entropies of student and teacher in nats (None without labels), and whether their argmaxes agree."""

    loss: Tensor
    kl: Tensor
    cross_entropy: Tensor | None
    teacher_cross_entropy: Tensor | None
    agreement: Tensor


class LinearCrossEntropy(NamedTuple):
    """The loss, and per token [T]: cross-entropy in nats (0 where ignored), and whether the label ranks first."""

    loss: Tensor
    cross_entropy: Tensor
    top1: Tensor


def linear_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    temperature: float = 1.0,
    divergence: str = "forward",
    labels: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = IGNORED,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    normalizer: Tensor | float | None = None,
    chunk_tokens: int | None = None,
) -> LinearKL:
    """Distillation loss of student_hidden [T, Hs] under student_head [V, Hs] against the teacher's [T, Ht], [V, Ht].

    loss = sum_t (kl_weight T^2 divergence_t + ce_weight cross_entropy_t) / normalizer, with the temperature T, over
    the tokens whose label [T] is not `ignore_index`, each times its `token_weights` [T] where they are given. The
    normalizer is by default the sum of the weights; give the whole batch's when this is a part of it.
    `divergence` is the option of a `divergence.Divergence`; of "mse" T divides the logits, too.
    Gradients reach the student's hidden states and head; the teacher gets none. Buffers are [chunk_tokens, V].

    Raises ValueError where shapes disagree or an option is unknown.
    """
    check_head("student", student_hidden, student_head)
    check_head("teacher", teacher_hidden, teacher_head)
    tokens, vocabulary = student_hidden.shape[0], student_head.shape[0]
    if teacher_hidden.shape[0] != tokens or teacher_head.shape[0] != vocabulary:
        raise ValueError(
            f"linear_kl: student has {tokens} tokens and a vocabulary of {vocabulary},"
            f" teacher {teacher_hidden.shape[0]} and {teacher_head.shape[0]}"
        )
    if divergence not in DIVERGENCES:
        raise ValueError(f"linear_kl: divergence is {divergence!r}, expected one of {', '.join(DIVERGENCES)}")
    if not temperature > 0:
        raise ValueError(f"linear_kl: temperature is {temperature}, expected more than 0")
    if ce_weight and labels is None:
        raise ValueError("linear_kl: ce_weight needs labels")
    weights, scale = weigh(tokens, labels, ignore_index, normalizer, student_hidden, token_weights)
    chunk_tokens = chunk_tokens or default_chunk(vocabulary, student_hidden)
    options = (temperature, DIVERGENCES[divergence], kl_weight, ce_weight, chunk_tokens)
    loss, kl, cross_entropy, teacher_cross_entropy, agreement = fused_loss(
        student_hidden, student_head, teacher_hidden, teacher_head, clean(labels, ignore_index), weights, scale, options
    )
    if labels is None:
        return LinearKL(loss, kl, None, None, agreement)
    return LinearKL(loss, kl, cross_entropy, teacher_cross_entropy, agreement)


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    ignore_index: int = IGNORED,
    normalizer: Tensor | float | None = None,
    chunk_tokens: int | None = None,
) -> LinearCrossEntropy:
    """sum_t cross_entropy_t / normalizer of hidden [T, H] under head [V, H] for labels [T]; see `linear_kl`."""
    check_head("model", hidden, head)
    weights, scale = weigh(hidden.shape[0], labels, ignore_index, normalizer, hidden, token_weights)
    options = (1.0, Divergence.FORWARD, 0.0, 1.0, chunk_tokens or default_chunk(head.shape[0], hidden))
    loss, _, cross_entropy, _, top1 = fused_loss(
        hidden, head, None, None, clean(labels, ignore_index), weights, scale, options
    )
    return LinearCrossEntropy(loss, cross_entropy, top1)


def default_chunk(vocabulary: int, hidden: Tensor) -> int:
    """Tokens a chunk. On a CPU at least 256, so that the products stay efficient, and about 16 MiB of float32 logits;
    on a GPU at least 2048, since every chunk reads and writes the whole gradient of the head."""
    if takes_triton(hidden):
        return max(2048, 2**28 // vocabulary)
    return max(256, 2**22 // vocabulary)


def fused_loss(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor | None,
    weights: Tensor,
    scale: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, divergence, cross-entropies of student and teacher, and whether the argmaxes agree; see `linear_kl`."""
    tensors = (hidden, head, teacher_hidden, teacher_head, labels, weights, scale)
    if not takes_triton(hidden):
        return torch_linear_kl(*tensors, options)
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, head)]
    return linear_kl_op(*tensors, *options, *needs)[:5]


def check_head(whose: str, hidden: Tensor, head: Tensor) -> None:
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"the {whose}'s hidden states and head must be [T, H] and [V, H],"
            f" not {tuple(hidden.shape)} and {tuple(head.shape)}"
        )


def weigh(
    tokens: int,
    labels: Tensor | None,
    ignore_index: int,
    normalizer: Tensor | float | None,
    hidden: Tensor,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights [T], 1 unless given or 0 where ignored, and one over the normalizer."""
    if labels is not None and tuple(labels.shape) != (tokens,):
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected ({tokens},)")
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weights = torch.ones(tokens, dtype=work, device=hidden.device)
    if labels is not None:
        weights = weights * (labels != ignore_index)
    if token_weights is not None:
        if tuple(token_weights.shape) != (tokens,):
            raise ValueError(f"token_weights has shape {tuple(token_weights.shape)}, expected ({tokens},)")
        weights = weights * token_weights
    if normalizer is None:
        normalizer = weights.sum()
    total = torch.as_tensor(normalizer, dtype=work, device=hidden.device)
    return weights, torch.where(total > 0, 1 / total, 0)


def clean(labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """Labels that can index: 0 where ignored (their weight is 0)."""
    return None if labels is None else labels.masked_fill(labels == ignore_index, 0)


@torch.library.custom_op("limbeck::linear_kl", mutates_args=())
def linear_kl_op(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor | None, teacher_head: Tensor | None, labels: Tensor | None,
    weights: Tensor, scale: Tensor, temperature: float, divergence: int, kl_weight: float, ce_weight: float,
    chunk_tokens: int, need_hidden: bool, need_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """By cuBLAS and Triton: what `fused_loss` gives, and gradients of hidden states and head (empty if not needed)."""
    tokens, need = hidden.shape[0], need_hidden or need_head
    _, _, _, _, first, dhidden, _ = linear_kl_shapes(hidden, head, need_hidden, need_head)
    kl, cross_entropy, teacher_cross_entropy = (hidden.new_zeros(tokens, dtype=torch.float32) for _ in range(3))
    total = torch.zeros(head.shape if need_head else 0, dtype=torch.float32, device=head.device)
    options = (temperature, Divergence(divergence), kl_weight, ce_weight, chunk_tokens)
    for start in range(0, tokens, chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, tokens))
        # The kernel overwrites logits with their gradient, which the next products want in the weights' dtype. With no
        # gradient wanted nothing is multiplied again, and the values get the products' float32 sums.
        logits = product(hidden[rows], head.T, full=not need)
        teacher = None
        if teacher_hidden is not None and teacher_head is not None:
            teacher = product(teacher_hidden[rows], teacher_head.T, full=not need)
        per_token = (kl[rows], cross_entropy[rows], teacher_cross_entropy[rows], first[rows])
        target = None if labels is None else labels[rows]
        chunk_launch(logits, teacher, target, weights[rows], per_token, options, need).enqueue(hidden)
        del teacher
        # 1 / normalizer comes last: a float16 or bfloat16 gradient divided by all of a batch's tokens may underflow.
        if need_hidden:
            dhidden[rows] = product(logits, head, full=True) * scale
        if need_head:
            accumulate(total, logits, hidden[rows])
        del logits  # before the next chunk's
    ignored = weights == 0  # their logits may be anything, and 0 times infinity is none
    for figure in (kl, cross_entropy, teacher_cross_entropy):
        figure.masked_fill_(ignored, 0)
    loss = ((kl_weight * temperature**2 * kl + ce_weight * cross_entropy) * weights).sum() * scale
    dhead = total.mul_(scale) if total.dtype == head.dtype else torch.mul(total, scale, out=head.new_empty(total.shape))
    return loss, kl, cross_entropy, teacher_cross_entropy, first & ~ignored, dhidden, dhead


def linear_kl_workspace(
    hidden: Tensor, head: Tensor, teacher: Tensor | None, chunk_tokens: int, need_hidden: bool, need_head: bool
) -> tuple[int, ...]:
    """Bytes at the highest moment within the operator, beside its answer: the head's gradient in float32, and a
    chunk's logits of both models, before the head's gradient is there in its own dtype."""
    rows, need = min(chunk_tokens, hidden.shape[0]), need_hidden or need_head
    width = hidden.element_size() if need else 4
    chunk = rows * (head.shape[0] * width * (1 if teacher is None else 2) + 4 * hidden.shape[1] * need_hidden)
    total = 4 * head.numel() * need_head
    if head.element_size() == 4:
        return (chunk,)  # the sum is the answer
    return total, max(chunk - head.numel() * head.element_size() * need_head, 0)


@linear_kl_op.register_fake
def linear_kl_shapes(hidden: Tensor, head: Tensor, *options: Any) -> tuple[Tensor, ...]:
    tokens, (need_hidden, need_head) = hidden.shape[0], options[-2:]
    return (
        hidden.new_empty((), dtype=torch.float32),
        *(hidden.new_empty(tokens, dtype=torch.float32) for _ in range(3)),
        hidden.new_empty(tokens, dtype=torch.bool),
        hidden.new_empty(hidden.shape if need_hidden else 0),
        head.new_empty(head.shape if need_head else 0),
    )


def chunk_launch(
    logits: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    weights: Tensor,
    per_token: tuple[Tensor, Tensor, Tensor, Tensor],
    options: Options,
    need_gradient: bool,
) -> Launch:
    """The kernel on a chunk's logits [t, V]; `per_token` receives divergence, cross-entropies and agreement."""
    temperature, divergence, kl_weight, ce_weight, _ = options
    kl, cross_entropy, teacher_cross_entropy, first = per_token
    arguments = {
        "student": logits, "teacher": teacher, "kl": kl,
        "labels": None if labels is None else labels.contiguous(), "weights": weights.contiguous(),
        "cross_entropy": cross_entropy, "teacher_cross_entropy": teacher_cross_entropy, "first": first,
        "vocabulary": logits.shape[1], "stride_student": logits.stride(0),
        "stride_teacher": 0 if teacher is None else teacher.stride(0),
        # T^2 of the loss, and 1 / T of the chain rule through logits / T
        "inverse_temperature": 1 / temperature, "kl_factor": kl_weight * temperature, "ce_factor": ce_weight,
        "DIVERGENCE": 0 if teacher is None else int(divergence),
        "LABELS": labels is not None, "CE": ce_weight != 0, "TEMPERED": temperature != 1, "GRADIENT": need_gradient,
        "BLOCK": BLOCK, "STAGES": STAGES,
    }  # fmt: skip
    return Launch(triton_module("linear_kl_triton").chunk_loss, (logits.shape[0],), arguments, WARPS, STAGES)


def keep_gradients(ctx, inputs, output) -> None:
    _, *others, dhidden, dhead = output
    ctx.save_for_backward(dhidden, dhead)
    ctx.mark_non_differentiable(*others, dhidden, dhead)
    ctx.set_materialize_grads(False)
    ctx.inputs = len(inputs)


def scale_gradients(ctx, dloss, *_):
    dhidden, dhead = ctx.saved_tensors
    scaled = [gradient * dloss if gradient.numel() else None for gradient in (dhidden, dhead)]
    return *scaled, *[None] * (ctx.inputs - 2)


linear_kl_op.register_autograd(scale_gradients, setup_context=keep_gradients)
