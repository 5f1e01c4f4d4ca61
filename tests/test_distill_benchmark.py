"""benchmarks/distill.py at a size of seconds: both sides compute the same loss, and its parts are all of a step."""

from __future__ import annotations

import pytest
from limbeck.benchmarks.distill import PARTS, Setting, compare, models, three_steps
from limbeck.benchmarks.live_bytes import LiveBytes
from limbeck.models.cost.parameters import count_parameters

pytest.importorskip("transformers")


def test_smoke() -> None:
    found = compare(Setting(1, 32, 97), rounds=1, steps=1)
    assert found["loss_error"] <= 1e-4
    assert set(found["shares"]) == set(PARTS) and sum(found["shares"].values()) == pytest.approx(1)
    assert min(*found["shares"].values(), *found["tokens_per_second"].values(), found["ratio"]) > 0


def test_tensors_alive_hold_weights_and_moments() -> None:
    """At least the teacher, and the student with its gradients and two moments."""
    setting = Setting(1, 16, 97)
    student, teacher = (count_parameters(model.config) for model in models(setting))
    assert 4 * (teacher + 4 * student) < three_steps("limbeck", setting, LiveBytes()) < 8 * (teacher + 4 * student)
