"""Exports in the programs that serve them: `make test-clients`, each skipped with a reason where a package is missing.

llama.cpp on the GGUF files of every family: logits of float32 within 1e-4 relative RMS of ours, the same greedy tokens,
perplexity within 0.1%, the same tokens of a text; bfloat16 and q8_0 load and stay near.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from limbeck.models.checkpoint import load_model, save_model
from limbeck.models.export import divergence, relative_rms
from limbeck.models.gguf.pretokenizers import KNOWN
from limbeck.models.named import SHIPPED
from limbeck.models.tokenizer import load_tokenizer
from limbeck.tests.client_helpers import TOKENS, greedy_tokens, prompts_of, same_or_tied
from limbeck.tests.gguf_helpers import FOLDERS, SAMPLES, gguf_config, write_folder, write_tokenizer
from limbeck.tests.helpers import limbeck, random_model
from limbeck.tests.llama_cpp import LlamaCpp
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.clients
# How far logits may be (`typical_error`): llama.cpp rounds activations too, and random weights carry it far.
NEAR, NEARER = {"bfloat16": 0.1, "q8_0": 0.2}, {"bfloat16": 0.01, "q8_0": 0.02}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("xllamacpp")
    return tmp_path_factory.mktemp("clients")


def gguf_of(source: Path, root: Path, dtype: str, *options: str) -> Path:
    out = root / f"{source.name}-{dtype}"
    code, _, err = limbeck("export", f"model={source}", f"output={out}", "format=gguf", f"dtype={dtype}", *options)
    assert code == 0, err
    (path,) = out.glob("*.gguf")
    return path


def perplexity(logits: Tensor, ids: list[int]) -> float:
    return F.cross_entropy(logits[:-1], torch.tensor(ids[1:])).exp().item()


def typical_error(ours: Tensor, theirs: Tensor) -> float:
    """Relative RMS of a token's logits, the median: where rounding changes which expert is chosen, a few are far."""
    return ((ours - theirs).square().mean(-1) / ours.square().mean(-1)).sqrt().median().item()


@torch.no_grad()
def compare(source: Path, root: Path, limits: dict[str, float], *options: str) -> None:
    model, prompts = load_model(source), prompts_of(source)
    ids = [number for prompt in prompts[:4] for number in prompt][:200]
    ours, greedy = model(torch.tensor([ids]))[0], greedy_tokens(model, prompts)
    exact = LlamaCpp(gguf_of(source, root, "float32", *options))
    theirs = exact.logits(ids)
    assert relative_rms(ours, theirs) < 1e-4
    assert perplexity(theirs, ids) == pytest.approx(perplexity(ours, ids), rel=1e-3)
    for prompt, mine in zip(prompts, greedy, strict=True):
        same_or_tied(model, prompt, mine, exact.greedy(prompt, TOKENS))
    exact.close()
    for dtype, limit in limits.items():
        rounded = LlamaCpp(gguf_of(source, root, dtype, *options))
        theirs = rounded.logits(ids)
        assert typical_error(ours, theirs) < limit and divergence(ours, theirs) < 2 * limit, dtype
        rounded.close()


def test_llama_cpp_runs_the_shipped_model(root: Path) -> None:
    compare(SHIPPED["zoo"], root, NEARER, "pre_tokenizer=gpt-2")


@pytest.mark.parametrize("name", FOLDERS)
def test_llama_cpp_runs_every_family(name: str, root: Path) -> None:
    compare(write_folder(root, name), root, NEAR)


@pytest.mark.parametrize("pre", KNOWN)
def test_llama_cpp_makes_the_same_tokens(pre: str, root: Path) -> None:
    folder = root / f"words-{pre}"
    size = write_tokenizer(folder, pre, **({"bos_token": None} if pre == "qwen2" else {}))
    save_model(random_model(gguf_config("llama", size), 0, torch.float32), root / pre, tokenizer_from=folder)
    opened, tokenizer = LlamaCpp(gguf_of(root / pre, root, "float32")), load_tokenizer(folder)
    for text in SAMPLES:
        assert opened.tokenize(text) == tokenizer.prompt(text), (pre, text)
    lib, vocab = opened.lib, opened.vocab
    assert lib.llama_vocab_eos(vocab) == tokenizer.eos_token_id
    assert lib.llama_vocab_get_add_bos(vocab) == bool(tokenizer.begin)
    opened.close()
