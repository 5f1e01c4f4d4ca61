"""matmul=: what it comes to on which processor, what it refuses, and that folders say it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from limbeck.kernels.products import CHOSEN
from limbeck.models import matmul
from limbeck.models.errors import InputError
from limbeck.models.matmul import has_units, known_gain, multiplying
from limbeck.tests.helpers import TIMES, lasting, limbeck


@pytest.mark.parametrize(
    ("listed", "there"),
    (
        ("flags\t\t: fpu sse avx512f avx512_bf16 fsrm\n", True),
        ("model name\t: some\nflags\t\t: fpu amx_tile amx_bf16\n", True),
        ("Features\t: fp asimd i8mm bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("model name\t: a bf16 one\n", False),
    ),
)
def test_units_are_those_that_the_system_lists(listed: str, there: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(listed)
    assert has_units(tmp_path / "cpuinfo") == there
    assert not has_units(tmp_path / "none")


@pytest.mark.parametrize(
    ("option", "units", "gain", "narrow", "says"),
    (
        ("float32", True, 2.0, False, ""),
        ("bfloat16", True, 0.5, True, ""),
        ("bfloat16", False, 0.5, True, "has no units"),
        ("auto", True, 1.9, True, "takes bfloat16: here products in bfloat16 are 1.9 times as fast"),
        ("auto", True, 1.1, False, "takes float32"),
        ("auto", False, 1.9, False, ""),
    ),
)
def test_what_is_chosen(
    option: str, units: bool, gain: float, narrow: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "has_units", lambda: units)
    monkeypatch.setattr(matmul, "known_gain", lambda: gain)
    notes = io.StringIO()
    with multiplying(SimpleNamespace(matmul=option, device="cpu", dtype="float32"), notes):
        assert CHOSEN.narrow == narrow
    assert not CHOSEN.narrow
    assert says in notes.getvalue() and bool(notes.getvalue()) == bool(says)
    with multiplying(SimpleNamespace()):  # a command without the option
        assert not CHOSEN.narrow


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "has_units", lambda: True)
    narrow = SimpleNamespace(matmul="bfloat16", device="cpu", dtype="bfloat16")
    with pytest.raises(InputError, match="of float32 weights on a CPU, not of dtype=bfloat16"), multiplying(narrow):
        pass
    auto = SimpleNamespace(matmul="auto", device="cpu", dtype="float64")
    with multiplying(auto):  # nothing that it could choose
        assert not CHOSEN.narrow
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="give matmul=float32 or matmul=bfloat16"), multiplying(auto):
        pass


def test_the_measurement_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    gain = known_gain()
    (kept,) = (tmp_path / "matmul").iterdir()
    assert gain > 0 and json.loads(kept.read_text())["gain"] == gain
    kept.write_text(json.dumps({"gain": 7.5}))
    assert known_gain() == 7.5
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)  # another machine, as it were
    monkeypatch.setattr(matmul, "measured_gain", lambda: 3.0)
    assert known_gain() == 3.0


def score(workshop: Path, out: Path, *more: str) -> tuple[int, str]:
    code, _, err = limbeck(
        "score", f"model={workshop / 'model'}", f"data={workshop / 'text'}", f"output={out}", "seq_len=64", "batch=2",
        "importance.tokens=256", "importance.depth_tokens=128", *more,
    )  # fmt: skip
    return code, err


def test_a_folder_says_which_products_made_it(workshop: Path, tmp_path: Path) -> None:
    single, half, again = (tmp_path / name for name in ("single", "half", "again"))
    for folder, more in ((single, ()), (half, ("matmul=bfloat16",)), (again, ("matmul=bfloat16",))):
        assert score(workshop, folder, *more)[0] == 0
    made = [json.loads((folder / "limbeck.json").read_text())["options"] for folder in (single, half)]
    assert made[1] == made[0] | {"matmul": "bfloat16"} and "matmul" not in made[0]
    scores = [(folder / "scores.json").read_text() for folder in (single, half, again)]
    assert scores[0] != scores[1] == scores[2]
    files = [
        {path.name: lasting(path) for path in folder.iterdir() if path.name not in TIMES} for folder in (half, again)
    ]
    assert files[0] == files[1]
    code, err = score(workshop, half)
    assert code == 2 and "made otherwise" in err and "matmul" in err


@pytest.mark.parametrize(
    ("words", "says"),
    (
        (("matmul=bf17",), "matmul"),
        (("matmul=bfloat16", "dtype=bfloat16"), "matmul=bfloat16 is of float32 weights"),
    ),
)
def test_one_line_for_what_is_wrong(words: tuple[str, ...], says: str, workshop: Path, tmp_path: Path) -> None:
    code, err = score(workshop, tmp_path / "out", *words)
    assert code == 2 and err.count("\n") == 1 and says in err and not (tmp_path / "out").exists()
