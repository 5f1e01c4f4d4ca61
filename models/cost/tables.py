"""What `limbeck memory-fit` shows of an estimate: rows of tables, and sentences."""

from __future__ import annotations

from ..errors import gib
from .fit import Estimate
from .hardware import GIB
from .parameters import count_parameters
from .ranks import rank_config
from .speed import BANDWIDTH_EFFICIENCY, COMPUTE_EFFICIENCY
from .vllm import largest_sequences

Rows = list[tuple[str, str]]


def places(estimate: Estimate) -> str:
    """Where it runs, as a sentence says it: "h100", or "each of 2 h100"."""
    ranks = estimate.fit.tensor_parallel
    return estimate.hardware.name if ranks == 1 else f"each of {ranks} {estimate.hardware.name}"


def memory_rows(estimate: Estimate) -> Rows:
    """The bytes, and what of the card they are held against."""
    hardware, report, answer = estimate.hardware, estimate.memory, estimate.verdict
    config = rank_config(estimate.config, estimate.fit.tensor_parallel)
    context = "any" if answer.largest_context < 0 else f"{answer.largest_context:,}"
    form = "weights" if estimate.held is None else "quantised weights"
    rows = [
        (f"{form} ({count_parameters(config):,} parameters)", gib(report.weights)),
        (f"key-value cache ({estimate.layers_with('token')})", gib(report.kv)),
        (f"SSM states ({estimate.layers_with('ssm')})", gib(report.ssm)),
        ("convolution states", gib(report.conv)),
        ("weights and caches together", gib(report.total)),
    ]
    if report.load is not None:
        step, width = gib(report.decode), gib(report.logits)
        rows += [
            ("the prompt's tokens", gib(report.prompt)),
            (f"activations of a prefill chunk of {report.load.chunk:,}", gib(report.activations)),
            (f"or of a decoding step, {step}, with logits, {width}", gib(report.decode + report.logits)),
            ("workspace of the matrix library", gib(report.workspace)),
            ("peak", gib(report.peak)),
        ]
    limit = estimate.config.max_position_embeddings
    return [
        *rows,
        (f"usable on {places(estimate)}", gib(hardware.usable_gib * GIB)),
        ("framework and runtime context, reserve and overhead", gib(hardware.usable_gib * GIB - answer.budget)),
        ("budget", gib(answer.budget)),
        ("margin", gib(answer.margin)),
        (f"largest context at this batch (the model's limit: {limit:,})", context),
        ("largest batch at this context", f"{answer.largest_batch:,}"),
    ]


def vllm_rows(estimate: Estimate) -> Rows:
    vllm = estimate.memory.vllm
    most = largest_sequences(vllm, estimate.hardware, mamba=estimate.memory.ssm > 0)
    return [
        ("tokens a block", f"{vllm.block_size:,}"),
        ("bytes of a block", gib(vllm.bytes_per_block)),
        ("blocks in the budget beside the weights", f"{vllm.blocks:,}"),
        ("blocks a request of this length", f"{vllm.blocks_per_request:,}"),
        ("cache of one request", gib(vllm.bytes_per_request)),
        ("requests of this length at once", f"{vllm.max_num_seqs:,}"),
        ("largest --max-num-seqs that starts", f"{most:,}"),
        ("largest --max-model-len that starts", f"{vllm.largest_max_model_len:,}"),
    ]


def speed_sentence(estimate: Estimate) -> str:
    """Tokens a second by the card's rates, and what is assumed for it."""
    card, ranks = estimate.hardware, estimate.fit.tensor_parallel
    if missing := card.missing_rates(ranks):
        return f"tokens a second: unknown without {', '.join(missing)}"
    speed, read = estimate.throughput(), max(estimate.fit.length // 3, 1)
    if speed is None:
        return "tokens a second: none, not one sequence fits"
    links = f" and of the {card.interconnect_gb_s / 2:g} GB/s one way between them" if ranks > 1 else ""
    return (
        f"tokens a second: {speed.tokens_per_second:,.0f} written by {speed.batch:,} requests at once, each after"
        f" {read:,} read and {max(estimate.fit.length - read, 1):,} to write; by the roofline of {places(estimate)} at"
        f" {COMPUTE_EFFICIENCY:.0%} of {card.bf16_tflops:g} TFLOP/s and {BANDWIDTH_EFFICIENCY:.0%} of"
        f" {card.bandwidth_gb_s:g} GB/s{links} (assumed), without launches and scheduler"
    )
