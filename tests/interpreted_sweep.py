"""The sweep of the scan's sizes in Triton's interpreter, with a timer that is told what to say; run by
`test_ssm_triton` with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.benchmarks import gpu_sweep
from limbeck.benchmarks.gpu_sweep import Sweep
from limbeck.kernels import scan_sizes, ssd_launch
from limbeck.kernels.scan_sizes import KernelSizes, ScanSizes

assert os.environ.get("TRITON_INTERPRET") == "1", "run by tests/test_ssm_triton.py"

SWEEP = Sweep((1, 5), (1, 7), ((1, 2),), torch.float32, True)
DEFAULT = KernelSizes(*scan_sizes.SIZES[90, 4])
OTHER = DEFAULT._replace(forward=ScanSizes(32, 16, 4, 1), gradients=DEFAULT.gradients._replace(warps=4))


def timer_of(milliseconds: Callable[[KernelSizes], float], runs: bool = True) -> gpu_sweep.Timer:
    def timer(work: Callable[[], Any]) -> float:
        if runs:
            work()
        return milliseconds(scan_sizes.TRIED[-1])

    return timer


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache" / "sizes.json"
    monkeypatch.setenv("LIMBECK_SCAN_SIZES", str(path))
    monkeypatch.setattr(scan_sizes, "card_name", lambda device: "Card, sm_90, triton 1.2")
    return path


def test_candidates_are_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate takes its own sizes and the others' defaults; one that is wrong has no time."""
    case = {"kind": "sweep", "kernel": "forward", "sizes": list(OTHER.forward)}
    row = gpu_sweep.sweep_case(case, SWEEP, timer_of(lambda sizes: float(sizes.forward.tokens)))
    assert row["right"] and row["ms"] == {"1 x 2": 32.0} and not scan_sizes.TRIED
    plain = ssd_launch.forward_launch

    def wrong(scan: Any, *arguments: Any) -> Any:
        launch = plain(scan, *arguments)
        tokens = scan.sizes(90).forward.tokens
        return launch._replace(arguments=launch.arguments | {"p_D": scan.D * 1.01}) if tokens == 32 else launch

    monkeypatch.setattr(ssd_launch, "forward_launch", wrong)
    row = gpu_sweep.sweep_case(case, SWEEP, timer_of(lambda sizes: 1.0))
    assert not row["right"] and row["value"] > 1e-4 and "ms" not in row


def test_the_best_are_written_where_they_are_right_and_faster(table: Path) -> None:
    """The forward pass takes half of the default's time, the backward more: it stays the default's."""
    told = iter([1.0, 2.0, 3.0, 2.0])
    case = {"kind": "adopt", "sizes": [list(each) for each in OTHER]}
    row = gpu_sweep.adopt_case(case, SWEEP, timer_of(lambda sizes: next(told), False))
    assert row["right"] and row["table"] == str(table)
    assert row["forward"] == {"ms": {"1 x 2": 1.0}, "default_ms": {"1 x 2": 2.0}}
    written = scan_sizes.read_table(table)["Card, sm_90, triton 1.2"]
    assert written == {"32 bits, head_dim 16, state 16": DEFAULT._replace(forward=OTHER.forward)}


def test_wrong_ones_are_not_written(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = {"value": 0.5, "gradient": float("nan"), "right": False}
    monkeypatch.setattr(gpu_sweep, "verdict", lambda *arguments: verdict)
    row = gpu_sweep.adopt_case({"kind": "adopt", "sizes": [list(each) for each in OTHER]}, SWEEP)
    assert not row["right"] and row["table"] is None and not table.exists()
