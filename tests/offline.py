"""Triton kernels compiled for GPUs that are not here: shared memory, registers and spills of each."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from limbeck.kernels.launch import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # a block may have (CUDA guide)
SHARED_LIMIT = {capability: size * 1024 for capability, size in SHARED_KIB.items()}
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
ALIGNED = [["tt.divisibility", 16]]


class Compiled(NamedTuple):
    """Bytes of shared memory a block, registers a thread, and bytes a thread keeps in local memory: its spills."""

    shared: int
    registers: int
    spills: int


def compile_for(
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    capability: int,
    *,
    attributes: dict[tuple[int, ...], Any] | None = None,
    warps: int = 4,
    stages: int = 3,
) -> Compiled:
    """One kernel for a compute capability: types by argument ("*bf16", "i32", "constexpr"), and the
    values of the constexprs. `attributes` names the arguments, by position, that 16 divides."""
    source = ASTSource(kernel, signature, constexprs, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = next(path for name, path in compiled.metadata_group.items() if name.endswith(".cubin"))
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    return Compiled(compiled.metadata.shared, registers, stack + local)


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """A launch's kernel, its arguments typed as Triton would type them; tensors may be on the meta device."""
    signature, constexprs, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        aligned = special and isinstance(value, int) and value % 16 == 0
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constexprs[name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        if aligned:
            attributes[position,] = ALIGNED
    return compile_for(launch.kernel, signature, constexprs, capability, attributes=attributes, warps=launch.warps,
                       stages=launch.stages)  # fmt: skip
