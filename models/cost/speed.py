"""How fast a config would run on a card, by the card's rates; `timing` measures a model. No weights are needed."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from ..config import HybridConfig
from ..errors import InputError
from .hardware import Hardware
from .inference import memory, verdict
from .parameters import kind_sizes, unused, weight_bytes
from .ranks import rank_config

if TYPE_CHECKING:
    from .stored_weights import StoredWeights

# Shares of a card's rates that generation is taken to reach where nothing is measured; `throughput` says why these.
COMPUTE_EFFICIENCY, BANDWIDTH_EFFICIENCY = 0.5, 0.7


def flops_per_token(config: HybridConfig, context: int) -> float:
    """FLOPs (a multiply-add is two) of one token's forward pass in a sequence of `context` tokens: every matrix
    product (of experts those that are chosen), attention to half of the context on average, and the SSD scan in chunks.
    Embedding look-ups and element-wise work do not count."""
    products = config.vocab_size * config.hidden_size - unused(config, 1)
    products += sum(config.pattern.count(kind) * size.matrices for kind, size in kind_sizes(config).items() if kind)
    work = sum(config.kinds.count(kind) * kind.work(config, context) for kind in dict.fromkeys(config.kinds))
    return 2.0 * (products + work)


def training_flops(
    student: HybridConfig, teacher: HybridConfig | None, context: int, checkpointing: bool = False
) -> float:
    """FLOPs of a token in training on rows of `context` tokens: three passes of the student, a fourth where layers run
    again in the backward, and one of the teacher."""
    passes = (3 + checkpointing) * flops_per_token(student, context)
    return passes + (0.0 if teacher is None else flops_per_token(teacher, context))


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
    compute_efficiency: float = COMPUTE_EFFICIENCY,
    bandwidth_efficiency: float = BANDWIDTH_EFFICIENCY,
    weight_dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    ssm_dtype: torch.dtype = torch.float32,
    conv_dtype: torch.dtype | None = None,
    held: StoredWeights | None = None,
    tensor_parallel: int = 1,
) -> Throughput | None:
    """A roofline estimate for `batch` requests of `input_tokens` that write `output_tokens` each; where `batch` is
    None, for as many as fit `budget` (bytes) at full length (one, where a model has no caches).

    Prefill and every decoding step take whichever is longer: their FLOPs at compute_efficiency x the card's bf16
    rate, or their bytes at bandwidth_efficiency x its bandwidth. A step reads the weights (`weights_read`) and the keys
    and values so far, and reads and writes the SSM and convolution states; prefill reads the weights once, and the head
    works on the last token alone. Of quantised weights the bytes are those `held`, and the rate stays bf16's. Of
    several GPUs each does a rank's work (`ranks`), and then they exchange (`exchange_seconds`). Launches, sampling and
    the scheduler are not in it: it ranks configs on one card, and says nothing of a serving stack. The default
    efficiencies are assumptions, the bandwidth's such that the published 9B comes out within 2% of the 156.42 tokens/s
    measured on an A10G (arXiv 2508.14444: 8k in, 16k out, batch 8).

    None where the profile lacks a rate (`Hardware.missing_rates`), or not one sequence fits.
    Raises InputError where tokens or batch are below 1, or an efficiency is not in (0, 1].
    """
    check_tokens(input_tokens, output_tokens, batch)
    check_efficiency("throughput: ", compute_efficiency=compute_efficiency, bandwidth_efficiency=bandwidth_efficiency)
    if hardware.missing_rates(tensor_parallel):
        return None
    config = rank_config(config, tensor_parallel)
    dtypes: Any = {"weight_dtype": weight_dtype, "kv_dtype": kv_dtype, "ssm_dtype": ssm_dtype, "conv_dtype": conv_dtype}
    dtypes |= {"held": held}
    if batch is None:
        batch = largest_batch_of(config, input_tokens + output_tokens, budget, dtypes)
        if batch < 1:
            return None
    rate = hardware.bf16_tflops * 1e12 * compute_efficiency
    bandwidth, middle = hardware.bandwidth_gb_s * 1e9 * bandwidth_efficiency, input_tokens + output_tokens // 2
    report = memory(config, middle, batch, chunk=None, **dtypes)
    head = config.vocab_size * config.hidden_size
    prefill_flops = input_tokens * (flops_per_token(config, input_tokens) - 2.0 * head) + 2.0 * head
    prefill_bytes = weights_read(config, weight_dtype, batch * input_tokens, held)
    prefill = max(batch * prefill_flops / rate, prefill_bytes / bandwidth)
    # A step's attention looks back on all of the context, a prefill's on half of it: hence twice.
    step_flops = batch * flops_per_token(config, 2 * middle)
    step_bytes = weights_read(config, weight_dtype, batch, held) + report.kv + 2 * (report.ssm + report.conv)
    step = max(step_flops / rate, step_bytes / bandwidth)
    if tensor_parallel > 1:
        each = exchange_seconds(config, hardware, tensor_parallel, weight_dtype, bandwidth_efficiency)
        prefill, step = prefill + batch * input_tokens * each, step + batch * each
    return Throughput(batch, batch * output_tokens / (prefill + output_tokens * step), prefill, step)


def check_tokens(input_tokens: int, output_tokens: int, batch: int | None) -> None:
    if input_tokens < 1 or output_tokens < 1 or (batch is not None and batch < 1):
        raise InputError(
            f"throughput: input_tokens ({input_tokens}), output_tokens ({output_tokens}) and batch ({batch})"
            " must be at least 1"
        )


def check_efficiency(where: str, **shares: float) -> None:
    """Raises InputError where a share of a card's rate is not above 0 and 1 at most."""
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise InputError(f"{where}{name} is {share}; expected a share of the card's rate, above 0 and 1 at most")


def exchange_seconds(
    config: HybridConfig, hardware: Hardware, ranks: int, dtype: torch.dtype, efficiency: float
) -> float:
    """Seconds of the links a token: the stream, summed over all ranks after the embedding and every layer. In a ring
    each rank sends 2 (n - 1) / n of it, one way; latency is not in it."""
    size = config.hidden_size * dtype.itemsize * (config.num_layers + 1)
    return 2 * (ranks - 1) / ranks * size / (hardware.interconnect_gb_s / 2 * 1e9 * efficiency)


def weights_read(config: HybridConfig, dtype: torch.dtype, tokens: int, held: StoredWeights | None = None) -> float:
    """Bytes of weights that a pass of so many tokens reads: all but the embedding, the experts that none chooses, and
    multi-token prediction."""
    head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    if held is not None:
        return held.read(config, tokens, head * dtype.itemsize)
    return weight_bytes(config.replace(mtp_steps=0), dtype) - (head + unused(config, tokens)) * dtype.itemsize


def largest_batch_of(config: HybridConfig, context: int, budget: float | None, dtypes: Any) -> int:
    """As many sequences as fit a budget; one or none of a model that keeps nothing. Raises InputError without one."""
    if budget is None:
        raise InputError("throughput: give a batch, or a budget in bytes that the batch has to fit")
    one = memory(config, context, 1, chunk=None, **dtypes)
    return verdict(config, one, budget).largest_batch if one.total > one.weights else int(one.total <= budget)


@dataclasses.dataclass(frozen=True)
class Load:
    """`batch` requests at once, each of `input_tokens`, each writing `output_tokens`."""

    input_tokens: int
    output_tokens: int
    batch: int

    def __post_init__(self) -> None:
        if self.input_tokens < 1 or self.output_tokens < 1 or self.batch < 1:
            raise InputError(
                f"bench: input ({self.input_tokens}), output ({self.output_tokens}) and batch ({self.batch}) must be at"
                " least 1"
            )

    def check_length(self, config: HybridConfig) -> None:
        """Raises InputError where it is beyond the model's positions."""
        if self.input_tokens + self.output_tokens > config.max_position_embeddings:
            raise InputError(
                f"bench: {self.input_tokens} + {self.output_tokens} tokens, the model's maximum is"
                f" {config.max_position_embeddings}"
            )


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds of one prompt's prefill up to its first token, and of a decoding step of the batch on average."""

    first_token_seconds: float
    step_seconds: float

    def tokens_per_second(self, load: Load) -> float:
        """New tokens of all sequences over all of the time: the prompts are read one after the other."""
        seconds = load.batch * self.first_token_seconds + load.output_tokens * self.step_seconds
        return load.batch * load.output_tokens / seconds


def roofline(
    config: HybridConfig,
    hardware: Hardware,
    load: Load,
    dtype: torch.dtype,
    ssm_dtype: torch.dtype,
    *,
    compute_efficiency: float = 1.0,
    bandwidth_efficiency: float = 1.0,
    held: StoredWeights | None = None,
) -> Speed | None:
    """The least time that a card's rates allow, or shares of them: whichever is longer, all FLOPs at its bf16 rate or
    all bytes at its bandwidth, of quantised weights those that are `held`. None where the profile has no rates."""
    limit = throughput(
        config,
        hardware,
        input_tokens=load.input_tokens,
        output_tokens=load.output_tokens,
        batch=load.batch,
        compute_efficiency=compute_efficiency,
        bandwidth_efficiency=bandwidth_efficiency,
        weight_dtype=dtype,
        ssm_dtype=ssm_dtype,
        held=held,
    )
    return None if limit is None else Speed(limit.prefill_seconds / load.batch, limit.step_seconds)


def predicted(measured: Speed, here: Speed, there: Speed) -> Speed:
    """What a measurement says of another card, assuming that each phase reaches the same share of both rooflines."""
    return Speed(
        measured.first_token_seconds * there.first_token_seconds / here.first_token_seconds,
        measured.step_seconds * there.step_seconds / here.step_seconds,
    )
