"""Compiles every configuration of the kernels of experts that Nemotron-3's models can choose, for every GPU that they
are stated for; prints one JSON list of what each takes.

Run by tests/test_moe_kernels.py in a process of its own, in which Triton does not interpret.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from limbeck.kernels.launch import CAPABILITIES, Launch
from limbeck.kernels.moe_launch import gradient_launch, product_launch
from limbeck.tests.offline import compile_launch

# Experts, neurons of one and inputs: Nano's, and Super's, which are latent.
SIZES = {"nano": (128, 1856, 2688), "super": (512, 2688, 1024)}


def launches() -> Iterator[tuple[str, Launch]]:
    for name, (experts, inner, width) in SIZES.items():
        for dtype in (torch.bfloat16, torch.float32):
            for rows in (6, 8192) if dtype == torch.bfloat16 else (8192,):
                x, y = (torch.empty(rows, size, dtype=dtype, device="meta") for size in (width, inner))
                stack = torch.empty(experts, inner, width, dtype=dtype, device="meta")
                ends = torch.empty(experts, dtype=torch.int32, device="meta")
                yield f"{name} {dtype} {rows}", product_launch(x, stack, ends, False, y)
                yield f"{name} {dtype} {rows} turned", product_launch(y, stack, ends, True, x)
                yield f"{name} {dtype} {rows} gradient", gradient_launch(y, x, ends, stack)


def main() -> None:
    print(json.dumps([(name, capability, *compile_launch(launch, capability))
                      for capability in CAPABILITIES for name, launch in launches()]))  # fmt: skip


if __name__ == "__main__":
    main()
