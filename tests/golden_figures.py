"""The figures that must not move while code does: computed here, recorded in tests/golden/, held by test_golden.

`python -m limbeck.tests.golden_figures FOLDER` writes configs.json and zoo.json anew. Everything that
knows where a thing is in the package stands in the first lines; the rest goes through the command line, files and what
is named there. The text is made here, number by number, so that no version of Python or of a data set decides it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

# What moves with the code: names, and nothing else in this file.
from limbeck.models.checkpoint import load_model
from limbeck.models.config import HybridConfig
from limbeck.models.cost.hardware import Place
from limbeck.models.cost.inference import memory
from limbeck.models.cost.parameters import count_parameters, num_tensors
from limbeck.models.cost.simulate import simulate
from limbeck.models.cost.training import Training, train_memory
from limbeck.models.families.family import stored_tensors
from limbeck.models.tokenizer import load_tokenizer
from limbeck.scripts.run.main import main
from limbeck.scripts.run.resolve import ZOO, model_config
from safetensors import safe_open
from torch import Tensor

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
    for mode, context in (("none", 8192), ("align", 8192), ("all", 100000))
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


def main_of_recording(folder: Path) -> None:
    """Writes both files."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place, settled():
        os.environ["LIMBECK_CACHE"] = str(Path(place) / "cache")
        write(folder / "configs.json", {"tolerance": tolerances(), "configs": config_figures()})
        chain = Chain.run(Path(place))
        found = zoo_figures(chain)
        for name, rows in found["generated"].items():
            for row in rows:
                row["sure"] = sure_characters(chain, name, row["prompt"], row["text"])
        write(folder / "zoo.json", {"machine": machine(), "tolerance": tolerances()} | found)


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


# The shipped model, by the command line

WORDS = ("value", "total", "items", "name", "count", "path", "line", "node", "result", "index", "key", "data", "size")
FORMS = (
    "def {a}_{b}({c}, {d}=None):\n    if {d} is None:\n        {d} = {n}\n    return {c} + {d}\n\n\n",
    "class {A}{B}:\n    def __init__(self, {c}):\n        self.{c} = {c}\n        self._{d} = {n}\n\n"
    "    def get_{d}(self):\n        return self._{d}\n\n\n",
    "for {c} in range({n}):\n    {a}.append({c} * {m})\n    if len({a}) > {m}:\n        break\n\n",
    "try:\n    {a} = int({b}[{n}])\nexcept (IndexError, ValueError):\n    {a} = {m}\n\n",
    "with open({a}_{b}, encoding='utf-8') as {c}:\n    {d} = [{c}.strip() for {c} in {c} if {c}]\n\n",
    "# The {a} of every {b} is counted once; {c} stands for the {d} before it.\n{A} = {{'{b}': {n}, '{c}': {m}}}\n\n",
    "import os, sys\n\n{a} = os.path.join(sys.prefix, '{b}', '{c}{n}.py')\nprint({a}, file=sys.stderr)\n\n",
    "    while {a} < {b}:\n        {a} += {n}\n        yield {c}[{a}:{a} + {m}]\n\n",
)
PROMPTS = (
    "def mean(values):",
    "import os\nimport",
    "class Node:\n    def __init__(self",
    "for i in range(",
    "try:\n    ",
)
TEXT_FILES, FORMS_A_FILE = 60, 24
NEW_TOKENS = 64
TARGETS = {
    "all axes": (
        "target.layers=11", "target.hidden_size=224", "target.intermediate_size=640", "target.mamba_num_heads=12",
    ),
    "by count": ("target.parameters=0.6",),
    "heads": (
        "target.layers=10", "target.hidden_size=192", "target.num_attention_heads=4", "target.mamba_head_dim=24",
    ),
}  # fmt: skip
CALIBRATION = ("seq_len=128", "batch=4", "device=cpu")
SCORINGS = {
    "activation": ("importance.tokens=4096", "importance.depth_tokens=512", "importance.remove_layers=2"),
    "activation, other choices": (
        "importance.tokens=1024", "importance.depth_tokens=256", "importance.remove_layers=1",
        "importance.depth_metric=kl", "importance.aggregate_batch=mean", "importance.mamba_source=out",
        "importance.ffn_source=act", "importance.times_output=true",
    ),
    "magnitude": (
        "importance=magnitude", "importance.depth_tokens=256", "importance.depth_metric=block_influence",
        "importance.remove_layers=2",
    ),
    "random": ("importance=random", "importance.remove_layers=2", "seed=7"),
}  # fmt: skip
REPAIR = ("repair.tokens=2048", *CALIBRATION)
DISTILL = (
    "device=cpu", "wandb=off", "distill.seq_len=64", "distill.batch=2", "distill.evaluate_tokens=512",
    "distill.train.steps=20", "distill.train.warmup_steps=2", "distill.train.log_every=5",
    "distill.train.evaluate_every=20", "distill.train.optimizer=muon", "distill.train.learning_rate=0.0015",
)  # fmt: skip
GAP = (
    "device=cpu", "split=all", "tokens=4096", "seq_len=128", "batch=8", "details.resamples=50", "details.worst=2",
    "details.prompts=4", "details.prompt_tokens=32", "details.new_tokens=16",
)  # fmt: skip
GAP_FIGURES = (
    "cross_entropy", "perplexity", "bits_per_byte", "kl", "reverse_kl", "mass_kept", "agreement", "top5_agreement",
    "mean_rank",
)  # fmt: skip
DISTILLED, CUT = "all axes, distilled", "all axes"


def write_text(folder: Path) -> Path:
    """Files that look like programs; a linear congruence draws, the same on every machine."""
    folder.mkdir()
    state = 2026

    def draw(count: int) -> int:
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (state >> 33) % count

    for number in range(TEXT_FILES):
        pieces = []
        for _ in range(FORMS_A_FILE):
            a, b, c, d = (WORDS[draw(len(WORDS))] for _ in "abcd")
            n, m = draw(1000), draw(64)
            form = FORMS[draw(len(FORMS))]
            pieces.append(form.format(a=a, b=b, c=c, d=d, A=a.title(), B=b.title(), n=n, m=m))
        (folder / f"{number}.py").write_text("".join(pieces), encoding="utf-8")
    return folder


def command(*words: str) -> None:
    """`limbeck WORDS` in this process, silent unless it fails."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    assert code == 0, (words, code, out.getvalue()[-500:], err.getvalue())


@dataclasses.dataclass(frozen=True)
class Chain:
    """A folder in which score, prune, distill, evaluate and generate have left what they make."""

    root: Path

    @property
    def text(self) -> Path:
        return self.root / "text"

    @classmethod
    def run(cls, root: Path) -> Chain:
        chain = cls(root)
        write_text(chain.text)
        data = f"data={chain.text}"
        for name, words in SCORINGS.items():
            command("score", "model=zoo", data, f"output={chain.scores(name)}", *CALIBRATION, *words)
        for target, words in TARGETS.items():
            plain = ("repair.rotate=false", "repair.least_squares=false")
            scores = f"scores={chain.scores('activation')}"
            command("prune", "model=zoo", scores, f"output={chain.model(target)}", "device=cpu", *plain, *words)
            repaired = chain.model(f"{target}, repaired")
            command("prune", "model=zoo", scores, f"output={repaired}", data, *REPAIR, *words)
        by_chance = (f"scores={chain.scores('random')}", f"output={chain.model('all axes, random')}")
        command("prune", "model=zoo", *by_chance, "device=cpu", *TARGETS[CUT])
        pair = ("teacher=zoo", f"student={chain.model(CUT)}")
        command("distill", *pair, data, f"output={chain.model(DISTILLED)}", *DISTILL)
        students = (f"+student.pruned={chain.model(CUT)}", f"+student.distilled={chain.model(DISTILLED)}")
        command("evaluate", "teacher=zoo", *students, data, f"output={root / 'gap'}", *GAP)
        prompts = root / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS), encoding="utf-8")
        for name in ("zoo", CUT):
            model = "zoo" if name == "zoo" else chain.model(name)
            answers = (f"prompts={prompts}", f"output={chain.answers(name)}", f"max_new_tokens={NEW_TOKENS}")
            command("generate", f"model={model}", *answers, "device=cpu", "batch=3")
        return chain

    def scores(self, name: str) -> Path:
        return self.root / f"scores {name}".replace(",", "").replace(" ", "-")

    def model(self, name: str) -> Path:
        return self.root / f"model {name}".replace(",", "").replace(" ", "-")

    def answers(self, name: str) -> Path:
        return self.root / f"answers-{name}.jsonl".replace(" ", "-")


def zoo_figures(chain: Chain) -> dict[str, Any]:
    """Everything of the chain that is recorded."""
    return {
        "text": hashlib.sha256(b"".join(path.read_bytes() for path in sorted(chain.text.iterdir()))).hexdigest(),
        "scores": {name: score_figures(chain.scores(name)) for name in SCORINGS},
        "kept": {name: kept_figures(chain.model(name)) for name in kept_models()},
        "weights": {name: weight_figures(chain.model(name)) for name in (*kept_models(), DISTILLED)},
        "exact_weights": [name for name in kept_models() if "repaired" not in name],
        "training": training_records(chain.model(DISTILLED)),
        "gap": gap_figures(chain.root / "gap"),
        "generated": {name: answers(chain, name) for name in ("zoo", CUT)},
    }


def kept_models() -> list[str]:
    return [*TARGETS, *(f"{target}, repaired" for target in TARGETS), "all axes, random"]


def opened(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name)


def digits(number: float) -> float:
    return float(f"{number:.9g}")


def fingerprint(tensor: Tensor) -> list[float]:
    """Sum, L2 norm, and the product with a fixed vector of numbers between -1.7 and 1.7 whose mean square is 1."""
    flat = tensor.double().flatten()
    ramp = (torch.arange(1, flat.numel() + 1, dtype=torch.float64) * 0.6180339887498949) % 1
    return [digits(number.item()) for number in (flat.sum(), flat.norm(), flat @ ((ramp - 0.5) * math.sqrt(12)))]


def score_figures(folder: Path) -> dict[str, Any]:
    """The layers' order and costs, and of every axis's scores a fingerprint and four values."""
    layers = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["layers"]
    widths = {}
    for name, scores in opened(folder / "scores.safetensors"):
        flat = scores.flatten()
        places = [number * (len(flat) - 1) // 3 for number in range(4)]
        widths[name] = [*fingerprint(scores), *(digits(flat[place].item()) for place in places)]
    values = [digits(value) for value in layers["values"]]
    return {"order": layers["order"], "values": values, "metric": layers["metric"], "widths": widths}


def kept_figures(folder: Path) -> dict[str, Any]:
    """selection.json: the layers, of every axis how many units, and the sha256 of which. At the cuts the scores are at
    least 6e-5 of themselves apart, many times what processors differ by, so that every one keeps the same."""
    found = json.loads((folder / "selection.json").read_text(encoding="utf-8"))
    kept = {}
    for axis, units in found["kept"].items():
        kept[axis] = [len(units), hashlib.sha256(json.dumps(units).encode()).hexdigest()[:16]]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found | {"kept": kept, "config": hashlib.sha256(json.dumps(config).encode()).hexdigest()}


def weight_figures(folder: Path) -> dict[str, Any]:
    """The sha256 of all weights, and each tensor's fingerprint."""
    whole, tensors = hashlib.sha256(), {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in opened(file):
            whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            whole.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
            tensors[name] = fingerprint(tensor)
    return {"sha256": whole.hexdigest(), "tensors": tensors, "logits": logit_figures(folder)}


@torch.no_grad()
def logit_figures(folder: Path) -> list[float]:
    """A fingerprint of what the model says of a fixed row of 96 tokens: the same however its directions are signed."""
    model = load_model(folder, torch.float32)
    ids = (torch.arange(96) * 37 + 5) % (model.config.vocab_size - 3) + 3
    return fingerprint(model(ids[None]).log_softmax(-1))


def training_records(folder: Path) -> list[dict[str, float]]:
    """What the log has of losses and held-out figures."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    wanted = ("step", "tokens", "loss", "learning_rate", "gradient_norm", "grad_norm")
    return [
        {
            key: digits(value)
            for key, value in json.loads(line).items()
            if key in wanted or key.startswith("validation_")
        }
        for line in lines
    ]


def gap_figures(folder: Path) -> dict[str, Any]:
    """Of gap.json: counts, and each model's figures with their intervals."""
    gap = json.loads((folder / "gap.json").read_text(encoding="utf-8"))
    models = {
        name: {key: [digits(found[key][end]) for end in ("value", "low", "high")] for key in GAP_FIGURES}
        for name, found in gap["models"].items()
    }
    counts = {key: gap[key] for key in ("tokens", "text_bytes", "documents", "parameters")}
    return counts | {"models": models, "recovery": [digits(gap["recovery"][end]) for end in ("value", "low", "high")]}


def answers(chain: Chain, name: str) -> list[dict[str, Any]]:
    """The greedy texts of the shipped or a pruned model."""
    lines = chain.answers(name).read_text(encoding="utf-8").splitlines()
    return [{key: json.loads(line)[key] for key in ("prompt", "text", "finished")} for line in lines]


@torch.no_grad()
def sure_characters(chain: Chain, name: str, prompt: str, text: str) -> int:
    """How much of a greedy text every processor has to write alike: the characters before the first token where the two
    most probable are less than `SURE` apart. For the recording alone."""
    folder = ZOO if name == "zoo" else chain.model(name)
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    ids, sure = [tokenizer.bos_token_id, *tokenizer.encode(prompt)], ""
    for _ in range(NEW_TOKENS):
        (first, second), (token, _) = model(torch.tensor([ids]))[0, -1].topk(2)
        if first - second < SURE:
            break
        ids.append(int(token))
        sure += tokenizer.decode([int(token)])
    return next(
        (n for n, pair in enumerate(zip(sure, text, strict=False)) if pair[0] != pair[1]), min(len(sure), len(text))
    )


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


if __name__ == "__main__":
    main_of_recording(Path(sys.argv[1]))
