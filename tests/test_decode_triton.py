"""The Triton kernels of a decoding step without a GPU: the interpreter in a process of its own, offline compilation,
and what their machine code and source promise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.kernels import launch, mamba_step
from limbeck.kernels.norm import add_rms_norm, forward_launch
from limbeck.tests.helpers import run_interpreted
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

NINE = (128, 80, 8, 128)  # Nemotron-Nano-9B-v2: heads, head_dim, groups, state
SHAPES = (NINE, (16, 32, 4, 64), (128, 64, 8, 256), (32, 64, 1, 128))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_interpreter_many() -> None:
    run_interpreted("interpreted_decode.py", "-m", "slow")


def step_tensors(shape: tuple[int, ...], dtype: torch.dtype, state: torch.dtype, device: str) -> tuple[Any, ...]:
    """The arguments of `mamba_step` up to its options, as the model calls it: 3 sequences, a width of 4."""
    (heads, head_dim, groups, width), batch = shape, 3
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * width

    def empty(*size: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=kind, device=device)

    rows = empty(batch, inner + channels + heads).split((inner, channels, heads), -1)
    arrived = empty(batch, groups, kind=torch.int32)
    weights = (empty(4, channels).mT, empty(channels), empty(heads, kind=torch.float32), empty(heads), empty(heads))
    return empty(batch, 3, channels).mT, empty(batch, heads, head_dim, width, kind=state), arrived, *rows, *weights


def launches(dtype: torch.dtype, shape: tuple[int, ...]) -> Iterator[launch.Launch]:
    """The step with states in float32 and in the dtype, the norm after the gate, before it and not at all; the norm
    that adds to the stream."""
    from limbeck.kernels import mamba_step_triton

    for kind, norm_first, normed in ((torch.float32, False, True), (dtype, True, True), (dtype, False, False)):
        conv, ssm, arrived, z, conv_in, dt, *vectors = step_tensors(shape, dtype, kind, "meta")
        y, norm = torch.empty(z.shape, dtype=dtype, device="meta"), vectors[0].new_empty(z.shape[1])
        weights = dict(zip(("weight", "bias", "A", "D", "dt_bias"), vectors, strict=True))
        weights["norm"] = norm if normed else None
        mixed = torch.empty(z.shape, device="meta") if normed else None
        yield mamba_step_triton.step_launch(
            conv, ssm, arrived, (z, conv_in, dt), weights, (0.0, math.inf, 1e-5, norm_first), mixed, y
        )
    x, weight = torch.empty(3, 1, 4480, dtype=dtype, device="meta"), torch.empty(4480, dtype=dtype, device="meta")
    yield forward_launch(x, x, None, weight, 1e-5, x, None, 1)


def check_compiles(capability: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Each fits the device's shared memory, and spills at most a few bytes a thread on sm_80 and 100."""
    from limbeck.tests.offline import SHARED_LIMIT, compile_launch

    for one in launches(dtype, shape):
        compiled = compile_launch(one, capability)
        name = f"{one.kernel.__name__} on sm_{capability}"
        assert compiled.shared <= SHARED_LIMIT[capability], f"{name}: {compiled}"
        assert compiled.spills <= {80: 16, 100: 32}.get(capability, 0), f"{name} spills: {compiled}"


def test_compiles_offline() -> None:
    pytest.importorskip("triton")
    check_compiles(90, torch.bfloat16, NINE)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", launch.CAPABILITIES)
def test_compiles_offline_all(capability: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    pytest.importorskip("triton")
    check_compiles(capability, dtype, shape)


@pytest.mark.parametrize("width", (2, 3, 4))
def test_the_convolutions_step_reads_all_before_it_writes(width: int) -> None:
    """In the machine code: loads, a barrier of all threads, stores. The interpreter cannot tell, since it has one
    thread."""
    pytest.importorskip("triton")
    from limbeck.benchmarks.sass_cycles import compiled, parsed
    from limbeck.kernels.conv_triton import step_launch

    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    state, weight, x = (
        torch.empty(2, width - 1, 300, **half).mT,
        torch.empty(300, width, **half),
        torch.empty(2, 300, **half),
    )
    machine = compiled(step_launch(state, x, weight, weight[:, 0].contiguous(), True, x, 90), 90)
    names = [one.name.split(".")[0] for one in parsed(machine.sass)]
    reads, barriers, writes = ([at for at, name in enumerate(names) if name == kind] for kind in ("LDG", "BAR", "STG"))
    assert max(reads) < min(barriers) < min(writes)
    assert len(reads) >= 2 * width + 1 and len(writes) >= width


def test_nothing_is_added_up_by_atomics() -> None:
    """A sum in the order in which programs end would not repeat itself bit for bit. The one atomic counts programs."""
    kernels = Path(launch.__file__).parent
    lines = [
        line.strip() for path in kernels.glob("*.py") for line in path.read_text().splitlines() if "tl.atomic" in line
    ]
    assert lines == ['arrived = tl.atomic_add(p_arrived, 1, sem="acq_rel", scope="gpu")']


@torch.no_grad()
def test_fake_cuda_tensors_pass() -> None:
    """At the 9B's size, without a GPU: shapes and dtypes of the GPU's path."""
    with FakeTensorMode():
        tensors = step_tensors(NINE, torch.bfloat16, torch.float32, "cuda")
        y = mamba_step.mamba_step(*tensors, torch.empty(10240, device="cuda"), 0.0, math.inf, 1e-5, False)
        assert (y.shape, y.dtype, y.device.type) == ((3, 10240), torch.bfloat16, "cuda")
        x = torch.empty(3, 1, 4480, dtype=torch.bfloat16, device="cuda")
        assert add_rms_norm(x, x, torch.empty(4480, device="cuda"), 1e-5).dtype == torch.bfloat16
    assert mamba_step.step_workspace(torch.empty(3, 4, 5, 6), torch.empty(20)) == (4 * 60,)
    assert mamba_step.step_workspace(torch.empty(3, 4, 5, 6), None) == ()


@pytest.mark.parametrize("norm", ("after", "before", "none"))
def test_operators_are_well_registered(norm: str) -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares memory that fake kernels leave unwritten
    conv, ssm, arrived, *rest = step_tensors((2, 3, 1, 4), torch.float32, torch.float32, "cpu")
    arguments = [torch.randn_like(each) for each in (conv, ssm, *rest)]
    weight = None if norm == "none" else torch.ones(6)
    options = (weight, 0.0, math.inf, 1e-5, norm == "before")
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments.insert(2, arrived.zero_())
    torch.library.opcheck(mamba_step.mamba_step_op, (*arguments, *options), test_utils=utilities)
