"""Imported by a script of this folder that is run as a file: the checkout that it lies in, whatever its folder is
called and whatever is installed, is the package `limbeck`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != HERE]  # its names shadow other packages'
if "limbeck" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "limbeck", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["limbeck"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["limbeck"])
