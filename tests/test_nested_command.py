"""`limbeck distill` with sizes within each other, and `limbeck prune`, which cuts one out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill.teaching import held_out_figures
from limbeck.distill.text.resolve import sample as read_sample
from limbeck.distill.trainer import TrainingRun
from limbeck.models.checkpoint import load_config, load_model, save_model
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.errors import InputError
from limbeck.models.submodel import SubModel
from limbeck.prune.nested import nested_cut, prefixes
from limbeck.prune.scores import LayerScores, Scores, save_scores
from limbeck.tests.helpers import (
    TIMES,
    assert_close,
    lasting,
    limbeck,
    make_workshop,
    random_model,
    tiny_config,
)
from limbeck.tests.nested_helpers import LEAST, MIDDLE, TARGETS, scores_of
from limbeck.tests.training_helpers import records

HOW = {
    "distill.seq_len": 32, "distill.batch": 2, "distill.train.steps": 10, "distill.train.save_every": 2,
    "distill.train.evaluate_every": 5, "distill.train.log_every": 1, "distill.train.warmup_steps": 1,
    "distill.train.optimizer": "muon", "distill.evaluate_tokens": 256, "wandb": "off", "device": "cpu",
}  # fmt: skip
SIZES = [{"target": {}, "name": "whole"}, {"target": MIDDLE, "share": 2}, {"target": LEAST, "name": "least"}]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is its own student, with its scores, and a text."""
    root = make_workshop(tmp_path_factory.mktemp("workshop"))
    save_scores(root / "scores", Scores(scores_of(load_config(root / "model")), LayerScores()))
    return root


def distil(root: Path, output: Path, *arguments: str, sizes: Any = SIZES, **changes: Any) -> tuple[int, str]:
    chosen = HOW | changes
    code, out, err = limbeck(
        "distill", f"teacher={root / 'model'}", f"student={root / 'model'}", f"data={root / 'text'}",
        f"output={output}", f"scores={root / 'scores'}", f"distill.nested={{sizes: {as_words(sizes)}}}",
        *(f"{key}={value}" for key, value in chosen.items()), *arguments,
    )  # fmt: skip
    return code, out + err


def as_words(content: Any) -> str:
    """As it is written on a command line."""
    return json.dumps(content).replace('"', "")


@pytest.fixture(scope="module")
def trained(workshop: Path) -> Path:
    code, said = distil(workshop, workshop / "nested", **{"distill.train.ema_decay": 0.5})
    assert code == 0, said
    return workshop / "nested"


def test_prune_cuts_out_what_was_trained(trained: Path, workshop: Path, tmp_path: Path) -> None:
    """Every size by its name: the figures that training had of it at its last step, and transformers' logits."""
    transformers = pytest.importorskip("transformers")
    stored = json.loads((trained / "nested.json").read_text())["sizes"]
    assert [size["name"] for size in stored][::2] == ["whole", "least"]
    assert [size["share"] for size in stored] == [0.25, 0.5, 0.25]
    last = records(trained)[-1]
    teacher, whole = load_model(workshop / "model"), load_model(trained)
    rows = read_sample(
        str(workshop / "text"), "validation", workshop / "model", tokens=256, seq_len=32, batch=2, seed=0
    )
    ids = torch.randint(3, 320, (2, 40))
    for size in stored:
        out = tmp_path / size["name"]
        code, text, err = limbeck("prune", f"model={trained}", f"nested={size['name']}", f"output={out}")
        assert code == 0, text + err
        pruned = load_model(out)
        config = pruned.config
        assert count_parameters(config) == size["parameters"]
        assert size["widths"].items() <= vars(config).items()
        own = SubModel(whole.config, config, prefixes(whole.config, config).kept).of(whole)
        assert_close("ours", own(ids), pruned(ids), 1e-6)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        assert_close("transformers", theirs(ids).logits, pruned(ids), 1e-5)
        figures = held_out_figures(teacher, pruned, rows)
        assert last[f"validation_kl_{size['name']}"] == pytest.approx(figures["validation_kl"], rel=1e-5)


def test_killed_and_resumed_leaves_the_same_bytes(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = {"distill.stages": "[{steps: 6}, {steps: 5, seq_len: 16}]"}
    assert distil(workshop, tmp_path / "calm", **staged)[0] == 0
    moved, count = TrainingRun.move, 0

    def killed(run: TrainingRun, norm: float) -> None:
        nonlocal count
        count += 1
        if count in (4, 9):  # of the first stage, and of the second
            raise KeyboardInterrupt
        moved(run, norm)

    monkeypatch.setattr(TrainingRun, "move", killed)
    codes = [distil(workshop, tmp_path / "rough", **staged)[0] for _ in range(3)]
    assert codes == [130, 130, 0]
    calm, rough = (sorted((tmp_path / name).iterdir()) for name in ("calm", "rough"))
    assert [file.name for file in calm] == [file.name for file in rough]
    for one, other in zip(calm, rough, strict=True):
        if one.is_file() and one.name not in TIMES:
            assert lasting(one) == lasting(other), one.name
    sizes = [record["size_parameters"] for record in records(tmp_path / "rough")]
    assert len(sizes) == 11 and len(set(sizes[:6])) == len(set(sizes[6:])) == 3


def test_a_cached_teacher_serves_every_size(workshop: Path, tmp_path: Path) -> None:
    """With all tokens in float32 it is the teacher: the same losses and figures."""
    places = (f"teacher={workshop / 'model'}", f"data={workshop / 'text'}", f"output={tmp_path / 'cache'}")
    rows = (f"{key}={value}" for key, value in HOW.items() if key.startswith("distill."))
    assert limbeck("cache-teacher", *places, *rows, "cache.k=320", "cache.dtype=float32")[0] == 0
    assert distil(workshop, tmp_path / "online")[0] == 0
    assert distil(workshop, tmp_path / "cached", f"teacher_cache={tmp_path / 'cache'}")[0] == 0
    online, cached = records(tmp_path / "online"), records(tmp_path / "cached")
    assert "validation_kl_least" in cached[-1]
    for ours, theirs in zip(cached, online, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


NARROW = {"hidden_size": 31}
REFUSED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "two at least": (SIZES[:1], ()),
    "from the largest to the smallest": ([SIZES[1], SIZES[0]], ()),
    "no fewer than those of the size before it": ([SIZES[0], {"target": {}}], ()),
    "target.depth is no option here": ([SIZES[0], {"target": {"depth": 3}}], ()),
    "all sizes have the student's layers": ([SIZES[0], {"target": {"layers": 3}}], ()),
    "a share, such as 0.75, or a count": ([SIZES[0], {"target": {"parameters": "much"}}], ()),
    "expected a multiple of n_groups": ([SIZES[0], {"target": {"mamba_num_heads": 5}}], ()),
    "share is 0": ([SIZES[0], {"target": LEAST, "share": 0}], ()),
    "two have one name": ([SIZES[0], {"target": LEAST, "name": "whole"}], ()),
    "give each a name of its own": (
        [{"target": {"hidden_size": 31}}, {"target": {"hidden_size": 31, "intermediate_size": 47}}],
        (),
    ),
    "rollouts": (SIZES, ("distill.rollouts={new_tokens: 4, prompt_tokens: 4}",)),
    "streams of different widths": (SIZES, ("distill.loss.hidden.weight=1",)),
    "multi-token prediction": (SIZES, ("distill.loss.mtp_weight=1",)),
    "train.quantize": (SIZES, ("distill.train.quantize=fp8",)),
    "train.expert_balance": (SIZES, ("distill.train.expert_balance=0.1",)),
    "train.compile": (SIZES, ("distill.train.compile=true",)),
    "give both or neither": (SIZES, ("scores=null",)),
}


@pytest.mark.parametrize("says", REFUSED)
def test_wrong_sizes_are_one_line(says: str, workshop: Path, tmp_path: Path) -> None:
    sizes, arguments = REFUSED[says]
    code, said = distil(workshop, tmp_path / "out", *arguments, sizes=sizes)
    assert code == 2 and says in said and len(said.splitlines()) == 1, said
    assert not list(tmp_path.iterdir())


def test_what_else_is_refused(trained: Path, workshop: Path, tmp_path: Path) -> None:
    def refused(says: str, *words: str) -> None:
        code, _, err = limbeck(*words)
        assert code == 2 and says in err and len(err.splitlines()) == 1, err
        assert not list(tmp_path.iterdir())

    cut = ("prune", f"model={trained}", f"output={tmp_path / 'out'}")
    refused("known: whole,", *cut, "nested=half")
    refused("did you mean 'least'", *cut, "nested=lest")
    refused("give scores=FOLDER", *cut)
    refused("left as it was trained", *cut, "nested=least", "target.hidden_size=24")
    refused("left as it was trained", *cut, "nested=least", f"data={workshop / 'text'}")
    refused("left as it was trained", *cut, "nested=least", "repair.norms=none")
    refused("has no nested.json", "prune", f"model={workshop / 'model'}", *cut[2:], "nested=least")
    chain = (f"data={workshop / 'text'}", f"output={tmp_path / 'out'}", "distill=nested")
    small = ("target.hidden_size=24", "distill.seq_len=32", "distill.batch=2")
    refused("limbeck distill alone", "compress", f"model={workshop / 'model'}", *chain, *small)
    refused("limbeck distill alone", "search", f"model={workshop / 'model'}", *chain[1:])
    refused("limbeck distill alone", "train-fit", "model=zoo", "target.hidden_size=224", "distill=nested")
    ahead = tiny_config(mtp_pattern="*-", mtp_steps=1)
    with pytest.raises(InputError, match="drop_mtp"):
        nested_cut(ahead, scores_of(ahead), TARGETS)
    other = {axis: values for axis, values in scores_of(tiny_config()).items() if axis.kind != "ssm_state"}
    with pytest.raises(InputError, match="score the student again"):
        nested_cut(tiny_config(), other, [{"ssm_state_size": 8}, LEAST])


def test_scores_of_another_model_are_refused(workshop: Path, tmp_path: Path) -> None:
    how = (f"data={workshop / 'text'}", "seq_len=32", "batch=2", "importance.tokens=64", "importance.depth_tokens=64")
    other = random_model(load_config(workshop / "model"), 9, torch.float32)
    save_model(other, tmp_path / "other", tokenizer_from=workshop / "words")
    assert limbeck("score", f"model={tmp_path / 'other'}", *how, f"output={tmp_path / 'scores'}")[0] == 0
    code, said = distil(workshop, tmp_path / "out", f"scores={tmp_path / 'scores'}")
    assert code == 2 and "are of another model" in said and not (tmp_path / "out").exists()
