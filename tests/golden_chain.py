"""The recorded figures of the shipped model's chain: scores, kept units, weights, training, gap and texts.

`python -m limbeck.tests.golden_chain FOLDER` writes configs.json and zoo.json anew. Everything goes through the command
line, files and what golden_figures.py names. The text is made here, number by number, so that no version of Python or
of a data set decides it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# What moves with the code: names, and nothing else in this file.
from limbeck.models.checkpoint import load_model
from limbeck.models.tokenizer import load_tokenizer
from limbeck.scripts.run.main import main
from limbeck.scripts.run.resolve import ZOO
from limbeck.tests.golden_figures import SURE, config_figures, machine, settled, tolerances, write
from safetensors import safe_open
from torch import Tensor

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


if __name__ == "__main__":
    main_of_recording(Path(sys.argv[1]))
