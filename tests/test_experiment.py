"""Experiments: every file composes, cells are made once, and the sentence about the published order is right."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from limbeck.models.errors import CheckFailed
from limbeck.prune.rounds import plan_cuts
from limbeck.scripts.experiment import Options, plans_of
from limbeck.scripts.experiments import cells
from limbeck.scripts.experiments.figures import (
    VariantRow,
    agreement,
    order_of,
    published_pairs,
    rank_correlation,
    stable_from,
)
from limbeck.scripts.experiments.sharing import Shared
from limbeck.scripts.run.compose import CONF, build, compose_config
from limbeck.scripts.run.resolve import model_config
from limbeck.tests.helpers import limbeck

NAMES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml") if path.stem != "all")
SMALL = (  # asyncio's sources have files of every split
    f"also=data={Path(asyncio.__file__).parent} evaluate_tokens=1024 repair.tokens=512"
    " importance.tokens=512 importance.depth_tokens=512"
    " distill.train.steps=1 distill.evaluate_tokens=512 distill.batch=1 distill.seq_len=128"
)


def options_of(*words: str) -> Options:
    return build(Options, compose_config("experiment", [*words, "output=x"]))


@pytest.mark.slow
def test_every_variant_composes_and_is_another() -> None:
    plans = plans_of(options_of("experiment=all", "seeds=[1]"))
    assert [plan.folder.name for plan in plans] == list(options_of("experiment=all").experiment.members)
    assert sorted(plan.folder.name for plan in plans) == NAMES
    for plan in plans:
        names = [cell.name for found in plan.cells.values() for cell in found]
        assert len(set(names)) == len(names) == len(plan.cells) > 1, plan.folder
        for found in plan.cells.values():
            for step in plan_cuts(model_config("zoo"), [one.cut for one in found[0].chain.plan()]):
                assert step.after != step.before
    shared = [cell.name for plan in plans for found in plan.cells.values() for cell in found]
    assert len(set(shared)) < len(shared)  # "KL" of one experiment is "at once" of another


@pytest.mark.slow
def test_cells_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("experiment=score-source", f"output={tmp_path / 'out'}", "seeds=[0]", "only=[x,z]", SMALL)
    code, out, err = limbeck(*words)
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["rows"]["x"]["mean"] != found["rows"]["z"]["mean"] and "The pair is" in out
    assert "| x |" in (tmp_path / "out" / "table.md").read_text()
    assert {path.suffix for path in (tmp_path / "out" / "plots").iterdir()} == {".png", ".svg"}
    assert not (tmp_path / "out" / "making").exists()
    monkeypatch.setattr(cells, "write_cell", None)  # nothing is left to do
    assert limbeck(*words)[0] == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text()) | {"run": found["run"]} == found
    assert found["seeds"] == [0] and found["also"] == SMALL.removeprefix("also=")
    before = (tmp_path / "out" / "table.md").read_bytes()
    for other, says in (("only=[x]", "variant z"), (SMALL + " evaluate_tokens=2048", "a table with also=")):
        code, _, err = limbeck(*words, other)
        assert code == 2 and says in err and err.count("\n") == 1, err
    assert (tmp_path / "out" / "table.md").read_bytes() == before


@pytest.mark.slow
def test_random_start_and_top_k_in_two_processes(tmp_path: Path) -> None:
    def rows_of(*words: str) -> dict[str, Any]:
        folder = tmp_path / words[0].partition("=")[2]
        code, _, err = limbeck(*words, f"output={folder}", "seeds=[0]", SMALL)
        assert code == 0, err
        for cell in (folder / "cells").glob("*.json"):
            content = json.loads(cell.read_text())
            assert content["curve"][-1]["tokens"] == content["tokens"] == 128
            assert content["models"]["distilled"]["parameters"] == content["models"]["pruned"]["parameters"] < 7_130_096
        found: dict[str, Any] = json.loads((folder / "result.json").read_text())["rows"]
        return found

    rows = rows_of("experiment=start", "jobs=2", "only=[pruned by activations,random weights]")
    assert rows["random weights"]["mean"] > 2 * rows["pruned by activations"]["mean"]
    rows = rows_of("experiment=top-k", "only=[all,'10','10, bucket']")
    assert len({rows[name]["mean"] for name in ("all", "10", "10, bucket")}) == 3


@pytest.mark.slow
def test_a_set_of_experiments(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    words = ("experiment=all", "only=[order,sizes,correction]", f"output={folder}", "seeds=[0]", SMALL)
    code, _, err = limbeck(*words)
    assert code == 0, err
    text = (folder / "experiments.md").read_text()
    for name in ("order", "sizes", "correction"):
        assert f"]({name}/plots/experiment.svg)" in text and (folder / name / "plots" / "experiment.svg").is_file()
    assert "Spearman" in text and "| loss as pruned |" in text


def test_the_order_predicted() -> None:
    def cell(kept: float, pruned: float, early: float, late: float) -> dict[str, Any]:
        curve = [{"tokens": 10, "kl": early}, {"tokens": 20, "kl": late}]
        return {"models": {"pruned": {"cross_entropy": {"value": pruned}}}, "importance_kept": kept, "curve": curve}

    cells_of = {"a": [cell(0.9, 9.0, 0.3, 0.1)], "b": [cell(0.8, 8.0, 0.2, 0.2)], "c": [cell(0.7, 7.0, 0.4, 0.3)]}
    found = order_of({"a": VariantRow((1.0,)), "b": VariantRow((2.0,)), "c": VariantRow((3.0,))}, cells_of)
    assert found == {"importance kept": [1.0], "loss as pruned": [-1.0], "10 tokens": [0.5], "20 tokens": [1.0]}
    assert stable_from(found) == "The mean correlation is 0.9 or more from 20 tokens on."
    assert stable_from({**found, "30 tokens": [0.8]}).startswith("At no time")
    early = {"importance kept": [1.0], "10 tokens": [0.8, 1.0], "20 tokens": [1.0, 1.0]}
    assert stable_from(early).endswith("from 10 tokens on.")
    assert rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(0.866, abs=1e-3)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0.0


def test_the_sentence() -> None:
    rows = {"a": VariantRow((0.9, 1.1), 2.0), "b": VariantRow((1.9, 2.2), 3.0), "c": VariantRow((2.0, 2.1), 4.0),
            "d": VariantRow((0.5, 0.5), 5.0), "e": VariantRow((9.0, 9.0))}  # fmt: skip
    text = agreement(rows, False, published_pairs(rows, False, []))
    assert text.startswith("2 of 6 pairs are in the published order")
    assert "other way round: a and d; b and d; c and d" in text and "every seed: b and c" in text
    assert agreement(rows, False, []) == "The source compares none of these."
    more = published_pairs(rows, True, [["e", "a", "b"]])  # the source's figures are of a kind of which more is better
    assert more[:3] == [("e", "a"), ("e", "b"), ("a", "b")] and ("b", "a") in more
    assert agreement(rows, False, [("a", "e")]) == "The pair is in the published order."
    text = agreement(rows, True, [("a", "e")])
    assert text == "The pair is not in the published order, the other way round: a and e."


@pytest.mark.parametrize(
    ("words", "complaint"),
    (
        (("experiment=lose",), "did you mean 'loss'"),
        (("experiment=loss", "only=[KLL]"), "did you mean 'KL'"),
        (("experiment=loss", "seeds=[]"), "seeds is []"),
        (("experiment=loss", "also=target.hiddensize=3"), "hiddensize"),
        (("experiment=loss", "experiment.measure=distilled.speed"), "experiment.measure"),
        (("experiment=loss", "+experiment.picture=pie"), "picture is 'pie'"),
        (("experiment=loss", "jobs=0"), "jobs is 0"),
        (("experiment=loss", "+experiment.orders=[[KL,CEE]]"), "did you mean 'CE'"),
        (("experiment=all", "only=[los]"), "did you mean 'loss'"),
        (("experiment=loss", "+experiment.members=[loss]"), "members"),
        (("experiment=loss", "seeds=[0,0]"), "each once"),
        (("experiment=score-source", "+experiment.picture=order"), "of distilled students"),
        (("experiment=loss", "also=data=/nowhere/it"), "/nowhere/it"),
        (("experiment=loss", "also=data=it's"), "cannot be read"),
        (("experiment=loss", "also=fit.context=9"), "reads fit.context"),
        (("experiment=loss", "also=matmul=bfloat16"), "reads matmul"),
        (("experiment=loss", "experiment.variants.KL.overrides=['matmul=bfloat16']"), "variants.KL: no cell"),
        (("experiment=loss", "also=target.layers=40"), "layers is 40"),
        (("experiment=loss", "device=mps:9"), "device"),
    ),
)
def test_wrong_input(words: tuple[str, ...], complaint: str, tmp_path: Path) -> None:
    code, _, err = limbeck(*words, f"output={tmp_path / 'out'}")
    assert code == 2 and complaint in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_variants_that_also_makes_the_same(tmp_path: Path) -> None:
    words = ("experiment=temperature", "also=distill.loss.temperature=2", f"output={tmp_path / 'out'}")
    code, _, err = limbeck(*words)
    assert code == 2 and "the same; leave it out" in err and not (tmp_path / "out").exists()


def test_an_output_of_something_else_is_left_alone(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    (mine / "making").mkdir(parents=True)
    (mine / "making" / "thesis").write_text("mine")
    code, _, err = limbeck("experiment=loss", f"output={mine}")
    assert code == 2 and "not of limbeck experiment" in err and (mine / "making" / "thesis").read_text() == "mine"
    code, _, err = limbeck("experiment=loss", f"output={mine / 'making' / 'thesis'}")
    assert code == 2 and err.count("\n") == 1
    (other / "cells").mkdir(parents=True)
    (other / "result.json").write_text('{"question": "Why?"}')
    code, _, err = limbeck("experiment=loss", f"output={other}")
    assert code == 2 and "another experiment (Why?)" in err


LOSS, OF_ALL = ("experiment=loss",), ("experiment=all", "only=[loss]")


@pytest.mark.parametrize(
    ("words", "says"),
    (
        ((*LOSS, "seeds=[1]"), "seed 0, seed 2"), ((*OF_ALL, "seeds=[0,1]"), "seed 2"),
        ((*LOSS, "only=[KL]"), "variant CE"),
        ((*LOSS, "also=evaluate_tokens=2048"), "also="), ((*OF_ALL, "also=evaluate_tokens=2048"), "also="),
        ((*LOSS, "experiment.measure=distilled.kl"), "of distilled.cross_entropy"),
        ((*OF_ALL, "+experiment.measure=distilled.kl"), "of distilled.cross_entropy"),
        ((*LOSS, "only=[KL,CE,KL + CE]", "seeds=[3,2,1,0]"), ""), (LOSS, ""), ((*OF_ALL, "seeds=[3,2,1,0]"), ""),
    ),
)  # fmt: skip
def test_a_table_is_not_replaced_by_a_smaller_one(
    words: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds, variants and figure; a table of more is written over it."""
    question, out = options_of("experiment=loss").experiment.question, tmp_path / "out"
    folder = out if words[0] == LOSS[0] else out / "loss"
    folder.mkdir(parents=True)
    (out / "cells").mkdir()
    content = {"question": question, "measure": "distilled.cross_entropy", "seeds": [0, 1, 2], "also": "",
               "rows": {"KL": {}, "CE": {}}}  # fmt: skip
    (folder / "result.json").write_text(json.dumps(content))
    (folder / "table.md").write_text(f"**{question}** ...")

    def stop(*_: Any) -> None:
        raise CheckFailed("as far as this")

    monkeypatch.setattr("limbeck.scripts.experiment.check_plans", stop)
    code, _, err = limbeck(*words, f"output={out}")
    assert code == (2 if says else 3) and says in err and err.count("\n") == 1, err
    assert json.loads((folder / "result.json").read_text()) == content


@pytest.mark.parametrize("place", ("table.md", "loss/table.md", "experiments.md"))
def test_tables_of_others_stay(place: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "cells").mkdir(parents=True)
    (out / "loss").mkdir()
    (out / place).write_text("mine")
    words = LOSS if place == "table.md" else OF_ALL
    code, _, err = limbeck(*words, f"output={out}")
    assert code == 2 and "not of limbeck experiment" in err and str(out / place) in err and err.count("\n") == 1
    assert (out / place).read_text() == "mine" and not list((out / "cells").iterdir())


@pytest.mark.slow
def test_members_have_the_command_lines_folders_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    (own / "experiment").mkdir(parents=True)
    (own / "recipe").mkdir()
    (own / "experiment" / "both.yaml").write_text("members: [mine, loss]\n")
    variants = "variants:\n  few: {overrides: [evaluate_tokens=2048]}\n  many: {}\n"
    (own / "experiment" / "mine.yaml").write_text(f"question: Mine?\nbase: [recipe=short]\n{variants}")
    recipe = (CONF / "recipe" / "ablation.yaml").read_text()
    (own / "recipe" / "short.yaml").write_text(recipe + "\nseq_len_of_nobody: 1\n")
    seen: list[Any] = []
    monkeypatch.setattr("limbeck.scripts.experiment.check_plans", lambda plans, *_: seen.extend(plans))
    monkeypatch.setattr("limbeck.scripts.experiment.complete_cells", lambda *_, **__: None)
    (tmp_path / "out" / "cells").mkdir(parents=True)
    words = ["experiment=both", "--config-dir", str(own), "seeds=[7]", f"output={tmp_path / 'out'}"]
    code, _, err = limbeck(*words)
    assert code == 2 and "seq_len_of_nobody" in err  # the folder's recipe is read
    (own / "recipe" / "short.yaml").write_text(recipe)
    changed = ["+experiment.measure=distilled.agreement", "+experiment.held_out=stdlib", "device=cpu"]
    for extra in ([], changed):
        seen.clear()
        code, _, err = limbeck(*words, *extra)
        assert code == 0, err
        assert [plan.folder.name for plan in seen] == ["mine", "loss"]
        assert seen[0].experiment.question == "Mine?" and list(seen[0].cells) == ["few", "many"]
        every = [cell for plan in seen for cell in plan.all_cells()]
        assert {cell.chain.seed for cell in every} == {7}
        if extra:
            assert {plan.experiment.measure for plan in seen} == {"distilled.agreement"}
            assert {(cell.held_out, cell.chain.device) for cell in every} == {("stdlib", "cpu")}
    code, _, err = limbeck("experiment=mine", "--config-dir", str(own), f"output={tmp_path / 'alone'}")
    assert code == 0 and seen[-1].experiment.question == "Mine?", err


def test_a_shared_folder_goes_with_the_last_one(tmp_path: Path) -> None:
    with Shared(tmp_path / "work") as first:
        with Shared(tmp_path / "work") as second:
            with first.alone("a") as free, second.alone("a", patient=False) as other, second.alone("b") as apart:
                assert (free, other, apart) == (True, False, True)
            with second.alone("a", patient=False) as other:
                assert other
            first.clear()
            assert (tmp_path / "work").is_dir()
        first.clear()
        assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_a_cell_that_cannot_be_made_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cells.write_cell

    def write_cell(cell: cells.Cell, *arguments: Any) -> None:
        if cell.title == "3":
            raise CheckFailed("the loss is not finite")
        real(cell, *arguments)

    monkeypatch.setattr(cells, "write_cell", write_cell)
    monkeypatch.setattr(cells, "measured", lambda cell, teacher, students: {})
    words = ("experiment=temperature", f"output={tmp_path / 'out'}", "seeds=[0]", SMALL)
    code, _, err = limbeck(*words, "only=['1','3']")
    assert code == 2 and "1 of 2 cells" in err and "3, seed 0: the loss is not finite" in err
    assert len(list((tmp_path / "out" / "cells").glob("*.json"))) == 1 and (tmp_path / "out" / "making").is_dir()


@pytest.mark.slow
def test_killed_and_gone_on_with_by_two_commands(tmp_path: Path) -> None:
    """The figures are those of a run that nobody disturbed."""
    words = ("experiment=repair", "only=[slices,norms by count,rotation]", "seeds=[0,1]", SMALL)
    assert limbeck(*words, f"output={tmp_path / 'plain'}")[0] == 0
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "limbeck.scripts.run.main", *words, f"output={killed}"]
    for _ in range(2):
        begun = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        before = len(list((killed / "cells").glob("*.json")))
        while len(list((killed / "cells").glob("*.json"))) == before and begun.poll() is None:
            time.sleep(0.05)
        os.killpg(begun.pid, signal.SIGKILL)
        begun.wait()
    both = [subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL) for more in ((), ("jobs=2",))]
    assert [process.wait() for process in both] == [0, 0]
    plain, gone_on = (
        json.loads((folder / "result.json").read_text())["rows"] for folder in (tmp_path / "plain", killed)
    )
    for name, row in plain.items():
        assert gone_on[name]["values"] == pytest.approx(row["values"], rel=1e-4)
    assert not (killed / "making").exists()
