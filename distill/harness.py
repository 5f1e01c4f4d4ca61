"""Task suites of lm-evaluation-harness (EleutherAI), asked of our models through our own inference path.

The harness makes the requests and the metrics, this adapter the answers; tokens, truncation and stopping are as its
own transformers model has them, so that both give the same tables. Log-likelihoods of many requests are packed as
documents into one row: no padding, and a row is as long as memory takes. Needs `pip install 'limbeck[eval]'`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..kernels.linear_kl import linear_cross_entropy
from ..models.engine import Completion, Engine, Request
from ..models.errors import InputError
from ..models.hybrid import HybridLM
from ..models.sampling import Sampling
from ..models.tokenizer import Tokenizer

ROW_TOKENS = {"cuda": 32768, "cpu": 2048}  # of a packed row, to begin with; attention's mask on a CPU is its square
Scored = tuple[float, bool]  # log-likelihood of a continuation, and whether it is the greedy one
MOST_SLOTS = {"cuda": 64, "cpu": 8}  # sequences that decode at once, to begin with
MOST_NEW_TOKENS = 256  # where a task says nothing, as the harness's own model has it
OnStep = Callable[[int, int], None]


class HarnessModel(TemplateLM):
    """A model and its tokenizer, as the harness wants them. `on_step(done, total)` counts requests of one kind."""

    def __init__(
        self, model: HybridLM, tokenizer: Tokenizer, *, row_tokens: int | None = None, on_step: OnStep | None = None
    ) -> None:
        super().__init__()
        self.model, self.tokens, self.on_step = model, tokenizer, on_step
        device = model.head_weight.device
        self.row_tokens = row_tokens or ROW_TOKENS.get(device.type, ROW_TOKENS["cpu"])
        self.max_length = model.config.max_position_embeddings
        self.prefix = tokenizer.backend.decode([tokenizer.bos_token_id], skip_special_tokens=False)

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokens.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens as tokenizer.json adds them, unless the text begins with the first one already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.prefix)
        return self.tokens.backend.encode(string, add_special_tokens=add_special_tokens).ids

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[Scored]:
        """Of each (name, context, continuation): too long ones lose tokens on the left."""
        sequences = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in requests]
        wanted = [len(continuation) for _, _, continuation in requests]
        found: list[Scored] = [(0.0, True)] * len(requests)
        order = sorted(range(len(sequences)), key=lambda number: -len(sequences[number]))
        done = 0
        while order:
            row = first_row(order, [len(sequence) - 1 for sequence in sequences], self.row_tokens)
            try:
                scores = self.score_row([sequences[number] for number in row], [wanted[number] for number in row])
            except torch.OutOfMemoryError:
                if len(row) == 1:
                    raise
                self.row_tokens //= 2
                torch.cuda.empty_cache()
                continue
            for number, score in zip(row, scores, strict=True):
                found[number] = score
            taken = set(row)
            order = [number for number in order if number not in taken]
            done += len(row)
            self.told(done, len(requests))
        return found

    @torch.inference_mode()
    def score_row(self, sequences: Sequence[list[int]], wanted: Sequence[int]) -> list[Scored]:
        """Log-likelihoods of the last `wanted` tokens of each sequence, all of them packed into one row."""
        device = self.model.head_weight.device
        inputs = torch.tensor([token for sequence in sequences for token in sequence[:-1]])[None]
        numbers = torch.repeat_interleave(torch.tensor([len(sequence) - 1 for sequence in sequences]))
        hidden = self.model.hidden_states(inputs.to(device), seq_idx=numbers.to(torch.int32)[None].to(device))[0]
        ends = torch.tensor([len(sequence) - 1 for sequence in sequences]).cumsum(0)
        places = torch.cat([torch.arange(end - count, end) for end, count in zip(ends.tolist(), wanted, strict=True)])
        labels = torch.tensor([t for seq, count in zip(sequences, wanted, strict=True) for t in seq[-count:]])
        found = linear_cross_entropy(hidden[places.to(device)], self.model.head_weight, labels.to(device))
        parts = zip(*(values.cpu().split(list(wanted)) for values in (found.cross_entropy, found.top1)), strict=True)
        return [(-float(lost.double().sum()), bool(likeliest.all())) for lost, likeliest in parts]

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
        """Texts that go on from prompts (too long ones lose tokens on the left), up to a stop string or the end."""
        end = self.tokens.backend.decode([self.eot_token_id], skip_special_tokens=False)
        asked, stops = [], []
        for request in requests:
            options = normalize_gen_kwargs(request.args[1], MOST_NEW_TOKENS)
            stops.append(handle_stop_sequences(options["until"], eos=end))
            most = options["max_gen_toks"]
            if most >= self.max_length:
                raise InputError(f"tasks: {most} new tokens leave no room for a prompt within {self.max_length} tokens")
            sampling = Sampling(options.get("temperature") or 0.0, *map(options.get, ("top_k", "top_p", "min_p")))
            prompt = self.tok_encode(request.args[0])[most - self.max_length :] or [self.prefix_token_id]
            ends = (self.eot_token_id,)
            asked.append(
                Request(
                    prompt,
                    most,
                    sampling,
                    stop=tuple(each for each in stops[-1] if each not in ("", end)),
                    stop_tokens=ends,
                )
            )
        engine = self.engine(asked)
        texts = [Completion() for _ in asked]
        numbers = {engine.add(request): place for place, request in enumerate(asked)}
        done = 0
        for event in engine.stream():
            texts[numbers[event.request]].add(event)
            if event.finished:
                done += 1
                self.told(done, len(asked))
        found = [self.tokens.decode(text.tokens) for text in texts]
        return [postprocess_generated_text(text, stop, None) for text, stop in zip(found, stops, strict=True)]

    def engine(self, asked: Sequence[Request]) -> Engine:
        """As many sequences at once as memory and `MOST_SLOTS` let."""
        longest = max(len(request.prompt) + request.max_new_tokens for request in asked)
        device = self.model.head_weight.device
        slots = min(len(asked), MOST_SLOTS.get(device.type, MOST_SLOTS["cpu"]))
        while True:
            try:
                return Engine(self.model, max_length=max(longest, 2), slots=slots, tokenizer=self.tokens)
            except (InputError, torch.OutOfMemoryError):
                if slots == 1:
                    raise
                slots //= 2

    def told(self, done: int, total: int) -> None:
        if self.on_step is not None:
            self.on_step(done, total)


def first_row(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[int]:
    """The next requests, longest first, that fit into a row together; one at least."""
    row, room = [order[0]], capacity - lengths[order[0]]
    for number in order[1:]:
        if lengths[number] <= room:
            row.append(number)
            room -= lengths[number]
    return row
