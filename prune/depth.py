"""Which layers may go: greedily, the one whose absence costs least, then again on what is left; or all at one look.

Sources: Minitron-SSM (arXiv 2504.11409) and Nemotron Nano 2 (2508.14444): the logits' mean squared error against the
original model at every step; Minitron (2407.14679): perplexity, and ShortGPT's block influence (2403.03853).
One pass along the layers moves every candidate's residual stream on beside the whole model's, so that a prefix is run
once and a layer's weights are read once. From the second step on candidates race (`Race.step`).
Shapes: [B, T] tokens, [N] counted tokens, [H] hidden, [V] vocabulary.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..kernels.norm import rms_norm
from ..models import processes
from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.hybrid import HybridLM
from ..models.kinds import KINDS, key_of, kind_by_key
from ..models.multipliers import scaled
from ..models.offload import STREAM_BYTES, Layer, Layers, layers_of
from .depth_metrics import METRICS, DepthMetric, Reading
from .importance import IGNORED_LABEL, TokenBatch
from .scores import LayerScores

TABLES = ("first", "all")
LEGS = 4  # of a race that reads its weights again for each: one less to run costs more than one more to read

Candidate = tuple[int, ...]  # source layers that go together
OnStep = Callable[[int, int], None]


@torch.no_grad()
def score_layers(
    model: HybridLM | Layers,
    batches: Sequence[TokenBatch],
    *,
    remove: int,
    pairs: bool = False,
    min_layers: Mapping[str, int] | None = None,
    metric: str | DepthMetric = "mse",
    iterative: bool = True,
    table: str = "first",
    stream_bytes: int = STREAM_BYTES,
    on_step: OnStep | None = None,
) -> LayerScores:
    """Orders `remove` layers by how little they are missed, over the positions whose label counts.

    Every remaining layer (with `pairs`, every two neighbours of what remains; where the config has a `block`, every
    whole block) is measured again after each removal; not `iterative`: once, and they go in that order, as far as
    `min_layers`, what must stay of a kind (mamba, attention, mlp), lets them.
    `metric`: "mse" the mean squared error of the logits against the original model's, "kl" KL(original || without),
    "perplexity" the mean cross-entropy of the labels (its logarithm), each of the model without the candidate;
    "block_influence" 1 - mean cosine of the residual stream before and after it.
    The first step measures every candidate; later ones as much of each as it takes to find the best, unless `table`
    is "all". Of many processes each has batches of its own.
    `stream_bytes` bounds the residual streams that are held; beside them are the original's last ones, [N, H], and
    what a single layer needs for a batch. `on_step(done, total)` counts candidates times batches; `total` is what may
    be left at most. Raises InputError when the options contradict the model or each other.
    """
    name_of = metric if isinstance(metric, str) else metric.name
    for name, value, known in (("metric", name_of, METRICS), ("table", table, TABLES)):
        if value not in known:
            raise InputError(f"depth: {name} is {value!r}; known: {', '.join(known)}")
    source = layers_of(model)
    config = source.config
    size = step_size(config, pairs)
    least = check_removal(config, remove, size, min_layers or {})
    steps = remove // size
    measured_steps = steps if iterative else min(steps, 1)
    counts = [(config.num_layers - size * (step + 1)) // config.block_size + 1 for step in range(measured_steps)]
    race = Race(source, batches, metric, stream_bytes, counts, on_step)
    stack = tuple(range(config.num_layers))
    order: list[int] = []
    values: list[float] = []
    tables: list[dict[int, float]] = []
    measured: dict[Candidate, float] = {}
    for step in range(steps):
        allowed = removable(config, stack, size, least)
        if iterative or step == 0:
            measured = race.step(stack, allowed, size, whole=step == 0 or table == "all")
            tables.append({candidate[0]: value for candidate, value in measured.items()})
        left = [candidate for candidate in allowed if candidate in measured]
        if not left:
            raise InputError(
                f"depth: after {len(order)} layers no two neighbours are left that were measured together;"
                " expected fewer layers to remove, or iterative=true"
            )
        best = min(left, key=lambda candidate: (measured[candidate], candidate))
        order += best
        values.append(measured[best])
        stack = tuple(layer for layer in stack if layer not in best)
    return LayerScores(tuple(order), tuple(values), tuple(tables), race.layer_evaluations(), name_of)


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


class Race:
    """Measures candidates for removal by a metric, batch after batch or in groups of them; so many at most a step."""

    def __init__(
        self,
        source: Layers,
        batches: Sequence[TokenBatch],
        metric: str | DepthMetric,
        stream_bytes: int,
        candidates: Sequence[int] = (),
        on_step: OnStep | None = None,
    ) -> None:
        self.source, self.stream_bytes, self.later, self.on_step = source, stream_bytes, list(candidates), on_step
        self.ids = [batch.input_ids for batch in batches]
        self.seq_idx = [batch.seq_idx.to(source.device) for batch in batches]
        labels = [batch.labels.to(source.device) for batch in batches]
        self.counted = [own != IGNORED_LABEL for own in labels]
        self.labels = [own[mask] for own, mask in zip(labels, self.counted, strict=True)]
        self.originals: dict[int, Tensor] = {}  # what the head reads of the original model, [N, H] a batch
        # All processes take part in every exchange: they agree on the number of batches (that of the one with most of
        # them), on one way to group them, and on what is counted.
        self.numbers = max(processes.gather(len(batches)))
        self.largest = max(processes.gather(max((ids.numel() for ids in self.ids), default=0)))
        self.grouped = any(processes.gather(source.streamed))
        sums = torch.tensor([sum(len(own) for own in self.labels), len(batches)], dtype=torch.float64)
        tokens, self.batches = processes.all_sum(sums).tolist()
        if not tokens:
            raise InputError("depth: the data has no counted token; expected at least one sample of two tokens")
        with processes.together():
            self.metric = METRICS[metric](source) if isinstance(metric, str) else metric
            self.norm = source.tensor("norm_f.weight")
        self.terms = tokens * self.metric.terms
        self.runs = self.done = self.pending = 0
        self.total = sum(self.later) * self.numbers

    def layer_evaluations(self) -> float:
        """Layers run, each over the whole calibration set."""
        return float(processes.all_sum(torch.tensor(float(self.runs), dtype=torch.float64))) / self.batches

    def step(self, stack: Candidate, allowed: Sequence[Candidate], size: int, whole: bool) -> dict[Candidate, float]:
        """The values of the candidates for removal from the stack; unless they are wanted `whole`, the best one's."""
        whole = whole or self.metric.needs == "stream"  # one pass gives all of them: nothing to save
        groups, at_once = self.groups(len(allowed), size, whole)
        sums, reached = dict.fromkeys(allowed, 0.0), dict.fromkeys(allowed, 0)  # reached: groups that are in the sum
        self.later = self.later[1:]
        while True:
            # Terms are not negative, so sums only grow. Measured further is always the smallest sum so far; once that
            # one is complete every other is larger already, and it has won, however few batches the others have seen.
            # Ties go to the first layer, as in a whole table. For a whole table it is the one with the fewest groups.
            leader = min(allowed, key=lambda own: (reached[own] if whole else sums[own], sums[own], own))
            group = reached[leader]
            if group == len(groups):
                break
            # A pass for one candidate costs nearly as many prefixes and reads as for several, so whoever stands at the
            # same group goes along that the leader will not get rid of: whose sum is within what the leader's comes to
            # if it continues as it has. This guess decides only what is measured sooner, never who wins.
            expected = sums[leader] * self.numbers / groups[group].start if group and not whole else math.inf
            chosen = [own for own in allowed if reached[own] == group and sums[own] <= expected]
            for begin in range(0, len(chosen), at_once):
                part = chosen[begin : begin + at_once]
                self.pending = len(part) * len(groups[group])
                for candidate, terms in zip(part, self.measure(stack, groups[group], part, size), strict=True):
                    for term in terms:  # one by one: the same sum whatever the groups
                        sums[candidate] += term
                    if not math.isfinite(sums[candidate]):
                        raise InputError(
                            f"depth: without layers {list(candidate)} the {self.metric.name} is not finite; expected a"
                            " model whose activations are"
                        )
                    reached[candidate] += 1
                self.done += self.pending
            self.tell(reached, groups)
        if whole:
            return {candidate: total / self.terms for candidate, total in sums.items()}
        if not self.later:
            self.tell({}, groups)
        return {leader: sums[leader] / self.terms}

    def tell(self, reached: Mapping[Candidate, int], groups: Sequence[range]) -> None:
        """Counts candidates times batches."""
        left = sum(self.numbers - (groups[at].start if at < len(groups) else self.numbers) for at in reached.values())
        self.total = self.done + left + sum(self.later) * self.numbers
        if self.on_step is not None:
            self.on_step(self.done, self.total)

    def tell_part(self, fraction: float) -> None:
        """Counts the part of a long pass that is done."""
        if self.grouped and self.on_step is not None:
            self.on_step(self.done + int(fraction * self.pending), self.total)

    def groups(self, candidates: int, size: int, whole: bool) -> tuple[list[range], int]:
        """Runs of batches that pass at once, one each where the weights are in memory, and how many candidates at once;
        within `stream_bytes`. Raises InputError where not even one of either fits."""
        stream = self.largest * self.source.config.hidden_size * self.source.dtype.itemsize
        fit = self.stream_bytes // stream
        across = self.metric.needs == "stream"
        copies = size + 1 if across else 2  # the whole model's, and those of `size` candidates that overlap, or of one
        if fit < copies:
            raise InputError(
                f"depth: a batch of {self.largest} tokens needs {copies * stream / 2**30:.3g} GiB for residual streams;"
                f" the bound is {self.stream_bytes / 2**30:.3g} GiB: raise it (streams_gib), or give fewer or shorter"
                " samples at once (depth_batch, seq_len)"
            )
        at_once = candidates if across else min(candidates, fit - 1)
        together = fit // (copies if across else at_once + 1) if self.grouped else 1
        # In legs where there is much to save; costs by the labels hardly part, since all have the text's own entropy.
        if not whole and self.metric.needs == "original":
            together = min(together, math.ceil(self.numbers / LEGS))
        return [range(i, min(i + together, self.numbers)) for i in range(0, self.numbers, together)], at_once

    def measure(
        self, stack: Candidate, numbers: range, candidates: Sequence[Candidate], size: int
    ) -> list[list[float]]:
        """Each candidate's terms, summed over the processes, a batch each: [candidates][numbers]."""
        costs = torch.zeros(len(candidates), len(numbers), dtype=torch.float64, device=self.source.device)
        mine = [number for number in numbers if number < len(self.ids)]
        with processes.together():
            if mine:
                run = self.costs_across if self.metric.needs == "stream" else self.costs_without
                costs[:, : len(mine)] = run(stack, mine, candidates, size)
        return processes.all_sum(costs).tolist()

    def costs_without(
        self, stack: Candidate, numbers: Sequence[int], candidates: Sequence[Candidate], size: int
    ) -> Tensor:
        """Costs [candidates, numbers] of the model without each candidate, whose stream parts from the stack's own
        before the candidate and skips it. In the first pass the stack is the original: its last stream is kept."""
        begins = {stack.index(candidate[0]): candidate for candidate in candidates}
        first = self.metric.needs == "original" and any(number not in self.originals for number in numbers)
        assert not first or len(stack) == self.source.config.num_layers
        last = len(stack) if first else max(begins)  # from here on nobody parts from the stack's own stream
        after = any(begin + size < len(stack) for begin in begins)
        hidden = self.source.embed([self.ids[number] for number in numbers])
        streams: dict[Candidate, list[Tensor]] = {}
        for place, layer in enumerate(self.source.in_turn(stack[: len(stack) if after else last])):
            if place in begins:
                streams[begins[place]] = list(hidden)
            for begin, candidate in begins.items():
                if begin + size <= place:
                    self.advance(layer, streams[candidate], numbers)
            if place < last:
                self.advance(layer, hidden, numbers)
            else:
                hidden = []
            self.tell_part((place + 1) / len(stack))
        for candidate in candidates:  # one at the very end, which nothing follows
            streams.setdefault(candidate, hidden)
        if first:
            own = zip(numbers, hidden, strict=True)
            self.originals |= {number: self.head_input(number, stream) for number, stream in own}
        readings = []
        for place, number in enumerate(numbers):
            for stream in streams.values():  # in place of the whole stream: what is read of it is less
                stream[place] = self.head_input(number, stream[place])
            smaller = [streams[candidate][place] for candidate in candidates]
            readings.append(Reading(self.originals.get(number), self.labels[number], smaller))
        return torch.stack(self.metric.costs(readings), 1)

    def costs_across(
        self, stack: Candidate, numbers: Sequence[int], candidates: Sequence[Candidate], size: int
    ) -> Tensor:
        """Costs [candidates, numbers] by the stack's own stream before and after each candidate."""
        rows = {stack.index(candidate[0]): row for row, candidate in enumerate(candidates)}
        costs = torch.zeros(len(candidates), len(numbers), dtype=torch.float64, device=self.source.device)
        hidden = self.source.embed([self.ids[number] for number in numbers])
        held: dict[int, list[Tensor]] = {}
        for place, layer in enumerate(self.source.in_turn(stack[: max(rows) + size])):
            if place in rows:
                held[place] = list(hidden)
            self.advance(layer, hidden, numbers)
            begin = place + 1 - size
            for column, before in enumerate(held.pop(begin, [])):
                number = numbers[column]
                mask = self.counted[number]
                reading = Reading(before[mask], self.labels[number], [hidden[column][mask]])
                costs[rows[begin], column] = self.metric.costs([reading])[0][0]
            self.tell_part((place + 1) / len(stack))
        return costs

    def advance(self, layer: Layer, hidden: list[Tensor], numbers: Sequence[int]) -> None:
        """Moves a stream of these batches on, in place of the list."""
        for place, number in enumerate(numbers):
            hidden[place] = layer.forward(hidden[place], self.seq_idx[number])
        self.runs += len(numbers)

    def head_input(self, number: int, hidden: Tensor) -> Tensor:
        """What the head reads at the counted tokens of a batch, [N, H]."""
        config = self.source.config
        normed = rms_norm(hidden[self.counted[number]], self.norm, config.norm_eps)
        return scaled(normed, config.multipliers.logits)


def step_size(config: HybridConfig, pairs: bool) -> int:
    """How many layers go together: a block, two neighbours, or one."""
    return config.block_size if config.family_record.blocks else 2 if pairs else 1


def removable(config: HybridConfig, stack: Sequence[int], size: int, least: Mapping[str, int]) -> list[Candidate]:
    """Runs of `size` neighbours in the stack that may go, so that every kind keeps its least number of layers (by its
    key); whole blocks where the family has them.

    Raises InputError where there is none (two neighbours may be of kinds that cannot spare both).
    """
    pattern = "".join(config.pattern[layer] for layer in stack)
    keys = [key_of(letter) for letter in pattern]
    candidates = [
        tuple(stack[i : i + size])
        for i in range(0, len(stack) - size + 1, config.block_size)
        if all(keys.count(key) - keys[i : i + size].count(key) >= least[key] for key in set(keys[i : i + size]))
    ]
    if not candidates:
        raise InputError(
            f"depth: min_layers lets no {'two neighbours' if size == 2 else 'layer'} of the {len(stack)} layers"
            f" {pattern} go; expected fewer layers to remove, or lower minima"
        )
    return candidates


def check_removal(config: HybridConfig, remove: int, size: int, min_layers: Mapping[str, int]) -> dict[str, int]:
    """The least number of layers of every kind, by its key; raises InputError when `remove` layers cannot go within
    it."""
    least = {kind.key: 0 for kind in KINDS.values()}
    for key, number in min_layers.items():
        least[kind_by_key(key, "depth: min_layers").key] = number
    there = Counter(map(key_of, config.pattern))
    spares = {key: max(0, there[key] - number) for key, number in least.items()}
    spare = min(sum(spares.values()), config.num_layers - 1)
    blocks, unit = config.family_record.blocks, config.block_size
    if blocks:  # whole ones go: as many of each as its scarcest kind allows
        inside = [Counter(map(key_of, block)) for block in blocks]
        spare = sum(size * min(spares[key] // count for key, count in block.items()) for block in inside)
        spare = min(spare, config.num_layers - size)
    if not 0 <= remove <= spare or remove % size:
        raise InputError(
            f"depth: remove is {remove / unit:g}; expected {'an even' if size == 2 * unit else 'a'} number of at most"
            f" {spare // unit}, which is what {config.num_layers // unit} layers and min_layers leave"
        )
    return least
