"""What a run is told of text and options that do less than they seem to."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from limbeck.distill.text import notes
from limbeck.models.checkpoint import load_config, save_model
from limbeck.scripts.run.resolve import sample
from limbeck.tests.helpers import limbeck, make_workshop, random_model


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_workshop(tmp_path_factory.mktemp("workshop"))
    for file in (root / "text").iterdir():
        file.write_text(file.read_text()[:1500])
    return root


def test_short_text_long_rows_and_a_warm_up_without_an_end(
    workshop: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notes, "SAID", set())
    short = load_config(workshop / "model").replace(max_position_embeddings=24)
    save_model(random_model(short).float(), tmp_path / "model", tokenizer_from=workshop / "words")
    places = [f"data={workshop / 'text'}", "device=cpu"]
    score = ["score", f"model={tmp_path / 'model'}", *places, "seq_len=32", "importance.depth_tokens=64"]
    with caplog.at_level(logging.WARNING, "limbeck"):
        code, _, err = limbeck(*score, f"output={tmp_path / 'scores'}", "importance.tokens=999999")
    assert code == 0, err
    said = [record.getMessage() for record in caplog.records]
    (few,) = [line for line in said if "999,999 that were requested" in line]
    assert "its train split has" in few
    assert len([line for line in said if "rows of 32 tokens are beyond the 24" in line]) == 1
    caplog.clear()
    monkeypatch.setattr(notes, "SAID", set())
    train = [
        "distill.train.steps=2",
        "distill.seq_len=32",
        "distill.batch=2",
        "distill.evaluate_tokens=64",
        "wandb=off",
    ]
    with caplog.at_level(logging.WARNING, "limbeck"):
        code, out, err = limbeck("distill", f"teacher={tmp_path / 'model'}", f"student={tmp_path / 'model'}", *places,
                                 *train, f"output={tmp_path / 'out'}")  # fmt: skip
    assert code == 0, err
    assert "warmup_steps is 20, the run has 2" in out
    said = [record.getMessage() for record in caplog.records]
    assert any("rows of 32 tokens are beyond the 24" in line for line in said) and "requested" not in " ".join(said)


@pytest.mark.slow
def test_a_sample_is_short_only_where_there_are_no_more_rows(
    workshop: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where rows are padded, or a mixture's shares are rounded down."""
    monkeypatch.setattr(notes, "SAID", set())
    (tmp_path / "mix.yaml").write_text(f"sources: [{{path: {workshop / 'text'}}}, {{path: stdlib, include: ['j*']}}]")
    model = workshop / "model"
    for data, tokens, is_short in (
        (str(workshop / "text"), 64, False), (str(workshop / "text"), 10**7, True),
        (str(tmp_path / "mix.yaml"), 97, False),
    ):  # fmt: skip
        caplog.clear()
        sample(data, "train", model, tokens=tokens, seq_len=32, batch=2, seed=0)
        assert any("that were requested" in record.getMessage() for record in caplog.records) is is_short
