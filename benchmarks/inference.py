"""Generation on the CUDA device at hand: right, how fast beside its ceiling, and within the memory that was predicted.

    python -m limbeck.benchmarks.inference [--json inference.json] [--only check decode memory throughput]
                                           [--short] [--budget SECONDS]
    python benchmarks/inference.py ...          the same from a checkout that is not installed
    python -m limbeck.benchmarks.inference --interpret

Needs torch, triton, numpy and safetensors; weights are drawn. Cases in the order of their worth, each a line that is
printed and a row of the JSON at once: chunked prefill and decoding against one forward pass, at a small size; the 9B's
decoding step at batch 1 beside the time in which its weights can be read; a prompt of 131,072 tokens and 64 steps under
a cap of 22.06 GiB, with the predicted and the measured peak, and the 12B, which is to be refused before anything is
allocated; the 9B against Qwen3-8B on four lengths of input and output (with --short one), each at the largest batch
that fits. A case begins where the budget (520 s, 165 with --short) has time for it; what was left out is named. Exit
code 3 where a case fails or a result is wrong, or the memory is further than 2% from its prediction. `--interpret` runs
all of it at tiny sizes on the CPU, in Triton's interpreter: its figures say nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

if not __package__:
    import checkout  # noqa: F401

import torch
from limbeck.benchmarks import guarded
from limbeck.benchmarks.guarded import Case, Runner, case_process, in_this_process, run_benchmark, serve
from limbeck.benchmarks.published import PUBLISHED
from limbeck.models.config import HybridConfig
from limbeck.models.cost.hardware import GIB, Place
from limbeck.models.cost.inference import memory, verdict
from limbeck.models.cost.peak import check_memory, measure, random_model
from limbeck.models.errors import CheckFailed
from limbeck.models.generate.cache import Cache
from limbeck.models.generate.decode import Decoder
from limbeck.models.generate.generate import prefill
from limbeck.models.hybrid import HybridLM
from limbeck.models.provenance import provenance
from torch import Tensor

SMALL = HybridConfig(
    pattern="M-*M-", vocab_size=512, hidden_size=128, intermediate_size=256, num_attention_heads=8,
    num_key_value_heads=2, head_dim=16, mamba_num_heads=8, mamba_head_dim=32, n_groups=2, ssm_state_size=16,
    chunk_size=16,
)  # fmt: skip
DENSE = SMALL.replace(pattern="*-", family="llama", activation="silu", gated_mlp=True, rope_theta=1e4)
USABLE = 22.06 * GIB  # of an A10G, arXiv 2508.14444
SHARE = 0.95  # of it, for us
MOST_OFF, RIGHT = 0.02, {torch.float32: 1e-4, torch.bfloat16: 3e-2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LONGEST_CASE = 300.0  # seconds
# arXiv 2508.14444: Nemotron-Nano-9B-v2 over Qwen3-8B on an A10G.
TOKENS, SEQUENCES = 24, 2  # of the check
PUBLISHED_RATIO = {(1024, 8192): 3.3, (8192, 16384): 6.3}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run: two models and one that is too large, where, with how many tokens, under which cap (bytes)."""

    hybrid: HybridConfig
    dense: HybridConfig
    large: HybridConfig
    device: torch.device
    dtype: torch.dtype
    context: int
    steps: int
    chunk: int
    lengths: tuple[tuple[int, int], ...]
    cap: float

    @property
    def place(self) -> Place:
        if self.device.type != "cuda":
            return Place("cpu", torch.get_num_threads())
        found = torch.cuda.get_device_properties(self.device)
        return Place("cuda", found.multi_processor_count, f"{found.major}.{found.minor}")

    def assumptions(self) -> dict[str, Any]:
        return {"weight_dtype": self.dtype, "chunk": self.chunk, "place": self.place}


def full_plan() -> Plan:
    hybrid, dense, large = (PUBLISHED[name] for name in ("nemotron-nano-9b-v2", "qwen3-8b", "nemotron-nano-12b-v2"))
    lengths = ((1024, 8192), (8192, 16384), (8192, 1024), (16384, 1024))  # the published ones first
    return Plan(hybrid, dense, large, torch.device("cuda"), torch.bfloat16, 131072, 64, 512, lengths, USABLE)


def tiny_plan() -> Plan:
    """On the CPU: the larger of the models is to be too large for the cap."""
    cap = 1.2 * memory(SMALL, 42, chunk=16, weight_dtype=torch.float32, place=Place("cpu", 1)).peak
    large = SMALL.replace(pattern=SMALL.pattern * 3)
    return Plan(SMALL, DENSE, large, torch.device("cpu"), torch.float32, 40, 2, 16, ((16, 8),), cap)


HELD: dict[str, Any] = {}  # one model, kept from case to case


def model_of(plan: Plan, config: HybridConfig) -> HybridLM:
    """The model before goes first: two need not fit."""
    if HELD.get("config") != config:
        forget(plan.device)
        HELD.update(config=config, model=random_model(config, plan.dtype, plan.device))
    model: HybridLM = HELD["model"]
    return model


def forget(device: torch.device) -> None:
    HELD.clear()
    clear(device)


def machine(plan: Plan, case: Case) -> Case:
    return dict(provenance())


@torch.inference_mode()
def check(plan: Plan, case: Case) -> Case:
    """Relative RMS of the logits of chunked prefill and decoding against one forward pass of the same tokens, by the
    length of the prompt."""
    dtype = DTYPES[case["dtype"]]
    model = random_model(SMALL, dtype, plan.device)
    ids = torch.arange(SEQUENCES * TOKENS, device=plan.device).view(SEQUENCES, -1) * 7919 % SMALL.vocab_size
    whole = model(ids).double()
    errors = {}
    for split in (1, 17, TOKENS - 1):
        cache = Cache(SMALL, SEQUENCES, TOKENS, dtype=dtype, device=plan.device)
        parts = [prefill(model, ids[:, :split], cache, 16)]
        decoder = Decoder(model, cache)
        parts += [decoder.step(ids[:, place]).clone() for place in range(split, TOKENS)]
        wanted = whole[:, split - 1 :]
        errors[f"prompt of {split}"] = float((torch.stack(parts, 1).double() - wanted).norm() / wanted.norm())
    return {"errors": errors, "right": all(error <= RIGHT[dtype] for error in errors.values())}


def decode(plan: Plan, case: Case) -> Case:
    """Milliseconds of a decoding step at batch 1 and its share of the ceiling, which reads the weights but the
    embedding, and the caches, at the bandwidth of a copy."""
    bandwidth = copy_bandwidth(plan)
    model = model_of(plan, plan.hybrid)
    length = min(1024, plan.context)
    report = memory(plan.hybrid, length, **plan.assumptions())
    read = report.weights - plan.hybrid.vocab_size * plan.hybrid.hidden_size * plan.dtype.itemsize
    moved = read + report.kv + 2 * (report.ssm + report.conv)
    times = step_seconds(model, plan, 1, length)
    found: Case = {f"{way}_ms": seconds * 1e3 for way, seconds in times.items()}
    found |= {f"{way}_of_ceiling": moved / bandwidth / seconds for way, seconds in times.items()}
    return found | {"bandwidth_gb_s": bandwidth / 1e9, "ceiling_tokens_s": bandwidth / moved}


def copy_bandwidth(plan: Plan) -> float:
    """Bytes a second, read and written."""
    size = 2**30 if plan.device.type == "cuda" else 2**20
    source, target = (torch.empty(size, dtype=torch.uint8, device=plan.device) for _ in range(2))
    return 2 * size / timed(lambda: target.copy_(source), plan.device)


def timed(work: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    """Median seconds of the work, after two warm-up rounds; of a single one on a CPU."""
    seconds = []
    rounds, warm = (rounds, 2) if device.type == "cuda" else (1, 0)
    for number in range(rounds + warm):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= warm:
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


@torch.inference_mode()
def step_seconds(model: HybridLM, plan: Plan, batch: int, length: int) -> dict[str, float]:
    """Seconds of the decoder's step with `length` tokens in the cache, called from Python and, on a GPU, replayed as a
    CUDA graph. It is the same step each time, over a cache of zeros: times do not depend on what is in it."""
    token = torch.zeros(batch, dtype=torch.int64, device=plan.device)
    cache = Cache(model.config, batch, length + 1, dtype=plan.dtype, device=plan.device)
    found = {}
    for way in ("eager", "graph") if plan.device.type == "cuda" else ("eager",):
        decoder = Decoder(model, cache, graphs=way == "graph")

        def step(decoder: Decoder = decoder) -> Tensor:
            cache.length = length
            return decoder.step(token)

        found[way] = timed(step, plan.device)
    return found


def capped_memory(plan: Plan, case: Case) -> Case:
    """The long prompt under the cap: predicted and measured peak; and what is said of the model that does not fit."""
    forget(plan.device)
    context = plan.context + plan.steps
    predicted = memory(plan.hybrid, context, **plan.assumptions()).peak
    check_memory(plan.hybrid, predicted, plan.device, plan.cap)
    model = random_model(plan.hybrid, plan.dtype, plan.device)
    run = measure(model, context, chunk=plan.chunk, steps=plan.steps, cap=plan.cap)
    del model
    off = predicted / run.peak - 1
    found = dataclasses.asdict(run) | {"predicted": predicted, "off": off, "right": abs(off) <= MOST_OFF}
    try:
        check_memory(plan.large, memory(plan.large, context, **plan.assumptions()).peak, plan.device, plan.cap)
    except CheckFailed as refusal:
        return found | {"large": str(refusal)}
    return found | {"large": "was not refused", "right": False}


@torch.inference_mode()
def throughput(plan: Plan, case: Case) -> Case:
    """Tokens a second of a model at lengths of input and output, at its largest batch within the cap (0: it does not
    fit): the prefill is timed, and decoding steps at the output's begin, middle and end, weighted as Simpson's rule
    does."""
    config = plan.hybrid if case["model"] == "hybrid" else plan.dense
    first, last = case["input"], case["output"]
    report = memory(config, first + last, **plan.assumptions())
    batch = verdict(config, report, SHARE * plan.cap).largest_batch
    if not batch:
        return {"sequences": 0}
    return {"sequences": batch, "tokens_per_second": speed(model_of(plan, config), plan, batch, first, last)}


def ratio(plan: Plan, case: Case) -> Case:
    published = PUBLISHED_RATIO.get((case["input"], case["output"]), "none")
    return {"ratio": case["sides"]["hybrid"] / case["sides"]["dense"], "published": published}


def speed(model: HybridLM, plan: Plan, batch: int, first: int, last: int) -> float:
    ids = torch.zeros(batch, first, dtype=torch.int64, device=plan.device)

    def fill() -> None:
        prefill(model, ids, Cache(model.config, batch, first, dtype=plan.dtype, device=plan.device), plan.chunk)

    seconds = timed(fill, plan.device, rounds=1)
    clear(plan.device)
    for place, weight in ((first, 1 / 6), (first + last // 2, 4 / 6), (first + last - 1, 1 / 6)):
        seconds += last * weight * min(step_seconds(model, plan, batch, place).values())
        clear(plan.device)
    return batch * last / seconds


def clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


WORK: dict[str, Callable[[Plan, Case], Case]] = {
    "machine": machine, "check": check, "decode": decode, "memory": capped_memory, "throughput": throughput,
    "ratio": ratio,
}  # fmt: skip
PARTS = ("check", "decode", "memory", "throughput")


def cases_of(plan: Plan, parts: list[str], short: bool, rows: list[Case]) -> Iterator[Case]:
    """In the order of their worth; `rows` are those so far."""
    yield {"kind": "machine"}
    for part in PARTS:
        if part not in parts:
            continue
        if part == "check":
            yield from (
                {"kind": "check", "dtype": str(dtype)[6:]} for dtype in dict.fromkeys([plan.dtype, torch.float32])
            )
        elif part == "throughput":
            for number in range(
                0, 1 if short else len(plan.lengths), 2
            ):  # two at a time: a model takes a while to draw
                yield from throughput_cases(plan.lengths[number : number + (1 if short else 2)], rows)
        else:
            yield {"kind": part}


def throughput_cases(lengths: tuple[tuple[int, int], ...], rows: list[Case]) -> Iterator[Case]:
    for model in ("hybrid", "dense"):
        yield from ({"kind": "throughput", "model": model, "input": first, "output": last} for first, last in lengths)
    for first, last in lengths:
        sides = {
            row["model"]: row["tokens_per_second"]
            for row in rows
            if row.get("input") == first and row.get("output") == last and "tokens_per_second" in row
        }
        if len(sides) == 2:
            yield {"kind": "ratio", "input": first, "output": last, "sides": sides}


def describe(row: Case) -> str:
    apart = ("case", "kind", "seconds", "model", "input", "output", "sides", "dtype")
    shown = {name: value for name, value in row.items() if name not in apart}
    if "right" in shown:
        shown["right"] = "yes" if shown["right"] else "NO"
    flat = {name: value for name, value in shown.items() if not isinstance(value, dict)}
    flat |= {key: one for value in shown.values() if isinstance(value, dict) for key, one in value.items()}
    return ", ".join(f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in flat.items())  # fmt: skip


def fails(row: Case) -> bool:
    return "error" in row or not row.get("right", True)


def working(plan: Plan) -> Callable[[Case], Case]:
    def work(case: Case) -> Case:
        clear(plan.device)
        return WORK[case["kind"]](plan, case)

    return work


def main(arguments: list[str] | None = None) -> int:
    short, interpret = "one length of input and output instead of four", "tiny sizes on the CPU, Triton interpreted"
    parser = guarded.script_options((__doc__ or "").splitlines()[0], "inference.json", short, interpret)
    parser.add_argument("--only", nargs="+", metavar="PART", choices=PARTS, default=list(PARTS), help="these alone")
    options = parser.parse_args(arguments)
    if guarded.is_refused(options):
        return 2
    plan = tiny_plan() if options.interpret else full_plan()
    if options.worker is not None:
        torch.set_float32_matmul_precision("highest")
        return serve(working(plan), options.worker)
    budget = guarded.budget_of(options, {}, LONGEST_CASE)
    cases = functools.partial(cases_of, plan, options.only, options.short)
    with contextlib.ExitStack() as closed:
        runner: Runner = in_this_process(working(plan))
        if not options.interpret:
            runner = closed.enter_context(contextlib.closing(case_process(__file__, options.json, dict(os.environ))))
        return run_benchmark(options.json, {"benchmark": "inference"}, cases, runner, budget, describe, fails)


if __name__ == "__main__":
    sys.exit(main())
