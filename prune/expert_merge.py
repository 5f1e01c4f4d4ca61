"""Experts that go merged into those that stay: the best part of these is kept whole, each of the others takes in what
answers most like it. Source: partial-preservation merging of SlimQwen (arXiv 2605.08738), with neurons aligned.

Alike are two experts by the cosine of their outputs on the tokens that chose the one that goes, weighted as the router
weights it there. A merged expert is the mean of its members' matrices, weighted by the routing weights that each had
over all tokens; before that the neurons of a member are put in the order of those of the expert that it joins, since
an expert is the same function whatever their order. The router keeps the rows of the experts that stay.
Shapes: [N] counted tokens, [E] experts, [k] of a token, [I] neurons, [D] inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.moe import activated
from ..models.hybrid import HybridLM
from .streams import Streams

ROWS = 4096  # tokens at most that two experts are compared on, of one batch


class Members(NamedTuple):
    """One expert's matrices: up and gate [I, D], down [D, I]."""

    up: Tensor
    down: Tensor
    gate: Tensor | None

    def outputs(self, x: Tensor) -> Tensor:
        """[n, D] of x [n, D]"""
        opened = None if self.gate is None else F.linear(x, self.gate)
        return F.linear(activated(F.linear(x, self.up), opened), self.down)

    def neurons(self) -> Tensor:
        """What belongs to each neuron, [I, ...]."""
        return torch.cat([self.up, self.down.mT, *([] if self.gate is None else [self.gate])], 1)

    def ordered(self, order: Tensor) -> Members:
        return Members(self.up[order], self.down[:, order], None if self.gate is None else self.gate[order])


class Use(NamedTuple):
    """Of each expert [E] over all counted tokens: the sum of its routing weights, and REAP's score."""

    weight: Tensor
    score: Tensor


def merged_experts(layer: HybridLM, streams: Streams, kept: Sequence[int], whole: float) -> dict[str, Tensor]:
    """The stacks of experts of `layer`, a model of one, by their names below `mixer.`, in which the experts `kept` have
    taken in the others, all but the share `whole` of them that scores highest. Empty where nothing is merged."""
    stacks = layer.config.kinds[0].experts
    assert stacks is not None
    mixer = layer.layers[0].get_submodule("mixer")
    values = {
        name: tensor for name, tensor in mixer.state_dict().items() if name in (stacks.up, stacks.down, stacks.gate)
    }
    experts = [
        Members(values[stacks.up][e], values[stacks.down][e], values[stacks.gate][e] if stacks.gate in values else None)
        for e in range(len(values[stacks.up]))
    ]
    use = uses(layer, streams, len(experts))
    order = sorted(kept, key=lambda expert: (-float(use.score[expert]), expert))
    hosts = sorted(order[round(whole * len(order)) :])
    gone = [expert for expert in range(len(experts)) if expert not in kept]
    if not hosts or not gone:
        return {}
    nearest = likeness(layer, streams, experts, gone, hosts).argmax(1)
    found = {name: tensor.clone() for name, tensor in values.items()}
    for place, host in enumerate(hosts):
        members = [expert for expert, own in zip(gone, nearest.tolist(), strict=True) if own == place]
        merged = mean_expert(experts, host, members, use.weight)
        for name, tensor in ((stacks.up, merged.up), (stacks.down, merged.down), (stacks.gate, merged.gate)):
            if tensor is not None:
                found[name][host] = tensor
    return found


def mean_expert(experts: Sequence[Members], host: int, members: Sequence[int], weight: Tensor) -> Members:
    """The host with the members taken in, weighted by `weight` [E]; alone it stays the very same."""
    total = float(weight[host]) + sum(float(weight[expert]) for expert in members)
    if not members or not total > 0:
        return experts[host]
    parts = [(float(weight[host]) / total, experts[host])]
    for expert in members:
        order = alignment(experts[host].neurons(), experts[expert].neurons())
        parts.append((float(weight[expert]) / total, experts[expert].ordered(order)))

    def mean(tensors: Sequence[Tensor]) -> Tensor:
        terms = [share * tensor.double() for (share, _), tensor in zip(parts, tensors, strict=True)]
        return torch.stack(terms).sum(0).to(tensors[0].dtype)

    own = [expert for _, expert in parts]
    gates = [expert.gate for expert in own if expert.gate is not None]
    return Members(mean([e.up for e in own]), mean([e.down for e in own]), mean(gates) if gates else None)


def alignment(like: Tensor, other: Tensor) -> Tensor:
    """The order [I] in which the rows of `other` [I, F] stand beside those of `like` whose products with them are the
    largest: pairs that are each other's best, again and again among what is left."""
    products = like.double() @ other.double().T
    order = torch.full((len(like),), -1, device=like.device)
    while bool((order < 0).any()):
        best, back = products.argmax(1), products.argmax(0)
        rows = ((back[best] == torch.arange(len(like), device=like.device)) & (order < 0)).nonzero().flatten()
        order[rows] = best[rows]
        products[rows] = -torch.inf
        products[:, best[rows]] = -torch.inf
    return order


class Routed(NamedTuple):
    """A batch's counted tokens: what experts read [N, D], which [N, k], with which weights, and what they gave, the
    weight included [N, k, D]."""

    inputs: Tensor
    choice: Tensor
    weights: Tensor
    given: Tensor


def routed(layer: HybridLM, streams: Streams) -> Iterator[Routed]:
    stacks = layer.config.kinds[0].experts
    assert stacks is not None
    names = (stacks.inputs, stacks.choice, stacks.weights, stacks.given)
    for number in range(len(streams.hidden)):
        seen = streams.output(layer, number, names)[1]
        inputs, choice, weights, given = (seen[name] for name in names)
        yield Routed(inputs, choice, weights, given.unflatten(1, (choice.shape[1], -1)))


def uses(layer: HybridLM, streams: Streams, experts: int) -> Use:
    weight, worth, count = torch.zeros(3, experts, dtype=torch.float64, device=streams.hidden[0].device)
    for tokens in routed(layer, streams):
        places = tokens.choice.flatten()
        norms = torch.linalg.vector_norm(tokens.given, dim=-1, dtype=torch.float64)
        weight.index_add_(0, places, tokens.weights.flatten().double())
        worth.index_add_(0, places, (norms / tokens.weights.sum(-1, keepdim=True)).flatten().double())
        count.index_add_(0, places, torch.ones_like(places, dtype=torch.float64))
    return Use(weight, worth / count.clamp(min=1))


def likeness(
    layer: HybridLM, streams: Streams, experts: Sequence[Members], gone: Sequence[int], hosts: Sequence[int]
) -> Tensor:
    """The cosines [gone, hosts] of the outputs of experts that go and of those that may take them in."""
    products = torch.zeros(len(gone), len(hosts), dtype=torch.float64, device=streams.hidden[0].device)
    squares, own = torch.zeros_like(products), torch.zeros_like(products[:, :1])
    for tokens in routed(layer, streams):
        for number, expert in enumerate(gone):
            rows, places = (part[:ROWS] for part in (tokens.choice == expert).nonzero(as_tuple=True))
            if not len(rows):
                continue
            given, weights = tokens.given[rows, places].double(), tokens.weights[rows, places, None].double()
            own[number] += given.square().sum()
            for place, host in enumerate(hosts):
                other = experts[host].outputs(tokens.inputs[rows]).double() * weights
                products[number, place] += (given * other).sum()
                squares[number, place] += other.square().sum()
    return products / (own * squares).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
