"""What the pruned start is worth: recipe=tiny beside the same student from random weights and from random importance.

    python -m limbeck.benchmarks.baselines [--output FOLDER]

All three students have the same architecture and see the same tokens of the same teacher's logits in the same order;
only their first weights differ. Each line is a run of the command line, resumable in the output folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from limbeck.models.checkpoint import load_config, save_model
from limbeck.models.cost import count_parameters
from limbeck.models.hybrid import HybridLM, initialize
from limbeck.models.provenance import provenance


def limbeck(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "limbeck.scripts.main", *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("baselines"))
    root = parser.parse_args().output
    limbeck("compress", "recipe=tiny", f"output={root / 'activation'}")
    limbeck("compress", "recipe=tiny", "importance=random", f"output={root / 'random-importance'}")
    pruned = root / "activation" / "pruned"
    start, trained = root / "random-weights", root / "random-weights-distilled"
    if not start.exists():
        model = HybridLM(load_config(pruned))
        initialize(model, torch.Generator().manual_seed(0))
        save_model(model, start, tokenizer_from=pruned)
    options = json.loads((root / "activation" / "distilled" / "limbeck.json").read_text())["options"]["distill"]
    train = [f"distill.{name}={options[name]}" for name in ("batch", "seq_len")]  # the same tokens a step
    train += [f"distill.train.{name}={value}" for name, value in options["train"].items()]
    limbeck("distill", "teacher=zoo", f"student={start}", "data=stdlib", f"output={trained}", *train)
    students = {
        "pruned": pruned,
        "distilled": root / "activation" / "distilled",
        "random_importance": root / "random-importance" / "pruned",
        "random_importance_distilled": root / "random-importance" / "distilled",
        "random_weights_distilled": trained,
    }
    named = [f"+student.{name}={folder}" for name, folder in students.items()]
    limbeck("evaluate", "teacher=zoo", *named, "data=stdlib", f"output={root / 'gap'}")
    gap = json.loads((root / "gap" / "gap.json").read_text())
    print("| student | parameters | cross-entropy | bits per byte | KL | top-1 agreement |\n|---|---|---|---|---|---|")
    for name, found in gap["models"].items():
        values = [f"{found[key]['value']:.4f}" for key in ("cross_entropy", "bits_per_byte", "kl")]
        size = count_parameters(load_config(students[name])) if name in students else gap["parameters"][name]
        print(f"| {name.replace('_', ' ')} | {size:,} | {' | '.join(values)} | {found['agreement']['value']:.1%} |")
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in provenance().items()))


if __name__ == "__main__":
    main()
