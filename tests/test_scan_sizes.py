"""The sizes of the scan's kernels: the defaults, and the table of those that were measured on a card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from limbeck.benchmarks.gpu_sweep import Sweep, best_sizes, candidates, sweep_cases
from limbeck.benchmarks.guarded import Case
from limbeck.kernels import scan_sizes
from limbeck.kernels.scan_sizes import SIZES, KernelSizes, ScanSizes, read_table, sizes_for, write_table

CARD, SHAPE = "NVIDIA H200, sm_90, triton 3.7.1", "16 bits, head_dim 80, state 128"
MEASURED = SIZES[90, 2]._replace(forward=ScanSizes(32, 64, 8, 2))
CUDA = torch.device("cuda", 0)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIMBECK_SCAN_SIZES", str(tmp_path / "sizes.json"))
    monkeypatch.setattr(scan_sizes, "card_name", lambda device: CARD)
    scan_sizes.measured_sizes.cache_clear()
    return tmp_path / "sizes.json"


def test_measured_sizes_are_those_of_their_card_and_widths(path: Path) -> None:
    assert sizes_for(CUDA, 90, 2, 80, 128) == SIZES[90, 2]
    write_table(path, CARD, SHAPE, MEASURED)
    write_table(path, "Other, sm_86, triton 3.7.1", SHAPE, SIZES[86, 2])
    assert read_table(path) == {CARD: {SHAPE: MEASURED}, "Other, sm_86, triton 3.7.1": {SHAPE: SIZES[86, 2]}}
    assert sizes_for(CUDA, 90, 2, 80, 128) == MEASURED
    for device, itemsize, head_dim in ((CUDA, 4, 80), (CUDA, 2, 64), (torch.device("cpu"), 2, 80)):
        assert sizes_for(device, 90, itemsize, head_dim, 128) == SIZES[90, itemsize]
    with scan_sizes.tried(SIZES[80, 2]):
        assert sizes_for(CUDA, 90, 2, 80, 128) == SIZES[80, 2]
    assert sizes_for(CUDA, 90, 2, 80, 128) == MEASURED


def test_where_the_table_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LIMBECK_SCAN_SIZES", raising=False)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    assert scan_sizes.table_path() == tmp_path / "scan_sizes.json"
    monkeypatch.setenv("LIMBECK_SCAN_SIZES", "")
    assert scan_sizes.table_path() is None and read_table(None) == {}


def broken(**changes: object) -> str:
    kernels = {name: one._asdict() for name, one in MEASURED._asdict().items()}
    kernels["forward"] |= changes
    return json.dumps({"format": 1, "cards": {CARD: {SHAPE: kernels}}})


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"format": 2, "cards": {}}', '{"format": 1, "cards": {"a": 1}}', "\xff", "[" * 100_000,
        broken(warps=3), broken(tokens=128), broken(turned=1), broken(stages=True), broken(more=1), broken(width="64"),
        broken().replace("sm_90", "sm_100"), broken().replace("sm_90", "x"), broken().replace('"walk"', '"other"'),
        broken().replace('"walk": {"tokens": 32', '"walk": {"tokens": 16'),
    ],
)  # fmt: skip
def test_a_damaged_table_is_one_line(text: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the sizes are the default ones. The last ones: a card on which loops of more stages are wrong, no card, a
    kernel that is not there, a chunk that memory is not predicted for."""
    path.write_text(text, encoding="latin-1")
    for _ in range(2):
        assert sizes_for(CUDA, 90, 2, 80, 128) == SIZES[90, 2]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(path) in err and "default sizes" in err
    with pytest.raises(ValueError, match="no table of scan sizes"):
        write_table(path, CARD, SHAPE, MEASURED)
    assert path.read_text(encoding="latin-1") == text


def test_what_breaks_a_rule_is_not_written(path: Path) -> None:
    with pytest.raises(ValueError, match="expected at most 64"):
        write_table(path, CARD, SHAPE, MEASURED._replace(forward=ScanSizes(128, 64, 4, 1)))
    assert not path.exists()


@pytest.mark.parametrize(("capability", "itemsize"), sorted(SIZES))
def test_candidates_can_be_written(capability: int, itemsize: int, path: Path) -> None:
    default = SIZES[capability, itemsize]
    for short in (True, False):
        for kernel, sizes in candidates(default, itemsize, capability, short).items():
            assert sizes[0] == getattr(default, kernel) and len(set(sizes)) == len(sizes) <= (5 if short else 20)
            for one in sizes:
                write_table(path, f"Card, sm_{capability}", f"{8 * itemsize} bits", default._replace(**{kernel: one}))


def test_the_best_is_the_fastest_right_one_at_all_loads() -> None:
    default, fast = SIZES[90, 2], ScanSizes(32, 64, 4, 1)

    def row(kernel: str, sizes: ScanSizes, *ms: float, right: bool = True) -> Case:
        named = dict(zip(("1 x 8192", "8 x 8192"), ms, strict=False))
        return {"kind": "sweep", "kernel": kernel, "sizes": list(sizes), "ms": named, "right": right}

    rows = [
        row("forward", default.forward, 1.0, 8.0),
        row("forward", ScanSizes(64, 64, 8, 1), 0.5, 16.0),  # faster at one load, slower by more at the other
        row("forward", fast, 0.9, 7.9),
        row("forward", ScanSizes(64, 64, 2, 1), 0.1, 0.1, right=False),
        row("forward", ScanSizes(64, 32, 4, 1), 0.1),
        {"kind": "sweep", "kernel": "forward", "sizes": [64, 16, 4, 1, False], "error": "out of shared memory"},
        {"kind": "sweep", "kernel": "forward", "way": "mamba_ssm", "ms": {"1 x 8192": 0.1, "8 x 8192": 0.1}},
        row("walk", ScanSizes(32, 16, 8, 2), 0.1, 0.1),  # the default was not timed
    ]
    assert best_sizes(default, rows) == default._replace(forward=fast)


def test_a_sweep_ends_with_what_its_rows_say() -> None:
    rows: list[Case] = []
    cases = []
    for case in sweep_cases(True, Sweep(), 90, rows, with_peer=True):
        cases.append(case)
        ms = {"1 x 8192": 1.0 + len(rows) % 7}
        rows.append(case | {"ms": ms, "right": True})
    assert [case["kernel"] for case in cases[:2]] == ["forward", "backward"] and cases[0]["way"] == "mamba_ssm"
    assert [case["kernel"] for case in cases[2:8]] == ["forward", "walk", "gradients"] * 2
    assert cases[-1]["kind"] == "adopt"
    best = KernelSizes(*(ScanSizes(*sizes) for sizes in cases[-1]["sizes"]))
    assert best == best_sizes(SIZES[90, 2], rows[:-1]) != SIZES[90, 2]
