"""`limbeck distill` with other teachers: cached, corrected, compared in their hidden states; and of a mixture."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill import teacher as module
from limbeck.distill.losses import DistillLoss
from limbeck.distill.options import Correction, DistillOptions, TrainOptions
from limbeck.distill.parallel import load_frozen
from limbeck.distill.state import last_figures
from limbeck.distill.teaching import kept_of
from limbeck.models.checkpoint import load_model, save_model
from limbeck.models.fingerprint import fingerprint_of, read_provenance
from limbeck.models.tokenizer import train_tokenizer
from limbeck.scripts import distill as distill_command
from limbeck.tests.helpers import limbeck, make_workshop, random_model, tiny_config
from safetensors.torch import load_file

HOW = ("distill.train.steps=4", "distill.seq_len=32", "distill.batch=2", "distill.train.evaluate_every=2")
SMALL = (*HOW, "distill.train.warmup_steps=1", "distill.train.log_every=1", "distill.evaluate_tokens=256")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its text, and two students: cut out of it, and another model."""
    root = make_workshop(tmp_path_factory.mktemp("workshop"))
    data = (f"data={root / 'text'}", "seq_len=32", "batch=2", "importance.tokens=256", "importance.depth_tokens=64")
    scored = limbeck(
        "score", f"model={root / 'model'}", *data, f"output={root / 'scores'}", "importance.remove_layers=1"
    )
    assert scored[0] == 0, scored
    for name, more in (("pruned", ()), ("turned", ("repair.rotate=true", "repair.tokens=256", *data[:3]))):
        cut = ("target.layers=5", "target.hidden_size=24", f"scores={root / 'scores'}", f"output={root / name}")
        pruned = limbeck("prune", f"model={root / 'model'}", *cut, *more)
        assert pruned[0] == 0, pruned
    other = random_model(tiny_config(vocab_size=320, pad_token_id=0, pattern="M*M-", hidden_size=20), 5)
    save_model(other.float(), root / "other", tokenizer_from=root / "words")
    return root


def distil(root: Path, output: Path, *arguments: str, student: str = "pruned") -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, records and what was said."""
    places = (f"teacher={root / 'model'}", f"student={root / student}", f"data={root / 'text'}", f"output={output}")
    code, out, err = limbeck("distill", *places, *SMALL, *arguments)
    metrics = output / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return code, records, out + err


def cache(root: Path, output: Path, *arguments: str) -> tuple[int, str, str]:
    places = (f"teacher={root / 'model'}", f"data={root / 'text'}", f"output={output}")
    return limbeck("cache-teacher", *places, *SMALL, *arguments)


def test_cached_teacher_trains_as_the_model_does(workshop: Path, tmp_path: Path) -> None:
    """All 320 tokens in float32 are the teacher itself: equal losses and held-out figures; with 8 they are a bound."""
    code, out, _ = cache(workshop, tmp_path / "cache", "cache.k=320", "cache.dtype=float32")
    assert code == 0 and "bytes a token" in out
    facts = json.loads((tmp_path / "cache" / "result.json").read_text())
    assert facts["bytes_per_token"] == pytest.approx(320 * 6 + 4, rel=0.02) and facts["k"] == 320
    assert read_provenance(tmp_path / "cache")["made_by"] == "limbeck cache-teacher"
    online = distil(workshop, tmp_path / "online")
    cached = distil(workshop, tmp_path / "cached", f"teacher_cache={tmp_path / 'cache'}")
    assert online[0] == cached[0] == 0
    for a, b in zip(online[1], cached[1], strict=True):
        for name in ("loss", "validation_loss", "validation_bits_per_byte", "validation_kl", "validation_agreement"):
            assert (name in a) == (name in b) and a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-4), name
    assert "validation_kl" in cached[1][-1]
    assert cache(workshop, tmp_path / "few", "cache.k=8")[0] == 0
    few = distil(workshop, tmp_path / "fewer", f"teacher_cache={tmp_path / 'few'}")
    assert few[0] == 0 and few[1][0]["loss"] < online[1][0]["loss"] < 3 * few[1][0]["loss"]


def test_cache_of_something_else_is_refused(workshop: Path, tmp_path: Path) -> None:
    assert cache(workshop, tmp_path / "cache", "cache.k=4")[0] == 0
    given = f"teacher_cache={tmp_path / 'cache'}"

    def refused(says: str, *arguments: str, root: Path = workshop) -> None:
        code, _, said = distil(root, tmp_path / "out", given, *arguments)
        assert code == 2 and says in said.replace("\n", " "), said
        assert not (tmp_path / "out").exists()

    refused("lacks rows", "distill.train.steps=5")
    refused("lacks rows", "seed=1")
    refused("lacks rows", "distill.seq_len=16")
    refused("temperature", "distill.loss.temperature=2")
    refused("hidden", "distill.loss.hidden.weight=1")
    refused("teacher_correction", "distill.teacher_correction={steps: 2}")
    refused("no finished cache", f"teacher_cache={tmp_path / 'nothing'}")
    moved = shutil.copytree(workshop, tmp_path / "moved")
    (moved / "text" / "0.txt").write_text("something else")
    refused("another data", root=moved)
    shutil.copytree(workshop / "text", moved / "text", dirs_exist_ok=True)
    other = random_model(tiny_config(vocab_size=320, pad_token_id=0), 9).float()
    save_model(other, moved / "new", tokenizer_from=moved / "words")
    shutil.rmtree(moved / "model")
    shutil.move(moved / "new", moved / "model")
    refused("another teacher", root=moved)
    shutil.rmtree(moved)
    shutil.copytree(workshop, moved)
    words = json.loads((moved / "pruned" / "tokenizer.json").read_text())
    (moved / "pruned" / "tokenizer.json").write_text(json.dumps(words))
    refused("not as it was left", root=moved)
    (moved / "pruned" / "limbeck.json").unlink()  # a folder of whoever else's
    refused("another tokenizer", root=moved)


def test_killed_cache_goes_on(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ("cache.k=4", "cache.shard_bytes=2000")
    assert cache(workshop, tmp_path / "calm", *whole)[0] == 0
    answer, requested = module.answers_to, []

    def killed(*arguments: Any) -> Any:
        requested.append(len(arguments[2]))
        if len(requested) == 5:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(module, "answers_to", killed)
    assert cache(workshop, tmp_path / "rough", *whole)[0] != 0 and not (tmp_path / "rough").exists()
    (tmp_path / ".rough.partial" / "rows-00099.safetensors.partial").write_bytes(b"half")
    monkeypatch.setattr(
        module, "answers_to", lambda *arguments: requested.append(len(arguments[2])) or answer(*arguments)
    )
    requested.clear()
    assert cache(workshop, tmp_path / "rough", *whole)[0] == 0
    assert not list((tmp_path / "rough").glob("*.partial"))
    calm, rough = (json.loads((tmp_path / name / "cache.json").read_text()) for name in ("calm", "rough"))
    assert calm["rows"] == rough["rows"] and 0 < sum(requested) < calm["rows"]
    assert distil(workshop, tmp_path / "out", f"teacher_cache={tmp_path / 'rough'}")[0] == 0


def test_a_damaged_cache_is_noticed(workshop: Path, tmp_path: Path) -> None:
    """A flipped bit when the file is first read, a file that is gone at once."""
    out = tmp_path / "cache"
    assert cache(workshop, out, "cache.k=8", "cache.shard_bytes=1")[0] == 0
    shard = sorted(out.glob("rows-*"))[1]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    code, _, said = distil(workshop, tmp_path / "flip", f"teacher_cache={out}")
    assert code == 2 and f"{shard.name} is damaged" in said, said
    shard.unlink()
    code, _, said = distil(workshop, tmp_path / "gone", f"teacher_cache={out}")
    assert code == 2 and "files are missing" in said and not (tmp_path / "gone").exists(), said


def test_a_cache_has_what_is_read_and_no_more(workshop: Path, tmp_path: Path) -> None:
    for name, words in (("held", ()), ("unheld", ("distill.train.evaluate_every=0",))):
        assert cache(workshop, tmp_path / name, "cache.k=8", *words)[0] == 0
    held, unheld = (json.loads((tmp_path / name / "cache.json").read_text())["rows"] for name in ("held", "unheld"))
    assert unheld < held
    assert (
        distil(workshop, tmp_path / "a", f"teacher_cache={tmp_path / 'unheld'}", "distill.train.evaluate_every=0")[0]
        == 0
    )


def test_what_is_trained_is_not_in_float16(workshop: Path, tmp_path: Path) -> None:
    code, _, said = distil(workshop, tmp_path / "out", "dtype=fp16")
    assert code == 2 and "float16 loses gradients" in said and not (tmp_path / "out").exists()


def test_figures_of_the_best_step_of_the_last_stage(tmp_path: Path) -> None:
    """Steps of records are counted through the stages, that of the weights from its own stage's first."""
    lines = [(1, 4, 0.9), (1, 8, 0.8), (2, 12, 0.7), (2, 16, 0.75)]
    records = [{"stage": stage, "step": step, "validation_kl": kl} for stage, step, kl in lines]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for weights, expected in (({"kept": "best", "step": 4}, 0.7), ({"kept": "last", "step": 8}, 0.75)):
        (tmp_path / "limbeck.json").write_text(json.dumps({"weights": weights}))
        assert last_figures(tmp_path, ["validation_kl"]) == {"validation_kl": expected}


def test_trackers_are_told_of_all_stages(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(distill_command, "journal", lambda *given: contextlib.nullcontext(told.append))
    stages = "distill.stages=[{steps: 2}, {steps: 1, batch: 1}, {steps: 2}]"
    code, _, said = distil(workshop, tmp_path / "out", stages, "distill.train.log_every=1")
    assert code == 0, said
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [(each["step"], each["tokens"]) for each in told] == [(each["step"], each["tokens"]) for each in lines]
    assert [each["step"] for each in told] == [1, 2, 3, 4, 5]


def test_what_a_student_kept_is_known_from_its_folder(workshop: Path) -> None:
    total = fingerprint_of(workshop / "model")
    selection = json.loads((workshop / "pruned" / "selection.json").read_text())
    kept, turned = (kept_of(workshop / name, workshop / "model", lambda: total) for name in ("pruned", "turned"))
    assert kept is not None and kept.channels == tuple(selection["kept"]["hidden"]) and len(kept.layers) == 5
    assert turned is not None and turned.channels is None and turned.layers == kept.layers
    assert kept_of(workshop / "pruned", workshop / "model", lambda: "another") is None
    assert kept_of(workshop / "other", workshop / "model", lambda: total) is None


@pytest.mark.parametrize("student", ("pruned", "turned", pytest.param("other", marks=pytest.mark.slow)))
def test_hidden_states_alone_teach(student: str, workshop: Path, tmp_path: Path) -> None:
    """On the kept channels where the student was cut out of this teacher, by a fitted map otherwise."""
    alone = ("distill.loss.kl_weight=0", "distill.loss.hidden.weight=1", "distill.loss.hidden.fit_tokens=512")
    kept = (*alone, "distill.loss.hidden.compare=kept")
    if student != "pruned":
        assert distil(workshop, tmp_path / "kept", *kept, student=student)[0] == 2
    steps = ("distill.train.steps=12", "distill.train.evaluate_every=0")
    how = kept if student == "pruned" else alone
    code, records, said = distil(workshop, tmp_path / "out", *how, *steps, student=student)
    assert code == 0, said
    assert 0.01 < records[-1]["loss"] < 0.9 * records[0]["loss"] < 4
    assert load_model(tmp_path / "out").config == load_model(workshop / student).config


@pytest.mark.slow
def test_corrected_teacher(workshop: Path, tmp_path: Path) -> None:
    """It lies beside the output, has learned, teaches, and is not made twice; the student's descent is still known."""
    correction = "distill.teacher_correction={tokens: 384, learning_rate: 0.01}"
    code, _, said = distil(workshop, tmp_path / "out", correction, "distill.loss.hidden.weight=1",
                                 "distill.loss.hidden.compare=kept")  # fmt: skip
    assert code == 0, said
    corrected = tmp_path / "out-corrected-teacher"
    curve = [json.loads(line)["loss"] for line in (corrected / "metrics.jsonl").read_text().splitlines()]
    assert curve[-1] < curve[0] - 0.2
    assert (
        read_provenance(tmp_path / "out")["inputs"]["teacher"]
        == fingerprint_of(corrected)
        != fingerprint_of(workshop / "model")
    )
    made = (corrected / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "out")
    assert distil(workshop, tmp_path / "out", correction)[0] == 0
    assert (corrected / "model.safetensors").stat().st_mtime_ns == made
    wrong = distil(workshop, tmp_path / "wrong", "distill.teacher_correction={step: 6}")
    assert wrong[0] == 2 and "steps" in wrong[2]


def test_moving_weights_and_a_mixture(workshop: Path, tmp_path: Path) -> None:
    mix = tmp_path / "mix.yaml"
    mix.write_text(f"sources:\n- {{path: {workshop / 'text'}, weight: 9}}\n- {{path: more.jsonl, weight: 1}}\n")
    (tmp_path / "more.jsonl").write_text("".join(f'{{"text": "more of {i}"}}\n' for i in range(300)))
    ramp = "distill.loss.ce_weight={start: 0, end: 1, steps: 3}"
    places = (f"teacher={workshop / 'model'}", f"student={workshop / 'pruned'}", f"output={tmp_path / 'out'}")
    code, out, err = limbeck("distill", *places, f"data={mix}", *SMALL, ramp)
    assert code == 0, err
    assert "The mixture" in out and "90.0%" in out and "epochs" in out
    inputs = read_provenance(tmp_path / "out")["inputs"]
    assert json.loads(inputs["data"])[0]["weight"] == 9
    mix.write_text(mix.read_text().replace("weight: 1}", "weight: 1, epochs: 0.001}"))
    code, _, err = limbeck("distill", *places[:2], f"output={tmp_path / 'two'}", f"data={mix}", *SMALL)
    assert code == 2 and "would be read" in err


def test_a_teacher_in_main_memory_and_in_another_dtype(workshop: Path, tmp_path: Path) -> None:
    """Offloaded it teaches the same, bit for bit, and its layers are away between turns; the dtype is its own."""
    more = {"here": "seed=0", "away": "distill.teacher_offload=true", "wide": "distill.teacher_dtype=float64"}
    for name, option in more.items():
        code, _, said = distil(workshop, tmp_path / name, option)
        assert code == 0, said
    found = [load_file(tmp_path / name / "model.safetensors") for name in ("here", "away", "wide")]
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    differences = [(found[0][key] - found[2][key]).abs().max().item() for key in found[0]]
    assert 0 < max(differences) < 1e-3
    teacher = load_frozen(workshop / "model", torch.float32, torch.device("cpu"), split=False, offload=True)
    teacher.hidden_states(torch.zeros(1, 3, dtype=torch.int64))
    assert all(weight.is_meta for weight in teacher.layers.parameters()) and not teacher.head_weight.is_meta
    code, _, said = distil(workshop, tmp_path / "x", "distill.teacher_dtype=float31")
    assert code == 2 and "float31" in said


def test_a_wrong_student_is_found_before_its_teacher_is_corrected(workshop: Path, tmp_path: Path) -> None:
    other = shutil.copytree(workshop / "pruned", tmp_path / "other")
    train_tokenizer(iter(["another text " * 99]), 97, other)
    code, _, said = distil(workshop, tmp_path / "out", "distill.teacher_correction={steps: 2}", student=str(other))
    assert code == 2 and "tokenizer" in said and "correcting" not in said, said
    assert not (tmp_path / "out-corrected-teacher").exists()


def test_options_that_a_cache_cannot_heed_are_refused(workshop: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    for word, says in (
        ("distill.teacher_correction={steps: 2}", "leave distill.teacher_correction out"),
        ("distill.teacher_dtype=bfloat16", "is dtype="),
        ("distill.teacher_offload=true", "is loaded whole"),
    ):
        code, _, err = cache(workshop, out, word)
        assert code == 2 and says in err and not out.exists(), err
    assert cache(workshop, out, "cache.k=8")[0] == 0
    for word in ("distill.teacher_dtype=bfloat16", "distill.teacher_offload=true"):
        code, _, said = distil(workshop, tmp_path / "no", f"teacher_cache={out}", word)
        assert code == 2 and "no teacher is read" in said, said


def test_a_corrected_teacher_is_trained_plainly(workshop: Path, tmp_path: Path) -> None:
    """Not through the student's rounding, and without the student's choice of a best step."""
    how = DistillOptions(
        DistillLoss(), TrainOptions(3, 1e-3, quantize="w8a8", keep="best", evaluate_every=1), 32, 2, 64,
        teacher_correction=Correction(steps=2),
    ).correction()  # fmt: skip
    assert (how.train.quantize, how.train.keep, how.train.evaluate_every, how.train.steps) == (None, "last", 0, 2)
