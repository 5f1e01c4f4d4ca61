"""What the documents name is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_how_it_works_names_what_exists() -> None:
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    files = set(re.findall(r"`((?:models|kernels|prune|distill|scripts)/\w+\.py)`", text))
    assert len(files) >= 15
    assert not [name for name in files if not (ROOT / name).is_file()]
    sources = "".join((ROOT / name).read_text() for name in files)
    named = set(re.findall(r"`(\w+)` (?:and `(\w+)` )?in `", text))
    functions = {name for pair in named for name in pair if name}
    assert {"score_widths", "score_layers", "linear_kl", "channel_scores"} <= functions
    assert not [name for name in functions if f"def {name}(" not in sources]
    for target in re.findall(r"\]\((\w[\w./-]*)\)", text):
        assert (ROOT / "docs" / target).is_file(), target
