"""Local distillation: a few gradient steps for each layer of the pruned model, against the source's own stream.

After least squares has refitted what reads and what writes the stream, all weights of a layer, its convolution, decays,
gates and router as well, are moved so that the stream after the layer comes nearer to the source's: it makes up for its
own missing units and for the errors of the layers before it. One layer is trained at a time, on calibration tokens:
neither a teacher's logits nor the gradients and optimizer states of a whole model are needed.

The loss is the squared error of a token's stream relative to that stream, the mean over tokens: the next norm divides
by its size. Steps are Adam's (arXiv 1412.6980), the rate relative to the root mean square of each weight, since what a
layer has (decays, norms, matrices) differs in size by orders of magnitude, and it falls to zero by a cosine.
Shapes: [B, T] tokens, [N] counted ones, [h] channels of the pruned stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.hybrid import HybridLM
from .ridge import check_finite
from .streams import Streams

BETAS = (0.9, 0.95)
LEAST_SIZE = 1e-3  # of a weight that the rate is relative to: one of zeros can move, too
NOTHING = 1e-9  # an error far above float32's rounding (1e-14 squared), and far below that of any layer that was cut


def distill_layer(layer: HybridLM, own: Streams, source: Streams, kept: Tensor, steps: int, rate: float) -> None:
    """Trains the weights of `layer`, a model of one layer, in place: `steps`, each on one batch of `own`, the streams
    before it, so that it gives the `kept` channels of `source`, the streams of the source after its layer. It stays as
    it was where that does not bring the mean error down, or where nothing is lost."""
    weights = {name: weight for name, weight in layer.named_parameters() if name.startswith("layers.0.")}
    numbers = [number for number, mask in enumerate(own.mask) if mask.any()]
    before = mean_error(layer, own, source, kept, numbers)
    check_finite(torch.tensor(before))
    if before <= NOTHING:
        return
    first = {name: weight.detach().clone() for name, weight in weights.items()}
    # Steps are too small for 16-bit weights: copies of full precision collect them.
    masters = {name: w.to(torch.promote_types(w.dtype, torch.float32), copy=True) for name, w in first.items()}
    optimizer = torch.optim.Adam([{"params": [w], "lr": rate * size_of(w)} for w in masters.values()], betas=BETAS)
    fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    for step in range(steps):
        number = numbers[step % len(numbers)]
        with torch.enable_grad():
            for weight in weights.values():
                weight.requires_grad_(True)
            loss = error(layer, own, number, target_of(source, number, kept))
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for master, gradient in zip(masters.values(), gradients, strict=True):
            master.grad = None if gradient is None else gradient.to(master)
        optimizer.step()
        fall.step()
        put(weights, masters)
    if not mean_error(layer, own, source, kept, numbers) < before:
        put(weights, first)


def error(layer: HybridLM, own: Streams, number: int, target: Tensor) -> Tensor:
    """What batch `number` gives, less `target` [N, h]: squares relative to the target's, the mean over tokens."""
    out = layer.forward_layers(own.hidden[number], 0, 1, seq_idx=own.seq_idx[number])[own.mask[number]].float()
    target = target.float()
    size = target.square().sum(1)
    return ((out - target).square().sum(1) / size.clamp(min=torch.finfo(size.dtype).tiny)).mean()


def target_of(source: Streams, number: int, kept: Tensor) -> Tensor:
    return source.hidden[number][source.mask[number]][:, kept]


@torch.no_grad()
def mean_error(layer: HybridLM, own: Streams, source: Streams, kept: Tensor, numbers: Sequence[int]) -> float:
    return sum(float(error(layer, own, n, target_of(source, n, kept))) for n in numbers) / len(numbers)


def size_of(weight: Tensor) -> float:
    return max(float(weight.square().mean().sqrt()), LEAST_SIZE)


def put(weights: dict[str, torch.nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.requires_grad_(False).copy_(values[name])
