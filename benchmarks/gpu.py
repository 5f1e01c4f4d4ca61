"""Every GPU kernel on the CUDA device at hand: right, repeatable, and how fast beside its floor and beside its peers.

    python -m limbeck.benchmarks.gpu [--json gpu.json] [--only NAME ...] [--short]
    python -m limbeck.benchmarks.gpu --interpret

Needs torch, triton, numpy and safetensors; mamba_ssm, causal_conv1d, liger_kernel and fla are measured where they are
installed. In this order: the first call of every kernel with an empty cache of compiled kernels; values and gradients
against float64; gradients twice, bit for bit; times at the 9B's shapes. A floor is the least traffic over the measured
bandwidth of a copy, or the operations over the measured rate of a matrix product. One table is printed, JSON written
beside it, and the exit code is 3 where a kernel is wrong or does not repeat itself. `--interpret` checks values,
gradients and bits alone, on tiny shapes, on the CPU, in Triton's interpreter.
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
from typing import Any, NamedTuple

import torch
from limbeck.benchmarks import gpu_peers
from limbeck.benchmarks.provenance import provenance
from limbeck.kernels import reference
from limbeck.kernels.activation import relu2, swiglu
from limbeck.kernels.attention import attention, decode_attention, document_mask
from limbeck.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from limbeck.kernels.linear_kl import default_chunk, linear_cross_entropy, linear_kl
from limbeck.kernels.norm import gated_rms_norm, rms_norm
from limbeck.kernels.ssd import ssd_scan
from limbeck.kernels.state_update import state_update
from torch import Tensor
from torch.nn import functional as F

# Nemotron-Nano-9B-v2 (NVIDIA-NeMo/Megatron-Bridge); the teacher's width is the 12B's.
HIDDEN, TEACHER, FFN, VOCABULARY = 4480, 5120, 15680, 131072
HEADS, HEAD_DIM, GROUPS, STATE, WIDTH, CHUNK = 128, 80, 8, 128, 4, 128
QUERIES, KEYS, QUERY_DIM = 40, 8, 128
INNER = HEADS * HEAD_DIM
CONV = INNER + 2 * GROUPS * STATE
PROJECTED = INNER + CONV + HEADS
EPS = 1e-5
# Relative RMS errors of values and gradients that count as right.
RIGHT = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 2e-2)}
SHAPES = ((1, 8192), (1, 32768), (8, 8192), (8, 32768))

Tensors = dict[str, Tensor]


class Op(NamedTuple):
    """One kernel: drawn inputs (those of floating dtype want gradients, unless `no_grad`), the fast way and the truth.

    `make(batch, tokens, small)` draws; the truth gets float64. `bytes_of` and `flops_of`, of (batch, tokens, element
    size), are those of forward and backward; `peers` are the ways of other packages, by name."""

    make: Callable[[int, int, bool], Tensors]
    fast: Callable[..., Any]
    truth: Callable[..., Any]
    bytes_of: tuple[Callable[[int, int], float], Callable[[int, int], float]] | None = None
    flops_of: tuple[Callable[[int, int], float], Callable[[int, int], float]] | None = None
    no_grad: bool = False
    peers: dict[str, Callable[..., Any]] = {}  # noqa: RUF012


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=DEVICE[0]) * scale


DEVICE = ["cpu"]


def rows_of(width: int, small: int, names: str) -> Callable[[int, int, bool], Tensors]:
    def make(batch: int, tokens: int, tiny: bool) -> Tensors:
        size = small if tiny else width
        return {name: normal(*((size,) if name == "weight" else (batch, tokens, size))) for name in names.split()}

    return make


def gated_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    """The gate is a slice of the projection, as in the model."""
    size, wide = (48, 100) if tiny else (INNER, PROJECTED)
    return {"x": normal(batch, tokens, size), "z": normal(batch, tokens, wide)[..., :size], "weight": normal(size)}


def scan_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    heads, groups = (4, 2) if tiny else (HEADS, GROUPS)
    state = 16 if tiny else STATE
    head_dim = 16 if tiny else HEAD_DIM
    return {
        "x": normal(batch, tokens, heads, head_dim),
        "dt": normal(batch, tokens, heads),
        "A": -torch.exp(torch.linspace(-4, 2.7, heads, device=DEVICE[0])),
        "B": normal(batch, tokens, groups, state),
        "C": normal(batch, tokens, groups, state),
        "D": normal(heads),
        "dt_bias": normal(heads) - 3,
    }


def conv_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    size, wide, start = (40, 64, 8) if tiny else (CONV, PROJECTED, INNER)
    x = normal(batch, tokens, wide)[..., start : start + size]
    return {"x": x, "weight": normal(size, WIDTH), "bias": normal(size)}


def step_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    size = 40 if tiny else CONV
    return {"state": normal(batch, WIDTH - 1, size).mT, "x": normal(batch, size), "weight": normal(size, WIDTH),
            "bias": normal(size)}  # fmt: skip


def update_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    scan = scan_inputs(batch, 1, tiny)
    one = {name: tensor[:, 0] if name in ("x", "dt", "B", "C") else tensor for name, tensor in scan.items()}
    return {"state": normal(*one["x"].shape, one["B"].shape[-1])} | one


def loss_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    count, vocabulary, widths = batch * tokens, *((60, (8, 12)) if tiny else (VOCABULARY, (HIDDEN, TEACHER)))
    found = {}
    for name, width in zip(("student", "teacher"), widths, strict=True):
        found[f"{name}_hidden"] = normal(count, width)
        found[f"{name}_head"] = normal(vocabulary, width, scale=width**-0.5)
    labels = torch.arange(count, device=DEVICE[0]) * 7919 % vocabulary
    return found | {"labels": torch.where(labels % 5 == 0, -100, labels)}


def query_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    heads, groups, size = (6, 2, 16) if tiny else (QUERIES, KEYS, QUERY_DIM)
    return {"q": normal(batch, heads, tokens, size), "k": normal(batch, groups, tokens, size),
            "v": normal(batch, groups, tokens, size)}  # fmt: skip


def packed_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    """Eight documents a row, of unequal lengths."""
    ends = torch.linspace(0, 1, 9, device=DEVICE[0])[1:] ** 2 * tokens
    document = torch.searchsorted(ends.ceil(), torch.arange(tokens, device=DEVICE[0]) + 1.0)
    return query_inputs(batch, tokens, tiny) | {"document": document.clamp(max=7).repeat(batch, 1)}


def decode_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    found = query_inputs(batch, tokens, tiny)
    return found | {"q": found["q"][:, :, 0]}


def dense_attention(q: Tensor, k: Tensor, v: Tensor, document: Tensor | None = None) -> Tensor:
    index = torch.arange(q.shape[2], device=q.device)
    mask = (index <= index[:, None])[None, None]
    if document is not None:
        mask = mask & (document[:, None, :, None] == document[:, None, None, :])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def step_truth(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference.causal_conv1d_reference(x[:, None], weight, bias, initial_state=state)[0][:, 0]


def update_truth(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **more: Any) -> Tensor:
    x, dt, B, C = (tensor[:, None] for tensor in (x, dt, B, C))
    return reference.ssd_scan_reference(x, dt, A, B, C, dt_softplus=True, initial_state=state, **more)[0][:, 0]


def loss_of(divergence: str, temperature: float = 1.0, ce_weight: float = 0.0) -> tuple[Any, Any]:
    options: dict[str, Any] = {"divergence": divergence, "temperature": temperature, "ce_weight": ce_weight}
    return (
        lambda **inputs: linear_kl(**inputs, **options)[:2],
        lambda **inputs: reference.linear_kl_reference(**inputs, **options),
    )


def per_token(forward: float, backward: float) -> Any:
    """Bytes of forward and backward for so many a token."""
    return (lambda batch, tokens: batch * tokens * forward), (lambda batch, tokens: batch * tokens * backward)


def per_pair(forward: float, backward: float) -> Any:
    """Operations for so many a pair of tokens, one of them before the other."""
    return (lambda b, t: b * t * t / 2 * forward), (lambda b, t: b * t * t / 2 * backward)


def loss_flops(student: int, teacher: int) -> Any:
    """All four products belong to the forward."""
    return (lambda b, t: 2 * b * t * VOCABULARY * (3 * student + teacher)), (lambda b, t: 0.0)


def operators() -> dict[str, Op]:
    scan_bytes = 2 * (INNER + 2 * GROUPS * STATE + HEADS)  # x, B, C and dt in bfloat16
    pair = 4 * QUERIES * QUERY_DIM
    cached = 2 * 2 * KEYS * QUERY_DIM
    state_bytes = 2 * 4 * HEADS * HEAD_DIM * STATE
    scan: dict[str, Any] = {"dt_softplus": True}
    return {
        "rms_norm": Op(rows_of(HIDDEN, 48, "x weight"), lambda x, weight: rms_norm(x, weight, EPS),
                       lambda x, weight: reference.rms_norm_reference(x, weight, EPS),
                       per_token(4 * HIDDEN, 6 * HIDDEN), peers=gpu_peers.RMS_NORM),
        "rms_norm + residual": Op(
            rows_of(HIDDEN, 48, "x residual weight"),
            lambda x, residual, weight: rms_norm(x, weight, EPS, residual=residual),
            lambda x, residual, weight: (reference.rms_norm_reference(x + residual, weight, EPS), x + residual),
            per_token(8 * HIDDEN, 8 * HIDDEN), peers=gpu_peers.ADD_RMS_NORM),
        "gated_rms_norm": Op(
            gated_inputs, lambda x, z, weight: gated_rms_norm(x, z, weight, EPS, GROUPS),
            lambda x, z, weight: reference.gated_rms_norm_reference(x, z, weight, EPS, GROUPS),
            per_token(6 * INNER, 10 * INNER), peers=gpu_peers.GATED_RMS_NORM),
        "relu2": Op(rows_of(FFN, 37, "x"), relu2, reference.relu2_reference, per_token(4 * FFN, 6 * FFN),
                    peers=gpu_peers.RELU2),
        "swiglu": Op(rows_of(FFN, 37, "gate up"), swiglu, reference.swiglu_reference, per_token(6 * FFN, 10 * FFN),
                     peers=gpu_peers.SWIGLU),
        "linear_kl": Op(loss_inputs, *loss_of("forward"), flops_of=loss_flops(HIDDEN, TEACHER),
                        peers=gpu_peers.LINEAR_KL),
        "linear_kl jsd": Op(loss_inputs, *loss_of("jsd"), flops_of=loss_flops(HIDDEN, TEACHER),
                            peers=gpu_peers.LINEAR_JSD),
        "linear_kl reverse T=2 + ce": Op(loss_inputs, *loss_of("reverse", 2.0, 0.5),
                                         flops_of=loss_flops(HIDDEN, TEACHER)),
        "linear_cross_entropy": Op(
            lambda *shape: {name: tensor for name, tensor in loss_inputs(*shape).items() if "teacher" not in name},
            lambda **inputs: linear_cross_entropy(*inputs.values()).loss,
            lambda student_hidden, student_head, labels: F.cross_entropy(student_hidden @ student_head.T, labels),
            flops_of=loss_flops(HIDDEN, 0)),
        "attention causal": Op(query_inputs, attention, dense_attention, flops_of=per_pair(pair, 2.5 * pair)),
        "attention packed, FlexAttention": Op(
            packed_inputs, lambda q, k, v, document: attention(q, k, v, document_mask(document)), dense_attention,
            peers=gpu_peers.PACKED | {"SDPA, dense mask": dense_attention}),
        "decode_attention": Op(decode_inputs, decode_attention, gpu_peers.decode_reference,
                               per_token(cached, 0), no_grad=True, peers={"SDPA": gpu_peers.decode_reference}),
        "ssd_scan": Op(scan_inputs, lambda **inputs: ssd_scan(**inputs, **scan, chunk_size=CHUNK),
                       lambda **inputs: reference.ssd_scan_reference(**inputs, **scan)[0],
                       per_token(scan_bytes + 2 * INNER, 2 * scan_bytes + 2 * INNER), peers=gpu_peers.SCAN),
        "causal_conv1d": Op(conv_inputs, causal_conv1d, lambda **inputs: reference.causal_conv1d_reference(**inputs)[0],
                            per_token(4 * CONV, 6 * CONV), peers=gpu_peers.CONV),
        "causal_conv1d_step": Op(step_inputs, causal_conv1d_step, step_truth,
                                 (lambda b, t: b * CONV * 16, lambda b, t: 0.0), no_grad=True),
        "state_update": Op(update_inputs, lambda **inputs: state_update(**inputs, dt_softplus=True), update_truth,
                           (lambda b, t: b * state_bytes, lambda b, t: 0.0), no_grad=True, peers=gpu_peers.UPDATE),
    }  # fmt: skip


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
    """Whether values and gradients are the same bits when asked for twice."""
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
