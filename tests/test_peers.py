"""Pruning beside peers: equal sizes, one measure, and cells that are not made twice."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.benchmarks import peers, pruning_peers
from limbeck.models.checkpoint import load_config, load_model, save_model
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.errors import InputError
from limbeck.models.named import SHIPPED
from limbeck.tests.helpers import dense_config, random_model
from torch.nn import functional as F

ZOO = SHIPPED["zoo"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    config = dense_config(0, "llama").replace(
        pattern="*-" * 5, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=load_config(ZOO).vocab_size, tie_word_embeddings=True,
    )  # fmt: skip
    save_model(random_model(config, dtype=torch.float32), folder / "model", tokenizer_from=ZOO)
    (folder / "text").mkdir()
    for number in range(30):
        words = " ".join(f"word{(number * 7 + place) % 23}" for place in range(200))
        (folder / "text" / f"{number}.txt").write_text(words)
    return folder


def bench(folder: Path, out: Path) -> peers.PeerBench:
    sizes = (32, 2, 128, 128, 96)
    return peers.PeerBench(peers.PeerSetting(folder / "model", str(folder / "text"), *sizes, (1e-3, 1e-2)), out)


def test_every_method_is_cut_to_the_share(llama: Path, tmp_path: Path) -> None:
    whole = count_parameters(load_config(llama / "model"))
    work = bench(llama, tmp_path)
    for name, repair in peers.OURS.items():
        if not repair.local_steps:
            assert 0.895 * whole < peers.ours(repair)(work, 0.9, 0).parameters < 0.902 * whole, name
    gone = peers.blocks_to_remove(work, 0.9)
    short = peers.shortgpt(work, 0.9, 0)
    assert short.module.config.num_layers == 2 * (5 - gone) and short.parameters <= 0.9 * whole
    with pytest.raises(InputError, match="no number of blocks"):
        peers.blocks_to_remove(work, 0.01)
    assert pruning_peers.narrowest(lambda size: 10 * size, 55, range(1, 9)) == 5


def test_the_loss_is_of_the_rows_as_transformers_reads_them(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    work = bench(llama, tmp_path)
    theirs = peers.Cut(work.theirs(), 0)
    assert pruning_peers.parameters_of(theirs.module) == count_parameters(work.model.config)
    theirs.module.lm_head.weight = torch.nn.Parameter(theirs.module.lm_head.weight.clone())
    assert pruning_peers.parameters_of(theirs.module) == count_parameters(work.model.config)
    assert work.loss(theirs) == pytest.approx(work.base(), rel=1e-5)
    (batch, *_) = work.rows("test", 128, 0)
    assert not batch.seq_idx.any()
    with torch.no_grad():
        logits = load_model(llama / "model")(batch.input_ids)
    found = peers.cross_entropy(logits, batch.labels)
    assert float(found) == pytest.approx(float(F.cross_entropy(logits.transpose(1, 2), batch.labels)), rel=1e-6)


@pytest.mark.slow
def test_the_command_measures_and_goes_on(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before and after training, the better of the rates; a second run makes no cell anew."""
    words = ["peers", str(tmp_path / "out"), "--model", str(llama / "model"), "--data", str(llama / "text")]
    words += ["--shares", "0.8", "--seeds", "0,1", "--tokens", "96", "--rates", "0.001,0.01", "--seq-len", "32"]
    words += ["--batch", "2", "--calibration-tokens", "128", "--held-out-tokens", "128"]
    words += ["--methods", f"limbeck, plain;{peers.SHORTGPT}"]
    monkeypatch.setattr(sys, "argv", words)
    peers.main()
    first = capsys.readouterr().out
    rows = [line for line in first.splitlines() if line.startswith(("| limbeck", "| ShortGPT"))]
    assert len(rows) == 2 and all(len(row.split("|")) == 6 for row in rows)
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 1 + 2 * 2 * 3

    def never(*_: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(peers.PeerBench, "loss", never)
    peers.main()
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")] == [
        line for line in first.splitlines() if line.startswith("| ")
    ]
    monkeypatch.setattr(sys, "argv", [*words, "--methods", "FLAP (FFN)"])
    with pytest.raises(SystemExit):
        peers.main()
