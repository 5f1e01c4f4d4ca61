"""Continuous batching: requests of any length share a batch; finished ones leave it, waiting ones join it.

A request's prompt is read chunk by chunk into a row of the cache of its own, then it decodes with the others. The rows
in use are always the first ones: when a sequence leaves, the last one moves, bit for bit, into its place.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ...kernels.linear import linear
from ..cost.hardware import GIB
from ..cost.inference import memory
from ..cost.parameters import count_parameters
from ..errors import InputError
from ..hybrid import HybridLM
from ..offload import free_memory
from ..tokenizer import Tokenizer
from .cache import Cache
from .decode import Decoder, lay_out
from .detokenize import TextStream
from .generate import check_prompt, end_tokens
from .sampling import Sampler, Sampling, most_probable

OPEN, CLOSE = "<think>", "</think>"
MARKER_TOKENS = 16  # tokens that a marker's text is looked for in


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how to continue it. `stop` strings end the text and are not part of it; `stop_tokens` end it too
    (None: the config's eos_token_id). A thought that is open (`<think>`) for `thinking_budget` tokens is closed."""

    prompt: Sequence[int]
    max_new_tokens: int = 64
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] | None = None
    logprobs: bool = False
    thinking_budget: int | None = None


@dataclasses.dataclass(frozen=True)
class Event:
    """One more token of a request: the text that can be shown with it, the log-probability that the model gives it (at
    temperature 1, where requested), and why it was the last: "stop" (a stop token), "stop string" or "length"."""

    request: int
    token: int
    text: str
    logprob: float | None
    finished: str | None


@dataclasses.dataclass
class Completion:
    """All of a request: new tokens (a stop token included), text, log-probabilities, and why it ended."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finished: str | None = None

    def add(self, event: Event) -> None:
        self.tokens.append(event.token)
        self.text += event.text
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
        self.finished = event.finished


class Thought:
    """Watches for an open thought, and says with which tokens to close it once its budget is spent."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], budget: int) -> None:
        self.tokenizer, self.budget = tokenizer, budget
        self.recent = collections.deque(prompt[-MARKER_TOKENS:], maxlen=MARKER_TOKENS)
        text = tokenizer.decode(prompt)  # a thought may have begun long ago
        self.open, self.spent = text.rfind(OPEN) > text.rfind(CLOSE), 0
        self.forced: collections.deque[int] = collections.deque()
        self.look()

    def see(self, token: int) -> None:
        self.spent += self.open
        self.recent.append(token)
        self.look()

    def look(self) -> None:
        text = self.tokenizer.decode(self.recent)
        opened, closed = text.rfind(OPEN), text.rfind(CLOSE)
        if max(opened, closed) >= 0:
            self.open = opened > closed
        if self.open and self.spent >= self.budget and not self.forced:
            self.forced.extend(self.tokenizer.encode(CLOSE))


class Running:
    """A request under way: `read` tokens of its prompt are in its row; `last` is the token that comes next."""

    def __init__(self, number: int, request: Request, engine: Engine) -> None:
        self.number, self.request, self.read, self.last, self.count = number, request, 0, -1, 0
        self.sampler = Sampler(request.sampling, engine.device)
        self.ends = engine.ends if request.stop_tokens is None else set(request.stop_tokens)
        tokenizer = engine.tokenizer
        if tokenizer is None and (request.stop or request.thinking_budget is not None):
            raise InputError("generate: stop strings and a thinking budget need the model's tokenizer")
        if request.thinking_budget is not None and request.thinking_budget < 0:
            raise InputError(f"generate: thinking_budget is {request.thinking_budget}; expected 0 or more")
        self.stream = None if tokenizer is None else TextStream(tokenizer, request.stop, request.prompt)
        self.thought = None
        if tokenizer is not None and request.thinking_budget is not None:
            self.thought = Thought(tokenizer, request.prompt, request.thinking_budget)

    def advance(self, logits: Tensor, argmax: int | None) -> Event:
        """The next token out of logits [V], whose argmax may be known."""
        if self.thought is not None and self.thought.forced:
            token = self.thought.forced.popleft()
        elif argmax is not None and self.request.sampling.temperature == 0:
            token = argmax
        else:
            token = self.sampler(logits)
        self.last, self.count = token, self.count + 1
        if self.thought is not None:
            self.thought.see(token)
        text = self.stream.push(token) if self.stream is not None else ""
        finished = None
        if self.stream is not None and self.stream.stopped:
            finished = "stop string"
        elif token in self.ends:
            finished = "stop"
        elif self.count == self.request.max_new_tokens:
            finished = "length"
        if finished and self.stream is not None:
            text += self.stream.finish()
            finished = "stop string" if self.stream.stopped else finished
        logprob = float(logits.float().log_softmax(-1)[token]) if self.request.logprobs else None
        return Event(self.number, token, text, logprob, finished)


class Engine:
    """`slots` sequences at once, each of up to `max_length` tokens, prompt included.

    Every step decodes one token of each sequence and reads at most `prefill_chunk` tokens of one waiting prompt: that
    bounds both the memory of a prefill and how long the others wait. `prepare` stores the matrices of a float32 model
    on the CPU anew, as decoding reads them fastest, and keeps a copy for batches where twice its size stays free
    (`decode.lay_out`, `decode.Decoder`). `graphs` as in `decode.Decoder`.

    Raises InputError where the caches do not fit the memory that is free, or a number is out of range.
    """

    def __init__(
        self,
        model: HybridLM,
        *,
        max_length: int,
        slots: int = 8,
        prefill_chunk: int = 512,
        ssm_dtype: torch.dtype = torch.float32,
        tokenizer: Tokenizer | None = None,
        prepare: bool = True,
        graphs: bool | None = None,
    ) -> None:
        config, head = model.config, model.head_weight
        if slots < 1 or max_length < 2 or prefill_chunk < 1:
            raise InputError(
                f"generate: slots ({slots}) and prefill_chunk ({prefill_chunk}) must be at least 1, max_length"
                f" ({max_length}) at least 2"
            )
        if max_length > config.max_position_embeddings:
            raise InputError(
                f"generate: max_length is {max_length}, the model's maximum is {config.max_position_embeddings}"
            )
        self.device = head.device
        free = check_cache_memory(model, slots, max_length, ssm_dtype)
        if prepare:
            lay_out(model)
        self.model, self.tokenizer, self.prefill_chunk = model, tokenizer, prefill_chunk
        self.cache = Cache(config, slots, max_length, dtype=head.dtype, device=head.device, ssm_dtype=ssm_dtype)
        pack = prepare and free > 3 * count_parameters(config) * head.dtype.itemsize
        self.decoder = Decoder(model, self.cache, graphs=graphs, pack=pack)
        self.ends = set(end_tokens(config.eos_token_id))
        self.waiting: collections.deque[Running] = collections.deque()
        self.reading: Running | None = None  # its row is the first after those of `running`
        self.running: list[Running] = []
        self.added = 0

    def add(self, request: Request) -> int:
        """Queues a request, and gives the number that its events carry. Raises InputError."""
        prompt, config = request.prompt, self.model.config
        check_prompt(prompt, len(prompt), request.max_new_tokens, config, self.cache.max_length)
        sequence = Running(self.added, request, self)
        self.waiting.append(sequence)
        self.added += 1
        return sequence.number

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.reading or self.running)

    def cancel(self, number: int) -> None:
        """Drops a request, wherever it is; unknown or finished ones are skipped."""
        self.waiting = collections.deque(each for each in self.waiting if each.number != number)
        if self.reading is not None and self.reading.number == number:
            self.reading = None
        self.leave([row for row, each in enumerate(self.running) if each.number == number])

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token of every sequence that decodes, and a chunk of a prompt."""
        events = self.decode() if self.running else []
        if self.reading is None and self.waiting and len(self.running) < len(self.cache.lengths):
            self.reading = self.waiting.popleft()
            self.cache.clear(len(self.running))
        if self.reading is not None:
            events += self.read(self.reading)
        return events

    def decode(self) -> list[Event]:
        logits = self.decoder.step([each.last for each in self.running])
        greedy = any(each.request.sampling.temperature == 0 for each in self.running)
        # One argmax over all rows: on a GPU each `.item()` of its own would wait for the device.
        top: Sequence[int | None] = most_probable(logits).tolist() if greedy else [None] * len(self.running)
        events = [each.advance(*row) for each, *row in zip(self.running, logits, top, strict=True)]
        self.leave([row for row, event in enumerate(events) if event.finished])
        return events

    def read(self, sequence: Running) -> list[Event]:
        row, prompt = len(self.running), sequence.request.prompt
        chunk = torch.tensor([prompt[sequence.read : sequence.read + self.prefill_chunk]], device=self.device)
        embedded = self.model.embed(chunk)
        hidden = self.model.hidden_states(chunk, cache=self.cache.rows(row, 1), embedded=embedded)
        sequence.read += chunk.shape[1]
        self.cache.lengths[row] = sequence.read
        if sequence.read < len(prompt):
            return []
        self.reading = None
        event = sequence.advance(linear(hidden[:, -1], self.model.head_weight)[0], None)
        if not event.finished:
            self.running.append(sequence)
        return [event]

    def leave(self, rows: Sequence[int]) -> None:
        """Takes sequences out of the batch; the last rows close the gaps."""
        before = len(self.running)
        for row in sorted(rows, reverse=True):  # from the end: the last row, which moves, is then none that leaves
            last = self.running.pop()
            if row < len(self.running):
                self.running[row] = last
                self.cache.move(len(self.running), row)
        if self.reading is not None and len(self.running) < before:
            self.cache.move(before, len(self.running))  # what is being read stays the first row after them

    def stream(self) -> Iterator[Event]:
        """Events until nothing is left to do; requests may be added meanwhile."""
        while self.busy:
            yield from self.step()

    def complete(self, requests: Iterable[Request]) -> list[Completion]:
        """Adds requests, and runs them to their ends."""
        completions = {self.add(request): Completion() for request in requests}
        for event in self.stream():
            if event.request in completions:
                completions[event.request].add(event)
        return list(completions.values())


def check_cache_memory(model: HybridLM, slots: int, max_length: int, ssm_dtype: torch.dtype) -> float:
    """Bytes that the caches leave free on the device (infinity where it does not say). Raises InputError where they
    take more than there is."""
    head = model.head_weight
    report = memory(model.config, max_length, slots, weight_dtype=head.dtype, ssm_dtype=ssm_dtype, chunk=None)
    needed, free = report.total - report.weights, free_memory(head.device)
    if free is not None and needed > free:
        raise InputError(
            f"generate: {slots} sequences of {max_length} tokens need {needed / GIB:,.2f} GiB of caches,"
            f" {free / GIB:,.2f} GiB of memory are free on {head.device}; take fewer at once, or less context"
        )
    return math.inf if free is None else free - needed
