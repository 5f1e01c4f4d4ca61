"""What distilling the published 12B into its 9B takes, computed: FLOPs by the shapes, GPU time by the roofline of
`memory-fit mode=train` at a share of the card's peak, memory by its plan. Nothing is run on a GPU; the share of the
peak is an assumption, and an argument.

    python -m limbeck.benchmarks.recipe_cost [--peak-share 0.35] [--gpus 8] [--split 4]

The last column is for rows that are split over `--split` of the GPUs (distill.train.context_parallel).
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
from limbeck.benchmarks.published import PUBLISHED
from limbeck.models.cost.hardware import GIB
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.cost.training import Training, train_memory
from limbeck.models.cost.training_time import UTILISATION, train_time
from limbeck.models.named import read_hardware
from limbeck.models.provenance import provenance

REMOVED = (7, 52, 8, 48, 17, 18)  # layers between the published patterns
# Student, tokens, tokens a row: arXiv 2508.14444; and a brief run, from which a first student is had.
STAGES = (("depth", 60e9, 8192), ("width", 50e9, 8192), ("width", 25e9, 49152), ("width", 1e9, 262144),
          ("width", 1e9, 8192))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peak-share", type=float, default=UTILISATION, help="of the card's dense bf16 rate (assumed)")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--split", type=int, default=4, help="GPUs that share a row")
    given = parser.parse_args()
    card, teacher = read_hardware("h100"), PUBLISHED["nemotron-nano-12b-v2"]
    shallow = teacher.replace(
        pattern="".join(letter for layer, letter in enumerate(teacher.pattern) if layer not in REMOVED)
    )
    students = {"depth": shallow, "width": PUBLISHED["nemotron-nano-9b-v2"]}
    head = ("student", "parameters", "tokens", "row", "FLOPs", "GPU-hours", "a GPU holds", f"rows over {given.split}")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, tokens, row in STAGES:
        student = students[name]
        how = Training(micro_batch=1, seq_len=row, batch=2 * given.gpus, checkpointing=True, teacher="online",
                       teacher_dtype=torch.bfloat16, processes=given.gpus)  # fmt: skip
        whole, parts = (train_memory(student, teacher, dataclasses.replace(how, context_parallel=split))
                        for split in (1, given.split))  # fmt: skip
        step = train_time(student, teacher, how, whole, 1, card, given.peak_share)
        assert step is not None
        steps = tokens / step.tokens
        cells = (name, f"{count_parameters(student):,}", f"{tokens / 1e9:g} 10^9", f"{row:,}",
                 f"{steps * step.flops:.2e}", f"{steps * step.gpu_hours:,.0f}", f"{whole.total / GIB:.1f} GiB",
                 f"{parts.total / GIB:.1f} GiB")  # fmt: skip
        print(f"| {' | '.join(cells)} |")
    print(f"\ncomputed: {card.name}, {given.peak_share:.0%} of {card.bf16_tflops:g} TFLOP/s, {given.gpus} GPUs (FSDP2)")
    print("\n".join(f"- {key}: {value}" for key, value in provenance().items()))


if __name__ == "__main__":
    main()
