"""What the documents name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_how_it_works_names_what_exists() -> None:
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    files = set(re.findall(r"`((?:models|kernels|prune|distill|scripts)/\w+\.py)`", text))
    assert len(files) >= 15
    assert not [name for name in files if not (ROOT / name).is_file()]
    sources = "".join((ROOT / name).read_text() for name in files)
    named = set(re.findall(r"`(\w+)` (?:and `(\w+)` )?in `", text))
    functions = {name for pair in named for name in pair if name}
    assert {"score_widths", "score_layers", "linear_kl", "column_scores"} <= functions
    assert not [name for name in functions if f"def {name}(" not in sources]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    """Files, pictures, and headings; what is on the network is left alone."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        place = document.parent / name if name else document
        assert place.exists(), target
        if heading:
            assert heading in headings(place.read_text()), target


def test_the_tables_of_the_experiments_are_in_the_results() -> None:
    results = (ROOT / "docs" / "RESULTS.md").read_text()
    tables = sorted((ROOT / "docs" / "experiments").glob("*/table.md"))
    assert len(tables) == 15
    for table in tables:
        assert table.read_text().strip() in results, table.parent.name
        assert f"(experiments/{table.parent.name}/plots/experiment.svg)" in results, table.parent.name


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def headings(text: str) -> set[str]:
    """Headings as links name them: small letters, no punctuation, hyphens for spaces."""
    found = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}
