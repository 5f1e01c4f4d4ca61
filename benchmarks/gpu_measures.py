"""What benchmarks/gpu.py does in a case: values, gradients and bits of a kernel, its first call, its times beside its
floor, what the device is and can do, and whether the peers are there."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels import scan_sizes
from ..kernels.launch import capability
from ..kernels.linear_kl import default_chunk
from ..models.provenance import provenance
from . import gpu_peers
from .gpu_cases import DRAWN, HEAD_DIM, STATE, VOCABULARY, Op, Tensors, operators
from .guarded import Case

# Relative RMS errors of values and gradients that count as right, in units of the dtype's spacing: how a compiler, a
# card or cuBLAS orders a sum moves an error by a few of them. The CPU's path has 5 and 9 in float32, 0.6 and 0.7 in
# bfloat16; TF32 in the place of float32 has 4,000, and a wrong index a million.
SPACINGS = {torch.float32: (80, 800), torch.bfloat16: (1.25, 2.5)}
TINY, WIDE = (2, 300), (1, 2048)  # batch and tokens of what is checked, at tiny widths and at the 9B's
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRODUCTS = "its four products alone"


def right(dtype: torch.dtype, value: float, gradient: float) -> bool:
    """False where one of them is NaN."""
    spacing = torch.finfo(dtype).eps
    return value <= SPACINGS[dtype][0] * spacing and gradient <= SPACINGS[dtype][1] * spacing


def tensors_of(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [part for part in value if isinstance(part, Tensor)]


def drawn_leaves(op: Op, batch: int, tokens: int, dtype: torch.dtype, tiny: bool) -> Tensors:
    """The same inputs each time, where they lie in the model, with gradients; A and the SSM state stay float32."""
    torch.manual_seed(0)
    before = DRAWN["dtype"]
    DRAWN["dtype"] = dtype
    try:
        inputs = op.make(batch, tokens, tiny)
    finally:
        DRAWN["dtype"] = before
    return {
        name: tensor.detach().requires_grad_(
            tensor.is_floating_point() and not op.no_grad and not name.startswith("teacher")
        )
        for name, tensor in inputs.items()
    }


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
    expected = expected.detach().double()
    found = found.detach().to(expected)
    return float((expected - found).norm() / expected.norm().clamp_min(1e-300))


def worst(errors: list[float]) -> float:
    """The largest, or NaN where one of them is, which Python's max would hide."""
    return float(torch.tensor([0.0, *errors], dtype=torch.float64).max())


def check(op: Op, batch: int, tokens: int, dtype: torch.dtype) -> Case:
    """Worst errors against float64 of the same rounded inputs, on tiny widths."""
    leaves = drawn_leaves(op, batch, tokens, dtype, True)
    exact = {name: tensor.detach().cpu() for name, tensor in leaves.items()}
    exact = {k: t.double().requires_grad_(leaves[k].requires_grad) if t.is_floating_point() else t
             for k, t in exact.items()}  # fmt: skip
    expected, expected_gradients = gradients(op, exact, op.truth)
    found, found_gradients = gradients(op, leaves, op.fast)
    value = worst([error(a, b) for a, b in zip(expected, found, strict=True)])
    gradient = worst([error(a, found_gradients[name]) for name, a in expected_gradients.items()])
    return {"value": value, "gradient": gradient, "right": right(dtype, value, gradient)}


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """As training that is to repeat itself runs: torch's own kernels are those that do, where it has them."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def repeats(op: Op, batch: int, tokens: int, dtype: torch.dtype, tiny: bool) -> bool:
    """Whether values and gradients are the same bits when computed twice."""
    with deterministic():
        twice = [gradients(op, drawn_leaves(op, batch, tokens, dtype, tiny), op.fast) for _ in range(2)]
    pairs = zip(*([*outputs, *found.values()] for outputs, found in twice), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def check_case(case: Case) -> Case:
    op, dtype = operators()[case["op"]], DTYPES[case["dtype"]]
    batch, tokens = case["batch"], case["tokens"]
    return check(op, batch, tokens, dtype) | {"repeats": repeats(op, batch, tokens, dtype, True)}


def first_case(case: Case) -> Case:
    """Seconds of the first call, forward and backward, with an empty cache of compiled kernels; and the bits."""
    op = operators()[case["op"]]
    leaves = drawn_leaves(op, case["batch"], case["tokens"], torch.bfloat16, False)
    torch.cuda.synchronize()
    clock = time.perf_counter()
    gradients(op, leaves, op.fast)
    torch.cuda.synchronize()
    first = time.perf_counter() - clock
    return {"first_call": first, "repeats": repeats(op, case["batch"], case["tokens"], torch.bfloat16, False)}


def milliseconds(work: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(work, return_mode="median"))


def rates_case(case: Case) -> Case:
    """Bytes a second of a copy (read and written), and operations a second of a bfloat16 matrix product."""
    source, target = (torch.empty(2**29, dtype=torch.uint8, device="cuda") for _ in range(2))
    copied = milliseconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    multiplied = milliseconds(lambda: a @ b)
    return {"bandwidth": 2 * 2**29 / copied * 1e3, "matmul": 2 * 8192**3 / multiplied * 1e3}


def time_way(op: Op, way: Callable[..., Any], leaves: Tensors) -> Case:
    """Milliseconds of forward and backward (medians), and the extra peak bytes of both; a loss's two are one."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = [output for output in tensors_of(way(**leaves)) if output.requires_grad]
    wanted = [tensor for tensor in leaves.values() if tensor.requires_grad]
    found: Case = {}
    if outputs:
        douts = [torch.ones_like(output) for output in outputs]
        torch.autograd.grad(outputs, wanted, douts, retain_graph=True)
        found["extra"] = float(torch.cuda.max_memory_allocated() - before)
        if outputs[0].dim():
            found["backward"] = milliseconds(lambda: torch.autograd.grad(outputs, wanted, douts, retain_graph=True))
    if outputs and not outputs[0].dim():
        outputs = []
        found["forward"] = milliseconds(lambda: torch.autograd.grad(tensors_of(way(**leaves))[0], wanted))
    else:
        found["forward"] = milliseconds(lambda: way(**leaves))
    return found


def timed_pass(way: Callable[..., Any], inputs: Tensors, forward: bool) -> Callable[[], Any]:
    """What is timed of a way: its forward without gradients, or its backward alone."""
    if forward:
        return torch.no_grad()(lambda: way(**inputs))
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    y = way(**leaves)
    return lambda: torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y), retain_graph=True)


def ways_of(name: str, op: Op) -> dict[str, Callable[..., Any]]:
    """Who does what an operator does, ours first."""
    ways = {"limbeck": op.fast} | op.peers
    if name.startswith("linear_kl"):
        ways[PRODUCTS] = lambda **inputs: gpu_peers.four_products(
            **inputs, chunk=default_chunk(VOCABULARY, inputs["student_hidden"])
        )
    return ways


def time_case(case: Case) -> Case:
    """Its floors are the least traffic at the measured bandwidth, or the operations at the measured rate of a product:
    `bytes` and `operations` of forward and backward."""
    op, shape = operators()[case["op"]], (case["batch"], case["tokens"])
    leaves = drawn_leaves(op, *shape, torch.bfloat16, False)
    needs = {"bytes": op.bytes_of, "operations": op.flops_of}
    known = {name: [each(*shape) for each in of] for name, of in needs.items() if of is not None}
    return time_way(op, ways_of(case["op"], op)[case["way"]], leaves) | known


def machine_case(case: Case) -> Case:
    """What it is, and which sizes of the scan it takes."""
    facts: Case = dict(provenance())
    for package in ("numpy", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    if DRAWN["device"] != "cuda":
        return facts
    found, device = torch.cuda.get_device_properties(0), torch.device("cuda", 0)
    facts |= {"capability": f"{found.major}.{found.minor}", "multiprocessors": found.multi_processor_count}
    facts |= {"sizes_of": capability(device), "memory_gib": round(found.total_memory / 2**30, 2)}
    facts |= {"cuda": torch.version.cuda}
    measured = scan_sizes.measured_sizes(device, 2, HEAD_DIM, STATE)
    path = scan_sizes.table_path()
    return facts | {"scan_sizes": "default" if measured is None else "measured", "scan_table": str(path or "none")}


def peer_case(case: Case) -> Case:
    gpu_peers.load_package(case["package"])
    version = getattr(sys.modules[case["package"]], "__version__", None)
    return {"version": version or "its Triton files alone"}


def wheel_case(case: Case) -> Case:
    """Installs one wheel, and nothing that it asks for, where its package is not there."""
    file, into = Path(case["file"]), case["into"]
    package = file.name.split("-")[0]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return {"installed": f"{importlib.metadata.version(package)}, which was there"}
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-index", "--no-deps", "--find-links", str(file.parent), "--target", into, package]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    if into not in sys.path:
        sys.path.append(into)
    importlib.invalidate_caches()
    return {"installed": importlib.metadata.version(package)}


def released(work: Callable[[Case], Case]) -> Callable[[Case], Case]:
    """Without what a case before left of the device's memory."""

    def clean(case: Case) -> Case:
        gc.collect()
        if DRAWN["device"] == "cuda":
            torch.cuda.empty_cache()
        return work(case)

    return clean
