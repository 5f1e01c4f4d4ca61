"""Where a figure was measured: hardware, versions and commit, to be printed beside it."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """Hardware, versions and the commit of the checkout (with '+changes' where the tree is not clean)."""
    facts: dict[str, Any] = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "python": platform.python_version()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    for package in ("torch", "triton", "transformers"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts["commit"] = commit()
    return facts


@functools.cache
def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def commit() -> str:
    """The commit of the checkout that this file lies in. Where it lies in none, or is installed in another one:
    $LIMBECK_COMMIT, else "unknown"."""
    given = os.environ.get("LIMBECK_COMMIT") or "unknown"
    home = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(home)]
    try:
        top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True)
        if Path(top.stdout.strip()).resolve() != home:
            return given
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return given
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
