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
from limbeck.benchmarks.gpu_cases import operators
from limbeck.kernels.attention import attention, decode_attention, document_mask
from limbeck.kernels.linear_kl import linear_kl
from limbeck.kernels.norm import rms_norm
from limbeck.models.attention import attention_mask
from limbeck.tests.helpers import assert_close, run_interpreted
from torch._subclasses.fake_tensor import FakeTensorMode

# Bytes of shared memory that a block may have (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


@pytest.mark.slow
def test_interpreted_many() -> None:
    run_interpreted("interpreted_loss.py", "interpreted_attention.py", "-m", "slow")


@pytest.mark.slow
def test_benchmark_interpreted(tmp_path: Path) -> None:
    """benchmarks/gpu.py without a GPU, whole; interpreted_loss.py runs a part of it."""
    report = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "limbeck.benchmarks.gpu", "--interpret", "--json", str(report)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    checks = [row for row in json.loads(report.read_text())["rows"] if row["kind"] == "check"]
    assert len(checks) == len(operators()) - 1 and all(row["right"] and row["repeats"] for row in checks)


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
        y = rms_norm(x, weight, 1e-5)
        assert y.shape == x.shape and y.device.type == "cuda" and y.dtype == torch.bfloat16
        head = torch.empty(300, 32, **place)
        found = linear_kl(y.flatten(0, 1), head, x.flatten(0, 1), head)
        q, k = torch.empty(2, 4, 16, 32, **place), torch.empty(2, 2, 48, 32, **place)
        assert attention_mask(16, 32, None, q.device) is None
        assert attention(q, k, k).shape == q.shape and attention(k, k, k).shape == k.shape
        assert attention(torch.empty(2, 4, 1, 32, **place), k, k).shape == (2, 4, 1, 32)
        assert found.kl.shape == (10,) and found.kl.dtype == torch.float32 and found.agreement.dtype == torch.bool


def test_attention_on_the_cpu() -> None:
    """With a past, and of single tokens with lengths of their own."""
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    whole = attention(torch.cat((torch.randn(2, 4, 4, 8), q), 2), k, v)
    assert_close("past", whole[:, :, 4:], attention(q, k, v), 1e-6)
    lengths = torch.tensor([3, 9])
    found = decode_attention(q[:, :, 0], k, v, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = decode_attention(q[row : row + 1, :, 0], k[row : row + 1, :, :length], v[row : row + 1, :, :length])
        assert_close("length", alone[0], found[row], 1e-6)
    with pytest.raises(ValueError, match="do not fit"):
        decode_attention(q[:, :3, 0], k, v)
    with pytest.raises(ValueError, match="lengths"):
        decode_attention(q[:, :, 0], k, v, lengths[:1])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("past", (0, 128, 190))
@pytest.mark.parametrize("lengths", ((300,), (128, 128, 3, 1, 200, 40), (1,) * 260, (127, 1, 128, 256, 9)))
def test_document_mask_is_that_of_its_rule(lengths: tuple[int, ...], past: int) -> None:
    """The same blocks as torch finds by trying every pair, and the same attention as with a dense mask; the queries
    are all tokens, or those after some."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    packed = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    document = torch.stack((packed, torch.zeros_like(packed)))
    length = len(packed)
    tokens, mask = length - past, document_mask(document, past)
    expected = create_block_mask(mask.mask_mod, 2, None, tokens, length, device="cpu", BLOCK_SIZE=128)
    assert torch.equal(mask.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(expected, name)), name
    q, k, v = torch.randn(2, 4, tokens, 16), torch.randn(2, 2, length, 16), torch.randn(2, 2, length, 16)
    dense = attention_mask(tokens, past, document, q.device)
    assert_close("y", attention(q, k, v, dense), flex_attention(q, k, v, block_mask=mask, enable_gqa=True), 1e-5)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # what an import of a missing package looks like
import torch
from limbeck.kernels.activation import relu2, relu2_op
from limbeck.kernels.attention import attention, decode_attention, document_mask
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
