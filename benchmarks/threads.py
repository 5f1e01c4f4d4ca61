"""How OpenMP's threads should wait for each other: the speed of a distillation step, idle and beside a busy process.

    python -m limbeck.benchmarks.threads [--steps 8] [--rounds 3]

Each policy in a process of its own, which sets it before torch is imported, in turns; the neighbour is one process that
computes without a pause. A step is that of the shipped model as its own teacher, 4 x 512 tokens, all threads. Run it
alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

POLICIES: dict[str, dict[str, str]] = {
    "as it is": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
WARM = 2
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
BUSY = "while True: pass"


def measure(steps: int) -> float:
    """Tokens a second of this process."""
    import torch
    from limbeck.distill.losses import DistillLoss, distillation_loss
    from limbeck.distill.text.packing import tokenize
    from limbeck.distill.text.resolve import documents
    from limbeck.models.checkpoint import load_model
    from limbeck.models.named import SHIPPED
    from limbeck.models.tokenizer import load_tokenizer

    torch.set_flush_denormal(True)
    folder, clock, seen = SHIPPED["zoo"], 0.0, 0
    teacher, student = (load_model(folder, torch.float32) for _ in range(2))
    loss_of = distillation_loss(teacher.requires_grad_(False), DistillLoss())
    text = tokenize(list(documents("stdlib", "test"))[:40], load_tokenizer(folder))
    for number, batch in enumerate(text.sample(batch_size=4, seq_len=512)):
        if number == WARM:
            clock = time.perf_counter()
        if number == WARM + steps:
            break
        loss_of(student, batch, float((batch.labels >= 0).sum())).backward()
        seen += batch.input_ids.numel() if number >= WARM else 0
    return seen / (time.perf_counter() - clock)


def apart(changes: dict[str, str], steps: int) -> float:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | changes
    command = [sys.executable, "-m", "limbeck.benchmarks.threads", "--own", "--steps", str(steps)]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--own", action="store_true", help="of this process alone, as JSON")
    options = parser.parse_args()
    if options.own:
        return print(json.dumps(measure(options.steps)))
    found: dict[str, dict[str, list[float]]] = {}
    for place in ("idle", "beside a busy process"):
        neighbour = subprocess.Popen([sys.executable, "-c", BUSY]) if place != "idle" else None
        try:
            for _ in range(options.rounds):
                for name, changes in POLICIES.items():
                    found.setdefault(name, {}).setdefault(place, []).append(apart(changes, options.steps))
        finally:
            if neighbour is not None:
                neighbour.kill()
    print("| threads wait | idle, tokens/s | beside a busy process | of idle |\n|---|---|---|---|")
    for name, rates in found.items():
        alone, beside = (statistics.median(rates[place]) for place in ("idle", "beside a busy process"))
        print(f"| {name} | {alone:,.0f} | {beside:,.0f} | {beside / alone:.2f} |")
    from limbeck.models.provenance import provenance

    print("\n" + "\n".join(f"- {key}: {value}" for key, value in provenance().items()))


if __name__ == "__main__":
    main()
