"""Exports served by vLLM on a CPU, in an environment of its own: `make test-clients` makes it in .venv/vllm, or
LIMBECK_VLLM names its Python. The same greedy tokens as `limbeck generate` in float32, and the same log-probabilities
of the shipped model's prompts within 1e-4."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models.checkpoint import load_model, save_model
from limbeck.models.named import SHIPPED
from limbeck.tests.client_helpers import TOKENS, greedy_tokens, prompts_of, same_or_tied
from limbeck.tests.gguf_helpers import gguf_config, write_tokenizer
from limbeck.tests.helpers import limbeck, random_model
from limbeck.tests.source_helpers import ROOT
from torch.nn import functional as F

pytestmark = pytest.mark.clients
LENGTH = 256


def vllm_python() -> Path:
    """Skips where there is none that imports vLLM."""
    python = Path(os.environ.get("LIMBECK_VLLM", ROOT / ".venv" / "vllm" / "bin" / "python"))
    if not python.is_file():
        pytest.skip(f"{python} is not there: no environment with vLLM")
    if subprocess.run([python, "-c", "import vllm"], capture_output=True, check=False).returncode:
        pytest.skip(f"{python} does not import vllm")
    return python


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped model as it is exported, and random ones of the dense families."""
    root = tmp_path_factory.mktemp("vllm")
    made = {"zoo": SHIPPED["zoo"]}
    size = write_tokenizer(root / "words", "gpt-2")
    for family in ("llama", "qwen3"):
        sizes = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 512}
        model = random_model(gguf_config(family, size, **sizes), 5, torch.float32)
        save_model(model, root / family, tokenizer_from=root / "words")
        made[family] = root / family
    for name, folder in made.items():
        code, _, err = limbeck("export", f"model={folder}", f"output={root / 'out' / name}", "dtype=bfloat16")
        assert code == 0, err
    return {name: root / "out" / name for name in made}


@torch.no_grad()
def test_vllm_serves_what_limbeck_generates(folders: dict[str, Path], tmp_path: Path) -> None:
    python = vllm_python()
    prompts = {name: prompts_of(folder) for name, folder in folders.items()}
    request = {"tokens": TOKENS, "length": LENGTH, "folders": {str(folders[name]): prompts[name] for name in folders}}
    (tmp_path / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("vllm_answers.py")
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [python, script, tmp_path / "request.json", tmp_path / "answer.json"],
        env=os.environ | settings, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads((tmp_path / "answer.json").read_text())
    for name, folder in folders.items():
        model, found = load_model(folder), answer[str(folder)]
        for prompt, ours, theirs in zip(prompts[name], greedy_tokens(model, prompts[name]), found, strict=True):
            same_or_tied(model, prompt, ours, theirs["tokens"])
            logprobs = F.log_softmax(model(torch.tensor([prompt]))[0], -1)
            own = logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
            far = (own - torch.tensor(theirs["logprobs"])).abs().max().item()
            # Random weights give logits of several tens, and float32 as many times the error.
            assert far < 1e-4 * (1 if name == "zoo" else logprobs.abs().max().item()), (name, far)
