"""What is left of a mixture's experts refitted to do, as far as they can, what all of them did.

Of each expert the matrix that gives its output is fitted, on the tokens that choose it now, to what those lack. A token
is served by k experts, so that each goes only 1/k of the way to its own solution: the loss of a token is convex in what
its experts give, and the mean of k changes costs it no more than the mean of their costs. So no order among experts is
needed, and the sum over tokens never grows.
Shapes: [N] counted tokens, [E] experts, [k] of a token, [I] neurons, [D] outputs: the stream's, or the latent size.
"""

from __future__ import annotations

from torch import Tensor

from ..models.hybrid import HybridLM
from ..models.layer import ExpertStacks
from .ridge import RidgeFit
from .streams import Streams

SUM_BYTES = 2**30  # of the moments of experts that are fitted at once


def refit_experts(
    original: HybridLM, pruned: HybridLM, before: Streams, own: Streams, kept: Tensor, ridge: float, multiplier: float
) -> None:
    """Refits, in place, the experts of `pruned`, a model of one layer that makes up for `original`'s; `before`, `own`
    are the streams that enter the two. Outputs are times `multiplier` in the stream, of which the pruned model has the
    `kept` channels; where experts give a latent vector, that is what is fitted."""
    stacks, (chosen, experts) = pruned.config.kinds[0].experts, pruned.config.kinds[0].chosen(pruned.config)
    assert stacks is not None
    down = pruned.get_parameter(f"layers.0.mixer.{stacks.down}").data
    at_once = max(1, SUM_BYTES // (8 * down.shape[2] * (down.shape[1] + down.shape[2])))
    for start in range(0, experts, at_once):
        fits = {expert: RidgeFit() for expert in range(start, min(start + at_once, experts))}
        for number in range(len(own.hidden)):
            lack, read, choice = lacking(original, pruned, before, own, number, kept, stacks, multiplier)
            for expert, fit in fits.items():
                rows, places = (choice == expert).nonzero(as_tuple=True)
                if len(rows):
                    fit.add(lack[rows], read[rows, :, places])
        for expert, fit in fits.items():
            if isinstance(fit.moments, Tensor):  # else no token chooses it
                weights = down[expert].double()
                fit.cross = fit.cross + weights @ fit.moments  # the target is what it gives, and what is lacking
                down[expert] += ((fit.solve(down[expert], ridge) - weights) / chosen).to(down)


def lacking(
    original: HybridLM,
    pruned: HybridLM,
    before: Streams,
    own: Streams,
    number: int,
    kept: Tensor,
    stacks: ExpertStacks,
    multiplier: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of batch `number` what its counted tokens lack after the layer [N, D], what their experts' last matrices read
    [N, I, k], and the experts [N, k]."""
    names = (stacks.choice, stacks.read, stacks.total)
    whole, whole_seen = before.output(original, number, names)
    stream, seen = own.output(pruned, number, names)
    choice = seen[stacks.choice]
    read = seen[stacks.read].unflatten(1, (-1, choice.shape[1]))
    if stacks.total in seen:
        return whole_seen[stacks.total] - seen[stacks.total], read, choice
    mask = own.mask[number]
    return whole[mask][:, kept] - stream[mask], read * multiplier, choice
