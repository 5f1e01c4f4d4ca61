"""`limbeck bench`: time to first token, time per output token and tokens a second of one model or two side by side,
measured here, held against the roofline, and carried over to the card of a profile."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveInt

from ..models.cards import card_named, profile
from ..models.config import HybridConfig
from ..models.cost.comparison import ASSUMED, BenchRow, figures, load_of, ratios, row_of, shares
from ..models.cost.hardware import Hardware, Reserve
from ..models.cost.parameters import count_parameters
from ..models.cost.speed import Load, Speed
from ..models.cost.timing import check_weights_fit, measure, this_cpu
from ..models.device import torch_device, torch_dtype
from ..models.errors import InputError
from ..models.folder import atomic_folder, check_new, write_json
from ..models.generate.decode import lay_out
from ..models.hybrid import HybridLM, initialize
from ..models.named import load_checked, model_weights
from ..models.offload import free_memory
from .run.resolve import model_config, model_folder, model_names
from .run.show import progress, say, table


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    against: str | None
    hardware: Hardware
    here: str | None
    lengths: tuple[str, ...]
    batch: PositiveInt | Literal["fit"]
    measure: bool
    rounds: PositiveInt
    steps: PositiveInt
    prefill_chunk: PositiveInt
    reserve: Reserve
    output: Path | None
    device: str
    dtype: str
    ssm_dtype: str


def run(options: Options) -> None:
    if options.output is not None:
        check_new(options.output)
    if not options.lengths:
        raise InputError("lengths is []; give one pair at least, such as lengths=[1k/8k]")
    if options.against == options.model:
        raise InputError(f"against={options.against} is the model itself; give another one, or leave it out")
    names = [options.model, *([] if options.against is None else [options.against])]
    configs = {name: model_config(name) for name in names}
    device = torch_device(options.device)
    dtype = torch_dtype("bfloat16" if device.type == "cuda" or not options.measure else "float32")
    if options.dtype != "auto":
        dtype = torch_dtype(options.dtype)
    types: dict[str, Any] = {"dtype": dtype, "ssm_dtype": torch_dtype(options.ssm_dtype)}
    types_there = types if options.dtype != "auto" else types | {"dtype": torch.bfloat16}
    limits = (options.batch, options.hardware, options.reserve, types_there, options.prefill_chunk)
    held = {} if options.measure else {name: model_weights(name, types_there["dtype"]) for name in names}
    loads = {
        name: [load_of(text, config, *limits, held=held.get(name)) for text in options.lengths]
        for name, config in configs.items()
    }
    named_here = None if options.here is None else profile(options.here)
    for name, config in configs.items():
        for load in loads[name]:
            load.check_length(config)
    here = (named_here or profile_here(device)) if options.measure else None
    speeds = measured_speeds(loads, configs, device, options, types) if options.measure else {}
    carries = options.measure and device.type == "cuda"
    rows = [
        row_of(name, loads[name][number], config, speeds.get((name, number)), here, options.hardware, types,
               types_there, carries=carries, held=held.get(name))
        for number in range(len(options.lengths))
        for name, config in configs.items()
    ]  # fmt: skip
    print_rows(rows, options, here, carries)
    if options.output is not None:
        content = {
            "rows": [row.content() for row in rows],
            "measured_on": None if here is None else dataclasses.asdict(here),
            "hardware": dataclasses.asdict(options.hardware),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "dtype": str(dtype).removeprefix("torch."),
        }
        with atomic_folder(options.output) as folder:
            write_json(folder / "bench.json", content)
        say(f"result: {options.output / 'bench.json'}")


def profile_here(device: torch.device) -> Hardware | None:
    """The limits of what is measured on: a CPU's as probed, or the GPU's own."""
    if device.type == "cpu":
        return this_cpu()
    return card_named(torch.cuda.get_device_name(device))


def model_of(name: str, config: HybridConfig, device: torch.device, dtype: torch.dtype) -> HybridLM:
    """A folder's model, or a named config with random weights."""
    check_weights_fit(count_parameters(config), dtype, free_memory(device), name)
    if name not in model_names():
        return load_checked(model_folder(name), dtype, device)
    model = HybridLM(config, device=device, dtype=dtype).eval()
    initialize(model, torch.Generator(device=device).manual_seed(0))
    return model


def measured_speeds(
    loads: Mapping[str, list[Load]],
    configs: Mapping[str, HybridConfig],
    device: torch.device,
    options: Options,
    types: Mapping[str, Any],
) -> dict[tuple[str, int], Speed]:
    """The median of the rounds of every model and load. Models that fit beside each other take turns; those on a GPU
    are loaded one after the other."""
    turns = [list(configs)] if device.type == "cpu" else [[name] for name in configs]
    taken: dict[tuple[str, int], list[Speed]] = {}
    with progress("measuring", options.rounds * sum(map(len, loads.values()))) as bar:
        for names in turns:
            models = {name: model_of(name, configs[name], device, types["dtype"]) for name in names}
            for model in models.values():
                lay_out(model)
            for number in range(len(options.lengths)):
                for _ in range(options.rounds):
                    for name, model in models.items():
                        speed = measure(
                            model,
                            loads[name][number],
                            prefill_chunk=options.prefill_chunk,
                            steps=options.steps,
                            ssm_dtype=types["ssm_dtype"],
                        )
                        taken.setdefault((name, number), []).append(speed)
                        bar.set(sum(map(len, taken.values())))
            del models, model
    return {
        key: Speed(
            statistics.median(speed.first_token_seconds for speed in speeds),
            statistics.median(speed.step_seconds for speed in speeds),
        )
        for key, speeds in taken.items()
    }


def print_rows(rows: Sequence[BenchRow], options: Options, here: Hardware | None, carries: bool) -> None:
    there = options.hardware.name
    columns = ["model", "in / out", "batch", "first token", "a token", "tokens/s"]
    if options.measure:
        cells = [[*named(row), *figures(row.measured, row.load), *shares(row)] for row in rows]
        table("Measured", [*columns, "prefill of roofline", "decode of roofline"], cells)
    if here is not None:
        say(f"Roofline of {here.name}: {here.bandwidth_gb_s:,.1f} GB/s, {here.bf16_tflops:,.3f} TFLOP/s")
    table(f"On {there}", columns, [[*named(row), *figures(row.estimate, row.load)] for row in rows])
    if carries:
        say("Carried over: each phase is assumed to reach the same share of its roofline there as here.")
    else:
        compute, bandwidth = ASSUMED.values()
        say(f"Not measured: {compute:g} of the rate of products and {bandwidth:g} of the bandwidth are assumed.")
    if options.against is not None:
        for first, second in zip(rows[::2], rows[1::2], strict=True):
            say(f"{first.load.input_tokens} / {first.load.output_tokens}: {ratios(first, second, there)}")


def named(row: BenchRow) -> list[str]:
    return [row.model, f"{row.load.input_tokens} / {row.load.output_tokens}", str(row.load.batch)]
