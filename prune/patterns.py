"""Which layer patterns can be left of a model's: subsequences, within rules, counted without listing them.

Two choices of layers that leave the same letters are the same pattern. A pattern is found by its leftmost choice,
letter by letter, which makes a deterministic automaton over the source: its paths are counted, listed, or followed.
Shapes: a pattern is a text with one letter a layer (models/kinds.py).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..models.errors import InputError
from ..models.kinds import key_of, kind_by_key


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a pattern has to keep to.

    min_layers: least number of layers of a kind, by its key (mamba, attention, mlp). longest_run: most neighbours of
    one kind, 0 for any number. pairs: layers go two neighbours at a time (the second pair may have become neighbours by
    the first). Raises InputError from the constructor.
    """

    min_layers: dict[str, int] = dataclasses.field(default_factory=dict)
    longest_run: int = 0
    pairs: bool = False

    def __post_init__(self) -> None:
        for kind, number in self.min_layers.items():
            kind_by_key(kind, "rules: min_layers")
            if number < 0:
                raise InputError(f"rules: min_layers has {kind}={number}; expected at least 0")
        if self.longest_run < 0:
            raise InputError(f"rules: longest_run is {self.longest_run}; expected at least 1, or 0 for any length")

    def least(self, key: str) -> int:
        """Of layers of the kind that options name so, variants among them."""
        return self.min_layers.get(key, 0)


def broken_rule(pattern: str, rules: Rules) -> str | None:
    """What a pattern by itself does not keep to, in words; None where it keeps to all."""
    there = Counter(map(key_of, pattern))
    for key, number in rules.min_layers.items():
        if there[key] < number:
            return f"{there[key]} {key} layers where min_layers.{key} is {number}"
    longest = max((len(list(run)) for _, run in itertools.groupby(pattern)), default=0)
    if 0 < rules.longest_run < longest:
        return f"{longest} like layers in a row where longest_run is {rules.longest_run}"
    return None


def odd_gap(layers: Sequence[int], total: int) -> bool:
    """Whether between the `layers` that stay of `total` some run of removed ones is not made of pairs."""
    edges = (-1, *layers, total)
    return any((after - before) % 2 == 0 for before, after in itertools.pairwise(edges))


def embed(
    source: str, pattern: str, rules: Rules | None = None, cost: Mapping[int, float] | None = None, *, size: int = 1
) -> tuple[int, ...] | None:
    """The layers of `source` that stay when it becomes `pattern`, whole blocks of `size`; None where no choice within
    the rules does.

    Of several choices the one whose removed layers cost least together, by `cost` (0 for those it does not name); of
    equal ones the leftmost.
    """
    rules, cost = rules or Rules(), cost or {}
    if broken_rule(pattern, rules) is not None or len(pattern) % size:
        return None
    left, wanted, pairs = blocks_of(source, size), blocks_of(pattern, size), by_pairs(rules, size)
    # best[k]: least cost of making wanted[k:] out of left[place:], and the step there (keep the block or not).
    impossible = float("inf")
    best = [impossible] * len(wanted) + [0.0]
    kept: list[list[bool]] = []
    for place in reversed(range(len(left))):
        row, choices = list(best), []
        gone = sum(cost.get(layer, 0.0) for layer in range(place * size, (place + 1) * size))
        for k in range(len(wanted) + 1):
            fits = k < len(wanted) and wanted[k] == left[place] and not (pairs and (place - k) % 2)
            keep = best[k + 1] if fits else impossible
            drop = best[k] + gone
            row[k] = min(keep, drop)
            choices.append(keep <= drop and keep < impossible)
        best = row
        kept.append(choices)
    # Kept layers of like parity as their numbers leave even gaps; the last gap is even when the lengths agree.
    if best[0] == impossible or (pairs and (len(left) - len(wanted)) % 2):
        return None
    blocks: list[int] = []
    for place, choices in enumerate(reversed(kept)):
        if choices[len(blocks)]:
            blocks.append(place)
    return tuple(layer for block in blocks for layer in range(block * size, (block + 1) * size))


def blocks_of(pattern: str, size: int) -> tuple[str, ...]:
    """The blocks of a pattern, each the letters of the layers that come and go together."""
    return tuple(pattern[start : start + size] for start in range(0, len(pattern), size))


def by_pairs(rules: Rules, size: int) -> bool:
    """Whether blocks go two at a time: those of an even size are pairs of layers each."""
    return rules.pairs and size % 2 == 1


class State(NamedTuple):
    """Where a leftmost choice stands: blocks kept, the next block of the source, the run so far, and of each kind how
    many layers are kept, counted up to the least number (so that few states are different)."""

    kept: int
    place: int
    last: str
    run: int
    counts: tuple[int, ...]


def automaton(
    source: Sequence[str], blocks: int, rules: Rules
) -> tuple[Callable[[State], Iterator[tuple[str, State]]], State]:
    """The steps from a state, by the blocks that they keep, and the state to begin with."""
    known, keys = tuple(dict.fromkeys(source)), kinds_in(source)
    least, size = [rules.least(key) for key in keys], len(source[0])
    inside = {block: [sum(key_of(letter) == key for letter in block) for key in keys] for block in known}

    def steps(state: State) -> Iterator[tuple[str, State]]:
        stop = len(source) - (blocks - state.kept) + 1
        for block in known:
            run = state.run + 1 if block == state.last else 1
            if size == 1 and 0 < rules.longest_run < run:
                continue
            stride = 2 if by_pairs(rules, size) else 1
            found = next((p for p in range(state.place, stop, stride) if source[p] == block), None)
            if found is not None:
                counts = tuple(
                    min(count + more, most)
                    for more, count, most in zip(inside[block], state.counts, least, strict=True)
                )
                last, run = (block, run) if rules.longest_run else ("", 0)
                yield block, State(state.kept + 1, found + 1, last, run, counts)

    return steps, State(0, 0, "", 0, (0,) * len(keys))


def kinds_in(source: Sequence[str]) -> tuple[str, ...]:
    """The keys of the kinds of a source's layers."""
    return tuple(dict.fromkeys(map(key_of, "".join(source))))


def ways(source: Sequence[str], blocks: int, rules: Rules) -> Callable[[State], int]:
    """How many patterns of so many blocks continue a state."""
    steps, _ = automaton(source, blocks, rules)
    keys = kinds_in(source)
    least = tuple(rules.least(key) for key in keys)
    missing = [key for key, number in rules.min_layers.items() if number and key not in keys]
    even = not (by_pairs(rules, len(source[0])) and (len(source) - blocks) % 2)
    known: dict[State, int] = {}

    def count(state: State) -> int:
        waiting = [state]  # no recursion: patterns have thousands of layers
        while waiting:
            at = waiting[-1]
            if at.kept == blocks:
                known[at] = int(at.counts == least and not missing and even)
            elif at not in known:
                after = [each for _, each in steps(at)]
                if unknown := [each for each in after if each not in known]:
                    waiting += unknown
                    continue
                known[at] = sum(known[each] for each in after)
            waiting.pop()
        return known[state]

    return count


def count_patterns(source: str, layers: int, rules: Rules | None = None, *, size: int = 1) -> int:
    """How many different patterns of `layers` layers can be left of `source`, whose blocks of `size` layers come and go
    together."""
    rules, blocks = rules or Rules(), blocks_of(source, size)
    return ways(blocks, layers // size, rules)(automaton(blocks, layers // size, rules)[1])


def patterns(source: str, layers: int, rules: Rules | None = None, *, size: int = 1) -> Iterator[str]:
    """The patterns that `count_patterns` counts, one by one; nothing that leads nowhere is walked."""
    rules, blocks, number = rules or Rules(), blocks_of(source, size), layers // size
    steps, start = automaton(blocks, number, rules)
    count = ways(blocks, number, rules)

    waiting = [(start, "")] if count(start) else []
    while waiting:
        state, before = waiting.pop()
        if state.kept == number:
            yield before
            continue
        waiting += reversed([(after, before + block) for block, after in steps(state) if count(after)])
