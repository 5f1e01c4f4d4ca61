"""The figures that must not move while code does: computed here, recorded in tests/golden/, held by test_golden.

`python -m limbeck.tests.golden_chain FOLDER` writes configs.json and zoo.json anew; golden_chain.py has the figures of
the shipped model. Everything that knows where a thing is in the package stands in the first lines.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

# What moves with the code: names, and nothing else in this file.
from limbeck.models.config import HybridConfig
from limbeck.models.cost.hardware import Place
from limbeck.models.cost.inference import memory
from limbeck.models.cost.parameters import count_parameters, num_tensors
from limbeck.models.cost.simulate import simulate
from limbeck.models.cost.training import Training, train_memory
from limbeck.models.families.family import stored_tensors
from limbeck.scripts.run.resolve import model_config

GOLDEN = Path(__file__).parent / "golden"
NAMED = ("nemotron-nano-12b-v2", "nemotron-nano-9b-v2", "nemotron-h-4b", "nemotron-h-8b", "qwen3-8b", "smollm2-135m")
DRAWN = 16
WHOLE_TABLE = 12  # layers up to which a config's tensors are listed one by one

# Formulas are held to the byte; what comes and goes may be counted in another way, as near as this (relative).
TRANSIENT_TOLERANCE = 1e-3
BLOCKS = 8 * 512  # bytes of a few blocks of a GPU's allocator: of a tiny model one of them is per cents
# What depends on the order in which a processor sums up.
SCORE_TOLERANCE, FIGURE_TOLERANCE = 1e-4, 1e-3
SURE = 0.01  # nats between the two most probable tokens from which on every processor takes the same one

EXACT = ("weights", "kv", "ssm", "conv", "prompt")
PASSING = ("activations", "decode", "logits", "workspace", "peak")
VLLM = (
    "block_size", "bytes_per_request", "max_num_seqs", "blocks_per_request", "bytes_per_block", "blocks",
    "largest_max_num_seqs", "largest_max_model_len",
)  # fmt: skip
TRAIN_STANDING = ("student weights", "master copies", "optimizer state", "weight average", "teacher weights")
TRAIN_EXACT = ("gradients", "gathered layers")  # where the fullest moment is the recorded one
TRAIN_PASSING = ("kept for the backward", "loss", "layer at work")

A10G, CPU = Place("cuda", 80, "8.6"), Place("cpu", 2)
BF16, FLOAT32 = torch.bfloat16, torch.float32
FLOAT8 = torch.float8_e4m3fn
LOADS: dict[str, dict[str, Any]] = {
    "a10g, one token": {"context": 1, "chunk": 512, "place": A10G},
    "a10g, 8192": {"context": 8192, "chunk": 512, "place": A10G},
    "a10g, 3 x 4096 by 128": {"context": 4096, "batch": 3, "chunk": 128, "place": A10G},
    "a10g, 131072, narrow": {
        "context": 131072, "chunk": 512, "place": A10G, "kv_dtype": FLOAT8, "ssm_dtype": BF16, "conv_dtype": BF16,
    },
    "cpu, 2 x 1024 by 128": {"context": 1024, "batch": 2, "chunk": 128, "place": CPU, "weight_dtype": FLOAT32},
    "cpu, 5000": {"context": 5000, "chunk": 512, "place": CPU, "weight_dtype": FLOAT32},
}  # fmt: skip
BUDGETS: dict[str, dict[str, Any]] = {
    f"{mode}, {context}": {"context": context, "budget": 22.06e9, "mamba_cache_mode": mode, "chunk": None}
    for mode, context in (("none", 8192), ("align", 8192), ("align", 100000))
}
TRAININGS: dict[str, Training] = {
    "plain": Training(),
    "cached, muon, checkpointed": Training(2, 1024, 8, dtype=FLOAT32, optimizer="muon", checkpointing=True,
                                           teacher="cached"),
    "8 processes, average": Training(1, 2048, 8, average=True, processes=8),
    "offloaded teacher": Training(2, 2048, 2, teacher_offload=True, teacher_dtype=FLOAT32, optimizer="muon"),
    "cpu": Training(4, 512, 4, dtype=FLOAT32, teacher_dtype=FLOAT32, optimizer="muon", device="cpu"),
    "no teacher, rows whole": Training(2, 4096, 2, packed=False, teacher="none"),
}  # fmt: skip
SIMULATED = ("drawn 0", "drawn 1", "drawn 2")  # one of each family
SIMULATIONS: dict[str, dict[str, Any]] = {
    "a10g, 2 x 700 by 128": {"context": 700, "batch": 2, "chunk": 128, "place": A10G},
    "cpu, 2 x 200 by 64": {"context": 200, "batch": 2, "chunk": 64, "place": CPU, "weight_dtype": FLOAT32},
}


def tolerances() -> dict[str, Any]:
    """For who reads the files; the test has its own from here."""
    return {
        "exact": [*EXACT, "vllm", *TRAIN_STANDING, *TRAIN_EXACT],
        "transient": [*PASSING, *TRAIN_PASSING, "simulation"],
        "transient_relative": TRANSIENT_TOLERANCE,
        "scores_relative": SCORE_TOLERANCE,
        "figures_relative": FIGURE_TOLERANCE,
    }


def write(path: Path, content: Any) -> None:
    """JSON that is small and still has a line for what belongs together: the innermost two levels share one."""
    path.write_text(spread(content) + "\n", encoding="utf-8")


def spread(content: Any, depth: int = 0) -> str:
    flat = json.dumps(content, allow_nan=False)
    if not isinstance(content, dict) or len(flat) < 160:
        return flat
    space = " " * (depth + 1)
    lines = (f"{space}{json.dumps(key)}: {spread(value, depth + 1)}" for key, value in content.items())
    return "{\n" + ",\n".join(lines) + f"\n{' ' * depth}}}"


def recorded(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def machine() -> dict[str, str]:
    """What has to be the same for equal bits."""
    info, name = Path("/proc/cpuinfo"), platform.processor()
    if info.is_file():
        lines = [line.partition(":") for line in info.read_text().partition("\n\n")[0].splitlines()]  # the first core
        facts = {head.strip(): value.strip() for head, _, value in lines}
        name = " ".join(facts.get(key, "") for key in ("vendor_id", "cpu family", "model", "stepping", "model name"))
        name += " " + hashlib.sha256(facts.get("flags", "").encode()).hexdigest()[:8]
    return {"processor": name, "torch": torch.__version__}


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """One thread and deterministic operators, as the figures were recorded with."""
    threads, sure = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(sure)


# Configs


def drawn_configs() -> dict[str, HybridConfig]:
    """Of the three families by turns, small and of middle size; a seed decides everything. For the recording alone:
    the test reads them from the file."""
    draw = random.Random(20261128)
    found = {}
    for number in range(DRAWN):
        family = ("nemotron_h", "llama", "qwen3")[number % 3]
        middle = number >= 6
        kv, shared = draw.choice((1, 2, 4)), draw.choice((1, 2, 4))
        head_dim = draw.choice((32, 64, 128)) if middle else draw.choice((8, 16))
        heads = kv * shared
        common: dict[str, Any] = {
            "vocab_size": draw.randint(5000, 60000) if middle else draw.randint(90, 300),
            "intermediate_size": draw.choice((704, 1376, 2048)) if middle else draw.choice((24, 40, 72)),
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "head_dim": head_dim,
            "tie_word_embeddings": draw.random() < 0.5,
            "norm_eps": draw.choice((1e-5, 1e-6)),
            "max_position_embeddings": draw.choice((2048, 8192, 131072)),
            "eos_token_id": draw.choice((2, (2, 11))),
            "pad_token_id": draw.choice((None, 0)),
        }
        if family == "nemotron_h":
            groups = draw.choice((1, 2, 4, 8))
            letters = "".join(
                draw.choice("MMM*---") for _ in range(draw.randint(4, 22) if middle else draw.randint(3, 7))
            )
            found[f"drawn {number}"] = HybridConfig(
                family=family, pattern="M*-" + letters, hidden_size=draw.choice((256, 480)) if middle else 24,
                mamba_num_heads=groups * draw.choice((1, 2, 3)), mamba_head_dim=draw.choice((8, 16, 64)),
                n_groups=groups, ssm_state_size=draw.choice((16, 64, 128)), conv_kernel=draw.choice((2, 3, 4)),
                chunk_size=draw.choice((32, 64, 128)), conv_bias=number % 2 == 0,
                dt_limit=((0.0, math.inf), (0.001, 0.1), (0.01, math.inf))[number // 3 % 3],
                extra={"time_step_min": 1e-6} if number == 0 else {}, **common,
            )  # fmt: skip
        else:
            found[f"drawn {number}"] = HybridConfig(
                family=family, pattern="*-" * (draw.randint(4, 14) if middle else draw.randint(1, 4)),
                hidden_size=heads * draw.choice((24, 64)) if family == "llama" else draw.choice((320, 512)) if middle
                else 40, activation="silu", gated_mlp=True, qk_norm=family == "qwen3",
                rope_theta=draw.choice((1e4, 5e5, 1e6)), **common,
            )  # fmt: skip
    return found


def config_figures() -> dict[str, Any]:
    """All configs with their figures."""
    configs = drawn_configs() | {name: model_config(name) for name in NAMED}
    return {name: {"config": config.to_hf()} | figures_of(name, config) for name, config in configs.items()}


def figures_of(name: str, config: HybridConfig) -> dict[str, Any]:
    """Tensors and memory of one config; lists are in the order of the names at the top."""
    lines = [f"{name} {list(tensor.shape)}" for name, tensor in stored_tensors(config).items()]
    found: dict[str, Any] = {
        "parameters": count_parameters(config),
        "tensors": num_tensors(config),
        "table": hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest(),
    }
    if config.num_layers <= WHOLE_TABLE and name not in NAMED:
        found["names"] = sorted(lines)
    found["memory"] = {}
    for label, load in LOADS.items():
        report = memory(config, **load)
        found["memory"][label] = [[getattr(report, key) for key in keys] for keys in (EXACT, PASSING)]
    found["vllm"] = {
        label: [getattr(memory(config, **load).vllm, key) for key in VLLM] for label, load in BUDGETS.items()
    }
    found["training"] = {label: training_figures(config, how) for label, how in TRAININGS.items()}
    if name in SIMULATED:
        found["simulation"] = {label: simulate(config, **load).peak for label, load in SIMULATIONS.items()}
    return found


def training_figures(config: HybridConfig, how: Training) -> list[Any]:
    """The fullest moment's name, its lines (standing, exact, passing), and all together."""
    report = train_memory(config, config, how)
    groups = (TRAIN_STANDING, TRAIN_EXACT, TRAIN_PASSING)
    return [report.fullest, *([report.lines[line] for line in lines] for lines in groups), report.total]


def near(found: float, golden: float, relative: float, size: float | None = None) -> bool:
    """Whether a number is the recorded one, as near as `relative` of it or of a `size`."""
    return abs(found - golden) <= relative * abs(golden if size is None else size)


def all_near(found: Sequence[float], golden: Sequence[float], relative: float) -> bool:
    return len(found) == len(golden) and all(near(*pair, relative) for pair in zip(found, golden, strict=True))


def bytes_near(found: Sequence[float], golden: Sequence[float]) -> bool:
    """Within TRANSIENT_TOLERANCE, or a few blocks of the allocator."""
    pairs = zip(found, golden, strict=True)
    return all(near(a, b, TRANSIENT_TOLERANCE) or abs(a - b) <= BLOCKS for a, b in pairs)


def same_fingerprint(found: Sequence[float], golden: Sequence[float], relative: float, norm_only: bool = False) -> bool:
    """Sum, norm and product as near as `relative` of the norm; or the norm alone."""
    numbers = slice(1, 2) if norm_only else slice(0, 3)
    return all(near(a, b, relative, golden[1]) for a, b in zip(found[numbers], golden[numbers], strict=True))
