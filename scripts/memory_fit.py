"""`limbeck memory-fit`: does a model fit a card at a context and batch? Exit code 0 yes, 3 no."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..models.config import HybridConfig
from ..models.cost import GIB, Hardware, MemoryReport, Verdict, count_parameters, memory, verdict
from ..models.errors import CheckFailed, InputError
from ..models.folder import atomic_folder, write_json
from .inputs import model_config, torch_dtype
from .show import gib, say, table


@dataclasses.dataclass(frozen=True)
class Fit:
    """Context (tokens a sequence), batch (sequences), dtypes, and what of the card is not ours."""

    context: int
    batch: int
    weight_dtype: str
    kv_dtype: str
    ssm_dtype: str
    framework_share: float
    reserve_gib: float
    overhead_gib: float

    def __post_init__(self) -> None:
        if not 0 <= self.framework_share < 1 or self.reserve_gib < 0 or self.overhead_gib < 0:
            raise InputError("framework_share must be in [0, 1), reserve_gib and overhead_gib at least 0")


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    hardware: Hardware
    context: int | None
    batch: int | None
    fit: Fit
    output: Path | None
    mode: str = "inference"

    def __post_init__(self) -> None:
        if self.mode != "inference":  # train is a command of its own (scripts/main.py)
            raise InputError(f"mode is {self.mode!r}; known: inference, train")


def run(options: Options) -> None:
    config = model_config(options.model)
    asked = {name: value for name in ("context", "batch") if (value := getattr(options, name)) is not None}
    report, answer = measure(config, options.hardware, dataclasses.replace(options.fit, **asked))
    show(config, report, answer, options.hardware)
    if options.output is not None:
        with atomic_folder(options.output) as folder:
            write_json(folder / "result.json", as_json(report, answer, options.hardware))
        say(f"result: {options.output / 'result.json'}")
    if not answer.fits:
        raise CheckFailed(
            f"{options.model} does not fit {options.hardware.name} at {report.context:,} tokens x {report.batch}:"
            f" {gib(-answer.margin)} too much; {advice(answer, report)}"
        )


def measure(config: HybridConfig, hardware: Hardware, fit: Fit) -> tuple[MemoryReport, Verdict]:
    """The bytes, and the verdict on them. Raises InputError where the card has no memory."""
    if not hardware.usable_gib > 0:
        raise InputError(f"hardware.usable_gib is {hardware.usable_gib:g}; expected the card's memory in GiB")
    budget = hardware.budget(fit.framework_share, fit.reserve_gib, fit.overhead_gib)
    report = memory(
        config,
        fit.context,
        fit.batch,
        weight_dtype=torch_dtype(fit.weight_dtype),
        kv_dtype=torch_dtype(fit.kv_dtype),
        ssm_dtype=torch_dtype(fit.ssm_dtype),
        budget=budget,
    )
    return report, verdict(config, report, budget)


def advice(answer: Verdict, report: MemoryReport) -> str:
    if answer.largest_context > 0:
        return f"{answer.largest_context:,} tokens would fit at this batch, or prune further"
    return "the weights alone leave no room: prune further, or take a larger card"


def show(config: HybridConfig, report: MemoryReport, answer: Verdict, hardware: Hardware) -> None:
    context = "any" if answer.largest_context < 0 else f"{answer.largest_context:,}"
    rows = [
        (f"weights ({count_parameters(config):,} parameters)", gib(report.weights)),
        (f"key-value cache ({len(config.layers_of('*'))} attention layers)", gib(report.kv)),
        (f"SSM states ({len(config.layers_of('M'))} Mamba layers)", gib(report.ssm)),
        ("convolution states", gib(report.conv)),
        ("together", gib(report.total)),
        (f"usable on {hardware.name}", gib(hardware.usable_gib * GIB)),
        ("framework, reserve and overhead", gib(hardware.usable_gib * GIB - answer.budget)),
        ("budget", gib(answer.budget)),
        ("margin", gib(answer.margin)),
        (f"largest context at this batch (the model's limit: {config.max_position_embeddings:,})", context),
        ("largest batch at this context", f"{answer.largest_batch:,}"),
        ("vLLM: tokens a block", f"{report.vllm.block_size:,}"),
        ("vLLM: cache of one request", gib(report.vllm.bytes_per_request)),
        ("vLLM: requests of this length at once (max_num_seqs)", f"{report.vllm.max_num_seqs:,}"),
    ]
    table(f"Memory at {report.context:,} tokens x {report.batch}", ("", ""), rows)
    say("fits" if answer.fits else "does not fit")


def as_json(report: MemoryReport, answer: Verdict, hardware: Hardware) -> dict[str, Any]:
    content = dataclasses.asdict(report) | {"total": report.total}
    return {
        "memory": content,
        "verdict": dataclasses.asdict(answer),
        "hardware": dataclasses.asdict(hardware),
        "gib": GIB,
    }
