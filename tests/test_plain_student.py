"""compress shows the selection without repair beside the repaired student, and what both are worth."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from limbeck.distill.report.gap_rows import won_back
from limbeck.distill.report.gap_sections import cards
from limbeck.models.checkpoint import load_config
from limbeck.scripts.compress import Options
from limbeck.scripts.run.compose import build, compose_config
from limbeck.scripts.run.rounds import from_plain, student_folders
from limbeck.tests.helpers import limbeck, make_workshop


def rounds_of(*words: str) -> Any:
    return build(Options, compose_config("compress", ["recipe=tiny", "dry_run=true", *words])).plan()


def test_the_last_round_alone_has_a_plain_student() -> None:
    plan = rounds_of()
    assert list(student_folders(Path("out"), plan)) == ["plain", "pruned", "distilled"]
    plain = plan[0].ways(True)["plain"].repair.repair(with_data=True)
    assert not plain.rotate and not plain.least_squares and plan[0].ways(True)["pruned"] is plan[0]
    unrepaired = rounds_of("repair=plain")
    assert list(student_folders(Path("out"), unrepaired)) == ["pruned", "distilled"]
    assert list(plan[0].ways(False)) == ["pruned"]


def gap_of(width: float | None, **values: float) -> dict[str, Any]:
    """What is read of a gap.json whose intervals reach as far to both sides."""

    def estimate(value: float) -> dict[str, float | None]:
        low, high = (None, None) if width is None else (value - width, value + width)
        return {"value": value, "low": low, "high": high}

    differences = [
        {"first": first, "second": second, "cross_entropy": estimate(values[second] - values[first])}
        for first, second in itertools.combinations(values, 2)
    ]
    return {"models": {name: {"cross_entropy": estimate(value)} for name, value in values.items()},
            "differences": differences}  # fmt: skip


def test_what_is_won_back() -> None:
    """Nothing is told where the selection lost nothing, or no more than chance would have it; see `recovered`."""
    values = {"teacher": 2.0, "plain": 3.0, "pruned": 2.4, "distilled": 2.25}
    assert won_back(gap_of(0.9, **values)) == pytest.approx(0.75)
    assert won_back(gap_of(None, **values)) == pytest.approx(0.75)  # one document, as recovery
    assert won_back(gap_of(1.1, **values)) is None
    assert won_back(gap_of(0.0, **values | {"plain": 2.0})) is None
    assert won_back(gap_of(0.1, **values | {"plain": 1.5})) is None
    for absent in ("plain", "distilled"):
        assert won_back(gap_of(0.1, **{name: values[name] for name in values if name != absent})) is None
    assert from_plain(gap_of(0.9, **values)) and from_plain(gap_of(1.1, **values)) == ""


@pytest.mark.slow
def test_the_chain_measures_all_three(tmp_path: Path) -> None:
    shop = make_workshop(tmp_path)
    out = tmp_path / "out"
    code, _, err = limbeck(
        "compress", f"model={shop / 'model'}", f"data={shop / 'text'}", f"output={out}", "target.hidden_size=24",
        "distill.seq_len=32", "distill.batch=2", "distill.train.steps=3", "distill.evaluate_tokens=64",
        "importance.tokens=128", "importance.depth_tokens=64", "importance.remove_layers=0", "repair.tokens=256",
        "evaluate_tokens=256", "fit.context=64", "device=cpu",
    )  # fmt: skip
    assert code == 0, err
    gap = json.loads((out / "gap" / "gap.json").read_text())
    assert list(gap["models"]) == ["teacher", "plain", "pruned", "distilled"]
    assert load_config(out / "plain") == load_config(out / "pruned")
    shown = [card["label"] for card in cards(gap, None)]
    assert any("plain selection" in label for label in shown) == (won_back(gap) is not None)
