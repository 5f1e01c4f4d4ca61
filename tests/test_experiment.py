"""Experiments: every file composes, cells are made once, and the sentence about the published order is right."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from limbeck.scripts import compress, experiment
from limbeck.scripts.compose import CONF, build, compose_config
from limbeck.scripts.experiment import Options, Row, agreement, chain_of
from limbeck.tests.helpers import limbeck

NAMES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
SMALL = (  # asyncio's sources have files of every split
    f"also=data={Path(asyncio.__file__).parent} evaluate_tokens=1024 repair.tokens=512"
    " importance.tokens=512 importance.depth_tokens=512"
    " distill.train.steps=1 distill.evaluate_tokens=512 distill.batch=1 distill.seq_len=128"
)


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_composes(name: str) -> None:
    options = build(Options, compose_config("experiment", [f"experiment={name}", "output=x"]))
    found = [chain_of(options, variant, 1) for variant in options.experiment.variants.values()]
    assert all(isinstance(chain, compress.Options) and chain.seed == 1 for chain in found)
    starts = [variant.start for variant in options.experiment.variants.values()]
    assert len({(str(chain), start) for chain, start in zip(found, starts, strict=True)}) == len(found) > 1


def test_cells_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("experiment=score-source", f"output={tmp_path / 'out'}", "seeds=[0]", "only=[x,z]", SMALL)
    code, out, err = limbeck(*words)
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["rows"]["x"]["mean"] != found["rows"]["z"]["mean"] and "2 pairs" not in out
    assert "| x |" in (tmp_path / "out" / "table.md").read_text()
    assert {path.suffix for path in (tmp_path / "out" / "plots").iterdir()} == {".png", ".svg"}
    assert not list((tmp_path / "out" / "work").iterdir())
    monkeypatch.setattr(experiment, "measured", None)  # nothing is left to do
    assert limbeck(*words)[0] == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == found


@pytest.mark.slow
def test_random_start(tmp_path: Path) -> None:
    words = ("experiment=start", f"output={tmp_path / 'out'}", "seeds=[0]", SMALL, "keep=true",
             "only=[pruned by activations,random weights]")  # fmt: skip
    code, _, err = limbeck(*words)
    assert code == 0, err
    rows = json.loads((tmp_path / "out" / "result.json").read_text())["rows"]
    assert rows["random weights"]["mean"] > 2 * rows["pruned by activations"]["mean"]


def test_the_sentence() -> None:
    rows = {"a": Row(1.0, 0.9, 1.1, 2.0), "b": Row(2.0, 1.9, 2.1, 3.0), "c": Row(2.05, 2.0, 2.1, 4.0),
            "d": Row(0.5, 0.5, 0.5, 5.0), "e": Row(9, 9, 9, None)}  # fmt: skip
    text = agreement(rows, more_is_better=False)
    assert text.startswith("2 of 6 pairs are in the published order")
    assert "other way round: a and d; b and d; c and d" in text and "spread: b and c" in text
    assert agreement({"e": rows["e"]}, False).startswith("The source gives no figures")


@pytest.mark.parametrize(
    ("words", "complaint"),
    (
        (("experiment=lose",), "did you mean 'loss'"),
        (("experiment=loss", "only=[KLL]"), "did you mean 'KL'"),
        (("experiment=loss", "seeds=[]"), "seeds is empty"),
        (("experiment=loss", "also=target.hiddensize=3"), "hiddensize"),
        (("experiment=loss", "experiment.measure=distilled.speed"), "experiment.measure"),
    ),
)
def test_wrong_input(words: tuple[str, ...], complaint: str, tmp_path: Path) -> None:
    code, _, err = limbeck(*words, f"output={tmp_path / 'out'}")
    assert code == 2 and complaint in err and err.count("\n") == 1 and not (tmp_path / "out").exists()
