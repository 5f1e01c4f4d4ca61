"""Exports served by vLLM on a CPU, in an environment of its own: `make test-clients` makes it in .venv/vllm, or
LIMBECK_VLLM names its Python. The same greedy tokens as `limbeck generate` in float32, and the same log-probabilities
of the shipped model's prompts within 1e-4; and what vLLM's own code makes of the cache is what memory-fit says."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models.checkpoint import load_model, save_model
from limbeck.models.config import HybridConfig
from limbeck.models.cost.inference import memory
from limbeck.models.cost.parameters import count_parameters, kind_sizes, weight_bytes
from limbeck.models.cost.ranks import rank_config, rank_counts
from limbeck.models.cost.vllm import MODES
from limbeck.models.device import torch_dtype
from limbeck.models.hybrid import HybridLM
from limbeck.models.named import SHIPPED, model_config, names
from limbeck.models.quantise import ROUNDINGS
from limbeck.tests.client_helpers import TOKENS, client_python, greedy_tokens, prompt_texts, prompts_of, same_or_tied
from limbeck.tests.gguf_helpers import gguf_config, write_tokenizer
from limbeck.tests.helpers import limbeck, random_model
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.clients
LENGTH = 256
SIZED = names("model")
RANKS = {name: [count for count in rank_counts(model_config(name)) if 1 < count <= 8] for name in SIZED}
LOADS = tuple(
    {"context": context, "ssm_dtype": dtype, "mode": mode}
    for context in (8192, 131072)
    for dtype in ("float32", "bfloat16")
    for mode in MODES
)
HEADROOM = 10 * 2**30 + 12345  # bytes for the cache


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped model as it is exported, and random ones of the dense families, one of them without bos."""
    root = tmp_path_factory.mktemp("vllm")
    made = {"zoo": SHIPPED["zoo"]}
    for family in ("llama", "qwen3"):
        size = write_tokenizer(root / f"{family}-words", "gpt-2", **({"bos_token": None} if family == "qwen3" else {}))
        sizes = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 512}
        model = random_model(gguf_config(family, size, **sizes), 5, torch.float32)
        save_model(model, root / family, tokenizer_from=root / f"{family}-words")
        made[family] = root / family
    for name, folder in made.items():
        code, _, err = limbeck("export", f"model={folder}", f"output={root / 'out' / name}", "dtype=bfloat16")
        assert code == 0, err
    return {name: root / "out" / name for name in made}


def answers_of(folders: list[Path], prompts: list[Any], dtype: str, where: Path) -> list[Any]:
    """What vLLM answers for each folder's prompts, texts or token ids."""
    python, script = client_python("LIMBECK_VLLM", "vllm", "vllm"), Path(__file__).with_name("vllm_answers.py")
    named = {str(folder): list(given) for folder, given in zip(folders, prompts, strict=True)}
    request = {"tokens": TOKENS, "length": LENGTH, "dtype": dtype, "folders": named}
    return list(answered(python, script, request, where).values())


def answered(python: Path, script: Path, request: Any, where: Path) -> dict[str, Any]:
    """What a program gives in vLLM's environment."""
    (where / "request.json").write_text(json.dumps(request))
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [python, script, where / "request.json", where / "answer.json"],
        env=os.environ | settings, cwd=where, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads((where / "answer.json").read_text()))


def logprobs_of(model: HybridLM, prompt: list[int]) -> Tensor:
    """Of every token of a prompt but the first, in our model."""
    every = F.log_softmax(model(torch.tensor([prompt]))[0], -1)
    return every[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]


@pytest.mark.timeout(3600)
@torch.no_grad()
def test_vllm_serves_what_limbeck_generates(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of the same texts: vLLM makes their tokens itself."""
    prompts = [prompts_of(folder) for folder in folders.values()]
    texts = [prompt_texts() for _ in folders]
    answers = answers_of(list(folders.values()), texts, "float32", tmp_path)
    for (name, folder), own, found in zip(folders.items(), prompts, answers, strict=True):
        model = load_model(folder)
        for prompt, ours, theirs in zip(own, greedy_tokens(model, own), found, strict=True):
            assert theirs["prompt"] == prompt, name
            same_or_tied(model, prompt, ours, theirs["tokens"])
            far = (logprobs_of(model, prompt) - torch.tensor(theirs["logprobs"])).abs().max().item()
            # Random weights give logits of several tens, and float32 as many times the error.
            size = 1 if name == "zoo" else model(torch.tensor([prompt])).abs().max().item()
            assert far < 1e-4 * size, (name, far)


@torch.no_grad()
def test_vllm_opens_rounded_weights(tmp_path: Path) -> None:
    """It rounds activations too, in fp8 and w8a8, and computes in bfloat16: log-probabilities are near, on average."""
    pytest.importorskip("compressed_tensors")
    folders = [tmp_path / form for form in ROUNDINGS]
    for folder in folders:
        code, _, err = limbeck("export", "model=zoo", f"output={folder}", f"format={folder.name}")
        assert code == 0, err
    prompts = [prompts_of(folder)[:5] for folder in folders]
    for folder, own, found in zip(folders, prompts, answers_of(folders, prompts, "bfloat16", tmp_path), strict=True):
        model = load_model(folder)
        for prompt, theirs in zip(own, found, strict=True):
            far = (logprobs_of(model, prompt) - torch.tensor(theirs["logprobs"])).abs().mean().item()
            assert far < 0.2, (folder.name, far)


@pytest.mark.timeout(3600)
def test_vllm_computes_the_sizes_of_memory_fit(tmp_path: Path) -> None:
    """Tokens and bytes of a block, blocks a request, blocks in all, whether it starts, and the largest --max-num-seqs
    and --max-model-len with which it does: of each config at each load, by vLLM's layers and its allocator; and of a
    rank of several at the first load, with its parameters."""
    python, folders = client_python("LIMBECK_VLLM", "vllm", "vllm"), {name: tmp_path / name for name in SIZED}
    for name, folder in folders.items():
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(model_config(name).to_hf() | {"torch_dtype": "bfloat16"}))
    request = {"folders": {name: str(folder) for name, folder in folders.items()}, "loads": LOADS, "memory": HEADROOM}
    request |= {"ranks": RANKS}
    found = answered(python, Path(__file__).with_name("vllm_sizes.py"), request, tmp_path)
    for name in SIZED:
        config = model_config(name)
        for load, theirs in zip(LOADS, found[name], strict=True):
            compare(config, load, theirs, name)
        for ranks in RANKS[name]:
            theirs, own = found[f"{name} x {ranks}"], rank_config(config, ranks)
            assert theirs.pop("parameters") == parameters_without_mocked(own), (name, ranks)
            compare(config, LOADS[0], theirs, name, ranks)


def parameters_without_mocked(config: HybridConfig) -> int:
    """All but the experts of nemotron_h, in whose place vllm_sizes.py has nothing."""
    mocked = (size.parameters - config.hidden_size for letter, size in kind_sizes(config).items() if size.experts
              for _ in range(config.pattern.count(letter)) if config.family == "nemotron_h")  # fmt: skip
    return count_parameters(config) - sum(mocked)


def compare(config: HybridConfig, load: dict[str, Any], theirs: dict[str, Any], name: str, ranks: int = 1) -> None:
    budget = weight_bytes(rank_config(config, ranks), torch.bfloat16) + HEADROOM
    report = memory(
        config, int(load["context"]), chunk=None, ssm_dtype=torch_dtype(str(load["ssm_dtype"])),
        mamba_cache_mode=str(load["mode"]), budget=budget, tensor_parallel=ranks,
    ).vllm  # fmt: skip
    starts, most = theirs.pop("starts"), theirs.pop("largest_max_num_seqs")
    assert {key: getattr(report, key) for key in theirs} == theirs, (name, load, ranks)
    assert (report.max_num_seqs > 0) == starts, (name, load, ranks)
    # Without Mamba layers there is no limit.
    assert report.largest_max_num_seqs == (most if most < 2**30 else 0), (name, load, ranks)
