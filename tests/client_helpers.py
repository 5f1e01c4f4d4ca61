"""What the tests of several clients share: prompts, our greedy tokens, and what counts as the same."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models.generate.engine import Engine, Request
from limbeck.models.generate.sampling import Sampling
from limbeck.models.tokenizer import load_tokenizer
from limbeck.tests.source_helpers import ROOT

TOKENS = 48


def prompt_texts() -> list[str]:
    """Twenty prompts of torch's source."""
    text = Path(torch.__file__).with_name("functional.py").read_text()
    return [text[start : start + 120] for start in range(3000, 43000, 2000)]


def prompts_of(source: Path) -> list[list[int]]:
    """These prompts in a folder's tokens, as `limbeck generate` reads them."""
    return [*map(load_tokenizer(source).prompt, prompt_texts())]


def greedy_tokens(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    longest = max(map(len, prompts)) + TOKENS
    engine = Engine(model, max_length=longest, slots=len(prompts), prepare=False)
    requests = [Request(prompt, TOKENS, Sampling(0.0), stop_tokens=()) for prompt in prompts]
    return [list(each.tokens) for each in engine.complete(requests)]


def same_or_tied(model: Any, prompt: list[int], ours: list[int], theirs: list[int]) -> None:
    """The same tokens; or, where they first differ, two logits that are as good as equal."""
    first = next((place for place, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
    if first is not None:
        logits = model(torch.tensor([prompt + ours[:first]]))[0, -1]
        gap = (logits[ours[first]] - logits[theirs[first]]).abs().item()
        assert gap <= 1e-4 * logits.abs().max().item(), (first, gap)


def client_python(variable: str, folder: str, module: str) -> Path:
    """The Python of an environment apart, which the variable names, or in .venv/`folder`; skips where there is none
    that imports the module."""
    python = Path(os.environ.get(variable, ROOT / ".venv" / folder / "bin" / "python"))
    if not python.is_file():
        pytest.skip(f"{python} is not there: no environment with {module}")
    if subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode:
        pytest.skip(f"{python} does not import {module}")
    return python
