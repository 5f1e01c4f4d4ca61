"""Shared by the tests: comparison by relative RMS, tiny configs and models, a command run as a user would."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models.checkpoint import save_model
from limbeck.models.config import HybridConfig
from limbeck.models.generate.cache import Cache
from limbeck.models.hybrid import HybridLM, initialize
from limbeck.models.tokenizer import train_tokenizer
from limbeck.scripts.run.main import main
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def assert_close(name: str, reference: Tensor, found: Tensor, ratio: float) -> float:
    """Relative RMS error of `found`, which is at most `ratio`; NaN never passes."""
    assert reference.shape == found.shape, (name, reference.shape, found.shape)
    difference = (reference.double() - found.double()).square().sum().sqrt().item()
    size = reference.double().square().sum().sqrt().item()
    assert math.isfinite(difference), f"{name}: not finite"
    assert difference <= ratio * size + 1e-30, (
        f"{name}: relative RMS error {difference / max(size, 1e-300):.2e} > {ratio}"
    )
    return difference / max(size, 1e-300)


TINY: dict[str, Any] = {
    "pattern": "M-M*-M",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "chunk_size": 8,
}


EXPERTS: dict[str, Any] = {
    "pattern": "ME*E-E",
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 20,
    "routed_scaling_factor": 2.5,
}


def tiny_config(**changes: Any) -> HybridConfig:
    return HybridConfig(**(TINY | changes))


def moe_config(**changes: Any) -> HybridConfig:
    """The tiny model with experts."""
    return tiny_config(**(EXPERTS | changes))


def random_config(seed: int) -> HybridConfig:
    """A small config, valid, with everything that matters drawn."""
    draw = random.Random(seed)
    groups, kv = draw.choice((1, 2, 4)), draw.choice((1, 2, 3))
    pattern = "".join(draw.choice("MM*--") for _ in range(draw.randint(1, 7)))
    return HybridConfig(
        pattern=pattern,
        vocab_size=draw.randint(20, 90),
        hidden_size=draw.choice((16, 20, 32)),
        intermediate_size=draw.choice((12, 24, 40)),
        num_attention_heads=kv * draw.choice((1, 2, 4)),
        num_key_value_heads=kv,
        head_dim=draw.choice((4, 8)),
        mamba_num_heads=groups * draw.choice((1, 2, 3, 4)),
        mamba_head_dim=draw.choice((4, 6, 8)),
        n_groups=groups,
        ssm_state_size=draw.choice((4, 8, 16)),
        conv_kernel=draw.choice((2, 3, 4)),
        chunk_size=draw.choice((4, 8)),
        conv_bias=draw.random() < 0.8,
        tie_word_embeddings=draw.random() < 0.2,
        norm_eps=1e-12,
    )


def dense_config(seed: int, family: str = "") -> HybridConfig:
    """A small llama or qwen3 config (by turns, unless told), valid, with everything that matters drawn."""
    draw = random.Random(seed)
    family = family or ("llama", "qwen3")[seed % 2]
    kv = draw.choice((1, 2, 3))
    heads = kv * draw.choice((1, 2, 3))
    return HybridConfig(
        family=family,
        pattern="*-" * draw.randint(1, 4),
        vocab_size=draw.randint(20, 90),
        hidden_size=heads * draw.choice((4, 8, 10)) if family == "llama" else draw.choice((16, 22, 40)),
        intermediate_size=draw.choice((12, 24, 40)),
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=draw.choice((4, 8, 12)),  # heads x head_dim is seldom hidden_size
        activation="silu",
        gated_mlp=True,
        qk_norm=family == "qwen3",
        rope_theta=draw.choice((1e4, 5e5)),
        tie_word_embeddings=draw.random() < 0.5,
        norm_eps=draw.choice((1e-5, 1e-6)),
        max_position_embeddings=256,
    )


def any_config(seed: int) -> HybridConfig:
    """Of every family: hybrids below 50, dense ones from there on."""
    return random_config(seed) if seed < 50 else dense_config(seed)


def random_model(config: HybridConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> HybridLM:
    """A model whose every weight matters: nothing is one or zero."""
    generator = torch.Generator().manual_seed(seed)
    model = HybridLM(config, dtype=dtype)
    initialize(model, generator, std=0.3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith((".D", "norm.weight", "norm_f.weight")):
                weight.uniform_(0.5, 1.5, generator=generator)
        for buffer in model.buffers():
            buffer.normal_(0, 0.2, generator=generator)
    return model.eval()


def limbeck(*arguments: str) -> tuple[int, str, str]:
    """Exit code, output and error output of a command line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


# What may differ between two runs of the same work: all of these, and limbeck.json's `run`.
TIMES = ("result.json", "speed.jsonl", "log.txt", "gap.html", "report.html")


def run_interpreted(*arguments: str) -> None:
    """Runs files of tests, in a process of their own in which every Triton kernel is interpreted."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


def lasting(path: Path) -> bytes:
    """A file's bytes, of a limbeck.json without what it says of the run."""
    if path.name != "limbeck.json":
        return path.read_bytes()
    content = json.loads(path.read_text())
    assert {"command", "host", "began", "seconds", "commit", "inputs", "output", "bytes"} <= content["run"].keys()
    return json.dumps({key: value for key, value in content.items() if key != "run"}).encode()


TEXT = "".join(f"def name_{i}(x):\n    return x + {i * i}\n\n" for i in range(400))


def make_workshop(root: Path) -> Path:
    """Fills a folder with a model that has a tokenizer of its own, and a text; nothing of both may change."""
    (root / "text").mkdir()
    for number in range(40):
        (root / "text" / f"{number}.txt").write_text(f"# file {number}\n" + TEXT[number * 60 :])
    (root / "words").mkdir()
    tokenizer = train_tokenizer([TEXT], 320, root / "words")
    torch.manual_seed(0)
    config = tiny_config(vocab_size=tokenizer.vocab_size, pad_token_id=0, extra={"time_step_min": 1e-6})
    save_model(random_model(config, dtype=torch.float32), root / "model", tokenizer_from=root / "words")
    return root


def make_pair(root: Path) -> Path:
    """The same, and a narrower student that has something to learn."""
    make_workshop(root)
    student = random_model(tiny_config(vocab_size=320, pad_token_id=0, hidden_size=24), 5)
    save_model(student.float(), root / "student", tokenizer_from=root / "words")
    return root


@torch.no_grad()
def cached_logits(ours: HybridLM, theirs: Any, ids: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] of transformers and of ours for ids [B, T]: a prompt, then one cached token after the other."""
    cache = Cache(ours.config, *ids.shape)
    output = theirs(ids[:, :prompt], use_cache=True)
    expected, found = [output.logits], [ours(ids[:, :prompt], cache=cache)]
    for token in ids[:, prompt:].split(1, 1):
        output = theirs(token, past_key_values=output.past_key_values, use_cache=True)
        expected.append(output.logits)
        found.append(ours(token, cache=cache))
    return torch.cat(expected, 1), torch.cat(found, 1)


def wide(**changes: Any) -> HybridConfig:
    """Of the shipped model's proportions, a quarter as wide."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "mamba_num_heads": 8, "mamba_head_dim": 16, "chunk_size": 64}
    return tiny_config(
        **(sizes | {"pattern": "M-*M"} | {"ssm_state_size": 32, "head_dim": 16, "vocab_size": 512} | changes)
    )


def compress_command(workshop: Path, out: Path) -> list[str]:
    return [
        "compress",
        f"model={workshop / 'model'}",
        f"data={workshop / 'text'}",
        f"output={out}",
        "target.layers=5",
        "target.hidden_size=24",
        "target.intermediate_size=40",
        "target.mamba_num_heads=6",
        "importance.tokens=256",
        "importance.depth_tokens=128",
        "distill.train.steps=12",
        "distill.train.save_every=3",
        "distill.train.evaluate_every=6",
        "distill.seq_len=32",
        "distill.batch=2",
        "evaluate_tokens=512",
        "fit.context=1000",
        "repair.tokens=512",
    ]


class Largest(TorchDispatchMode):
    """The most elements that any tensor had that was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out
