"""`limbeck bench`: what is measured, what is estimated, and the published comparison by the roofline alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from limbeck.models.cards import card_named, profile
from limbeck.models.cost.hardware import Hardware
from limbeck.models.cost.speed import Load, Speed, predicted, roofline
from limbeck.models.cost.timing import measure
from limbeck.models.errors import InputError
from limbeck.scripts import bench
from limbeck.scripts.run.resolve import model_config
from limbeck.tests.helpers import limbeck, random_model, tiny_config

A10G = Hardware("a10g", 22.49, 22.06, 600, 70)


def test_tokens_per_second_by_hand() -> None:
    # Two prompts of half a second one after the other, then ten steps of 0.1 s: 20 tokens in 2 s.
    assert Speed(0.5, 0.1).tokens_per_second(Load(100, 10, 2)) == pytest.approx(10)


def test_a_roofline_by_hand() -> None:
    """Decoding reads all weights but the embedding, and the state twice; by bandwidth alone."""
    config = model_config("nemotron-nano-9b-v2")
    limit = roofline(config, A10G, Load(8192, 2, 1), torch.bfloat16, torch.float32)
    assert limit is not None
    weights = 2 * (8_888_227_328 - 131072 * 4480)
    state = 27 * (128 * 80 * 128 * 4 + (128 * 80 + 2 * 8 * 128) * 3 * 2)
    keys = 8193 * 4 * 2 * 8 * 128 * 2
    assert limit.step_seconds == pytest.approx((weights + 2 * state + keys) / 600e9, rel=1e-9)
    assert roofline(config, Hardware("none", 1, 1, 0, 0), Load(1, 1, 1), torch.bfloat16, torch.float32) is None


def test_a_prediction_keeps_the_share_of_the_roofline() -> None:
    found = predicted(Speed(2.0, 0.3), Speed(1.0, 0.1), Speed(4.0, 0.5))
    assert (found.first_token_seconds, found.step_seconds) == pytest.approx((8.0, 1.5))


@pytest.mark.slow
def test_the_published_ratios_by_the_roofline() -> None:
    """arXiv 2508.14444: 3.3 times Qwen3-8B's tokens at 1k/8k and 6.3 times at 8k/16k, each at its largest batch on an
    A10G. The estimate is of the same kind, and no measurement."""
    code, out, err = limbeck("bench", "model=nemotron-nano-9b-v2", "against=qwen3-8b", "batch=fit", "measure=false")
    assert code == 0, err
    found = [float(line.split("writes ")[1].split()[0]) for line in out.splitlines() if "times the tokens" in line]
    assert len(found) == 4 and 2.5 < found[0] < 4 and 5 < found[2] < 7.5
    assert "Not measured" in out and "Measured" not in out.replace("Not measured", "")


def test_two_models_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "this_cpu", lambda: Hardware("this CPU", 0, 0, 20, 0.1))
    quick = ("lengths=[9/7,4/2]", "rounds=1", "steps=2", "prefill_chunk=4", "batch=2", f"output={tmp_path / 'out'}")
    code, out, err = limbeck("bench", "model=zoo", "against=zoo-small", *quick)
    assert code == 0, err
    content = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [(row["model"], row["input_tokens"]) for row in content["rows"]] == [
        ("zoo", 9), ("zoo-small", 9), ("zoo", 4), ("zoo-small", 4)
    ]  # fmt: skip
    for row in content["rows"]:
        assert row["batch"] == 2 and all(
            row[kind]["tokens_per_second"] > 0 for kind in ("measured", "limit", "estimate")
        )
    assert content["dtype"] == "float32" and content["measured_on"]["name"] == "this CPU"
    assert out.count("times the tokens of zoo-small here") == 2 and "On a10g" in out
    code, _, err = limbeck("bench", "model=zoo", *quick)
    assert code == 2 and "exists already" in err


@pytest.mark.parametrize(
    "arguments,says",
    (
        (["batch=0"], "at least 1"),
        (["batch=few"], "batch is 'few'"),
        (["lengths=[5]"], "INPUT/OUTPUT"),
        (["lengths=[0/5]"], "at least 1"),
        (["lengths=[8k/1k]"], "maximum is 8192"),
        (["hardware=a11g"], "a10g"),
        (["here=a11g"], "a10g"),
        (["batch=fit", "hardware=custom", "hardware.usable_gib=0.1"], "not one sequence"),
        (["against=nothing"], "nothing"),
        (["rounds=0"], "at least 1"),
        (["against=zoo"], "the model itself"),
        (["lengths=[]"], "give one pair at least"),
        (["lengths=[8k/1k]", "measure=false"], "maximum is 8192"),
        (["here=a11g", "measure=false"], "a10g"),
    ),
)
def test_wrong_input(arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "this_cpu", lambda: Hardware("this CPU", 0, 0, 20, 0.1))
    code, _, err = limbeck("bench", "model=zoo", "rounds=1", *arguments)
    assert code == 2 and says in err and err.count("\n") == 1, err


def test_lengths_are_checked_before_one_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measured_speeds", lambda *given: pytest.fail("measured"))
    code, _, err = limbeck("bench", "model=zoo", "lengths=[16/4,8k/1k]", "here=h100")
    assert code == 2 and "maximum is 8192" in err, err


@pytest.mark.parametrize(
    ("device", "name"),
    (
        ("NVIDIA A10G", "a10g"), ("NVIDIA L4", "l4"), ("NVIDIA L40S", "l40s"), ("NVIDIA L40", None),
        ("NVIDIA T400", None),
        ("Tesla T4", "t4"), ("NVIDIA A100-SXM4-80GB", "a100-80g"), ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA A100 80GB PCIe", None), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None), ("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"), ("NVIDIA GeForce RTX 5090 Laptop GPU", None), ("NVIDIA B200", "b200"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None), ("GRID T4-8Q", None),
        ("NVIDIA L4-12Q", None), ("NVIDIA A10G-24Q", None), ("NVIDIA H100 SXM5 64GB", None),
        ("NVIDIA H100 96GB HBM3", None), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA H200 141GB HBM3e", "h200"), ("NVIDIA T4G", None),
    ),
)  # fmt: skip
def test_a_card_is_known_by_its_own_name_alone(device: str, name: str | None) -> None:
    found = card_named(device)
    assert found == (None if name is None else profile(name))


def test_the_batch_that_fits_a_card_is_that_in_its_dtypes() -> None:
    """In bfloat16 there, whatever this machine measures in, with the prefill's own chunks."""
    profile_of = {"hardware=custom", "hardware.usable_gib=2"}
    sizes = []
    for more in (["measure=false"], ["measure=false", "dtype=bfloat16"], ["measure=false", "dtype=float32"]):
        code, out, err = limbeck("bench", "model=zoo-small", "batch=fit", "lengths=[64/64]", *profile_of, *more)
        assert code == 0, err
        sizes.append(out)
    assert sizes[0] == sizes[1] != sizes[2]


def test_quantised_weights_count_as_the_files_have_them(tmp_path: Path) -> None:
    """Where nothing is measured: a step reads fewer bytes, and more sequences fit."""
    rounded = tmp_path / "rounded"
    code, _, err = limbeck("export", "model=zoo", "format=w4a16", f"output={rounded}", "device=cpu")
    assert code == 0, err
    profile_of = ("hardware=l4", "hardware.usable_gib=2", "hardware.total_gib=2")
    words = ("bench", "model=zoo", f"against={rounded}", "measure=false", *profile_of)
    found = []
    for batch in ("1", "fit"):
        out = tmp_path / f"bench-{batch}"
        code, _, err = limbeck(*words, "lengths=[64/64]", f"batch={batch}", f"output={out}")
        assert code == 0, err
        found.append(json.loads((out / "bench.json").read_text())["rows"])
    (plain, small), (_, more) = found[0], found[1]
    assert small["estimate"]["step_seconds"] < 0.9 * plain["estimate"]["step_seconds"]
    assert more["batch"] > found[1][0]["batch"]


def test_weights_beyond_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "this_cpu", lambda: Hardware("this CPU", 0, 0, 20, 0.1))
    monkeypatch.setattr(bench, "free_memory", lambda device: 2**30)
    code, _, err = limbeck("bench", "model=nemotron-nano-9b-v2", "lengths=[4/2]")
    assert code == 2 and "measure=false" in err


def test_measuring_does_all_that_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts calls: prompts are read in chunks, steps are spread over a long output."""
    model = random_model(tiny_config(max_position_embeddings=600), dtype=torch.float32)
    chunks: list[int] = []
    hidden = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda ids, **k: chunks.append(ids.shape[1]) or hidden(ids, **k))
    speed = measure(model, Load(10, 500, 3), prefill_chunk=4, steps=2)
    assert chunks == [4, 4, 4, 2] and 0 < speed.step_seconds < 1 and 0 < speed.first_token_seconds < 1
    with pytest.raises(InputError, match="maximum is 600"):
        measure(model, Load(500, 101, 1))
