"""Figures recorded before code was moved: tensors, bytes, scores, weights and texts are still the same.

Recorded by `python -m limbeck.tests.golden_chain tests/golden`; tolerances stand in golden_figures.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from limbeck.models.config import HybridConfig
from limbeck.tests import golden_chain
from limbeck.tests import golden_figures as figures

CONFIGS = figures.recorded("configs")["configs"]
QUICK = ("drawn 1", "nemotron-nano-9b-v2", "qwen3-8b", "smollm2-135m")  # the others run with those that are slow
GOLDEN = figures.recorded("zoo")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[golden_chain.Chain]:
    with figures.settled():
        yield golden_chain.Chain.run(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def zoo(chain: golden_chain.Chain) -> dict[str, Any]:
    return golden_chain.zoo_figures(chain)


@pytest.fixture(scope="module")
def same_machine() -> bool:
    """Whether bits that depend on the processor have to be equal."""
    return GOLDEN["machine"] == figures.machine()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CONFIGS],
)
def test_configs(name: str) -> None:
    """Formulas to the byte; what comes and goes within TRANSIENT_TOLERANCE."""
    golden = CONFIGS[name]
    config = HybridConfig.from_hf(golden["config"])
    assert config.to_hf() == golden["config"]
    found = figures.figures_of(name, config)
    for key in ("parameters", "tensors", "table", "names", "vllm"):
        assert found.get(key) == golden.get(key), key
    near = figures.TRANSIENT_TOLERANCE
    assert found["memory"].keys() == golden["memory"].keys()
    for label, (exact, passing) in golden["memory"].items():
        assert found["memory"][label][0] == exact, label
        assert figures.bytes_near(found["memory"][label][1], passing), (label, found["memory"][label][1], passing)
    assert found["training"].keys() == golden["training"].keys()
    for label, (fullest, standing, exact, passing, total) in golden["training"].items():
        now = found["training"][label]
        assert now[1] == standing and figures.near(now[4], total, near), (label, now)
        if now[0] == fullest:  # else two moments are as full as each other
            assert now[2] == exact and figures.bytes_near(now[3], passing), (label, now)
    assert found.get("simulation", {}).keys() == golden.get("simulation", {}).keys()
    for label, peak in golden.get("simulation", {}).items():
        assert figures.near(found["simulation"][label], peak, near), (label, found["simulation"][label], peak)


def test_text_is_the_recorded_one(zoo: dict[str, Any]) -> None:
    assert zoo["text"] == GOLDEN["text"]


@pytest.mark.parametrize("name", GOLDEN["scores"])
def test_scores(name: str, zoo: dict[str, Any]) -> None:
    found, golden = zoo["scores"][name], GOLDEN["scores"][name]
    assert (found["order"], found["metric"]) == (golden["order"], golden["metric"])
    assert figures.all_near(found["values"], golden["values"], figures.SCORE_TOLERANCE)
    assert found["widths"].keys() >= golden["widths"].keys()  # later there were more axes
    for axis, expected in golden["widths"].items():
        now = found["widths"][axis]
        assert figures.same_fingerprint(now[:3], expected[:3], figures.SCORE_TOLERANCE), axis
        assert figures.all_near(now[3:], expected[3:], figures.SCORE_TOLERANCE), axis


@pytest.mark.parametrize("name", GOLDEN["kept"])
def test_selections(name: str, zoo: dict[str, Any]) -> None:
    assert zoo["kept"][name] == GOLDEN["kept"][name]


@pytest.mark.parametrize("name", GOLDEN["weights"])
def test_weights(name: str, zoo: dict[str, Any], same_machine: bool) -> None:
    """Slices are the same bits everywhere; what was repaired or trained is on the machine of the recording, and else
    by fingerprints (of rotated tensors by norms, since a direction has no sign of its own)."""
    found, golden = zoo["weights"][name], GOLDEN["weights"][name]
    if same_machine or name in GOLDEN["exact_weights"]:
        assert found["sha256"] == golden["sha256"]
    assert found["tensors"].keys() == golden["tensors"].keys()
    norm_only = "repaired" in name
    for tensor, expected in golden["tensors"].items():
        now = found["tensors"][tensor]
        assert figures.same_fingerprint(now, expected, figures.FIGURE_TOLERANCE, norm_only), (tensor, now, expected)
    if norm_only:
        # A rotation cuts along directions of nearly equal weight as the processor rounds: from an AMD to an Intel the
        # sum (600 times the norm) moved by 1e-4 of itself, the product by 1.4e-3 of the norm.
        (total, norm, product), expected = found["logits"], golden["logits"]
        assert figures.all_near((total, norm), expected[:2], figures.FIGURE_TOLERANCE)
        assert figures.near(product, expected[2], 5 * figures.FIGURE_TOLERANCE, expected[1])
    else:
        assert figures.same_fingerprint(found["logits"], golden["logits"], figures.FIGURE_TOLERANCE)


def test_training(zoo: dict[str, Any]) -> None:
    assert len(zoo["training"]) == len(GOLDEN["training"])
    for found, golden in zip(zoo["training"], GOLDEN["training"], strict=True):
        assert found.keys() == golden.keys()
        for key, expected in golden.items():
            if key == "validation_agreement":  # a token more or less
                assert abs(found[key] - expected) <= 0.01
            else:
                assert figures.near(found[key], expected, figures.FIGURE_TOLERANCE), (key, found[key], expected)


def test_gap(zoo: dict[str, Any]) -> None:
    """Shares of tokens may differ by a few tokens, and ranks by as little."""
    found, golden = zoo["gap"], GOLDEN["gap"]
    for key in ("tokens", "text_bytes", "documents", "parameters"):
        assert found[key] == golden[key], key
    assert found["models"].keys() == golden["models"].keys()
    for name, expected in golden["models"].items():
        assert found["models"][name].keys() == expected.keys()
        for key, numbers in expected.items():
            counted = key in ("agreement", "top5_agreement", "mean_rank")
            near = 5 * figures.FIGURE_TOLERANCE if counted else figures.FIGURE_TOLERANCE
            assert figures.all_near(found["models"][name][key], numbers, near), (name, key, numbers)
    assert figures.all_near(found["recovery"], golden["recovery"], 5 * figures.FIGURE_TOLERANCE)


@pytest.mark.parametrize("name", GOLDEN["generated"])
def test_generated_texts(name: str, zoo: dict[str, Any], same_machine: bool) -> None:
    """The same words, on another processor as far as no two tokens are about as likely."""
    for found, golden in zip(zoo["generated"][name], GOLDEN["generated"][name], strict=True):
        assert found["prompt"] == golden["prompt"]
        if same_machine or golden["sure"] == len(golden["text"]):
            assert (found["text"], found["finished"]) == (golden["text"], golden["finished"])
        else:
            assert found["text"][: golden["sure"]] == golden["text"][: golden["sure"]]
