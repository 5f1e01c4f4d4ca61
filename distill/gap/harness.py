"""Task suites of lm-evaluation-harness (EleutherAI), run on our models through our own inference path.

The harness makes the requests and the metrics, this adapter the answers; tokens, truncation and stopping are as its
own transformers model has them, so that both give the same tables. Log-likelihoods of many requests are packed as
documents into one row: no padding. How long a row is, and how many sequences decode at once, follows from the memory
that is free; where it runs out all the same, from half as many on. Needs `pip install 'limbeck[eval]'`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ...kernels.fused_loss import CACHED
from ...kernels.linear_kl import default_chunk, linear_cross_entropy
from ...models.config import HybridConfig
from ...models.cost.hardware import Place
from ...models.cost.inference import largest, memory
from ...models.errors import InputError
from ...models.generate.engine import Completion, Engine, Request
from ...models.generate.sampling import Sampling
from ...models.hybrid import HybridLM
from ...models.offload import free_memory
from ...models.placement import release_memory
from ...models.tokenizer import Tokenizer

# Tokens of a packed row. A CPU's attention works on all pairs of them, so that longer rows cost it more a token; on a
# GPU 65,536 keep the widest tensor of the 9B's layers below 2^31 elements.
MOST_ROW_TOKENS = {"cuda": 65536, "cpu": 2048}
# Sequences that decode at once: on a CPU as many as `Engine` takes by itself; a GPU keeps a graph for each number.
MOST_SLOTS = {"cuda": 128, "cpu": 8}
SHARE = 0.8  # of the free memory; what the allocator splits off, and what is not counted here, has the rest
PAIR_BYTES = 5  # of two tokens of a row on a CPU: the mask of packed documents, and SDPA's copy of it in float32
MOST_NEW_TOKENS = 256  # where a task says nothing, as the harness's own model has it
Scored = tuple[float, bool]  # log-likelihood of a continuation, and whether it is the greedy one
OnStep = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Headroom:
    """What rows and batches of a model take where it runs: `chunk` tokens have their logits in one piece."""

    config: HybridConfig
    dtype: torch.dtype
    place: Place
    chunk: int

    @classmethod
    def of(cls, model: HybridLM) -> Headroom:
        config, head = model.config, model.head_weight
        place = Place("cpu", torch.get_num_threads())
        if head.is_cuda:
            card = torch.cuda.get_device_properties(head.device)
            place = Place("cuda", card.multi_processor_count, f"{card.major}.{card.minor}")
        return cls(config, head.dtype, place, default_chunk(config.vocab_size, head))

    def row_tokens(self, free: int | None) -> int:
        """Tokens of the longest row that `free` bytes take (None: unknown), at least 1."""
        bound = MOST_ROW_TOKENS[self.place.device]
        return bound if free is None else max(1, largest(self.row_bytes, SHARE * free, bound, bound))

    def slots(self, length: int, free: int | None) -> int:
        """Sequences of up to `length` tokens that decode at once in `free` bytes (None: unknown), at least 1."""
        bound = MOST_SLOTS[self.place.device]
        return (
            bound if free is None else max(1, largest(lambda n: self.slot_bytes(n, length), SHARE * free, bound, bound))
        )

    def row_bytes(self, tokens: int) -> int:
        """Of scoring a row: the highest moment of the layers, or of the head after them, with a chunk's logits in
        float32 and (on a CPU) up to three tensors of a piece of them."""
        layers = memory(self.config, tokens + 1, 1, chunk=tokens, weight_dtype=self.dtype, place=self.place).activations
        per_token = any(kind.state_bytes(self.config, 1, 1, 1).token for kind in self.config.kinds)
        if self.place.device == "cpu" and per_token:  # a layer that looks back at every token makes a mask of pairs
            layers += PAIR_BYTES * tokens**2
        hidden = 2 * tokens * self.config.hidden_size * self.dtype.itemsize
        head = 4 * min(self.chunk, tokens) * self.config.vocab_size + 12 * max(CACHED, self.config.vocab_size)
        return max(layers, hidden + head)

    def slot_bytes(self, slots: int, length: int) -> int:
        """Of decoding: caches, and the prefill of one prompt or a step of all. A GPU's graphs, one for each number of
        sequences, keep their logits."""
        one, batch = (
            memory(self.config, length, count, weight_dtype=self.dtype, place=self.place) for count in (1, slots)
        )
        caches = batch.kv + batch.ssm + batch.conv
        graphs = batch.logits * (slots + 1) // 4 if self.place.device == "cuda" else 0  # .logits: two sets of them
        return caches + max(one.activations, batch.decode + batch.logits) + batch.workspace + graphs


class HarnessModel(TemplateLM):
    """A model and its tokenizer, as the harness wants them. `on_step(done, total)` counts requests of one kind; texts
    that are drawn follow from `seed` and the number of their request."""

    def __init__(
        self, model: HybridLM, tokenizer: Tokenizer, *, row_tokens: int | None = None, on_step: OnStep | None = None,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.tokens, self.on_step, self.seed = model, tokenizer, on_step, seed
        self.headroom = Headroom.of(model)
        release_memory()
        self.row_tokens = row_tokens or self.headroom.row_tokens(free_memory(self.device))
        self.max_length = model.config.max_position_embeddings
        self.prefix = tokenizer.decode([self.prefix_token_id])

    @property
    def device(self) -> torch.device:
        return self.model.head_weight.device

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context, as the harness's own model has it."""
        return self.eot_token_id if self.tokens.bos_token_id is None else self.tokens.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with those that the tokenizer adds unless the text begins with such a token already."""
        if add_special_tokens is None:
            add_special_tokens = not (self.prefix and string.startswith(self.prefix))
        return self.tokens.framed(string) if add_special_tokens else self.tokens.encode(string)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[Scored]:
        """Of each (name, context, continuation): too long ones lose tokens on the left."""
        sequences = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in requests]
        wanted = [len(continuation) for _, _, continuation in requests]
        results: list[Scored] = [(0.0, True)] * len(requests)
        lengths = [len(sequence) - 1 for sequence in sequences]
        order = sorted(range(len(sequences)), key=lambda number: -lengths[number])
        done = 0
        while order:
            row = first_row(order, lengths, self.row_tokens)
            scores = None
            try:
                scores = self.score_row([sequences[number] for number in row], [wanted[number] for number in row])
            except torch.OutOfMemoryError:
                if len(row) == 1:
                    raise
            if scores is None:
                self.row_tokens = sum(lengths[number] for number in row) // 2
                release_memory()
                continue
            for number, score in zip(row, scores, strict=True):
                results[number] = score
            taken = set(row)
            order = [number for number in order if number not in taken]
            done += len(row)
            self.told(done, len(requests))
        return results

    @torch.inference_mode()
    def score_row(self, sequences: Sequence[list[int]], wanted: Sequence[int]) -> list[Scored]:
        """Log-likelihoods of the last `wanted` tokens of each sequence, all of them packed into one row."""
        device = self.device
        inputs = torch.tensor([token for sequence in sequences for token in sequence[:-1]])[None]
        numbers = torch.repeat_interleave(torch.tensor([len(sequence) - 1 for sequence in sequences]))
        hidden = self.model.hidden_states(inputs.to(device), seq_idx=numbers.to(torch.int32)[None].to(device))[0]
        ends = torch.tensor([len(sequence) - 1 for sequence in sequences]).cumsum(0)
        places = torch.cat([torch.arange(end - count, end) for end, count in zip(ends.tolist(), wanted, strict=True)])
        labels = torch.tensor([t for seq, count in zip(sequences, wanted, strict=True) for t in seq[-count:]])
        figures = linear_cross_entropy(hidden[places.to(device)], self.model.head_weight, labels.to(device))
        parts = zip(
            *(values.cpu().split(list(wanted)) for values in (figures.cross_entropy, figures.top1)), strict=True
        )
        return [(-float(lost.double().sum()), bool(first.all())) for lost, first in parts]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: windows of the model's length that share no token, one token of context before the first."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            ids = self.tok_encode(text)
            rolled = get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            own = [(None, *make_disjoint_window(window)) for window in rolled]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that continue prompts (too long ones lose tokens on the left), up to a stop string or the end."""
        end = self.tokens.backend.decode([self.eot_token_id], skip_special_tokens=False)
        prompts, stops = [], []
        for number, request in enumerate(requests):
            options = normalize_gen_kwargs(request.args[1], MOST_NEW_TOKENS)
            stops.append(handle_stop_sequences(options["until"], eos=end))
            new = options["max_gen_toks"]
            if new >= self.max_length:
                raise InputError(f"tasks: {new} new tokens leave nothing for a prompt within {self.max_length} tokens")
            top_k = options.get("top_k")
            sampling = Sampling(
                options.get("temperature") or 0.0,
                top_k if top_k and top_k > 0 else None,  # transformers switches it off with 0
                options.get("top_p"),
                options.get("min_p"),
                self.seed + number,
            )
            prompt = self.tok_encode(request.args[0])[new - self.max_length :] or [self.prefix_token_id]
            stop = tuple(each for each in stops[-1] if each not in ("", end))
            prompts.append(Request(prompt, new, sampling, stop=stop, stop_tokens=(self.eot_token_id,)))
        texts = [self.tokens.decode(completion.tokens) for completion in self.complete(prompts)]
        return [postprocess_generated_text(text, stop, None) for text, stop in zip(texts, stops, strict=True)]

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Runs requests to their ends. Where memory runs out, those that have not ended begin anew, at most half as
        many at once."""
        texts = [Completion() for _ in requests]
        length = max([2, *(len(request.prompt) + request.max_new_tokens for request in requests)])
        slots = len(requests)
        while left := [place for place, text in enumerate(texts) if text.finished is None]:
            release_memory()
            slots = min(slots, len(left), self.headroom.slots(length, free_memory(self.device)))
            try:
                self.decode(requests, texts, left, length, slots)
            except torch.OutOfMemoryError:
                if slots == 1:
                    raise
                slots //= 2
        return texts

    def decode(
        self, requests: Sequence[Request], texts: list[Completion], left: Sequence[int], length: int, slots: int
    ) -> None:
        """Writes the texts of the requests that are `left`, `slots` at once."""
        engine = Engine(self.model, max_length=length, slots=slots, tokenizer=self.tokens)
        numbers = {engine.add(requests[place]): place for place in left}
        for place in left:
            texts[place] = Completion()
        done = len(requests) - len(left)
        for event in engine.stream():
            texts[numbers[event.request]].add(event)
            if event.finished:
                done += 1
                self.told(done, len(requests))

    def told(self, done: int, total: int) -> None:
        if self.on_step is not None:
            self.on_step(done, total)


def first_row(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[int]:
    """The next requests, longest first, that fit into a row together; one at least."""
    row, free = [order[0]], capacity - lengths[order[0]]
    for number in order[1:]:
        if lengths[number] <= free:
            row.append(number)
            free -= lengths[number]
    return row
