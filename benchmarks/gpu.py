"""Every GPU kernel on the CUDA device at hand: right, repeatable, and how fast beside its floor and beside its peers.

    python -m limbeck.benchmarks.gpu [--json gpu.json] [--only NAME ...] [--short] [--budget SECONDS] [--wheels FOLDER]
    python benchmarks/gpu.py ...          the same from a checkout that is not installed, whatever its folder is called
    python -m limbeck.benchmarks.gpu --interpret

Needs torch, triton, numpy and safetensors. Peers (mamba_ssm, causal_conv1d, liger_kernel, fla, transformers, vllm) are
measured where they are installed, or lie in a folder of wheels. Cases in the order of their worth, each a line that is
printed and a row of the JSON at once: what the machine can do; values, gradients and bits of every kernel against
float64; on a card that has none yet, the sizes of the scan (`gpu_sweep`); first calls and times at the 9B's shapes and
strides. A case begins where the budget (520 s, 165 with --short) has time for it; what was left out is named. A floor
is the least traffic over the bandwidth of a copy, or the operations over the rate of a matrix product, both measured.
Exit code 3 where a kernel of ours fails, is wrong or does not repeat itself; `gpu.log` beside the JSON has the rest.
$LIMBECK_COMMIT is the commit where there is no .git. `--interpret` checks values, gradients and bits alone, on tiny
shapes, on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

if not __package__:
    import checkout  # noqa: F401

import torch
from limbeck.benchmarks import guarded
from limbeck.benchmarks.gpu_cases import DRAWN, Op, operators
from limbeck.benchmarks.gpu_measures import (
    TINY,
    WIDE,
    check,
    check_case,
    first_case,
    machine_case,
    peer_case,
    rates_case,
    released,
    time_case,
    ways_of,
    wheel_case,
)
from limbeck.benchmarks.gpu_peers import PACKAGES
from limbeck.benchmarks.gpu_sweep import FULL, PEER, adopt_case, sweep_case, sweep_cases
from limbeck.benchmarks.guarded import Case, Runner, case_process, in_this_process, run_benchmark, serve

__all__ = ["check", "main", "operators"]

SHAPES = ((1, 8192), (8, 8192), (1, 32768), (8, 32768))
SHARES = {"sweep": 0.3}  # of the budget, at most
WORK = {
    "machine": machine_case, "rates": rates_case, "wheel": wheel_case, "peer": peer_case, "check": check_case,
    "sweep": sweep_case, "adopt": adopt_case, "first": first_case, "time": time_case,
}  # fmt: skip
FACTS = {"benchmark": "gpu"}
FLEX = "attention packed, FlexAttention"  # torch's kernel, which knows no interpreter


@released
def work(case: Case) -> Case:
    return WORK[case["kind"]](case)


def check_cases(ops: dict[str, Op], dtype: str, shape: tuple[int, int]) -> Iterator[Case]:
    for name in ops:
        yield {"kind": "check", "op": name, "dtype": dtype, "batch": shape[0], "tokens": shape[1]}


def time_cases(ops: dict[str, Op], shape: tuple[int, int], packages: list[str], compiled: bool) -> Iterator[Case]:
    """Of every kernel at a shape: ours and the packages', or what torch does, which compiles for long."""
    batch, tokens = shape
    place = {"batch": batch, "tokens": tokens}
    for name, op in ops.items():
        of_a_token = name in ("causal_conv1d_step", "state_update")  # the same whatever the tokens are
        if (name.startswith("linear") and batch > 1) or (of_a_token and tokens > SHAPES[0][1]):
            continue
        if not compiled and shape == SHAPES[0]:
            yield {"kind": "first", "op": name, "batch": WIDE[0], "tokens": WIDE[1]}
        ours = ["limbeck", *(way for way in op.peers if way in packages)]
        others = [way for way in ways_of(name, op) if way != "limbeck" and way not in PACKAGES]
        yield from ({"kind": "time", "op": name, **place, "way": way} for way in (others if compiled else ours))


def plan(ops: dict[str, Op], short: bool, wheels: list[Path], into: str, rows: list[Case]) -> Iterator[Case]:
    """Cases in the order of their worth; `rows` are those so far, which tell what is worth to be done."""
    yield {"kind": "machine"}
    yield {"kind": "rates"}
    yield from check_cases(ops, "bfloat16", TINY)
    yield from ({"kind": "wheel", "file": str(file), "into": into} for file in wheels)
    yield from ({"kind": "peer", "package": package} for package in PACKAGES)
    packages = [row["package"] for row in rows if row["kind"] == "peer" and "error" not in row]
    machine = next((row for row in rows if row["kind"] == "machine"), {})
    if machine.get("scan_sizes") == "default" and "ssd_scan" in ops:
        yield from sweep_cases(short, FULL, machine["sizes_of"], rows, PEER in packages)
    yield from time_cases(ops, SHAPES[0], packages, compiled=False)
    yield from check_cases(ops, "float32", TINY)
    for shape in () if short else SHAPES[1:]:
        yield from time_cases(ops, shape, packages, compiled=False)
    for shape in SHAPES[:1] if short else SHAPES:
        yield from time_cases(ops, shape, packages, compiled=True)


def floors(row: Case, rates: Case) -> dict[str, float]:
    """Milliseconds of forward and backward that a kernel cannot beat."""
    found = {}
    for need, rate in (("bytes", "bandwidth"), ("operations", "matmul")):
        for part, amount in zip(("forward", "backward"), row.get(need, ()), strict=False):
            if amount and rate in rates:
                found[part] = amount / rates[rate] * 1e3
    return found


def with_floors(runner: Runner) -> Runner:
    rates: Case = {}

    def with_floor(case: Case, limit: float) -> Case:
        row = runner(case, limit)
        if row["kind"] == "rates":
            rates.update(row)
        return row | ({"floor": floors(row, rates)} if row["kind"] == "time" and "error" not in row else {})

    return with_floor


def describe(row: Case) -> str:
    """A row's result in a line."""
    kind = row["kind"]
    verdicts = [word for name, yes, no in (("right", "right", "WRONG"), ("repeats", "repeats", "DOES NOT REPEAT"))
                if name in row for word in [yes if row[name] else no]]  # fmt: skip
    errors = [f"{name}s {float(row[name]):.1e}" for name in ("value", "gradient") if name in row]
    if kind == "time":
        parts = []
        for part in ("forward", "backward"):
            if part in row:
                floor = row["floor"].get(part)
                share = f" (floor {floor:.3f}, {floor / row[part]:.0%})" if floor else ""
                parts.append(f"{part} {row[part]:.3f} ms{share}")
        return ", ".join([*parts, *([f"extra {row['extra'] / 2**20:.0f} MiB"] if "extra" in row else [])])
    if kind in ("check", "sweep", "adopt"):
        times = [", ".join(f"{ms:.3f} ms at {load}" for load, ms in row["ms"].items())] if "ms" in row else []
        adopted = [f"adopted {row['adopted']}, written to {row['table']}"] if "adopted" in row else []
        return ", ".join([*errors, *verdicts, *times, *adopted])
    if kind == "first":
        return ", ".join([f"first call {row['first_call']:.1f} s", *verdicts])
    apart = ("case", "kind", "seconds", "package", "file", "into")
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in row.items() if name not in apart)  # fmt: skip


def fails(row: Case) -> bool:
    """Whether a row says that a kernel of ours does: too little memory for a shape, peers and candidates aside."""
    if row["kind"] in ("wheel", "peer", "sweep") or row.get("way", "limbeck") != "limbeck":
        return False
    if "error" in row:
        return row["kind"] != "time" or not row["error"].startswith("OutOfMemoryError")
    return not (row.get("right", True) and row.get("repeats", True))


def worker_environment(cache: str, into: str) -> dict[str, str]:
    """Fresh caches of compiled kernels; the wheels; and products in the precision that they ask for."""
    apart = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in apart}
    environment |= {"TRITON_CACHE_DIR": f"{cache}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products ask for it
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), into]))
    return environment


def options_of(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    short, interpret = "one shape, 8192 tokens, instead of four", "correctness alone, in Triton's interpreter"
    parser = guarded.script_options((__doc__ or "").splitlines()[0], "gpu.json", short, interpret)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these kernels alone")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="peers to install where they are not")
    return parser, parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    parser, options = options_of(arguments)
    ops = operators()
    unknown = set(options.only or ()) - set(ops)
    if unknown:
        parser.error(f"unknown kernel {', '.join(sorted(unknown))}; known: {', '.join(ops)}")
    ops = {name: op for name, op in ops.items() if not options.only or name in options.only}
    wheels = sorted(options.wheels.glob("*.whl")) if options.wheels else []
    if options.wheels and not wheels:
        parser.error(f"--wheels {options.wheels} has no wheel")
    if guarded.is_refused(options):
        return 2
    if options.worker is not None:
        DRAWN["device"] = "cuda"
        torch.set_float32_matmul_precision("highest")
        return serve(work, options.worker)
    return measure(options, ops, wheels)


def measure(options: argparse.Namespace, ops: dict[str, Op], wheels: list[Path]) -> int:
    budget = guarded.budget_of(options, SHARES)
    if options.interpret:
        kept = {name: op for name, op in ops.items() if name != FLEX}
        cases = [{"kind": "machine"}, *check_cases(kept, "float32", (2, 9))]
        return run_benchmark(options.json, FACTS, lambda _: cases, in_this_process(work), budget, describe, fails)
    with tempfile.TemporaryDirectory(prefix="limbeck-", ignore_cleanup_errors=True) as folder:
        into = f"{folder}/peers"
        process = case_process(__file__, options.json, worker_environment(folder, into))
        with contextlib.closing(process):
            planned = functools.partial(plan, ops, options.short, wheels, into)
            return run_benchmark(options.json, FACTS, planned, with_floors(process), budget, describe, fails)


if __name__ == "__main__":
    raise SystemExit(main())
