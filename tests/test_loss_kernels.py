"""The Triton kernels of norms, activations, loss and attention: run in the interpreter and compiled for GPUs, each in
a process of its own; and what happens to CUDA tensors without a GPU, or without triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limbeck.kernels.linear_kl import linear_kl
from limbeck.kernels.norm import rms_norm
from torch._subclasses.fake_tensor import FakeTensorMode

HERE = Path(__file__).parent
# Bytes of shared memory that a block may have (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


def interpret(file: str, *options: str) -> None:
    """Runs a file of tests with every Triton kernel interpreted."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file), *options]
    found = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert found.returncode == 0 and " passed" in found.stdout, found.stdout[-6000:] + found.stderr[-2000:]


def test_interpreted() -> None:
    interpret("interpreted_loss.py")


@pytest.mark.slow
def test_interpreted_many() -> None:
    interpret("interpreted_loss.py", "-m", "slow")


def compile_offline(least: int, *options: str) -> None:
    """Compiles for GPUs that are not here: everything fits, and nothing spills."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "limbeck.tests.offline_loss", *options]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-4000:]
    compiled = json.loads(found.stdout.splitlines()[-1])
    assert len(compiled) >= least and {capability for _, capability, *_ in compiled} >= {86, 90}
    for name, capability, shared, registers, spills in compiled:
        assert shared <= SHARED_LIMIT[capability], f"{name} takes {shared} bytes of shared memory on sm_{capability}"
        assert spills == 0 or capability in (80, 89), f"{name} spills {spills} bytes on sm_{capability}"
        assert 0 < registers <= 255


def test_compiled_offline() -> None:
    compile_offline(12, "sample")


@pytest.mark.slow
def test_compiled_offline_all() -> None:
    compile_offline(400)


def test_fake_cuda_tensors_take_the_ops() -> None:
    """Inference on a GPU that is not there: shapes, dtypes and devices come out, and no logits of all tokens."""
    with FakeTensorMode(), torch.no_grad():
        place = {"device": "cuda", "dtype": torch.bfloat16}
        x, weight = torch.empty(2, 5, 32, **place), torch.empty(32, **place)
        y, total = rms_norm(x, weight, 1e-5, residual=x)
        assert y.shape == total.shape == x.shape and y.device.type == "cuda" and y.dtype == torch.bfloat16
        head = torch.empty(300, 32, **place)
        found = linear_kl(y.flatten(0, 1), head, total.flatten(0, 1), head)
        assert found.kl.shape == (10,) and found.kl.dtype == torch.float32 and found.agreement.dtype == torch.bool


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # what an import of a missing package looks like
import torch
from limbeck.kernels.activation import relu2, relu2_op
from limbeck.kernels.linear_kl import linear_kl
from limbeck.models.hybrid import HybridLM
head = torch.ones(5, 3, requires_grad=True)
linear_kl(torch.ones(2, 3), head, torch.ones(2, 3), head).loss.backward()
assert relu2(torch.ones(3)).tolist() == [1, 1, 1]
try:
    relu2_op(torch.ones(3))  # what a CUDA tensor reaches
except ImportError as error:
    print(error)
"""


def test_without_triton() -> None:
    """The package imports and computes on the CPU; the GPU's path says what to install."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "pip install 'triton" in found.stdout
