"""compress shows the selection without repair beside the repaired student, and what both are worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from limbeck.distill.report.gap_rows import won_back
from limbeck.distill.report.gap_sections import cards
from limbeck.models.checkpoint import load_config
from limbeck.scripts.compress import Options
from limbeck.scripts.run.compose import build, compose_config
from limbeck.scripts.run.rounds import student_folders
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


def entropies(**values: float) -> dict[str, Any]:
    return {"models": {name: {"cross_entropy": {"value": value}} for name, value in values.items()}}


def test_what_is_won_back() -> None:
    assert won_back(entropies(teacher=2.0, plain=3.0, pruned=2.4, distilled=2.25)) == pytest.approx(0.75)
    assert won_back(entropies(teacher=2.0, pruned=2.4, distilled=2.25)) is None
    assert won_back(entropies(teacher=2.0, plain=2.0, pruned=2.4, distilled=2.25)) is None


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
