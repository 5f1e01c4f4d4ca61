"""Triton kernel of the loss on the logits of one chunk of tokens; see `linear_kl`.

A program takes one token and reads the vocabulary in blocks: once for the sums of the softmaxes (each lane keeps its
own running maximum, so that nothing crosses lanes inside the loop), once for a divergence that is part of its own
gradient (reverse, jsd), and once for the gradient, which takes the place of the student's logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .divergence import Divergence

NOTHING = tl.constexpr(0)  # no teacher: cross-entropy alone
FORWARD = tl.constexpr(Divergence.FORWARD.value)
MSE = tl.constexpr(Divergence.MSE.value)
REVERSE = tl.constexpr(Divergence.REVERSE.value)
JSD = tl.constexpr(Divergence.JSD.value)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def add_to_softmax(value, largest, total, raw_total, position, column, inverse_temperature, RAW: tl.constexpr):
    """Running maximum, sum of exp((value - maximum) / T), the same at T = 1, and where the maximum was first."""
    higher = value > largest
    step = -tl.abs(value - largest)  # one exponential serves both ways: the sum shrinks, or the new term is small
    small = tl.exp(step * inverse_temperature)
    total = tl.where(higher, total * small + 1, total + small)
    if RAW:
        small = tl.exp(step)
        raw_total = tl.where(higher, raw_total * small + 1, raw_total + small)
    return tl.where(higher, value, largest), total, raw_total, tl.where(higher, column, position)


@triton.jit
def close_softmax(largest, total, raw_total, position, inverse_temperature, RAW: tl.constexpr):
    """The largest logit m, log sum exp((logit - m) / T), the same at T = 1, and the first argmax.

    Kept apart from m, the logarithm of a probability near one is exact."""
    top = tl.max(largest, 0)
    log_total = tl.log(tl.sum(total * tl.exp((largest - top) * inverse_temperature), 0))
    raw_log_total = log_total
    if RAW:
        raw_log_total = tl.log(tl.sum(raw_total * tl.exp(largest - top), 0))
    return top, log_total, raw_log_total, tl.min(tl.where(largest == top, position, 2147483647), 0)


@triton.jit
def above_middle(d):
    """log((1 + e^d) / 2): by how much log((e^s + e^t) / 2) is above s, for d = t - s.

    Near zero by the series of d / 2 + log cosh(d / 2): a difference of two logarithms would leave only noise there."""
    square = d * d
    near = d / 2 + square * (1 / 8 - square * (1 / 192 - square * (1 / 2880)))
    far = tl.maximum(d, 0.0) + tl.log(1 + tl.exp(-tl.abs(d))) - LN2
    return tl.where(square < 0.25, near, far)


@triton.jit
def chunk_loss(
    student, teacher, labels, weights, kl, cross_entropy, teacher_cross_entropy, first,
    vocabulary, stride_student, stride_teacher, inverse_temperature, kl_factor, ce_factor,
    DIVERGENCE: tl.constexpr, LABELS: tl.constexpr, CE: tl.constexpr, TEMPERED: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_student
    if DIVERGENCE != NOTHING:
        teacher += row * stride_teacher
    RAW: tl.constexpr = TEMPERED and LABELS  # cross-entropies are at T = 1, whatever the divergence is at
    SUMMED_FIRST: tl.constexpr = (DIVERGENCE == REVERSE) | (DIVERGENCE == JSD)
    o_block = tl.arange(0, BLOCK)
    if LABELS:
        label = tl.load(labels + row)
        at_label = tl.load(student + label).to(tl.float32)
        if DIVERGENCE != NOTHING:
            teacher_at_label = tl.load(teacher + label).to(tl.float32)

    # 1. The softmaxes. Finite beginnings: the difference of two infinities would be NaN.
    s_top = tl.full([BLOCK], -1e30, tl.float32)
    t_top = tl.full([BLOCK], -1e30, tl.float32)
    s_sum = tl.zeros([BLOCK], tl.float32)
    t_sum = tl.zeros([BLOCK], tl.float32)
    s_raw = tl.zeros([BLOCK], tl.float32)
    t_raw = tl.zeros([BLOCK], tl.float32)
    s_at = tl.zeros([BLOCK], tl.int32)
    t_at = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
        column = start + o_block
        mask = column < vocabulary
        x = tl.load(student + column, mask=mask, other=-float("inf")).to(tl.float32)
        s_top, s_sum, s_raw, s_at = add_to_softmax(x, s_top, s_sum, s_raw, s_at, column, inverse_temperature, RAW)
        if DIVERGENCE != NOTHING:
            y = tl.load(teacher + column, mask=mask, other=-float("inf")).to(tl.float32)
            t_top, t_sum, t_raw, t_at = add_to_softmax(y, t_top, t_sum, t_raw, t_at, column, inverse_temperature, RAW)
    s_max, s_log, s_raw_log, s_first = close_softmax(s_top, s_sum, s_raw, s_at, inverse_temperature, RAW)
    t_max, t_log = s_max, s_log
    if DIVERGENCE != NOTHING:
        t_max, t_log, t_raw_log, t_first = close_softmax(t_top, t_sum, t_raw, t_at, inverse_temperature, RAW)
        tl.store(first + row, s_first == t_first)
        if LABELS:
            tl.store(teacher_cross_entropy + row, t_raw_log + (t_max - teacher_at_label))
    else:
        tl.store(first + row, s_first == label)
    if LABELS:
        tl.store(cross_entropy + row, s_raw_log + (s_max - at_label))

    # 2. Divergences whose gradient has their own sum in it: one more walk before the gradient's.
    own = 0.0
    if SUMMED_FIRST:
        own_part = tl.zeros([BLOCK], tl.float32)
        other_part = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
            column = start + o_block
            mask = column < vocabulary
            x = tl.load(student + column, mask=mask, other=0.0).to(tl.float32)
            y = tl.load(teacher + column, mask=mask, other=0.0).to(tl.float32)
            s = (x - s_max) * inverse_temperature - s_log
            t = (y - t_max) * inverse_temperature - t_log
            if DIVERGENCE == REVERSE:
                own_part += tl.where(mask, tl.exp(s) * (s - t), 0.0)
            else:
                own_part -= tl.where(mask, tl.exp(s) * above_middle(t - s), 0.0)
                other_part -= tl.where(mask, tl.exp(t) * above_middle(s - t), 0.0)
        own = tl.sum(own_part, 0)
        if DIVERGENCE == REVERSE:
            tl.store(kl + row, own)
        else:
            tl.store(kl + row, (own + tl.sum(other_part, 0)) / 2)

    # 3. The gradient, and the other divergences along with it. Each row is read before it is overwritten, by the same
    # program and lane: no other token's program touches it.
    if GRADIENT or (DIVERGENCE != NOTHING and not SUMMED_FIRST):
        if GRADIENT:
            weight = tl.load(weights + row)
        kl_part = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
            column = start + o_block
            mask = column < vocabulary
            x = tl.load(student + column, mask=mask, other=0.0).to(tl.float32)
            gradient = tl.zeros([BLOCK], tl.float32)
            if DIVERGENCE != NOTHING:
                y = tl.load(teacher + column, mask=mask, other=0.0).to(tl.float32)
                s = (x - s_max) * inverse_temperature - s_log
                t = (y - t_max) * inverse_temperature - t_log
                if DIVERGENCE == FORWARD:
                    p_teacher = tl.exp(t)
                    kl_part += tl.where(mask, p_teacher * (t - s), 0.0)
                    if GRADIENT:
                        gradient = (tl.exp(s) - p_teacher) * kl_factor
                elif DIVERGENCE == MSE:
                    difference = tl.where(mask, (x - y) * inverse_temperature, 0.0)
                    kl_part += difference * difference
                    gradient = difference * (2 * kl_factor / vocabulary)
                elif DIVERGENCE == REVERSE:
                    gradient = tl.exp(s) * (s - t - own) * kl_factor
                else:
                    tl.static_assert(DIVERGENCE == JSD)
                    gradient = -tl.exp(s) * (above_middle(t - s) + own) * (kl_factor / 2)
            if GRADIENT:
                if CE:
                    gradient += (tl.exp(x - s_max - s_raw_log) - tl.where(column == label, 1.0, 0.0)) * ce_factor
                # An ignored token's logits may be anything, and 0 times infinity is none.
                gradient = tl.where(weight == 0, 0.0, gradient * weight)
                tl.store(student + column, gradient.to(student.dtype.element_ty), mask=mask)
        if DIVERGENCE == FORWARD:
            tl.store(kl + row, tl.sum(kl_part, 0))
        elif DIVERGENCE == MSE:
            tl.store(kl + row, tl.sum(kl_part, 0) / vocabulary)
