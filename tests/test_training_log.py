"""What a training leaves to look at: logged figures, offline logs; weights averaged after the fact."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limbeck.distill.average import merged_rows
from limbeck.distill.parallel import prepare
from limbeck.distill.speed import speed_figures
from limbeck.distill.stages import hand_on
from limbeck.distill.state import states
from limbeck.distill.trainer import train
from limbeck.models.checkpoint import load_model, open_checkpoint, save_model
from limbeck.models.cost.speed import flops_per_token
from limbeck.models.fingerprint import fingerprint_of
from limbeck.scripts.run.tracking import card_tflops, note_of
from limbeck.tests.helpers import assert_close, limbeck, random_model, tiny_config
from limbeck.tests.training_helpers import batches_from, model_of, options, teach, weights
from safetensors.torch import load_file


def test_merge(workshop: Path, tmp_path: Path) -> None:
    model = workshop / "model"
    config = open_checkpoint(model).config
    save_model(random_model(config, 3), tmp_path / "other", dtype=torch.bfloat16, tokenizer_from=model)
    words = ("merge", f"model={model}", f"other={tmp_path / 'other'}", "weight=0.25")
    code, _, err = limbeck(*words, f"output={tmp_path / 'merged'}")
    assert code == 0, err
    one, two, merged = (
        load_file(path / "model.safetensors") for path in (model, tmp_path / "other", tmp_path / "merged")
    )
    for name, value in merged.items():
        assert value.dtype == torch.float32
        assert_close(name, 0.75 * one[name].double() + 0.25 * two[name].double(), value, 1e-6)
    assert load_model(tmp_path / "merged").config == config
    pieces = dict(merged_rows(open_checkpoint(model), open_checkpoint(tmp_path / "other"), 0.0))
    assert (
        all(torch.equal(value, one[name]) for name, value in load_file(model / "model.safetensors").items()) and pieces
    )
    narrow = random_model(config.replace(hidden_size=24), 3)
    save_model(narrow, tmp_path / "narrow", tokenizer_from=model)
    for change, says in (
        (f"other={tmp_path / 'narrow'}", "not of one config (hidden_size 32 and 24)"),
        ("weight=1.5", "weight is 1.5"),
    ):
        code, _, err = limbeck(*words, change, f"output={tmp_path / 'no'}")
        assert code == 2 and says in err and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("card", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA L40", None), ("NVIDIA A10", None),
        ("NVIDIA H100 PCIe", None), ("NVIDIA H200", 989), ("NVIDIA H20", None),
    ],
)  # fmt: skip
def test_peak_of_the_cards(card: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert card_tflops(torch.device("cuda")) == tflops


def test_figures_of_the_log() -> None:
    student, teacher = tiny_config(hidden_size=24), tiny_config()
    flops = 3 * flops_per_token(student, 512) + flops_per_token(teacher, 512)
    found = speed_figures(student, teacher, 512, torch.device("cpu"), None, 1000.0)
    assert found["model_tflops"] == pytest.approx(1e-9 * flops) and "mfu" not in found
    assert 0.05 < found["memory_gib"] < 100
    half = speed_figures(student, teacher, 512, torch.device("cpu"), 2e-9 * flops, 1000.0)
    assert half["mfu"] == pytest.approx(0.5)
    record = {"step": 1, "loss": 1.5, "tokens_per_second": 1000.0, **found}
    assert note_of(record).startswith("loss 1.500  1,000 tokens/s  ") and "TFLOP/s" in note_of(record)
    assert "50.0% of peak" in note_of(record | {"mfu": 0.5})
    assert note_of({key: value for key, value in record.items() if key != "loss"}).startswith("skipped")


@pytest.mark.slow
def test_offline_logs(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder beside the weights that is no part of what the folder is taken for; none is made where it is off."""
    words = [f"teacher={workshop / 'model'}", f"student={workshop / 'model'}", f"data={workshop / 'text'}"]
    words += [
        "distill.train.steps=2",
        "distill.seq_len=32",
        "distill.batch=2",
        "distill.evaluate_tokens=64",
        "device=cpu",
    ]
    environment = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    for mode in ("off", "offline"):
        command = [
            sys.executable,
            "-m",
            "limbeck.scripts.distill",
            *words,
            f"output={tmp_path / mode}",
            f"wandb={mode}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
        assert done.returncode == 0 and "wandb stopped" not in done.stdout, done.stderr[-3000:]
    logs = list((tmp_path / "offline" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(logs) == 1 and logs[0].stat().st_size > 500 and not (tmp_path / "off" / "wandb").exists()
    assert fingerprint_of(tmp_path / "off") == fingerprint_of(tmp_path / "offline")
    code, _, err = limbeck("distill", *words, f"output={tmp_path / 'no'}", "wandb=on")
    assert code == 2 and "wandb is 'on'; known: off, offline, online" in err


def test_a_student_handed_on_between_stages(tmp_path: Path) -> None:
    """What a stage leaves, here a moving average, is where the next one begins; earlier states go."""
    how = options(steps=3, ema_decay=0.5)
    student, places = prepare(model_of(1)), [tmp_path / "1", tmp_path / "2"]
    train(student, teach(), batches_from, how, places[0])
    expected = load_file(states(places[0])[-1] / "average.safetensors")
    hand_on(student, places, 0, how)
    assert all(torch.equal(expected[name], value) for name, value in weights(student.model).items())
    train(student, teach(), batches_from, how, places[1])
    assert states(places[0])
    hand_on(student, places, 1, how)
    assert not states(places[0]) and states(places[1])
