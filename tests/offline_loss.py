"""Compiles every configuration of the kernels of norms, activations, loss and attention that the 9B and the small
model can choose, for every GPU that they are stated for; prints one JSON list of what each takes. With the argument
"sample" it is those of the 9B's training step alone, for two GPUs.

Run by tests/test_loss_kernels.py in a process of its own, in which Triton does not interpret.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator

import torch
from limbeck.kernels import attention
from limbeck.kernels.activation import flat_launch
from limbeck.kernels.divergence import Divergence
from limbeck.kernels.launch import CAPABILITIES, Launch
from limbeck.kernels.linear_kl import chunk_launch
from limbeck.kernels.norm import backward_launch, forward_launch, norm_backward_shapes, norm_shapes
from limbeck.tests.offline import compile_launch
from torch import Tensor

BF16, FP32 = torch.bfloat16, torch.float32


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norms() -> Iterator[tuple[str, Launch]]:
    """Hidden states of the 9B, the 12B and the small model, heads, and Mamba's output beside a slice of zxBCdt."""
    for width, groups, dtype in itertools.chain(
        ((width, 1, dtype) for width in (4480, 5120, 8192, 256, 128) for dtype in (BF16, FP32)),
        ((10240, 8, BF16), (10240, 8, FP32), (512, 1, FP32)),
    ):
        x, weight = empty(512, width, dtype=dtype), empty(width, dtype=dtype)
        z = empty(512, 2 * width + 2 * 1024 + 128, dtype=dtype)[:, :width] if groups > 1 or width == 512 else None
        outputs = norm_shapes(x, z, weight, 1e-5, groups)
        name = f"norm {width} / {groups} {dtype}"
        yield name, forward_launch(x, None, z, weight, 1e-5, *outputs, groups)
        shapes = norm_backward_shapes(x, x, z, weight, outputs[1])
        yield name + " backward", backward_launch(x, x, z, weight, outputs[1], shapes)[0]


def activations() -> Iterator[tuple[str, Launch]]:
    for dtype in (BF16, FP32):
        x = empty(512, 15680, dtype=dtype)
        yield f"relu2 {dtype}", flat_launch("relu2_forward", x=x, y=x)
        yield f"relu2 {dtype} backward", flat_launch("relu2_backward", x=x, dy=x, dx=x)
        yield f"swiglu {dtype}", flat_launch("swiglu_forward", gate=x, up=x, y=x)
        yield f"swiglu {dtype} backward", flat_launch("swiglu_backward", gate=x, up=x, dy=x, dgate=x, dup=x)


def losses() -> Iterator[tuple[str, Launch]]:
    logits = {dtype: empty(2048, 131072, dtype=dtype) for dtype in (BF16, FP32)}
    labels, weights = empty(2048, dtype=torch.int64), empty(2048, dtype=FP32)
    per_token = (weights, weights, weights, empty(2048, dtype=torch.bool))
    for dtype, need in ((BF16, True), (FP32, True), (FP32, False)):
        student = logits[dtype]
        for divergence, temperature, mixes, target in itertools.product(
            (*Divergence, None), (1.0, 2.0), (0.0, 0.5), (None, labels)
        ):
            if (target is None and (mixes or divergence is None)) or (divergence is None and temperature != 1):
                continue
            options = (temperature, divergence or Divergence.FORWARD, 1.0, mixes, 2048)
            teacher = None if divergence is None else student
            kind = divergence and divergence.option
            name = f"loss {kind} {dtype} T={temperature} ce={mixes} labels={target is not None} gradient={need}"
            yield name, chunk_launch(student, teacher, target, weights, per_token, options, need)


def decoding(stages: int) -> Iterator[tuple[str, Launch]]:
    """The 9B's heads and the small model's, with the stages of one device."""
    for heads, groups, size, dtype in ((40, 8, 128, BF16), (40, 8, 128, FP32), (8, 2, 32, FP32), (32, 8, 128, BF16)):
        q, cache = empty(2, heads, size, dtype=dtype), empty(2, groups, 4096, size, dtype=dtype)
        parts, join = attention.decode_launches(q, cache, cache, empty(2, dtype=torch.int64), q)
        name = f"decode {heads} / {groups} x {size} {dtype}"
        yield name, parts._replace(arguments=parts.arguments | {"STAGES": stages}, stages=stages)
        yield name + " join", join


SAMPLE = (
    "decode 40 / 8 x 128 torch.bfloat16",
    "norm 4480 / 1 torch.bfloat16", "norm 4480 / 1 torch.bfloat16 backward",
    "norm 10240 / 8 torch.bfloat16", "norm 10240 / 8 torch.bfloat16 backward", "relu2 torch.bfloat16 backward",
    "loss forward torch.bfloat16 T=1.0 ce=0.0 labels=True gradient=True",
)  # fmt: skip


def main() -> None:
    sample = sys.argv[1:] == ["sample"]
    found = []
    for capability in (86, 90) if sample else CAPABILITIES:
        stages = attention.STAGES[capability]
        for name, launch in itertools.chain(norms(), activations(), losses(), decoding(stages)):
            if not sample or name in SAMPLE:
                found.append((name, capability, *compile_launch(launch, capability)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
