"""What of a generating model's memory comes and goes: the tensors of a prefill chunk and of a decoding step.

The sums follow `generate.prefill`, `hybrid.HybridLM.hidden_states`, `decode.Step` and the mixers line by line: for each
layer the few moments that may be the highest, with what is live then. `simulate` counts the same by running them. A
CPU computes in float32, and its torch paths keep more at once than the Triton kernels, which work in registers. A GPU
takes FlashAttention: bfloat16 or float16, head_dim a multiple of 8.
Letters: [B] batch, [T] tokens of the step, [L] tokens with the past.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ...kernels.attention import cpu_workspace, decode_workspace, flash_workspace
from ...kernels.causal_conv1d import Blocks
from ..config import HybridConfig
from ..errors import InputError
from .hardware import Place, round_up


def check_load(context: int, batch: int, chunk: int) -> None:
    if context < 1 or batch < 1 or chunk < 1:
        raise InputError(f"memory: context ({context}), batch ({batch}) and chunk ({chunk}) must be at least 1")


@dataclasses.dataclass(frozen=True)
class Step:
    """One call of the model: B sequences of T tokens each, L with the past, and the bytes of a number."""

    config: HybridConfig
    batch: int
    tokens: int
    length: int
    element: int
    ssm_element: int
    place: Place

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    def sum(self, *elements: int) -> int:
        """Bytes of tensors of so many elements each."""
        return self.bytes(*(count * self.element for count in elements))

    def bytes(self, *sizes: int) -> int:
        return sum(round_up(size, self.place) for size in sizes)

    def peak(self) -> int:
        """The highest moment of the layers, of the final norm, and of the rest of the prompt's positions."""
        stream = self.sum(self.rows * self.config.hidden_size)
        # The embedding and the stream are both held; u, what the mixer reads, is the third: but in the first layer.
        ends = [3 * stream]
        for letter in set(self.config.pattern):
            held = 3 if letter in self.config.pattern[1:] else 2
            ends += [held * stream + moment for moment in MOMENTS[letter](self)]
        return max(ends) + self.positions()

    def positions(self) -> int:
        """Rotary angles, and a CPU's mask over the past: there from the first layer to the last."""
        config, past = self.config, self.length - self.tokens
        size = 0
        if config.rope_theta is not None and "*" in config.pattern:
            size += 2 * self.bytes(4 * self.tokens * config.head_dim // 2)
        if self.place.device == "cpu" and "*" in config.pattern and past and self.tokens > 1:
            size += self.tokens * self.length
        return size


def mlp_moments(step: Step) -> Iterator[int]:
    inner = step.sum(step.rows * step.config.intermediate_size)
    if step.config.gated_mlp:
        yield 3 * inner  # gate, up and their product
    yield 2 * inner + step.sum(step.rows * step.config.hidden_size)


def attention_moments(step: Step) -> Iterator[int]:
    config, rows, place = step.config, step.rows, step.place
    heads, size = config.num_attention_heads, config.head_dim
    q, k = (step.sum(rows * count * size) for count in (heads, config.num_key_value_heads))
    yield q + 2 * k
    if config.qk_norm:
        yield q + 2 * k + q + step.bytes(4 * rows * heads)
    if config.rope_theta is not None:
        # In float32: the tensor (a CPU's is that already), both halves and what they are made of, then the whole.
        turned = (12 if step.element < 4 else 8) * rows * size
        yield q + 2 * k + step.bytes(turned * heads)
        yield 2 * q + 2 * k + step.bytes(turned * config.num_key_value_heads)
    if place.device == "cpu":
        mask = 4 * step.tokens * step.length if step.tokens > 1 and step.length > step.tokens else 0
        work = [mask, 4 * rows * heads, *cpu_workspace(step.tokens, step.length, size, place.processors)]
    elif step.tokens == 1:
        work = [*decode_workspace(step.batch, heads, config.num_key_value_heads, size, place.processors)]
    else:
        split = flash_workspace(step.batch, heads, step.tokens, step.length, size, place.processors)
        work = [4 * rows * heads, 1, 1, *split]  # log-sum-exp; seed and offset of the dropout that there is not
    yield 2 * q + step.bytes(*work)
    yield 2 * q + step.sum(rows * config.hidden_size)


def mamba_moments(step: Step) -> Iterator[int]:
    config, rows, batch = step.config, step.rows, step.batch
    projected = step.sum(rows * (config.d_inner + config.conv_dim + config.mamba_num_heads))
    convolved, inner = step.sum(rows * config.conv_dim), step.sum(rows * config.d_inner)
    out = step.sum(rows * config.hidden_size)
    if step.tokens == 1:
        yield from token_moments(step, projected, convolved, inner, out)
        return
    state = step.bytes(4 * batch * config.d_inner * config.ssm_state_size)
    groups = step.bytes(4 * rows * config.n_groups)
    if step.place.device == "cpu":
        yield from cpu_scan_moments(step, projected + convolved + inner + state)
        groups *= 2
    last = step.sum(batch * config.conv_dim * (config.conv_kernel - 1))
    yield projected + convolved + inner + state + last + step.bytes(4 * config.mamba_num_heads)
    yield projected + convolved + 2 * inner + state + max(groups, out)


def token_moments(step: Step, projected: int, convolved: int, inner: int, out: int) -> Iterator[int]:
    """Of `Mamba2Mixer.step`."""
    config, batch = step.config, step.batch
    held = projected + convolved + prepared(step)
    if step.place.device == "cpu":
        yield held + 8 * batch * config.conv_kernel * config.conv_dim
        wide = 4 * batch * config.d_inner * config.ssm_state_size if step.ssm_element != 4 else 0
        yield held + wide + 3 * inner
    yield held + 2 * inner + max(step.bytes(4 * batch * config.n_groups), out)


def prepared(step: Step) -> int:
    """What a `MambaStep` makes ready: the convolution's weight in another order, and A."""
    config = step.config
    return step.sum(config.conv_kernel * config.conv_dim) + step.bytes(4 * config.mamba_num_heads)


def decoder_peak(step: Step, width: int) -> int:
    """The highest moment of `decode.Step` on a GPU, from when it is bound to its graph's capture, beside two sets of
    logits of `width` bytes: at its end both are there, before it one."""
    config, batch = step.config, step.batch
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    stream = step.sum(batch * config.hidden_size)
    moments = [2 * stream]
    if "-" in config.pattern:
        moments += [2 * stream + moment for moment in mlp_moments(step)]
    if "*" in config.pattern:
        q, k = (step.sum(batch * count * size) for count in (heads, groups))
        work = step.bytes(*decode_workspace(batch, heads, groups, size, step.place.processors))
        turned = step.bytes(12 * batch * heads * size) if config.rope_theta is not None else 0
        moments.append(2 * stream + q + 2 * k + max(q + max(work, stream), turned))
    if "M" in config.pattern:
        one = [step.sum(batch * count) for count in (
            config.d_inner + config.conv_dim + config.mamba_num_heads, config.conv_dim, config.d_inner
        )]  # fmt: skip
        state = step.bytes(batch * config.d_inner * config.ssm_state_size * step.ssm_element)
        state += step.sum(batch * config.conv_dim * (config.conv_kernel - 1))
        last = max(step.bytes(4 * batch * config.n_groups), stream)
        moments.append(2 * stream + one[0] + one[1] + 2 * one[2] + last + state)
    places = step.bytes(8 * batch * groups, 8 * batch) if "*" in config.pattern else 0
    if config.rope_theta is not None and "*" in config.pattern:
        places += 2 * step.bytes(4 * batch * size // 2)
    held = step.bytes(16 * batch, 8 * batch) + config.pattern.count("M") * prepared(step)
    return held + places + max(3 * stream, max(moments) - width)


def cpu_scan_moments(step: Step, held: int) -> Iterator[int]:
    """Of `torch_conv` and `torch_scan`, float32 and float64; `held`: projection, convolution, y and state."""
    config, rows, batch = step.config, step.rows, step.batch
    heads, inner = config.mamba_num_heads, config.d_inner
    block = min(Blocks.tokens, step.tokens)
    own = 4 * (config.conv_kernel * config.conv_dim + (2 * block + config.conv_kernel - 1) * config.conv_dim)
    state = 4 * batch * inner * config.ssm_state_size
    yield held - 4 * rows * inner - state + own
    limited = config.dt_limit != (0.0, float("inf"))
    held += 4 * batch * config.conv_dim * (config.conv_kernel - 1) + 4 * heads + (20 if limited else 16) * rows * heads
    tokens = min(config.chunk_size, step.tokens)
    last = tokens if step.tokens > tokens else 0  # the answer of the chunk before is still held
    part = 4 * batch * tokens * inner
    held += part if last else 0
    pairs, each = batch * heads * tokens**2, batch * heads * tokens
    yield held + 12 * pairs + 8 * each
    group = 4 * batch * tokens * config.n_groups * config.ssm_state_size
    yield held + 4 * pairs + 8 * each + 5 * part + group + state
    yield held + 4 * pairs + 8 * each + 3 * part + 2 * state


MOMENTS = {"M": mamba_moments, "*": attention_moments, "-": mlp_moments}


@dataclasses.dataclass(frozen=True)
class Transient:
    """Bytes at the highest moment of the prefill and of a decoding step, that step's two sets of logits (the last and
    the next) apart. 0 where a context of one token decodes nothing."""

    prefill: int
    decode: int
    logits: int

    @property
    def peak(self) -> int:
        return max(self.prefill, self.decode + self.logits)


def transient(
    config: HybridConfig, context: int, batch: int, chunk: int, element: int, ssm_element: int, place: Place
) -> Transient:
    """Of `batch` sequences of `context` tokens, the last one decoded, the others prefilled in chunks. Chunks differ by
    their past alone: the first, the last whole one and the rest behind it are looked at."""
    element = 4 if place.device == "cpu" else element
    tokens = max(context - 1, 1)
    whole, rest = divmod(tokens, chunk)

    def step(count: int, length: int) -> Step:
        return Step(config, batch, count, length, element, ssm_element, place)

    first = step(min(chunk, tokens), min(chunk, tokens))
    width = first.sum(batch * config.vocab_size)
    moments = [first.peak()]
    held = first.sum(first.rows * config.hidden_size)  # what the chunk before gave
    if whole > 1:
        moments.append(held + step(chunk, whole * chunk).peak())
    if whole and rest:
        moments.append(held + step(rest, tokens).peak())
    final = step(rest or chunk, tokens)
    moments.append(final.sum(final.rows * config.hidden_size) + width)
    if context == 1:
        return Transient(max(moments), 0, 0)
    one = step(1, context)
    if place.device == "cuda":
        return Transient(max(moments), decoder_peak(one, width), 2 * width)
    decode = max(one.peak() - width, final.sum(batch * config.hidden_size))
    return Transient(max(moments), decode + first.bytes(8 * batch), 2 * width)
