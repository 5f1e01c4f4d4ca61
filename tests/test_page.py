"""The page in a real browser, at a desk and on a phone: nothing complains, overflows, or asks the network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from limbeck.distill.report import write_page
from limbeck.tests.browser import Browser, browser, find_browser
from limbeck.tests.page_content import fit, page_content

PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium on the PATH; install one, or name it in LIMBECK_BROWSER"
)
# Elements that reach beyond the window, unless something around them scrolls or is drawn at its own size.
OVERFLOW = """[...document.querySelectorAll('body *')].filter(element => {
    const box = element.getBoundingClientRect();
    return (box.right > innerWidth + 1 || box.left < -1) && !element.closest('.table, .wide, pre, svg');
}).map(element => element.tagName + '.' + element.className)"""
CLIPPED = """[...document.querySelectorAll('.card b, .card span, h1, h2, h3, p')].filter(element =>
    element.scrollWidth > element.clientWidth + 1).map(element => element.textContent)"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with browser(PROGRAM, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    content = page_content(folder)
    content["memory"] = {name: fit(1.0) for name in ("teacher", "pruned", "distilled")}
    return write_page(folder, "gap.html", **content)


@pytest.mark.parametrize("scheme", ("light", "dark"))
@pytest.mark.parametrize("width", (1280, 390))
def test_it_stands_alone_and_fits(width: int, scheme: str, page: Path, chromium: Browser) -> None:
    chromium.show(page, width, scheme=scheme)
    assert chromium.evaluate("innerWidth") == width
    chromium.evaluate("document.querySelectorAll('details').forEach(found => found.open = true)")
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    assert chromium.evaluate(OVERFLOW) == [] and chromium.evaluate(CLIPPED) == []
    sizes = chromium.evaluate("[...document.querySelectorAll('svg')].map(found => found.getBoundingClientRect().width)")
    assert len(sizes) > 10 and min(sizes) > width / 4
    paper = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(244, 246, 248)") is (scheme == "light")
    assert chromium.complaints() == [] and chromium.requests() == [page.as_uri()]
    assert chromium.screenshot().startswith(b"\x89PNG")


def test_it_prints(page: Path, chromium: Browser) -> None:
    """On paper of A4 between margins nothing is beyond the edge, tables included."""
    chromium.show(page, 680)
    chromium.ask("Emulation.setEmulatedMedia", media="print")
    beyond = "[...document.querySelectorAll('.table table')].filter(t => t.getBoundingClientRect().right > innerWidth)"
    assert chromium.evaluate(f"{beyond}.map(table => table.textContent.slice(0, 80))") == []
    assert chromium.pdf().startswith(b"%PDF")
    chromium.ask("Emulation.setEmulatedMedia", media="")


def test_what_is_wrong_is_seen(tmp_path: Path, chromium: Browser) -> None:
    """The checks above find a page that overflows, complains, and asks for a picture."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<body><div style='width:2000px'>wide</div><img src='https://example.invalid/a.png'><script>console.error('no');"
        "null.x</script>"
    )
    chromium.show(bad, 390)
    assert "DIV." in chromium.evaluate(OVERFLOW) and chromium.evaluate("document.documentElement.scrollWidth") >= 2000
    assert "https://example.invalid/a.png" in chromium.requests()
    said = " ".join(chromium.complaints())
    assert "console.error: ['no']" in said and "Uncaught" in said
