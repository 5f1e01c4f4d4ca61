"""benchmarks/prose.py: the text of a book's pages out of a .deb file."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from limbeck.benchmarks import prose
from limbeck.models.errors import InputError

PAGE = """<html><head><title>no</title></head><body><div id="banner"><a href="x">no</a></div>
<ul class="docnav"><li>no</li></ul>
<h2>1.1. Title</h2><p>Two  words &amp;<br/> more<img src="x"/></p>
<pre class="screen">no <em>no</em></pre><p>Last</p></body>"""


def package(folder: Path, name: str) -> Path:
    tree = io.BytesIO()
    with tarfile.open(fileobj=tree, mode="w:xz") as tar:
        for page in (name, "./usr/share/doc/x/html/de-DE/other.html"):
            entry = tarfile.TarInfo(page)
            entry.size = len(PAGE)
            tar.addfile(entry, io.BytesIO(PAGE.encode()))
    path = folder / "x.deb"
    with path.open("wb") as stream:
        stream.write(b"!<arch>\n")
        for member, data in (("debian-binary", b"2.0"), ("data.tar.xz", tree.getvalue())):
            stream.write(f"{member:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode())
            stream.write(data + b"\n" * (len(data) % 2))
    return path


def test_pages_without_navigation_and_listings(tmp_path: Path) -> None:
    found = dict(prose.pages(package(tmp_path, "./usr/share/doc/x/html/en-US/a.html")))
    assert found == {"a": "1.1. Title\nTwo words & more\nLast\n"}


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"x is no \.deb file"):
        list(prose.pages(tmp_path / "x"))
