"""`limbeck bench`: time to first token, time per output token and tokens a second of one model or two side by side,
measured here, held against the roofline, and carried over to the card of a profile."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import torch

from ..models.checkpoint import load_model
from ..models.config import HybridConfig
from ..models.cost.hardware import Hardware
from ..models.cost.inference import memory, verdict
from ..models.cost.parameters import count_parameters
from ..models.cost.speed import Load, Speed, predicted, roofline
from ..models.cost.timing import check_weights_fit, measure, this_cpu
from ..models.errors import InputError
from ..models.folder import atomic_folder, write_json
from ..models.generate.decode import lay_out
from ..models.hybrid import HybridLM, initialize
from ..models.offload import free_memory
from .run.compose import CONF, guess
from .run.resolve import model_config, model_folder, model_names, torch_device, torch_dtype
from .run.show import progress, say, table

# Shares of a card's rates that are assumed where nothing is measured; `cost.throughput` says why these.
ASSUMED: dict[str, Any] = {"compute_efficiency": 0.5, "bandwidth_efficiency": 0.7}


@dataclasses.dataclass(frozen=True)
class Room:
    """What of the profile's card is not ours, where the batch is the largest that fits."""

    framework_share: float
    reserve_gib: float
    overhead_gib: float


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    against: str | None
    hardware: Hardware
    here: str | None
    lengths: tuple[str, ...]
    batch: Any
    measure: bool
    rounds: int
    steps: int
    prefill_chunk: int
    room: Room
    output: Path | None
    device: str
    dtype: str
    ssm_dtype: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A model under a load: measured here and the roofline here, and what the profile's card would do."""

    model: str
    load: Load
    measured: Speed | None
    limit: Speed | None
    estimate: Speed | None

    def content(self) -> dict[str, Any]:
        found: dict[str, Any] = {"model": self.model} | dataclasses.asdict(self.load)
        for name in ("measured", "limit", "estimate"):
            speed = getattr(self, name)
            found[name] = None
            if speed is not None:
                found[name] = dataclasses.asdict(speed) | {"tokens_per_second": speed.tokens_per_second(self.load)}
        return found


def run(options: Options) -> None:
    names = [options.model, *([] if options.against is None else [options.against])]
    if options.output is not None and options.output.exists():
        raise InputError(f"{options.output} exists already; give an output folder that does not")
    if options.rounds < 1 or options.steps < 1 or options.prefill_chunk < 1:
        raise InputError("rounds, steps and prefill_chunk must be at least 1")
    configs = {name: model_config(name) for name in names}
    device = torch_device(options.device)
    dtype = torch_dtype("bfloat16" if device.type == "cuda" or not options.measure else "float32")
    if options.dtype != "auto":
        dtype = torch_dtype(options.dtype)
    types: dict[str, Any] = {"dtype": dtype, "ssm_dtype": torch_dtype(options.ssm_dtype)}
    loads = {name: [load_of(text, configs[name], options, types) for text in options.lengths] for name in configs}
    here = profile_here(options, device) if options.measure else None
    speeds = measured_speeds(loads, configs, device, options, types) if options.measure else {}
    rows = [
        row_of(name, load, configs[name], speeds.get((name, number)), here, options, types)
        for number in range(len(options.lengths))
        for name in configs
        for load in [loads[name][number]]
    ]
    show(rows, options, here)
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


def load_of(text: str, config: HybridConfig, options: Options, types: dict[str, Any]) -> Load:
    """ "1k/8k": 1024 tokens in, 8192 out; the batch as given, or the largest that fits the profile at full length."""
    parts = text.lower().split("/")
    try:
        source, target = (int(part.removesuffix("k")) * (1024 if part.endswith("k") else 1) for part in parts)
    except ValueError:
        raise InputError(f"lengths: {text!r} is no pair; expected INPUT/OUTPUT such as 1k/8k or 128/64") from None
    if options.batch != "fit":
        if not isinstance(options.batch, int) or isinstance(options.batch, bool):
            raise InputError(f"batch is {options.batch!r}; expected a whole number, or fit")
        return Load(source, target, options.batch)
    room = options.room
    budget = options.hardware.budget(room.framework_share, room.reserve_gib, room.overhead_gib)
    dtypes: dict[str, Any] = {"weight_dtype": types["dtype"], "ssm_dtype": types["ssm_dtype"]}
    Load(source, target, 1)  # refuses what is below 1
    one = memory(config, source + target, 1, **dtypes)
    batch = verdict(config, one, budget).largest_batch
    if batch < 1:
        raise InputError(f"batch=fit: not one sequence of {source} + {target} tokens fits {options.hardware.name}")
    return Load(source, target, batch)


def profile_here(options: Options, device: torch.device) -> Hardware | None:
    """The limits of what is measured on: the profile that here= names, else a CPU's as probed, else the profile whose
    name is part of the GPU's."""
    if options.here is not None:
        return profile(options.here)
    if device.type == "cpu":
        return this_cpu()
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    near = [known for known in profiles() if known.split("-")[0] in name]
    return profile(near[0]) if near else None


def profiles() -> list[str]:
    return sorted(path.stem for path in (CONF / "hardware").glob("*.yaml") if path.stem not in ("cpu", "custom"))


def profile(name: str) -> Hardware:
    """A profile of conf/hardware/. Raises InputError."""
    from omegaconf import OmegaConf

    if name not in profiles():
        raise InputError(f"here={name}: no such profile; known: {', '.join(profiles())}" + guess(name, profiles()))
    content: Any = OmegaConf.to_container(OmegaConf.load(CONF / "hardware" / f"{name}.yaml"))
    return Hardware(**content)


def model_of(name: str, config: HybridConfig, device: torch.device, dtype: torch.dtype) -> HybridLM:
    """A folder's model, or a named config with random weights."""
    check_weights_fit(count_parameters(config), dtype, free_memory(device), name)
    if name not in model_names():
        return load_model(model_folder(name), dtype, device)
    model = HybridLM(config, device=device, dtype=dtype).eval()
    initialize(model, torch.Generator(device=device).manual_seed(0))
    return model


def measured_speeds(
    loads: dict[str, list[Load]],
    configs: dict[str, HybridConfig],
    device: torch.device,
    options: Options,
    types: dict[str, Any],
) -> dict[tuple[str, int], Speed]:
    """The median of the rounds of every model and load. Models that fit beside each other take turns; those on a GPU
    are loaded one after the other."""
    turns = [list(configs)] if device.type == "cpu" else [[name] for name in configs]
    found: dict[tuple[str, int], list[Speed]] = {}
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
                        found.setdefault((name, number), []).append(speed)
                        bar.set(sum(map(len, found.values())))
            del models, model
    return {
        key: Speed(
            statistics.median(speed.first_token_seconds for speed in speeds),
            statistics.median(speed.step_seconds for speed in speeds),
        )
        for key, speeds in found.items()
    }


def row_of(
    name: str,
    load: Load,
    config: HybridConfig,
    measured: Speed | None,
    here: Hardware | None,
    options: Options,
    types: dict[str, Any],
) -> Row:
    """A GPU's measurement is carried over to the profile's card; a CPU's says nothing of one."""
    limit = None if here is None else roofline(config, here, load, **types)
    there = types if options.dtype != "auto" else types | {"dtype": torch.bfloat16}
    if measured is not None and limit is not None and carries(options):
        target = roofline(config, options.hardware, load, **there)
        return Row(name, load, measured, limit, None if target is None else predicted(measured, limit, target))
    return Row(name, load, measured, limit, roofline(config, options.hardware, load, **there, **ASSUMED))


def carries(options: Options) -> bool:
    return options.measure and torch_device(options.device).type == "cuda"


def show(rows: list[Row], options: Options, here: Hardware | None) -> None:
    there = options.hardware.name
    columns = ["model", "in / out", "batch", "first token", "a token", "tokens/s"]
    if options.measure:
        cells = [[*named(row), *figures(row.measured, row.load), *shares(row)] for row in rows]
        table("Measured", [*columns, "prefill of roofline", "decode of roofline"], cells)
    if here is not None:
        say(f"Roofline of {here.name}: {here.bandwidth_gb_s:,.1f} GB/s, {here.bf16_tflops:,.3f} TFLOP/s")
    table(f"On {there}", columns, [[*named(row), *figures(row.estimate, row.load)] for row in rows])
    if carries(options):
        say("Carried over: each phase is assumed to reach the same share of its roofline there as here.")
    else:
        compute, bandwidth = ASSUMED.values()
        say(f"Not measured: {compute:g} of the rate of products and {bandwidth:g} of the bandwidth are assumed.")
    if options.against is not None:
        for first, second in zip(rows[::2], rows[1::2], strict=True):
            say(f"{first.load.input_tokens} / {first.load.output_tokens}: {ratios(first, second, there)}")


def named(row: Row) -> list[str]:
    return [row.model, f"{row.load.input_tokens} / {row.load.output_tokens}", str(row.load.batch)]


def figures(speed: Speed | None, load: Load) -> list[str]:
    if speed is None:
        return ["-", "-", "-"]
    return [seconds(speed.first_token_seconds), seconds(speed.step_seconds), f"{speed.tokens_per_second(load):,.1f}"]


def seconds(count: float) -> str:
    return f"{count:.2f} s" if count >= 1 else f"{count * 1e3:.2f} ms"


def shares(row: Row) -> list[str]:
    """Of the rooflines of prefill and decoding, how much is reached."""
    if row.measured is None or row.limit is None:
        return ["-", "-"]
    prefill = row.limit.first_token_seconds / row.measured.first_token_seconds
    return [f"{prefill:.0%}", f"{row.limit.step_seconds / row.measured.step_seconds:.0%}"]


def ratios(first: Row, second: Row, there: str) -> str:
    """Tokens a second of the first over those of the second."""
    found = []
    for name, place in (("measured", "here"), ("estimate", f"on {there}")):
        one, other = getattr(first, name), getattr(second, name)
        if one is not None and other is not None:
            ratio = one.tokens_per_second(first.load) / other.tokens_per_second(second.load)
            found.append(f"{first.model} writes {ratio:.2f} times the tokens of {second.model} {place}")
    return "; ".join(found) or "nothing to compare"
