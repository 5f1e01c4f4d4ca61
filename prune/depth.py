"""Which layers may go: greedily, the one whose absence changes the logits least, then again on what is left.

Source: Minitron-SSM (arXiv 2504.11409) and Nemotron Nano 2 (2508.14444): the mean squared error is taken against the
original model's logits at every step. With logits W h, it is d^T (W^T W) d / V for a difference d of what the head
reads, so that no [tokens, V] logits are ever made. Shapes: [B, T] tokens, [H] hidden, [V] vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..kernels.norm import rms_norm
from ..models.config import LAYER_KINDS, HybridConfig
from ..models.errors import InputError
from ..models.hybrid import HybridLM
from .importance import IGNORED_LABEL, TokenBatch
from .scores import LayerScores

HEAD_ROWS = 8192  # rows of the head that are in float64 at a time

Candidate = tuple[int, ...]  # source layers that go together


@torch.no_grad()
def score_layers(
    model: HybridLM,
    batches: Sequence[TokenBatch],
    *,
    remove: int,
    pairs: bool = False,
    min_layers: Mapping[str, int] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> LayerScores:
    """Orders `remove` layers by how little the logits miss them, over the positions whose label counts.

    Every remaining layer (with `pairs`, every two neighbours of what remains; where the config has a `block`, every
    whole block) is measured again after each removal. One walk through the stack measures all: from the residual
    stream before a candidate, the layers behind it run without it, so that what lies before it is never run twice.
    `min_layers` says how many of a kind (mamba, attention, mlp) must stay. `on_step(done, total)` counts candidates
    times batches; `total` shrinks where `min_layers` forbids some. Raises InputError when the options contradict the
    model.
    """
    config = model.config
    size = step_size(config, pairs)
    least = check_removal(config, remove, size, min_layers or {})
    distance = LogitDistance(model, batches)
    stack = tuple(range(config.num_layers))
    order: list[int] = []
    mse: list[float] = []
    table: list[dict[int, float]] = []
    evaluations = len(stack)
    done = 0
    for step in range(remove // size):
        allowed = removable(config, stack, size, least)
        stride = len(config.block) or 1
        later = sum((len(stack) - size * (further + 1)) // stride + 1 for further in range(1, remove // size - step))
        total = done + (len(allowed) + later) * len(batches)
        sums = dict.fromkeys(allowed, 0.0)
        for number, batch in enumerate(batches):
            hidden = model.embed(batch.input_ids.to(distance.device))
            seq_idx = batch.seq_idx.to(distance.device)
            for position, layer in enumerate(stack):
                candidate = stack[position : position + size]
                if candidate in sums:
                    without = run_layers(model, hidden, stack[position + size :], seq_idx)
                    sums[candidate] += distance.squared_error(number, without)
                    evaluations += len(stack) - position - size if number == 0 else 0
                    done += 1
                    if on_step is not None:
                        on_step(done, total)
                hidden = run_layers(model, hidden, (layer,), seq_idx)
        evaluations += len(stack)
        measured = {candidate: value / distance.logits for candidate, value in sums.items()}
        best = min(measured, key=lambda candidate: (measured[candidate], candidate))
        order += best
        mse.append(measured[best])
        table.append({candidate[0]: value for candidate, value in measured.items()})
        stack = tuple(layer for layer in stack if layer not in best)
    return LayerScores(tuple(order), tuple(mse), tuple(table), evaluations)


def random_layers(
    config: HybridConfig,
    *,
    remove: int,
    seed: int,
    pairs: bool = False,
    min_layers: Mapping[str, int] | None = None,
) -> LayerScores:
    """The baseline: layers in random order, within the same limits as `score_layers`."""
    size = step_size(config, pairs)
    least = check_removal(config, remove, size, min_layers or {})
    generator = random.Random(seed)
    stack = tuple(range(config.num_layers))
    order: list[int] = []
    while len(order) < remove:
        chosen = generator.choice(removable(config, stack, size, least))
        order += chosen
        stack = tuple(layer for layer in stack if layer not in chosen)
    return LayerScores(tuple(order))


class LogitDistance:
    """Squared distances from the original model's logits, from what the head reads.

    `logits` is the number of logits that a sum runs over: counted positions times V.
    """

    def __init__(self, model: HybridLM, batches: Sequence[TokenBatch]) -> None:
        head = model.head_weight
        self.device = head.device
        self.norm, self.eps = model.norm_f.weight, model.config.norm_eps
        self.gram = torch.zeros(head.shape[1], head.shape[1], dtype=torch.float64, device=head.device)
        for rows in head.split(HEAD_ROWS):
            self.gram += rows.double().T @ rows.double()
        self.counted = [(batch.labels != IGNORED_LABEL).to(self.device) for batch in batches]
        self.logits = sum(int(counted.sum()) for counted in self.counted) * head.shape[0]
        if not self.logits:
            raise InputError("depth: the data has no counted token; expected at least one sample of two tokens")
        self.original = [
            model.hidden_states(batch.input_ids.to(self.device), seq_idx=batch.seq_idx.to(self.device))[counted]
            for batch, counted in zip(batches, self.counted, strict=True)
        ]

    def squared_error(self, number: int, hidden: Tensor) -> float:
        """The sum over logits for batch `number`, given the residual stream [B, T, H] before the final norm."""
        read = rms_norm(hidden[self.counted[number]], self.norm, self.eps)
        difference = read.double() - self.original[number].double()
        return float(((difference @ self.gram) * difference).sum())


def run_layers(model: HybridLM, hidden: Tensor, layers: Sequence[int], seq_idx: Tensor) -> Tensor:
    """The residual stream [B, T, H] after these layers, in this order; neighbours run in one call."""
    start = 0
    for stop in range(1, len(layers) + 1):
        if stop == len(layers) or layers[stop] != layers[stop - 1] + 1:
            hidden = model.forward_layers(hidden, layers[start], layers[stop - 1] + 1, seq_idx=seq_idx)
            start = stop
    return hidden


def step_size(config: HybridConfig, pairs: bool) -> int:
    """How many layers go together: a block, two neighbours, or one."""
    return len(config.block) or (2 if pairs else 1)


def removable(config: HybridConfig, stack: Sequence[int], size: int, least: Mapping[str, int]) -> list[Candidate]:
    """Runs of `size` neighbours in the stack that may go, so that every kind keeps its least number of layers;
    whole blocks where the family has them.

    Raises InputError where there is none (two neighbours may be of kinds that cannot spare both).
    """
    pattern = "".join(config.pattern[layer] for layer in stack)
    found = [
        tuple(stack[i : i + size])
        for i in range(0, len(stack) - size + 1, len(config.block) or 1)
        if all(
            pattern.count(letter) - pattern[i : i + size].count(letter) >= least[letter]
            for letter in set(pattern[i : i + size])
        )
    ]
    if not found:
        raise InputError(
            f"depth: min_layers lets no {'two neighbours' if size == 2 else 'layer'} of the {len(stack)} layers"
            f" {pattern} go; expected fewer layers to remove, or lower minima"
        )
    return found


def check_removal(config: HybridConfig, remove: int, size: int, min_layers: Mapping[str, int]) -> dict[str, int]:
    """The least number of layers a letter; raises InputError when `remove` layers cannot go within it."""
    letters = {kind: letter for letter, kind in LAYER_KINDS.items()}
    for kind in min_layers:
        if kind not in letters:
            raise InputError(f"depth: min_layers names the unknown kind {kind!r}; known: {', '.join(letters)}")
    least = {letter: min_layers.get(kind, 0) for kind, letter in letters.items()}
    spares = {letter: max(0, config.pattern.count(letter) - number) for letter, number in least.items()}
    spare = min(sum(spares.values()), config.num_layers - 1)
    if config.block:
        spare = min(*(size * spares[letter] for letter in config.block), config.num_layers - size)
    if not 0 <= remove <= spare or remove % size:
        whole = f", in whole blocks {config.block!r} ({config.family})" if config.block else ""
        raise InputError(
            f"depth: remove is {remove}; expected {'an even' if size == 2 else 'a'} number of at most {spare}{whole},"
            f" which is what {config.num_layers} layers and min_layers leave"
        )
    return least
