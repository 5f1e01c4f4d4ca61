"""The page in a real browser, at a desk and on a phone: nothing complains, overflows, or asks the network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from limbeck.distill.report.report import write_page
from limbeck.tests.browser import Browser, browser, find_browser
from limbeck.tests.helpers import limbeck, make_workshop
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

# Texts whose contrast with what they stand on (WCAG 2.2's ratio of luminances) is below a bound, with that contrast.
FAINT = """least => {
    const light = colour => colour.slice(0, 3).map(x => x / 255).map(x => x <= .03928 ? x / 12.92 :
        ((x + .055) / 1.055) ** 2.4).reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
    const read = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
    const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3]));
    return [...document.querySelectorAll('body *')].filter(element => !element.closest('style') &&
        [...element.childNodes].some(child => child.nodeType == 3 && child.textContent.trim())).map(element => {
        const chain = [];
        for (let each = element; each; each = each.parentElement) chain.unshift(getComputedStyle(each).backgroundColor);
        const under = chain.map(read).reduce((below, each) => over(each, below), [255, 255, 255]);
        const style = getComputedStyle(element);
        const text = over(read(element instanceof SVGElement ? style.fill : style.color), under);
        const [low, high] = [light(text), light(under)].sort((a, b) => a - b);
        return [element.textContent.trim().slice(0, 40), (high + .05) / (low + .05)];
    }).filter(each => !(each[1] >= least));
}"""


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


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of `limbeck evaluate` itself."""
    root = make_workshop(tmp_path_factory.mktemp("workshop"))
    words = ["evaluate", f"teacher={root / 'model'}", f"+student.same={root / 'model'}", f"data={root / 'text'}"]
    code, _, err = limbeck(*words, f"output={root / 'gap'}", "tokens=512", "seq_len=64", "details.new_tokens=4")
    assert code == 0, err
    return root / "gap" / "gap.html"


def look_at(page: Path, width: int, scheme: str, chromium: Browser) -> None:
    """Shows a page with all that folds open. Nothing overflows, complains, or asks the network."""
    chromium.show(page, width, scheme=scheme)
    assert chromium.evaluate("innerWidth") == width
    chromium.evaluate("document.querySelectorAll('details').forEach(found => found.open = true)")
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    assert chromium.evaluate(OVERFLOW) == [] and chromium.evaluate(CLIPPED) == []
    assert chromium.complaints() == [] and chromium.requests() == [page.as_uri()]


@pytest.mark.parametrize("width", (1280, 390))
def test_a_page_as_the_command_writes_it(width: int, measured: Path, chromium: Browser) -> None:
    look_at(measured, width, "light", chromium)


@pytest.mark.parametrize("scheme", ("light", "dark"))
@pytest.mark.parametrize("width", (1280, 390))
def test_it_stands_alone_and_fits(width: int, scheme: str, page: Path, chromium: Browser) -> None:
    look_at(page, width, scheme, chromium)
    sizes = chromium.evaluate("[...document.querySelectorAll('svg')].map(found => found.getBoundingClientRect().width)")
    assert len(sizes) > 10 and min(sizes) > width / 4
    paper = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(244, 246, 248)") is (scheme == "light")
    # The labels of lines, in the lines' colours, are of the size that 3 is for; all others have 4.5 in light, too.
    assert chromium.evaluate(f"({FAINT})({4.5 if scheme == 'dark' else 3})") == []
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
