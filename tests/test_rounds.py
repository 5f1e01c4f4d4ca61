"""Rounds of compress and stages of distill: the same bytes after interruptions, and what is refused or rehearsed."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from limbeck.distill import stages
from limbeck.models.checkpoint import load_config
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.errors import InputError
from limbeck.prune.rounds import in_kinds, leftovers, plan_cuts
from limbeck.prune.target import Target
from limbeck.scripts import evaluate, prune
from limbeck.scripts.compress import Options
from limbeck.scripts.run.compose import build, compose_config
from limbeck.scripts.run.rounds import rounds_of
from limbeck.tests.helpers import TIMES, lasting, limbeck, make_workshop, tiny_config


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of its own tokenizer and a text, nothing of which may change."""
    return make_workshop(tmp_path_factory.mktemp("workshop"))


DEPTH = "{name: depth, target: {layers: 4}, importance: {remove_layers: 2}, distill: {stages: [{steps: 4}]}}"
WIDTH = (
    "{name: width, seed: 1, target: {hidden_size: 24, mamba_num_heads: 6}, importance: {remove_layers: 0},"
    " distill: {stages: [{steps: 5, learning_rate: 0.002}, {seq_len: 64, batch: 1, tokens: 200}]}}"
)
ROUNDS = f"rounds=[{DEPTH}, {WIDTH}]"


def command(workshop: Path, out: Path, *words: str) -> list[str]:
    return [
        "compress",
        f"model={workshop / 'model'}",
        f"data={workshop / 'text'}",
        f"output={out}",
        "importance.tokens=256",
        "importance.depth_tokens=128",
        "distill.train.steps=3",
        "distill.train.save_every=2",
        "distill.train.evaluate_every=2",
        "distill.train.log_every=1",
        "distill.seq_len=32",
        "distill.batch=2",
        "distill.evaluate_tokens=128",
        "evaluate_tokens=256",
        "fit.context=1000",
        "repair.rotate=false",
        "repair.least_squares=false",
        *words,
    ]


def contents(out: Path) -> dict[str, bytes]:
    """The files of all rounds but those that hold times."""
    found = {path.relative_to(out).as_posix(): path for path in sorted(out.glob("[0-9]-*/**/*")) if path.is_file()}
    return {name: lasting(path) for name, path in found.items() if path.name not in TIMES}


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stopping_at(step: int) -> Callable[..., Any]:
    """The trainer, interrupted after its `step`th step of all calls."""
    real, seen = stages.train, 0

    def train(*arguments: Any, on_step: Callable[[dict[str, Any]], None], **options: Any) -> int:
        def counted(record: dict[str, Any]) -> None:
            nonlocal seen
            seen += 1
            on_step(record)
            if seen == step:
                raise KeyboardInterrupt

        return real(*arguments, on_step=counted, **options)

    return train


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def interrupted(*words: str) -> None:
    code, _, err = limbeck(*words)
    assert code == 130, err


@pytest.mark.slow
def test_two_rounds_and_again(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers, then widths in two stages; interrupted in each round, the same command ends with the same bytes."""
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    code, text, err = limbeck(*command(workshop, calm, ROUNDS))
    assert code == 0, err
    assert "1. score: what matters (1-depth)" in text and "9. memory-fit" in text

    with monkeypatch.context() as patch:
        patch.setattr(stages, "train", stopping_at(3))
        interrupted(*command(workshop, rough, ROUNDS))
        assert (rough / "1-depth" / ".distilled.partial" / "training" / "1" / "state-00000002").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(prune, "run", interrupt)
        interrupted(*command(workshop, rough, ROUNDS))
    monkeypatch.setattr(stages, "train", stopping_at(2 + 5 + 3))  # 2 of the first round's 4 steps were done
    interrupted(*command(workshop, rough, ROUNDS))
    training = rough / "2-width" / ".distilled.partial" / "training"
    assert [path.name for path in sorted(training.glob("*/state-*"))][-2:] == ["state-00000005", "state-00000002"]
    monkeypatch.setattr(stages, "train", stopping_at(3))  # so that a step of the first stage would be noticed
    monkeypatch.setattr(evaluate, "run", interrupt)
    interrupted(*command(workshop, rough, ROUNDS))
    assert contents(rough) == contents(calm) and len(contents(calm)) > 20

    sizes = {name: load_config(calm / name / "distilled") for name in ("1-depth", "2-width")}
    assert [(size.num_layers, size.hidden_size, size.mamba_num_heads) for size in sizes.values()] == [
        (4, 32, 8),
        (4, 24, 6),
    ]
    assert load_config(calm / "exported").pattern == sizes["2-width"].pattern
    gap = json.loads((calm / "gap" / "gap.json").read_text())
    assert list(gap["models"]) == ["teacher", "1-depth pruned", "1-depth distilled", "pruned", "distilled"]
    made = json.loads((calm / "2-width" / "scores" / "limbeck.json").read_text())
    trained = json.loads((calm / "1-depth" / "distilled" / "limbeck.json").read_text())
    again = json.loads((calm / "2-width" / "distilled" / "limbeck.json").read_text())
    assert trained["inputs"]["teacher"] == again["inputs"]["teacher"] != made["inputs"]["model"]
    assert made["options"]["seed"] == 1 and trained["options"]["seed"] == 0

    records = metrics(calm / "2-width" / "distilled" / "metrics.jsonl")
    assert [record["stage"] for record in records] == [1] * 5 + [2] * 4
    assert [record["step"] for record in records] == list(range(1, 10))
    assert [record["tokens"] for record in records] == [64 * step for step in range(1, 10)]
    assert records[0]["learning_rate"] < 0.002 and "validation_kl" in records[-1]


def test_one_round_is_as_none(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights, whether a target stands alone, in a round, or trains in a single stage; and nothing of rounds
    or stages in the fingerprint where there are none."""
    monkeypatch.setattr(evaluate, "run", interrupt)
    interrupted(*command(workshop, tmp_path / "none", "target.hidden_size=24", "importance.remove_layers=0"))
    one = "rounds=[{name: only, target: {hidden_size: 24}, importance: {remove_layers: 0}, distill: {stages: [{}]}}]"
    interrupted(*command(workshop, tmp_path / "one", one))
    for name in ("pruned", "distilled"):
        weights = (tmp_path / "none" / name / "model.safetensors").read_bytes()
        assert weights == (tmp_path / "one" / "1-only" / name / "model.safetensors").read_bytes()
    facts = (tmp_path / "none" / "run" / "limbeck.json").read_text()
    facts += (tmp_path / "none" / "distilled" / "limbeck.json").read_text()
    assert not any(word in facts for word in ("rounds", "stages", "dry_run"))
    record = metrics(tmp_path / "none" / "distilled" / "metrics.jsonl")[0]
    assert "stage" not in record


def test_refused_before_anything_is_written(workshop: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for words, says in (
        ("rounds=[{name: a, target: {layers: 4}, importnce: {}}]", "rounds[0].importnce is no option here; did you"),
        ("rounds=[{name: a, target: {layers: 4, depth: 3}}]", "round 1-a: target.depth is no option"),
        ("rounds=[{name: a}]", "round 1-a has no target"),
        ("rounds=[{name: a, target: {layers: null}}]", "round 1-a has no target"),
        ("rounds=[{name: a, target: 3}]", "round 1-a: target is 3"),
        ("rounds=[{target: {layers: 4}}]", "rounds[0].name is None"),
        ("rounds=[{name: a/b, target: {layers: 4}}]", "rounds[0].name is 'a/b'"),
        ("rounds=[3]", "rounds[0] is 3; expected a mapping"),
        (f"rounds=[{DEPTH}, {{name: b, target: {{layers: 5}}}}]", "round 2-b: target: layers is 5; expected 1..4"),
        (f"rounds=[{DEPTH}, {{name: b, target: {{hidden_size: 40}}}}]", "round 2-b: target: hidden_size is 40"),
        (f"rounds=[{DEPTH}] target.layers=5", "target is given beside rounds"),
        ("distill.stages=[{steps: 3, tokens: 64}]", "distill.stages[0] has both tokens and steps"),
        ("distill.stages=[{},{stpes: 3}]", "distill.stages[1].stpes is no option here; did you mean 'steps'"),
        ("distill.stages=[{steps: 0}]", "steps (0)"),
        ("distill.stages=[{tokens: 0.5}]", "distill.stages[0].tokens is 0.5; expected at least 1"),
        ("distill.stages=[{tokens: many}]", "distill.stages[0].tokens is 'many'; expected a whole number"),
        ("distill.stages=[{batch: 0}]", "batch is 0"),
        ("distill.stages=[{seq_len: 1000000}] target.hidden_size=24", "do not fill one batch of 2 rows x 1000000"),
        (
            "rounds=[{name: a, target: {layers: 4}, distill: {stages: [{x: 1}]}}]",
            "round 1-a: distill.stages[0].x is no",
        ),
    ):
        given = words.rpartition(" target.")
        parts = [given[0], f"target.{given[2]}"] if given[1] else [words]
        code, _, err = limbeck(*command(workshop, out, *parts))
        assert code == 2 and says in err and err.count("\n") == 1 and err.startswith("limbeck: "), (words, err)
        assert not list(tmp_path.iterdir())
    for word in ("data=", "output="):
        left = [part for part in command(workshop, out, "target.layers=5") if not part.startswith(word)]
        code, _, err = limbeck(*left)
        assert code == 2 and f"{word[:-1]} is missing; give {word}VALUE" in err


def test_epochs_are_kept_before_anything_is_written(workshop: Path, tmp_path: Path) -> None:
    mix = tmp_path / "mix.yaml"
    mix.write_text(f"sources: [{{path: {workshop / 'text'}, epochs: 0.2}}]")
    words = [word for word in command(workshop, tmp_path / "out", "target.layers=5") if not word.startswith("data=")]
    for more in ("distill.train.steps=900", "distill.teacher_correction={steps: 900}"):
        code, _, err = limbeck(*words, f"data={mix}", more)
        assert code == 2 and "its epochs are 0.2" in err and err.count("\n") == 1, err
        assert list(tmp_path.iterdir()) == [mix]


@pytest.mark.slow
def test_a_dry_run_says_what_it_comes_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text, err = limbeck("compress", "recipe=nemotron-nano-9b-v2", "dry_run=true")
    assert code == 0 and not err and not list(tmp_path.iterdir())
    lines = [[part.strip() for part in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    found = {name: values for name, *values in lines if name}
    assert found["layers"] == ["62", "56", "56"] and found["residual channels"] == ["5,120", "5,120", "4,480"]
    assert found["parameters"][0] == "12,310,001,152" and found["fits"] == ["no", "no", "yes"]
    assert found["tokens to distil"] == ["-", "60,001,615,872", "76,007,079,936"]
    assert "2-width distill, stage 2: 3,974 steps x 128 rows x 49,152 = 25,002,246,144 tokens" in text
    assert "in all: 136,008,695,808" in text and "19.66 GiB of a10g" in text and "from and to" in text

    kept = "rounds.0.target.keep_layers=[" + ",".join(str(n) for n in range(62) if n not in PUBLISHED) + "]"
    code, text, _ = limbeck("compress", "recipe=nemotron-nano-9b-v2", "dry_run=true", f"+{kept}", "output=x")
    assert code == 0 and "8,888,227,328" in text and "from and to" not in text and not list(tmp_path.iterdir())
    code, _, err = limbeck("compress", "recipe=nemotron-nano-9b-v2", "dry_run=true", "rounds.0.target.layers=58")
    assert code == 0, err  # fewer layers to remove than are scored
    code, _, err = limbeck("compress", "recipe=nemotron-nano-9b-v2", "dry_run=true", "rounds.0.target.layers=50")
    assert code == 2 and "round 1-depth: target: 50 of 62 layers" in err
    code, _, err = limbeck("compress", "recipe=nemotron-nano-9b-v2", f"data={tmp_path}", "output=x")
    assert code == 2 and "without weights" in err and not list(tmp_path.iterdir())


PUBLISHED = (7, 52, 8, 48, 17, 18)  # layers that NVIDIA removed, by the two published patterns


def test_leftovers_are_every_mix_of_kinds() -> None:
    """Against a plain count: which mixes can be left of M-M*-M by removing two layers, with a least number of each."""
    config = tiny_config()
    options = compose_config("compress", ["model=x", "dry_run=true"])
    options["importance"] |= {"remove_layers": 2, "min_layers": {"mamba": 2}}
    options["rounds"] = [{"name": "a", "target": {"layers": 4}}]
    (step,) = plan_cuts(config, [one.cut for one in build(Options, options).plan()])
    kept = itertools.combinations(config.pattern, 4)
    expected = {"".join(sorted(letters)) for letters in kept if letters.count("M") >= 2}
    assert leftovers(step, {in_kinds(config)}) == expected and len(expected) > 3
    counts = {count_parameters(step.after.replace(pattern=pattern)) for pattern in expected}
    assert count_parameters(step.after) in counts


@pytest.mark.parametrize(
    ("target", "removed"),
    (
        ({"layers": 4}, 2),
        ({"hidden_size": 24}, 0),
        ({"parameters": 0.8}, 0),
        ({"keep_layers": (0, 1)}, 0),
        ({"layers": 9}, 0),
    ),
)
def test_as_many_layers_are_put_in_order_as_the_target_removes(target: dict[str, Any], removed: int) -> None:
    words = [f"target.{key}={list(value) if isinstance(value, tuple) else value!s}" for key, value in target.items()]
    (found,) = build(Options, compose_config("compress", ["model=x", "dry_run=true", *words])).plan()
    assert found.importance.remove_layers is None and found.scored(tiny_config()).remove_layers == removed
    assert found.importance.settled(tiny_config()).remove_layers == 1
    requested = dataclasses.replace(found, importance=dataclasses.replace(found.importance, remove_layers=3))
    assert requested.scored(tiny_config()).remove_layers == 3


def test_compress_asks_for_a_size(workshop: Path, tmp_path: Path) -> None:
    words = [word for word in command(workshop, tmp_path / "out") if not word.startswith("target.")]
    code, _, err = limbeck(*words)
    assert code == 2 and "target.parameters=0.75" in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_compress_to_a_share_of_the_parameters(workshop: Path, tmp_path: Path) -> None:
    code, _, err = limbeck(*command(workshop, tmp_path / "out", "target.parameters=0.8"))
    assert code == 0, err
    before, after = (
        count_parameters(load_config(path)) for path in (workshop / "model", tmp_path / "out" / "exported")
    )
    assert 0.7 * before < after <= 0.8 * before


def test_a_target_beside_rounds_is_refused() -> None:
    (base,) = build(Options, compose_config("compress", ["recipe=tiny", "dry_run=true"])).plan()
    assert base.target.layers == 11 and rounds_of(base, ()) == (base,)
    with pytest.raises(InputError, match="beside rounds"):
        rounds_of(base, ({"name": "a", "target": {"layers": 3}},))
    assert base.target != Target()


def test_distill_alone_in_stages(workshop: Path, tmp_path: Path) -> None:
    teacher, student = (f"{name}={workshop / 'model'}" for name in ("teacher", "student"))
    words = ["distill", teacher, student, f"data={workshop / 'text'}", f"output={tmp_path / 'out'}"]
    words += ["distill.seq_len=32", "distill.batch=2", "distill.train.evaluate_every=0"]
    code, _, err = limbeck(*words, "distill.stages=[{tokens: 100},{steps: 1, seq_len: 16, schedule: wsd}]")
    assert code == 0, err
    assert [(r["stage"], r["step"], r["tokens"]) for r in metrics(tmp_path / "out" / "metrics.jsonl")] == [
        (1, 2, 128),
        (2, 3, 160),
    ]
    assert not (tmp_path / "out" / "training").exists()
