"""What comes and goes while a model runs, by running one layer of each kind on tensors without memory (`simulate`).

Layers of a kind are alike, so that the highest moment of a model is that of one with each kind once, whatever the
number of layers: between two layers the residual stream alone is passed on. What a decoding step keeps of a layer for
the next one is counted for each layer. Every answer is kept, by the config of those few layers and by what was run.
Bytes are those of a GPU's allocator, or of a CPU's. Shapes: [B] batch, [T] tokens of a call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ...kernels.tracing import tracing
from ..config import HybridConfig
from ..generate.cache import Cache
from ..generate.generate import last_logits
from ..hybrid import HybridLM
from .hardware import Place, round_up
from .parameters import num_tensors
from .simulate import Stand, Tracker, advance, decode, without_memory

DTYPES = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


@dataclasses.dataclass(frozen=True)
class Transient:
    """Bytes at the highest moment of the prefill and of a decoding step, that step's two sets of logits (the last and
    the next) apart. 0 where a context of one token decodes nothing."""

    prefill: int
    decode: int
    logits: int


@dataclasses.dataclass(frozen=True)
class Traced:
    """A few layers, bytes of a weight's and of an SSM state's number, where they run, and the batch."""

    config: HybridConfig
    weight_bytes: int
    ssm_bytes: int
    place: Place
    batch: int

    def cache(self, length: int, past: int) -> Cache:
        """For `length` tokens, `past` of which are there."""
        dtype, ssm_dtype = DTYPES[self.weight_bytes], DTYPES[self.ssm_bytes]
        cache = Cache(self.config, self.batch, length, dtype=dtype, device=self.place.device, ssm_dtype=ssm_dtype)
        advance(cache, past)
        return cache

    def empty(self, *sizes: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor [B, *sizes] of the weights' dtype."""
        return torch.empty(self.batch, *sizes, dtype=dtype or DTYPES[self.weight_bytes], device=self.place.device)


def transient(
    config: HybridConfig,
    context: int,
    batch: int,
    chunk: int,
    weight_bytes: int,
    ssm_bytes: int,
    place: Place,
    gathered: int = 0,
) -> Transient:
    """Of `batch` sequences of `context` tokens, the last one decoded, the others prefilled in chunks. Chunks differ by
    their past alone: the first, the last whole one and the rest after it are run. Where the config is a rank's, its
    logits are a part of `gathered` in all, which it is given beside its own and keeps alone."""
    few = alike(config)
    traced = Traced(few, weight_bytes, ssm_bytes, place, batch)
    tokens = max(context - 1, 1)
    whole, rest = divmod(tokens, chunk)
    length = min(chunk, tokens)
    moments, given = [chunk_peaks(traced, length).at(0)], run_head(traced, length).given
    if whole > 1:  # beside what the chunk before gave
        moments.append(given + chunk_peaks(traced, chunk).at((whole - 1) * chunk))
    if whole and rest:
        moments.append(given + chunk_peaks(traced, rest).at(whole * chunk))
    head = run_head(traced, rest or chunk)
    whole_logits = round_up(batch * gathered * weight_bytes, place)
    moments.append(head.peak + whole_logits)
    if context == 1:
        return Transient(max(moments), 0, 0)
    steps = decode_peaks(traced)
    highest = steps.at(context - 1)
    more = sum((config.pattern.count(kind) - few.pattern.count(kind)) * size for kind, size in steps.left)
    logits = 2 * whole_logits + head.logits if gathered else 2 * head.logits
    return Transient(max(moments), highest + more - 2 * head.logits, logits)


class Moment(NamedTuple):
    """Bytes at the highest moment of a run, whether an operator's workspace is in them that grows unevenly, and what is
    left of a layer of each kind after it: (kind, bytes)."""

    bytes: int
    uneven: bool
    left: tuple[tuple[str, int], ...] = ()


class Growth:
    """The highest moments of runs by the tokens that the cache held. Every tensor grows evenly with them or stays
    as it is, so that the highest moment is convex and never falls: between two equal ones, and between neighbours of
    three on a straight line, it is known without being run. Not so where FlashAttention shares out few queries' keys:
    there each is run."""

    def __init__(self, run: Callable[[int], Moment]) -> None:
        self.run, self.known = run, dict[int, Moment]()

    def at(self, past: int) -> int:
        if past not in self.known:
            line = self.between(past)
            self.known[past] = self.run(past) if line is None else Moment(line, False)
        return self.known[past].bytes

    @property
    def left(self) -> tuple[tuple[str, int], ...]:
        """What is left of layers, however many tokens there were."""
        return next(iter(self.known.values())).left

    def between(self, past: int) -> int | None:
        below, above = (sorted(p for p in self.known if (p < past) == less) for less in (True, False))
        if not below or not above or self.known[above[0]].uneven:
            return None
        (left, right), others = (below[-1], above[0]), (*below[-2:-1], *above[1:2])
        start, rise, run = self.at(left), self.at(right) - self.at(left), right - left
        on_line = any((self.at(other) - start) * run == rise * (other - left) for other in others)
        return start + rise * (past - left) // run if on_line or not rise else None


def alike(config: HybridConfig) -> HybridConfig:
    """A config whose few layers show what all of this one's do: each kind once, after a first layer (beside which
    the embedding is not held a second time)."""
    first, later = config.pattern[0], sorted(set(config.pattern[1:]))
    if first in later:  # any kind may come first; the one of the fewest tensors is run fastest
        first = min(later, key=lambda kind: num_tensors(config.replace(pattern=kind)))
    return config.replace(
        pattern=first + "".join(later), mtp_steps=0, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )


@contextlib.contextmanager
def running(traced: Traced) -> Iterator[tuple[HybridLM, Tracker]]:
    """The model without memory, and what counts its tensors, in the modes that both need."""
    mode, tracker, model = session(traced.config, traced.weight_bytes, traced.place)
    with tracing(), torch.no_grad(), mode, tracker, Stand():
        yield model, tracker


@functools.lru_cache(maxsize=16)
def session(config: HybridConfig, weight_bytes: int, place: Place) -> tuple[FakeTensorMode, Tracker, HybridLM]:
    mode, tracker = FakeTensorMode(), Tracker(place)
    empty = HybridLM(config, device="meta", dtype=DTYPES[weight_bytes])
    with mode, tracker:
        return mode, tracker, tracker.watch(without_memory(empty, place.device))


@functools.lru_cache(maxsize=4096)
def chunk_peaks(traced: Traced, tokens: int) -> Growth:
    """Bytes at the highest moment of a chunk of the prompt, by the tokens before it."""

    def moment(past: int) -> Moment:
        with running(traced) as (model, tracker):
            cache, ids = traced.cache(past + tokens, past), traced.empty(tokens, dtype=torch.int64)
            before = tracker.begin()
            model.hidden_states(ids, cache=cache)
            return Moment(tracker.peak.bytes - before, tracker.uneven)

    return Growth(moment)


class Head(NamedTuple):
    """Bytes of what a chunk gives [B, T, hidden], of the last token's logits [B, V], and at the highest moment while
    these are made."""

    given: int
    logits: int
    peak: int


@functools.lru_cache(maxsize=4096)
def run_head(traced: Traced, tokens: int) -> Head:
    with running(traced) as (model, tracker):
        before = tracker.begin()
        hidden = traced.empty(tokens, traced.config.hidden_size)
        given = tracker.now - before
        logits = last_logits(model, hidden)
        assert logits.dim() == 2
        return Head(given, tracker.now - before - given, tracker.peak.bytes - before)


@functools.lru_cache(maxsize=4096)
def decode_peaks(traced: Traced) -> Growth:
    """Bytes at the highest moment of a decoding step, the logits before it included, by the tokens before it; what is
    left is there for further steps."""

    def moment(past: int) -> Moment:
        with running(traced) as (model, tracker):
            cache = traced.cache(past + 1, past)
            before = tracker.begin()
            logits = traced.empty(traced.config.vocab_size)
            kept = decode(model, logits.argmax(-1), cache)
            left = {traced.config.pattern[layer]: size for layer, size in sorted(tracker.left().items())}
            del kept
            return Moment(tracker.peak.bytes - before, tracker.uneven, tuple(left.items()))

    return Growth(moment)
