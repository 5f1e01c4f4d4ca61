"""How threads wait is decided by what other processes compute, before torch is there, and by nobody who has chosen."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from limbeck.models import threads
from limbeck.models.threads import POLICY, Neighbours, busy_seconds, set_wait_policy


def test_it_waits_passively_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 4)
    found: dict[str, str] = {}
    assert set_wait_policy(1.0, found) and found == {POLICY: "PASSIVE"}
    for busy, environment in (
        (0.2, {}), (1.0, {POLICY: "ACTIVE"}), (1.0, {"GOMP_SPINCOUNT": "5"}), (1.0, {"OMP_NUM_THREADS": "1"}),
        (1.0, {"LOCAL_RANK": "0"}),
    ):  # fmt: skip
        before = dict(environment)
        assert not set_wait_policy(busy, environment) and environment == before


def test_where_torch_is_there_it_comes_too_late() -> None:
    import torch  # noqa: F401

    found: dict[str, str] = {}
    assert not set_wait_policy(1.0, found) and not found


@pytest.mark.skipif(not threads.TIMES.exists(), reason="the system does not say what its processors do")
def test_neighbours_are_what_others_compute() -> None:
    neighbours = Neighbours()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        time.sleep(1.0)
        beside = neighbours.processors()
        other.kill()
    assert beside > 0.3
    mine = Neighbours()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    (busy, own, _), (busy_now, own_now, _) = mine.start, mine.now()
    assert busy is not None and busy_now is not None
    assert mine.processors() >= 0 and busy_now - busy >= 0.5 * (
        own_now - own
    )  # what is counted here has this process's


def test_a_system_that_does_not_say_has_no_neighbours(tmp_path: Path) -> None:
    assert busy_seconds(tmp_path / "none") is None
    (tmp_path / "odd").write_text("cpu what\n")
    assert busy_seconds(tmp_path / "odd") is None
    (tmp_path / "stat").write_text("cpu  100 0 50 900 10 0 0 0 0 0\n")
    found = busy_seconds(tmp_path / "stat")
    assert found is not None and found > 0
