"""`limbeck search` as a user meets it: picks, resumption, plots, wrong words, and kills."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from limbeck.models.checkpoint import load_config
from limbeck.models.cost.parameters import count_parameters
from limbeck.prune.search import (
    Candidate,
)
from limbeck.prune.sliced_loss import sliced_loss
from limbeck.scripts import search as command
from limbeck.tests.helpers import TIMES, lasting, limbeck, make_workshop


def sizes(candidate: Candidate) -> tuple[int, int, int]:
    config = candidate.config
    return config.hidden_size, config.intermediate_size, config.mamba_num_heads


QUICK = (
    "rank=loss", "measure=4", "loss_tokens=128", "distill_top=2", "budget.gib=1", "budget.context=64",
    "space.layers=[5,6]", "space.hidden_size=[24,32]", "space.mamba_num_heads=[4,8]",
    "distill.train.steps=4", "distill.train.save_every=2", "distill.train.evaluate_every=4", "distill.seq_len=32",
    "distill.batch=2", "distill.evaluate_tokens=128",
)  # fmt: skip


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text and scores, nothing of which may change."""
    root = make_workshop(tmp_path_factory.mktemp("workshop"))
    given = (f"model={root / 'model'}", f"data={root / 'text'}", f"output={root / 'scores'}", "seq_len=32")
    few = ("importance.tokens=256", "importance.depth_tokens=128", "importance.remove_layers=2")
    code, _, err = limbeck("score", *given, *few)
    assert code == 0, err
    return root


def arguments(workshop: Path, out: Path) -> list[str]:
    given = {"model": workshop / "model", "data": workshop / "text", "scores": workshop / "scores", "output": out}
    return ["search", *(f"{key}={value}" for key, value in given.items()), *QUICK]


@pytest.fixture(scope="module")
def calm(workshop: Path) -> Path:
    """The output of an undisturbed search."""
    out = workshop / "calm"
    code, text, err = limbeck(*arguments(workshop, out))
    assert code == 0, err
    assert "Distilled briefly" in text and "candidates.json" not in text and "result.json" in text
    return out


def test_a_search_picks_what_prune_makes(workshop: Path, calm: Path, tmp_path: Path) -> None:
    content = json.loads((calm / "candidates.json").read_text())
    losses = [candidate["loss"] for candidate in content["candidates"]]
    assert content["fit"] == 8 and losses[:4] == sorted(losses[:4]) and losses[4:] == [None] * 4
    picks = content["picks"]
    assert {pick["name"] for pick in picks} == {candidate["name"] for candidate in content["candidates"][:2]}
    assert picks[0]["kl"] <= picks[1]["kl"]
    assert sorted(path.name for path in calm.iterdir()) == [
        "candidates.json", "limbeck.json", "log.txt", "plots", "result.json", "students"
    ]  # fmt: skip
    result = json.loads((calm / "result.json").read_text())
    assert result["best"] == picks[0]["name"]
    pruned = tmp_path / "pruned"
    given = (f"model={workshop / 'model'}", f"scores={workshop / 'scores'}", f"output={pruned}")
    code, _, err = limbeck("prune", *given, *shlex.split(result["prune"]))
    assert code == 0, err
    assert load_config(pruned) == load_config(calm / picks[0]["folder"])
    assert (
        count_parameters(load_config(pruned)) == content["candidates"][0]["parameters"]
        or picks[0]["name"] != (content["candidates"][0]["name"])
    )
    svg = (calm / "plots" / "search.svg").read_text()
    assert "Loss of the model cut in memory" in svg and "Pareto front" in svg


def test_a_finished_search_is_not_done_again(workshop: Path, calm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "distil", lambda *_: pytest.fail("done again"))
    assert limbeck(*arguments(workshop, calm))[0] == 0
    code, _, err = limbeck(*arguments(workshop, calm), "measure=3")
    assert code == 2 and "measure was 4, now 3" in err


def test_an_interrupted_search_measures_nothing_twice(
    workshop: Path, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(*given: Any) -> float:
        if len(calls) == 2:
            calls.append("interrupted")
            raise KeyboardInterrupt
        calls.append("measured")
        return sliced_loss(*given)

    monkeypatch.setattr(command, "sliced_loss", counted)
    out = tmp_path / "out"
    assert limbeck(*arguments(workshop, out))[0] == 130 and not out.exists()
    assert limbeck(*arguments(workshop, out))[0] == 0
    assert calls == ["measured", "measured", "interrupted", "measured", "measured"]
    assert_same(out, calm)


def assert_same(out: Path, calm: Path) -> None:
    """Candidates, picks, plots and students, byte for byte."""
    files = [path.relative_to(calm) for path in calm.rglob("*") if path.is_file()]
    assert files == [path for path in files if (out / path).exists()]
    for file in files:
        if file.name not in TIMES:
            assert lasting(out / file) == lasting(calm / file), file


@pytest.mark.parametrize("rank", ("memory", "importance"))
def test_ranks_without_text(rank: str, workshop: Path, tmp_path: Path) -> None:
    """Scores and a config are enough: no data, no weights."""
    out = tmp_path / "out"
    given = (f"model={workshop / 'model'}", f"scores={workshop / 'scores'}", f"output={out}", f"rank={rank}")
    grid = ("space.layers=[4,5,6]", "space.hidden_size={min: 16,max: 32,step: 8}", "listed=5", "hardware=custom")
    code, text, err = limbeck("search", *given, *grid, "hardware.usable_gib=1", "budget.context=64")
    assert code == 0, err
    content = json.loads((out / "candidates.json").read_text())
    assert content["fit"] == 9 and len(content["candidates"]) == 5 and content["picks"] == []
    values = [c["importance"] if rank == "importance" else c["memory"]["total"] for c in content["candidates"]]
    assert values == sorted(values, reverse=True) and "importance" in text
    assert "Share of the importance" in (out / "plots" / "search.svg").read_text()


def test_without_scores_or_bandwidth_the_plot_is_of_parameters(workshop: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = (f"model={workshop / 'model'}", f"output={out}", "space.hidden_size=[16,32]", "budget.context=64")
    assert limbeck("search", *given, "hardware=custom", "hardware.usable_gib=1")[0] == 0
    assert "Parameters" in (out / "plots" / "search.svg").read_text()


def test_a_named_pattern_is_what_prune_makes(workshop: Path, tmp_path: Path) -> None:
    given = (f"model={workshop / 'model'}", f"scores={workshop / 'scores'}")
    grid = ("space.patterns=[M*-M]", "space.mamba_num_heads=[4]", "budget.context=64", "budget.gib=1")
    code, _, err = limbeck("search", *given, f"output={tmp_path / 'sizes'}", *grid)
    assert code == 0, err
    result = json.loads((tmp_path / "sizes" / "result.json").read_text())
    assert limbeck("prune", *given, f"output={tmp_path / 'pruned'}", *shlex.split(result["prune"]))[0] == 0
    config = load_config(tmp_path / "pruned")
    assert config.pattern == "M*-M" and config.mamba_num_heads == 4


@pytest.mark.parametrize(
    ("change", "says"),
    (
        ("rank=best", "memory, importance, loss"),
        ("scores=null", "scores is missing"),
        ("data=null", "data is missing"),
        ("model=nemotron-nano-9b-v2", "without weights"),
        ("distill.train.evaluate_every=0", "evaluate_every"),
        ("space.hidden_size=[99]", "at most 32"),
        ("space.hidden_size=32", "expected a list"),
        ("space.hidden_size={min: 3}", "space.hidden_size.max is missing"),
        ("space.patterns=[MM]", "keep one"),
        ("budget.gib=0.00001", "none of 8 sizes fits"),
        ("budget.gib=0", "expected more than 0"),
        ("budget.framework_share=1", "framework_share"),
        ("budget.kv_dtype=int3", "int3"),
        ("requests.batch=-1", "batch"),
        ("rules.min_layers.attention=-1", "min_layers has attention=-1"),
        ("listed=0", "listed"),
        ("measure=-1", "measure"),
    ),
)
def test_wrong_words_write_nothing(change: str, says: str, workshop: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    words = [word for word in arguments(workshop, tmp_path / "out") if word.split("=")[0] != change.split("=")[0]]
    code, _, err = limbeck(*words, change)
    assert code == 2 and says in err and err.count("\n") == 1, err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_killed_at_random_points(workshop: Path, calm: Path, tmp_path: Path) -> None:
    """SIGKILL at ten moments of a search: the same candidates, picks and students as undisturbed."""
    run = [sys.executable, "-m", "limbeck.scripts.run.main"]
    clock = time.perf_counter()
    subprocess.run([*run, *arguments(workshop, tmp_path / "timed")], check=True, capture_output=True)
    length = time.perf_counter() - clock
    assert_same(tmp_path / "timed", calm)
    draw, killed, out = random.Random(0), 0, tmp_path / "rough"
    for _ in range(10):
        process = subprocess.Popen([*run, *arguments(workshop, out)], stdout=subprocess.DEVNULL)
        try:
            process.wait(draw.uniform(0.4, 1.0) * length)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
        if (out / "result.json").exists():
            assert_same(out, calm)
            shutil.rmtree(out)
    assert killed >= 5
    subprocess.run([*run, *arguments(workshop, out)], check=True, capture_output=True)
    assert_same(out, calm)


def test_text_that_is_not_read_is_said(tmp_path: Path) -> None:
    words = ["model=zoo", "data=/nowhere", "space.hidden_size=[192]", "budget.context=512", f"output={tmp_path / 'x'}"]
    code, out, err = limbeck("search", *words)
    assert code == 0 and "note: data= is not read: rank=memory needs no text" in out, err


def test_picks_are_of_the_weights_that_are_left(workshop: Path, tmp_path: Path) -> None:
    """Of the step that is kept as the best, whatever came after it; a mean that nothing measures is refused."""
    out = tmp_path / "out"
    more = ("distill_top=1", "distill.train.keep=best", "distill.train.evaluate_every=1",
            "distill.train.warmup_steps=0",
            "distill.train.learning_rate=3", "distill.train.steps=2")  # fmt: skip
    code, _, err = limbeck(*arguments(workshop, out), *more)
    assert code == 0, err
    (pick,) = json.loads((out / "candidates.json").read_text())["picks"]
    left = json.loads((out / pick["folder"] / "limbeck.json").read_text())["weights"]
    lines = [json.loads(line) for line in (out / pick["folder"] / "metrics.jsonl").read_text().splitlines()]
    assert pick["kl"] == left["value"] < lines[-1]["validation_kl"], [line["validation_kl"] for line in lines]
    code, _, err = limbeck(*arguments(workshop, tmp_path / "no"), "distill.train.average_states=2")
    assert code == 2 and "average_states is 2" in err
