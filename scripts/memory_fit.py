"""`limbeck memory-fit`: does a model fit a card at a context and batch? Exit code 0 yes, 3 no.

Three witnesses: the formula (always), the simulation of the inference path without memory, and a measured run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..models.config import HybridConfig
from ..models.cost.hardware import GIB, Hardware
from ..models.cost.inference import Change, MemoryReport, Verdict, changes, memory, verdict
from ..models.cost.parameters import count_parameters
from ..models.cost.vllm import flags
from ..models.errors import CheckFailed, InputError
from ..models.folder import atomic_folder, write_json
from .run.resolve import DTYPES, model_config, model_folder, model_names, torch_dtype
from .run.show import gib, progress, say, table

if TYPE_CHECKING:
    from ..models.cost.peak import Measured
    from ..models.cost.simulate import Simulation

KV_DTYPES = DTYPES | {"float8_e4m3fn": torch.float8_e4m3fn}
LONGEST = 131072  # tokens of a context that nobody has chosen
WITNESSES = {
    "formula": (), "simulation": ("simulation",), "measurement": ("measurement",), "all": ("simulation", "measurement"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fit:
    """Context (tokens a sequence; None: see `of`), batch (sequences), dtypes, and what of the card is not ours; tokens
    of a prefill chunk, and vLLM's mode for the states of Mamba layers."""

    context: int | None
    batch: int
    weight_dtype: str
    kv_dtype: str
    ssm_dtype: str
    framework_share: float
    reserve_gib: float
    overhead_gib: float
    chunk: int = 512
    mamba_cache_mode: str = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.framework_share < 1 or self.reserve_gib < 0 or self.overhead_gib < 0:
            raise InputError("framework_share must be in [0, 1), reserve_gib and overhead_gib at least 0")
        if self.kv_dtype not in KV_DTYPES:
            raise InputError(f"fit.kv_dtype {self.kv_dtype!r} is unknown; known: {', '.join(KV_DTYPES)}")

    def of(self, config: HybridConfig) -> Fit:
        """With a context where none was given: what the model is made for, at most `LONGEST`."""
        if self.context is not None:
            return self
        return dataclasses.replace(self, context=min(LONGEST, config.max_position_embeddings))

    @property
    def length(self) -> int:
        """The context, once there is one."""
        assert self.context is not None
        return self.context

    def asked(self, hardware: Hardware) -> dict[str, Any]:
        """The arguments of `cost.memory` beside context and batch."""
        return {
            "weight_dtype": torch_dtype(self.weight_dtype),
            "kv_dtype": KV_DTYPES[self.kv_dtype],
            "ssm_dtype": torch_dtype(self.ssm_dtype),
            "chunk": self.chunk,
            "place": hardware.place,
            "mamba_cache_mode": self.mamba_cache_mode,
        }

    def budget(self, hardware: Hardware) -> float:
        """Bytes of the card that are ours."""
        return hardware.budget(self.framework_share, self.reserve_gib, self.overhead_gib)


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    hardware: Hardware
    context: int | None
    batch: int | None
    fit: Fit
    witness: str
    steps: int
    output: Path | None
    mode: str = "inference"

    def __post_init__(self) -> None:
        if self.mode != "inference":  # train is a command of its own (scripts/run/main.py)
            raise InputError(f"mode is {self.mode!r}; known: inference, train")


def run(options: Options) -> None:
    config, hardware = model_config(options.model), options.hardware
    named = {name: value for name in ("context", "batch") if (value := getattr(options, name)) is not None}
    fit = dataclasses.replace(options.fit, **named).of(config)
    check(options, config, fit)
    report, answer = measure(config, hardware, fit)
    ways = [] if answer.fits else changes(config, report, answer.budget, **fit.asked(hardware))
    show(config, report, answer, hardware)
    show_vllm(config, report, answer, hardware, fit)
    simulation = simulated(config, hardware, fit) if "simulation" in WITNESSES[options.witness] else None
    measured = None
    if "measurement" in WITNESSES[options.witness] and answer.fits:
        measured = measured_run(options, config, fit, report)
    compare(report, simulation, measured)
    if ways:
        rows = [(way.name, gib(way.saved), "fits" if way.fits else "does not fit") for way in ways]
        table("What would help", ("change", "saves", "then"), rows)
    if options.output is not None:
        with atomic_folder(options.output) as folder:
            content = as_json(report, answer, hardware) | {
                "vllm_flags": arguments(config, report, answer, hardware, fit)
            }
            content |= {"changes": [dataclasses.asdict(way) for way in ways]}
            content |= {"simulation": simulation and dataclasses.asdict(simulation)}
            content |= {"measurement": measured and dataclasses.asdict(measured)}
            write_json(folder / "result.json", content)
            draw(folder, options.model, config, report, answer, hardware)
        say(f"result: {options.output / 'result.json'}, plots/memory.png and .svg beside it")
    if not answer.fits:
        raise CheckFailed(
            f"{options.model} does not fit {hardware.name} at {report.context:,} tokens x {report.batch}:"
            f" {gib(-answer.margin)} too much; {advice(answer, ways)}"
        )


def check(options: Options, config: HybridConfig, fit: Fit) -> None:
    """Raises InputError for what `measure` lets pass, since a chain of stages asks for it too."""
    if options.witness not in WITNESSES:
        raise InputError(f"witness is {options.witness!r}; known: {', '.join(WITNESSES)}")
    if fit.length > config.max_position_embeddings:
        raise InputError(
            f"context {fit.length:,} is beyond the {config.max_position_embeddings:,} tokens that {options.model} is"
            f" made for; give context={config.max_position_embeddings} or less"
        )
    if WITNESSES[options.witness] and fit.kv_dtype != fit.weight_dtype:
        raise InputError(
            f"witness={options.witness} runs the inference path, which keeps keys and values in the weights' dtype:"
            f" fit.kv_dtype is {fit.kv_dtype}, fit.weight_dtype {fit.weight_dtype}"
        )
    if options.steps < 1:
        raise InputError(f"steps is {options.steps}; expected at least 1 token to decode")
    measures = "measurement" in WITNESSES[options.witness]
    if measures and options.hardware.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"witness={options.witness}: {options.hardware.name} is a GPU, and torch {torch.__version__} sees none"
            " here; use witness=simulation, or hardware=cpu"
        )


def measure(config: HybridConfig, hardware: Hardware, fit: Fit) -> tuple[MemoryReport, Verdict]:
    """The bytes by formula, and the verdict on them. Raises InputError where the card has no memory."""
    if not hardware.usable_gib > 0:
        raise InputError(f"hardware.usable_gib is {hardware.usable_gib:g}; expected the card's memory in GiB")
    if hardware.device not in ("cuda", "cpu") or hardware.multiprocessors < 1:
        raise InputError(
            f"hardware.device is {hardware.device!r} with {hardware.multiprocessors} multiprocessors;"
            " expected cuda or cpu, and at least 1"
        )
    fit = fit.of(config)
    budget = fit.budget(hardware)
    report = memory(config, fit.length, fit.batch, budget=budget, **fit.asked(hardware))
    return report, verdict(config, report, budget)


def simulated(config: HybridConfig, hardware: Hardware, fit: Fit) -> Simulation:
    from ..models.cost.simulate import simulate

    with progress("simulating the inference path", 1) as bar:
        found = simulate(
            config, fit.length, fit.batch, chunk=fit.chunk, weight_dtype=torch_dtype(fit.weight_dtype),
            ssm_dtype=torch_dtype(fit.ssm_dtype), place=hardware.place,
        )  # fmt: skip
        bar.set(1)
    return found


def measured_run(options: Options, config: HybridConfig, fit: Fit, report: MemoryReport) -> Measured:
    """The run under a cap of the card's usable memory; of a named config with drawn weights."""
    from ..models.checkpoint import load_model
    from ..models.cost.peak import check_room, random_model
    from ..models.cost.peak import measure as measure_run

    device = torch.device(options.hardware.device)
    cap = options.hardware.usable_gib * GIB
    check_room(config, report.peak, device, cap)
    dtype = torch_dtype(fit.weight_dtype)
    if options.model in model_names():
        model = random_model(config, dtype, device)
    else:
        model = load_model(model_folder(options.model), dtype, device).requires_grad_(False)
    with progress("measuring a run", 1) as bar:
        found = measure_run(
            model, fit.length, fit.batch, chunk=fit.chunk, steps=min(options.steps, fit.length - 1),
            ssm_dtype=torch_dtype(fit.ssm_dtype), cap=cap,
        )  # fmt: skip
        bar.set(1)
    return found


def advice(answer: Verdict, ways: list[Change]) -> str:
    helps = next((way.name for way in ways if way.fits), None)
    if answer.largest_context > 0:
        return f"{answer.largest_context:,} tokens would fit at this batch, or {helps or 'prune further'}"
    return f"no context fits at this batch: {helps or 'prune further, or take a larger card'}"


def show(config: HybridConfig, report: MemoryReport, answer: Verdict, hardware: Hardware) -> None:
    context = "any" if answer.largest_context < 0 else f"{answer.largest_context:,}"
    rows = [
        (f"weights ({count_parameters(config):,} parameters)", gib(report.weights)),
        (f"key-value cache ({len([k for k in config.pattern if k == '*'])} attention layers)", gib(report.kv)),
        (f"SSM states ({len([k for k in config.pattern if k == 'M'])} Mamba layers)", gib(report.ssm)),
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
    rows += [
        (f"usable on {hardware.name}", gib(hardware.usable_gib * GIB)),
        ("framework and runtime context, reserve and overhead", gib(hardware.usable_gib * GIB - answer.budget)),
        ("budget", gib(answer.budget)),
        ("margin", gib(answer.margin)),
        (f"largest context at this batch (the model's limit: {config.max_position_embeddings:,})", context),
        ("largest batch at this context", f"{answer.largest_batch:,}"),
    ]
    table(f"Memory at {report.context:,} tokens x {report.batch}", ("", ""), rows)
    say("fits" if answer.fits else "does not fit")


def show_vllm(config: HybridConfig, report: MemoryReport, answer: Verdict, hardware: Hardware, fit: Fit) -> None:
    found = report.vllm
    rows = [
        ("tokens a block", f"{found.block_size:,}"),
        ("bytes of a block", gib(found.bytes_per_block)),
        ("blocks in the budget beside the weights", f"{found.blocks:,}"),
        ("blocks a request of this length", f"{found.blocks_per_request:,}"),
        ("cache of one request", gib(found.bytes_per_request)),
        ("requests of this length at once", f"{found.max_num_seqs:,}"),
        ("largest --max-num-seqs that starts", f"{found.largest_max_num_seqs:,}" if "M" in config.pattern else "any"),
        ("largest --max-model-len that starts", f"{found.largest_max_model_len:,}"),
    ]
    table(f"vLLM, Mamba cache mode {found.mode}", ("", ""), rows)
    if found.max_num_seqs:
        say("vllm serve MODEL " + " ".join(arguments(config, report, answer, hardware, fit)))
    else:
        say("vLLM would not start at this length: the blocks do not hold one request")


def arguments(config: HybridConfig, report: MemoryReport, answer: Verdict, hardware: Hardware, fit: Fit) -> list[str]:
    """The flags of `vllm serve` for this fit."""
    return flags(
        report.vllm, context=report.context, utilization=max(answer.budget, 0) / (hardware.usable_gib * GIB),
        ssm_dtype=fit.ssm_dtype, kv_dtype=fit.kv_dtype, dtype=fit.weight_dtype, mamba=bool("M" in config.pattern),
    )  # fmt: skip


def compare(report: MemoryReport, simulation: Simulation | None, measured: Measured | None) -> None:
    """The witnesses side by side, and where the simulation's peak is."""
    rows = [("formula", gib(report.peak), "")]
    if simulation is not None:
        rows.append(("simulation", gib(simulation.peak), f"{simulation.peak / report.peak - 1:+.3%}"))
    if measured is not None:
        rows.append((f"measurement ({measured.device})", gib(measured.peak), f"{measured.peak / report.peak - 1:+.3%}"))
    if len(rows) > 1:
        table("Peak by witness", ("", "peak", "against the formula"), rows)
    if simulation is not None:
        where = (
            "outside of the layers" if simulation.layer is None else f"layer {simulation.layer} ({simulation.letter})"
        )
        say(f"the simulated peak: {simulation.phase}, {where}, {simulation.operator}; the largest that come and go:")
        for operator, shape, size in simulation.largest:
            say(f"  {gib(size):>12}  {operator} {list(shape)}")


def draw(
    folder: Path, name: str, config: HybridConfig, report: MemoryReport, answer: Verdict, hardware: Hardware
) -> None:
    from ..distill.report.memory_plot import memory_plot
    from ..distill.report.plots import save_png, save_svg

    figure = memory_plot(name, config, report, answer.budget, hardware.name)
    save_png(figure, folder, "memory")
    save_svg(figure, folder, "memory")


def as_json(report: MemoryReport, answer: Verdict, hardware: Hardware) -> dict[str, Any]:
    content = dataclasses.asdict(report) | {"total": report.total, "transient": report.transient, "peak": report.peak}
    return {
        "memory": content,
        "verdict": dataclasses.asdict(answer),
        "hardware": dataclasses.asdict(hardware),
        "gib": GIB,
    }
