"""`limbeck memory-fit`: does a model fit a card at a context and batch? Exit code 0 yes, 3 no.

Three methods: the formula (always), the simulation of the inference path without memory, and a measured run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import PositiveInt

from ..models.config import HybridConfig
from ..models.cost.fit import Estimate, Fit
from ..models.cost.hardware import GIB, Hardware
from ..models.cost.inference import MemoryReport
from ..models.cost.serving import serving_cautions, serving_rows
from ..models.cost.tables import memory_rows, places, speed_sentence, vllm_rows
from ..models.device import torch_dtype
from ..models.errors import CheckFailed, InputError
from ..models.folder import atomic_folder, check_new, write_json
from .run.resolve import held_weights, model_config, model_folder, model_names
from .run.show import gib, progress, say, table, told

if TYPE_CHECKING:
    from ..models.cost.peak import Measured
    from ..models.cost.simulate import Simulation


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    hardware: Hardware
    context: PositiveInt | None
    batch: PositiveInt | None
    tensor_parallel: PositiveInt | None
    fit: Fit
    method: Literal["formula", "simulation", "measurement", "all"]
    steps: PositiveInt
    output: Path | None
    mode: Literal["inference", "train"] = "inference"  # train is a command of its own (scripts/run/main.py)


def run(options: Options) -> None:
    if options.output is not None:
        check_new(options.output)
    config, hardware = model_config(options.model), options.hardware
    short = ("context", "batch", "tensor_parallel")
    named = {name: value for name in short if (value := getattr(options, name)) is not None}
    fit = dataclasses.replace(options.fit, **named).of(config)
    held = held_weights(options.model, fit)
    check(options, config, fit, quantised=held is not None)
    with progress("estimating the memory", 1) as bar:
        estimate = fit.estimate(config, hardware, held)
        bar.set(1)
    print_estimate(estimate)
    table(f"vLLM, Mamba cache mode {estimate.memory.vllm.mode}", ("", ""), vllm_rows(estimate))
    commands = serving_rows(estimate, options.model)
    for program, command in commands:
        say(f"{program}: {command}")
    for caution in serving_cautions(commands):
        say(f"caution: {caution}")
    say(speed_sentence(estimate))
    simulation = simulated(estimate) if options.method in ("simulation", "all") else None
    measures = options.method in ("measurement", "all")
    measured = measured_run(options, estimate) if measures and estimate.fits else None
    if measures and measured is None:
        say(f"not measured: by formula the model does not fit {places(estimate)}")
    compare(estimate.memory, simulation, measured)
    if changes := estimate.changes():
        rows = [(each.name, gib(each.saved), "fits" if each.fits else "does not fit") for each in changes]
        table("What would help", ("change", "saves", "then"), rows)
    if options.output is not None:
        from ..distill.report.memory_plot import draw_memory

        with atomic_folder(options.output) as folder:
            content = estimate.to_json() | {"vllm_flags": estimate.vllm_flags(), "commands": dict(commands)}
            content |= {"changes": [dataclasses.asdict(each) for each in changes]}
            content |= {"simulation": simulation and dataclasses.asdict(simulation)}
            content |= {"measurement": measured and dataclasses.asdict(measured)}
            write_json(folder / "result.json", told(folder, content, options.output))
            draw_memory(folder, options.model, estimate)
        say(f"result: {options.output / 'result.json'}, plots/memory.png and .svg beside it")
    if not estimate.fits:
        raise CheckFailed(
            f"{options.model} does not fit {places(estimate)} at {fit.length:,} tokens x {fit.batch}:"
            f" {gib(-estimate.verdict.margin)} too much; {estimate.advice()}"
        )


def check(options: Options, config: HybridConfig, fit: Fit, *, quantised: bool) -> None:
    """Raises InputError for what an estimate lets pass, since a chain of stages makes one too."""
    if fit.length > config.max_position_embeddings:
        raise InputError(
            f"context {fit.length:,} is beyond the {config.max_position_embeddings:,} tokens that {options.model} is"
            f" made for; give context={config.max_position_embeddings} or less"
        )
    if options.method != "formula":
        fit.check_run(options.method, options.model, quantised=quantised)
    measures = options.method in ("measurement", "all")
    if measures and options.hardware.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"method={options.method}: {options.hardware.name} is a GPU, and torch {torch.__version__} sees none"
            " here; use method=simulation, or hardware=cpu"
        )


def simulated(estimate: Estimate) -> Simulation:
    with progress("simulating the inference path", 1) as bar:
        simulation = estimate.simulate()
        bar.set(1)
    return simulation


def measured_run(options: Options, estimate: Estimate) -> Measured:
    """The run under a cap of the card's usable memory; of a named config with drawn weights."""
    from ..models.cost.peak import check_memory, measure, random_model
    from ..models.named import load_checked

    config, fit, device = estimate.config, estimate.fit, torch.device(options.hardware.device)
    cap, dtype = options.hardware.usable_gib * GIB, torch_dtype(fit.weight_dtype)
    check_memory(config, estimate.memory.peak, device, cap)
    if options.model in model_names():
        model = random_model(config, dtype, device)
    else:
        model = load_checked(model_folder(options.model), dtype, device).requires_grad_(False)
    with progress("measuring a run", 1) as bar:
        measured = measure(
            model, fit.length, fit.batch, chunk=fit.chunk, steps=min(options.steps, fit.length - 1),
            ssm_dtype=torch_dtype(fit.ssm_dtype), cap=cap,
        )  # fmt: skip
        bar.set(1)
    return measured


def print_estimate(estimate: Estimate) -> None:
    report, many = estimate.memory, estimate.fit.tensor_parallel > 1
    on_each = f" on {places(estimate)}" if many else ""
    table(f"Memory at {report.context:,} tokens x {report.batch}{on_each}", ("", ""), memory_rows(estimate))
    say("fits" if estimate.fits else "does not fit")
    for caution in estimate.cautions():
        say(f"caution: {caution}")


def compare(report: MemoryReport, simulation: Simulation | None, measured: Measured | None) -> None:
    """The methods side by side, and where the simulation's peak is."""
    rows = [("formula", gib(report.peak), "")]
    if simulation is not None:
        rows.append(("simulation", gib(simulation.peak), f"{simulation.peak / report.peak - 1:+.3%}"))
    if measured is not None:
        rows.append((f"measurement ({measured.device})", gib(measured.peak), f"{measured.peak / report.peak - 1:+.3%}"))
    if len(rows) > 1:
        table("Peak by method", ("", "peak", "against the formula"), rows)
    if simulation is not None:
        where = "outside of the layers"
        if simulation.layer is not None:
            where = f"layer {simulation.layer} ({simulation.letter})"
        say(f"the simulated peak: {simulation.phase}, {where}, {simulation.operator}; the largest that come and go:")
        for operator, shape, size in simulation.largest:
            say(f"  {gib(size):>12}  {operator} {list(shape)}")
