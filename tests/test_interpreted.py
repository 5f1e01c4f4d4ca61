"""The Triton kernels in Triton's interpreter, all in one process: to begin one takes as long as many of its tests."""

from __future__ import annotations

from limbeck.tests.helpers import run_interpreted

KERNELS = ("loss", "attention", "moe", "decode", "ssm", "sweep")


def test_kernels() -> None:
    run_interpreted(*(f"interpreted_{name}.py" for name in KERNELS))
