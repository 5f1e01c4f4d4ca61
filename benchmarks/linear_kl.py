"""linear_kl on the CPU beside the dense loss: extra peak memory and time of forward and backward, float32.

    python -m limbeck.benchmarks.linear_kl [--tokens 2048] [--vocabulary 131072] [--widths 512 640] [--rounds 1]

The dense loss is the plain one: logits of student and teacher, two log_softmax, kl_div, backward to the student's
hidden states and head. Each measurement is a process of its own, by turns; its extra memory is the high-water mark of
its resident bytes above what it had with inputs alone, so the gradients that both leave count in both. Time is
that of the process on its processors, which a busy machine disturbs less than the clock on the wall (given as well).
Values and gradients of both are compared first, at 64 tokens.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from limbeck.kernels.linear_kl import linear_kl
from limbeck.models.provenance import provenance
from torch import Tensor
from torch.nn import functional as F


def fused(hidden: Tensor, head: Tensor, target: Tensor, target_head: Tensor) -> Tensor:
    return linear_kl(hidden, head, target, target_head).loss


def dense(hidden: Tensor, head: Tensor, target: Tensor, target_head: Tensor) -> Tensor:
    with torch.no_grad():
        expected = F.log_softmax(target @ target_head.T, -1)
    return F.kl_div(F.log_softmax(hidden @ head.T, -1), expected, reduction="batchmean", log_target=True)


LOSSES = {"linear_kl": fused, "dense": dense}


def inputs(tokens: int, vocabulary: int, widths: list[int]) -> list[Tensor]:
    """Student's hidden states and head, which want gradients, and the teacher's: logits of standard deviation one."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for width in widths:
        tensors.append(torch.randn(tokens, width, generator=generator))
        tensors.append(torch.randn(vocabulary, width, generator=generator).mul_(width**-0.5))
    for tensor in tensors[:2]:
        tensor.requires_grad_()
    return tensors


def resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(name: str, tokens: int, vocabulary: int, widths: list[int]) -> dict[str, float]:
    """Runs in a process of its own."""
    torch.set_num_threads(1)
    LOSSES[name](*inputs(4, 64, widths)).backward()  # what a first call loads
    tensors = inputs(tokens, vocabulary, widths)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = resident("VmRSS")
    wall, busy = time.perf_counter(), time.process_time()
    loss = LOSSES[name](*tensors)
    loss.backward()
    seconds = {"seconds": time.process_time() - busy, "wall": time.perf_counter() - wall}
    return {"extra": resident("VmHWM") - before, "loss": loss.item(), **seconds}


def compare(vocabulary: int, widths: list[int]) -> float:
    """Relative RMS difference of the worse of the two gradients."""
    results = []
    for loss_of in LOSSES.values():
        tensors = inputs(64, vocabulary, widths)
        loss_of(*tensors).backward()
        results.append([tensor.grad for tensor in tensors[:2]])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--widths", type=int, nargs=2, default=[512, 640], help="hidden sizes of student and teacher")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--only", choices=LOSSES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.tokens, options.vocabulary, options.widths)))
        return
    difference = compare(options.vocabulary, options.widths)
    assert difference < 1e-4, f"the gradients differ by {difference}"
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in LOSSES}
    words = ["--tokens", options.tokens, "--vocabulary", options.vocabulary, "--widths", *options.widths]
    for _ in range(options.rounds):
        for name in LOSSES:
            command = [sys.executable, "-m", "limbeck.benchmarks.linear_kl", "--only", name, *map(str, words)]
            finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[name].append(json.loads(finished.stdout))
    best = {
        name: {key: min(run[key] for run in runs) for key in ("extra", "seconds", "wall")}
        for name, runs in found.items()
    }
    ratio = {key: best["linear_kl"][key] / best["dense"][key] for key in ("extra", "seconds", "wall")}
    print(f"{options.tokens} tokens, vocabulary {options.vocabulary}, hidden {options.widths}, one thread")
    print(f"gradients differ by {difference:.1e} (relative RMS)\n")
    print("| | extra peak memory, MiB | processor, s | wall, s |\n|---|---|---|---|")
    for name, row in best.items():
        print(f"| {name} | {row['extra'] / 2**20:.0f} | {row['seconds']:.1f} | {row['wall']:.1f} |")
    print(f"| ratio | {ratio['extra']:.3f} | {ratio['seconds']:.2f} | {ratio['wall']:.2f} |")
    facts = provenance()
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in facts.items()))
    if options.json:
        options.json.write_text(json.dumps({"runs": found, "ratio": ratio, "provenance": facts}, indent=1))


if __name__ == "__main__":
    main()
