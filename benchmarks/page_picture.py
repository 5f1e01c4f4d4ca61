"""The picture of a page that the README shows: its top at a desk in light, and on a phone in dark, beside each other.

    python -m limbeck.benchmarks.page_picture demo-out/report/report.html docs/gap-page.png

Needs Chromium on the PATH, or named in LIMBECK_BROWSER.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from limbeck.tests.browser import browser, find_browser
from PIL import Image

HEIGHT, GAP = 1280, 24  # pixels
SHOTS = ((1280, "light"), (390, "dark"))


def main() -> None:
    page, picture = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    program = find_browser()
    if program is None:
        sys.exit("no Chromium on the PATH; install one, or name it in LIMBECK_BROWSER")
    images = []
    with tempfile.TemporaryDirectory() as profile, browser(program, Path(profile)) as shown:
        for width, scheme in SHOTS:
            shown.show(page, width, HEIGHT, scheme=scheme)
            images.append(Image.open(io.BytesIO(shown.screenshot(whole=False))).convert("RGB"))
    whole = Image.new(
        "RGB", (sum(image.width for image in images) + GAP, max(image.height for image in images)), "white"
    )
    place = 0
    for image in images:
        whole.paste(image, (place, 0))
        place += image.width + GAP
    whole.save(picture, optimize=True)


if __name__ == "__main__":
    main()
