"""English prose for the benchmarks that compare texts: the pages of the Debian handbook, a .txt file each.

    apt-get download debian-handbook
    python -m limbeck.benchmarks.prose debian-handbook_*_all.deb FOLDER

The book is Raphaël Hertzog's and Roland Mas's (GPL-2+ or CC-BY-SA-3.0). A page is what lies between its HTML's tags
(paragraphs, headings, lists and tables, a line each), without navigation and without listings, which are no prose.
FOLDER is what data= takes.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

from limbeck.models.errors import InputError
from limbeck.models.folder import atomic_folder

PAGES = "html/en-US"
APART = {"head", "script", "style", "pre", "docnav", "toc", "banner"}  # tags, classes and an id
LINES = {"p", "li", "dt", "dd", "td", "th", "h1", "h2", "h3", "h4", "h5", "h6", "div", "tr"}
VOID = {"br", "img", "hr", "meta", "link", "input", "col"}
HEADER = 60  # bytes of a member's header in an ar archive
LEAST = 500  # characters of a page that has more than titles


class PageText(HTMLParser):
    """The text of a page, a line for every paragraph."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[list[str]] = [[]]
        self.open: list[tuple[str, bool]] = []  # tags that are open, and whether what is in them is left out

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            return
        own = dict(attrs)
        names = {tag, own.get("id"), *(own.get("class") or "").split()}
        left_out = bool(self.open and self.open[-1][1]) or not APART.isdisjoint(names)
        self.open.append((tag, left_out))
        if tag in LINES:
            self.lines.append([])

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID and any(name == tag for name, _ in self.open):
            while self.open.pop()[0] != tag:
                pass
        if tag in LINES:
            self.lines.append([])

    def handle_data(self, data: str) -> None:
        if not (self.open and self.open[-1][1]):
            self.lines[-1].append(data)

    def text(self) -> str:
        lines = (" ".join("".join(parts).split()) for parts in self.lines)
        return "\n".join(line for line in lines if line) + "\n"


def pages(package: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each English page of a .deb file. Raises InputError."""
    for member, content in archive_members(package.read_bytes(), package):
        if member.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content)) as tree:
                for entry in tree:
                    name = PurePosixPath(entry.name)
                    stream = tree.extractfile(entry) if name.match(f"{PAGES}/*.html") and entry.isfile() else None
                    if stream is not None:
                        reader = PageText()
                        reader.feed(stream.read().decode())
                        reader.close()
                        yield name.stem, reader.text()


def archive_members(data: bytes, package: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of an ar archive, which a .deb file is. Raises InputError."""
    if not data.startswith(b"!<arch>\n"):
        raise InputError(f"{package} is no .deb file; apt-get download debian-handbook fetches one")
    place = 8
    while place + HEADER <= len(data):
        header = data[place : place + HEADER]
        size = int(header[48:58])
        yield header[:16].decode().rstrip(" /"), data[place + HEADER : place + HEADER + size]
        place += HEADER + size + size % 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("package", type=Path, help="debian-handbook_*_all.deb")
    parser.add_argument("folder", type=Path, help="made; data= takes it")
    options = parser.parse_args()
    with atomic_folder(options.folder) as folder:
        found = {name: text for name, text in pages(options.package) if len(text) >= LEAST}
        if not found:
            raise InputError(f"{options.package} has no pages in {PAGES}; expected the package debian-handbook")
        for name, text in sorted(found.items()):
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    print(f"{len(found)} pages, {sum(map(len, found.values())):,} characters")


if __name__ == "__main__":
    main()
