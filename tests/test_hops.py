"""How many of our files lie between a command line and its first tensor operation with weights (see hops.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from limbeck.tests.helpers import limbeck
from limbeck.tests.hops import hops

# On the stack at that moment, and entered before it; golden/commands.json has what both were before the house. The goal
# is 3, 3, 3, 4, 4 on the stack, and at most 60% entered (7, 15, 16, 22, 22): a model that is read enters a file of each
# layer kind, and an option, a folder and a JSON file their border's reader, which the goal was not counted for.
LIMITS = {"prune": (3, 17), "score": (3, 45), "generate": (4, 50), "evaluate": (4, 47), "distill": (4, 45)}
TEXT = ["data=stdlib", "seq_len=64", "batch=2", "device=cpu"]
SCORE = ["importance.tokens=128", "importance.depth_tokens=64"]
TRAIN = ["distill.seq_len=64", "distill.batch=2", "distill.evaluate_tokens=128", "distill.train.steps=1"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores and a student; the text is in the cache by then."""
    root = tmp_path_factory.mktemp("hops")
    assert limbeck("score", "model=zoo", *TEXT, *SCORE, f"output={root / 'scores'}")[0] == 0
    words = ["target.hidden_size=224", f"scores={root / 'scores'}", f"output={root / 'pruned'}"]
    assert limbeck("prune", "model=zoo", *words)[0] == 0
    return root


def words_of(command: str, folders: Path) -> list[str]:
    output, pruned = f"output={folders / command}", folders / "pruned"
    return {
        "prune": ["model=zoo", f"scores={folders / 'scores'}", "target.hidden_size=224", output],
        "score": ["model=zoo", *TEXT, *SCORE, output],
        "generate": ["model=zoo", "prompt=import os", "max_new_tokens=2", "device=cpu"],
        "evaluate": ["teacher=zoo", f"+student.pruned={pruned}", *TEXT, "tokens=256", output],
        "distill": ["teacher=zoo", f"student={pruned}", "data=stdlib", *TRAIN, "device=cpu", output],
    }[command]


@pytest.mark.slow
@pytest.mark.parametrize("command", LIMITS)
def test_files_to_the_first_tensor_operation(command: str, folders: Path) -> None:
    stack, entered = hops([command, *words_of(command, folders)])
    most, before = LIMITS[command]
    assert 0 < len(stack) <= most, stack
    assert 0 < len(entered) <= before, (len(entered), entered)
