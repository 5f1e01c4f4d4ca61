"""Every GPU kernel on the CUDA device at hand: right, repeatable, and how fast beside its floor and beside its peers.

    python -m limbeck.benchmarks.gpu [--json gpu.json] [--only NAME ...] [--short]
    python -m limbeck.benchmarks.gpu --interpret

Needs torch, triton, numpy and safetensors; mamba_ssm, causal_conv1d, liger_kernel, fla, transformers and vllm are
measured where they are installed. In this order: the first call of every kernel with an empty cache of compiled
kernels; values and gradients against float64; gradients twice, bit for bit; times at the 9B's shapes. A floor is the
least traffic over the measured bandwidth of a copy, or the operations over the measured rate of a matrix product. One
table is printed, JSON written beside it, and the exit code is 3 where a kernel is wrong or does not repeat itself.
`--interpret` checks values, gradients and bits alone, on tiny shapes, on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from limbeck.benchmarks import gpu_peers
from limbeck.benchmarks.gpu_cases import DEVICE, VOCABULARY, Op, Tensors, operators
from limbeck.kernels.linear_kl import default_chunk
from limbeck.models.provenance import provenance
from torch import Tensor

# Relative RMS errors of values and gradients that count as right.
RIGHT = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 2e-2)}
SHAPES = ((1, 8192), (1, 32768), (8, 8192), (8, 32768))


def tensors_of(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [part for part in value if isinstance(part, Tensor)]


def as_leaves(op: Op, inputs: Tensors, dtype: torch.dtype) -> Tensors:
    """In that dtype, with gradients; A and the SSM state stay float32, as in the model."""
    found = {}
    for name, tensor in inputs.items():
        if not tensor.is_floating_point():
            found[name] = tensor
            continue
        keeps = name == "A" or (name == "state" and tensor.dim() == 4)
        cast = tensor.detach().to(torch.float32 if keeps and dtype != torch.float64 else dtype)
        found[name] = cast.requires_grad_(not op.no_grad and not name.startswith("teacher"))
    return found


def gradients(op: Op, leaves: Tensors, way: Callable[..., Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and the gradients for fixed random gradients of those outputs."""
    outputs = tensors_of(way(**leaves))
    wanted = {name: tensor for name, tensor in leaves.items() if tensor.requires_grad}
    if not wanted:
        return outputs, {}
    generator = torch.Generator().manual_seed(1)
    into = [output for output in outputs if output.requires_grad]
    douts = [torch.randn(output.shape, generator=generator).to(output) for output in into]
    return outputs, dict(zip(wanted, torch.autograd.grad(into, list(wanted.values()), douts), strict=True))


def error(expected: Tensor, found: Tensor) -> float:
    """Relative RMS error; NaN where the truth or what was found has one."""
    expected, found = expected.detach().double().cpu(), found.detach().double().cpu()
    return float((expected - found).norm() / expected.norm().clamp_min(1e-300))


def check(op: Op, batch: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Worst errors against float64 of the same rounded inputs, on tiny widths."""
    torch.manual_seed(0)
    leaves = as_leaves(op, op.make(batch, tokens, True), dtype)
    exact = {name: tensor.detach().cpu() for name, tensor in leaves.items()}
    exact = {k: t.double().requires_grad_(leaves[k].requires_grad) if t.is_floating_point() else t
             for k, t in exact.items()}  # fmt: skip
    expected, expected_gradients = gradients(op, exact, op.truth)
    found, found_gradients = gradients(op, leaves, op.fast)
    values = max(error(a, b) for a, b in zip(expected, found, strict=True))
    worst = max((error(a, found_gradients[name]) for name, a in expected_gradients.items()), default=0.0)
    return {"value": values, "gradient": worst, "right": values <= RIGHT[dtype][0] and worst <= RIGHT[dtype][1]}


def repeats(op: Op, batch: int, tokens: int, dtype: torch.dtype, tiny: bool) -> bool:
    """Whether values and gradients are the same bits when computed twice."""
    torch.manual_seed(0)
    inputs = op.make(batch, tokens, tiny)
    twice = [gradients(op, as_leaves(op, {k: t.clone() for k, t in inputs.items()}, dtype), op.fast) for _ in range(2)]
    pairs = zip(*([*outputs, *found.values()] for outputs, found in twice), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def device_rates() -> dict[str, float]:
    """Bytes a second of a copy (read and written), and operations a second of a bfloat16 matrix product."""
    from triton.testing import do_bench

    source, target = (torch.empty(2**29, dtype=torch.uint8, device="cuda") for _ in range(2))
    copied = do_bench(lambda: target.copy_(source), return_mode="median")
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    multiplied = do_bench(lambda: a @ b, return_mode="median")
    return {"bandwidth": 2 * 2**29 / copied * 1e3, "matmul": 2 * 8192**3 / multiplied * 1e3}


def time_way(op: Op, way: Callable[..., Any], leaves: Tensors) -> dict[str, float]:
    """Milliseconds of forward and backward (medians), and the extra peak bytes of both; a loss's two are one."""
    from triton.testing import do_bench

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = [output for output in tensors_of(way(**leaves)) if output.requires_grad]
    wanted = [tensor for tensor in leaves.values() if tensor.requires_grad]
    found = {}
    if outputs:
        douts = [torch.ones_like(output) for output in outputs]
        torch.autograd.grad(outputs, wanted, douts, retain_graph=True)
        found["extra"] = float(torch.cuda.max_memory_allocated() - before)
        if outputs[0].dim():
            again = lambda: torch.autograd.grad(outputs, wanted, douts, retain_graph=True)  # noqa: E731
            found["backward"] = do_bench(again, return_mode="median")
    if outputs and not outputs[0].dim():
        outputs = []
        found["forward"] = do_bench(
            lambda: torch.autograd.grad(tensors_of(way(**leaves))[0], wanted), return_mode="median"
        )
    else:
        found["forward"] = do_bench(lambda: way(**leaves), return_mode="median")
    return found


def measure(name: str, op: Op, batch: int, tokens: int, rates: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Rows of one kernel at one shape: ours, torch.compile of the torch formula, and the peers that are there."""
    torch.manual_seed(0)
    leaves = as_leaves(op, op.make(batch, tokens, False), torch.bfloat16)
    floors: dict[str, float] = {}
    for number, part in enumerate(("forward", "backward")):
        if op.bytes_of is not None:
            floors[part] = op.bytes_of[number](batch, tokens) / rates["bandwidth"] * 1e3
        if op.flops_of is not None:
            floors[part] = op.flops_of[number](batch, tokens) / rates["matmul"] * 1e3
    ways = {"limbeck": op.fast} | op.peers
    if name.startswith("linear_kl"):
        ways["its four products alone"] = lambda **inputs: gpu_peers.four_products(
            **inputs, chunk=default_chunk(VOCABULARY, inputs["student_hidden"])
        )
    for who, way in ways.items():
        row: dict[str, Any] = {"op": name, "batch": batch, "tokens": tokens, "way": who, "floor": floors}
        try:
            yield row | time_way(op, way, leaves)
        except Exception as problem:  # a peer that is absent or too old, or too little memory, is a row of the table
            yield row | {
                "error": f"{type(problem).__name__}: {str(problem).splitlines()[0][:120] if str(problem) else ''}"
            }
        torch.cuda.empty_cache()


def cold_start(ops: dict[str, Op]) -> dict[str, float]:
    """Seconds of the first call, forward and backward, of every kernel; the cache of compiled kernels is empty."""
    found = {}
    for name, op in ops.items():
        leaves = as_leaves(op, op.make(1, 2048, False), torch.bfloat16)
        torch.cuda.synchronize()
        clock = time.perf_counter()
        gradients(op, leaves, op.fast)
        torch.cuda.synchronize()
        found[name] = time.perf_counter() - clock
    return found


def print_rows(rows: list[dict[str, Any]]) -> None:
    print("| kernel | batch x tokens | by | forward, ms | backward, ms | floors, ms | of the floor | extra, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        place = f"| {row['op']} | {row['batch']} x {row['tokens']} | {row['way']} |"
        if "error" in row:
            print(f"{place} {row['error']} | | | | |")
            continue
        parts = [part for part in ("forward", "backward") if part in row]
        times = " | ".join(f"{row[part]:.3f}" if part in row else "" for part in ("forward", "backward"))
        known = [part for part in parts if row["floor"].get(part)]
        floors = " + ".join(f"{row['floor'][part]:.3f}" for part in known)
        shares = ", ".join(f"{row['floor'][part] / row[part]:.0%}" for part in known)
        extra = f"{row['extra'] / 2**20:.0f}" if "extra" in row else ""
        print(f"{place} {times} | {floors} | {shares} | {extra} |")


def print_checks(checks: list[dict[str, Any]]) -> None:
    print("| kernel | dtype | values | gradients | right | repeats |\n|---|---|---|---|---|---|")
    for row in checks:
        right = "yes" if row["right"] else "NO"
        print(f"| {row['op']} | {row['dtype']} | {row['value']:.1e} | {row['gradient']:.1e} | {right} |"
              f" {'yes' if row['repeats'] else 'NO'} |")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="where the figures go")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these kernels alone")
    parser.add_argument("--short", action="store_true", help="one shape, 8192 tokens, instead of four")
    parser.add_argument("--interpret", action="store_true", help="correctness alone, in Triton's interpreter")
    options = parser.parse_args(arguments)
    ops = operators()
    if options.only:
        unknown = set(options.only) - set(ops)
        if unknown:
            parser.error(f"unknown kernel {', '.join(sorted(unknown))}; known: {', '.join(ops)}")
        ops = {name: op for name, op in ops.items() if name in options.only}
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        ops.pop("attention packed, FlexAttention", None)  # its kernel is torch's, and knows no interpreter
    elif not torch.cuda.is_available():
        parser.error("no CUDA device here; --interpret checks the kernels on the CPU")
    else:
        DEVICE[0] = "cuda"
        for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            os.environ[name] = tempfile.mkdtemp(prefix="limbeck-")
    report: dict[str, Any] = {"provenance": provenance()}
    print("\n".join(f"- {key}: {value}" for key, value in report["provenance"].items()) + "\n")
    if not options.interpret:
        report["cold start, s"] = cold_start(ops)
        print(f"first calls: {sum(report['cold start, s'].values()):.1f} s in all\n")
    report["checks"] = []
    shape = (2, 9) if options.interpret else (2, 300)
    for name, op in ops.items():
        for dtype in (torch.float32,) if options.interpret else (torch.float32, torch.bfloat16):
            row = check(op, *shape, dtype) | {"op": name, "dtype": str(dtype).removeprefix("torch.")}
            full = repeats(op, *shape, dtype, True) if options.interpret else repeats(op, 1, 2048, dtype, False)
            report["checks"].append(row | {"repeats": full})
    print_checks(report["checks"])
    if not options.interpret:
        report["device"] = device_rates()
        rates = ", ".join(f"{name} {rate:.3g}/s" for name, rate in report["device"].items())
        print(f"\nmeasured: {rates} (bytes, operations)\n")
        report["rows"] = []
        for batch, tokens in SHAPES[:1] if options.short else SHAPES:
            for name, op in ops.items():
                if name.startswith("linear") and batch > 1:
                    continue  # tokens are tokens there
                report["rows"] += measure(name, op, batch, tokens, report["device"])
        print_rows(report["rows"])
    options.json.write_text(json.dumps(report, indent=1))
    wrong = [row["op"] for row in report["checks"] if not (row["right"] and row["repeats"]) or math.isnan(row["value"])]
    if wrong:
        print(f"wrong or not repeatable: {', '.join(wrong)}", file=sys.stderr)
    return 3 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
