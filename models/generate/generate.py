"""The simple way to generate: a batch of equal prompts, prefilled in chunks, then one token at a time over the cache.
Requests that differ, come and go go through `engine.Engine`.

Shapes: [B] sequences of equal length, [T] tokens, [V] vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...kernels.linear import linear
from ..config import HybridConfig
from ..errors import InputError
from ..hybrid import HybridLM
from .cache import Cache
from .decode import Decoder
from .sampling import Sampler, Sampling, most_probable

OnToken = Callable[[Tensor], None]


@torch.inference_mode()
def generate(
    model: HybridLM,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | tuple[int, ...] | None = None,
    prefill_chunk: int = 512,
    on_token: OnToken | None = None,
) -> Tensor:
    """input_ids [B, T] with up to `max_new_tokens` tokens after them, [B, T + new].

    Temperature and the cuts are those of `Sampling`; row b has random numbers of its own, from seed + b. A sequence
    that has produced an `eos_token_id` repeats it, and when all have, generation ends. Memory of the prefill is bounded
    by `prefill_chunk` tokens. `on_token` [B] sees each new token.

    Raises InputError for an empty or too long prompt, ids outside the vocabulary, and options out of range.
    """
    samplings = [Sampling(temperature, top_k, top_p, min_p, seed + row) for row in range(input_ids.shape[0])]
    if prefill_chunk < 1:
        raise InputError(f"generate: prefill_chunk is {prefill_chunk}; expected at least 1")
    config, head = model.config, model.head_weight
    batch, length = input_ids.shape
    check_prompt(input_ids.flatten().tolist(), length, max_new_tokens, config, config.max_position_embeddings)
    cache = Cache(config, batch, length + max_new_tokens, dtype=head.dtype, device=head.device)
    decoder = Decoder(model, cache)
    samplers = [Sampler(sampling, head.device) for sampling in samplings]
    ends = end_tokens(eos_token_id)
    logits = prefill(model, input_ids.to(head.device), cache, prefill_chunk)
    ended = torch.zeros(batch, dtype=torch.bool, device=head.device)
    tokens = [input_ids.to(head.device)]
    for left in range(max_new_tokens, 0, -1):
        if temperature == 0:
            token = most_probable(logits)
        else:
            drawn = [sampler(row) for sampler, row in zip(samplers, logits, strict=True)]
            token = torch.tensor(drawn, device=head.device)
        if ends:
            token = torch.where(ended, ends[0], token)
            for end in ends:
                ended |= token == end
        tokens.append(token[:, None])
        if on_token is not None:
            on_token(token)
        if left == 1 or (ends and bool(ended.all())):
            break
        logits = decoder.step(token)
    return torch.cat(tokens, 1)


def prefill(model: HybridLM, input_ids: Tensor, cache: Cache, chunk: int) -> Tensor:
    """Runs the prompt [B, T] into the cache, and gives the logits [B, V] after its last token."""
    for start in range(0, input_ids.shape[1], chunk):
        hidden = model.hidden_states(input_ids[:, start : start + chunk], cache=cache)
    return last_logits(model, hidden)


def last_logits(model: HybridLM, hidden: Tensor) -> Tensor:
    """Logits [B, V] after the last of tokens that gave hidden [B, T, hidden]."""
    return linear(hidden[:, -1], model.head_weight)


def decode_one_token(model: HybridLM, token: Tensor, cache: Cache) -> Tensor:
    """Logits [B, V] after one more token [B] of sequences of equal length, by the model itself; many steps are faster
    through `decode.Decoder`."""
    return model(token[:, None], cache=cache)[:, 0]


def end_tokens(eos_token_id: int | Sequence[int] | None) -> tuple[int, ...]:
    """The tokens that end a text, of a config's `eos_token_id`."""
    return () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)


def check_prompt(ids: Sequence[int], length: int, max_new_tokens: int, config: HybridConfig, most: int) -> None:
    """Raises InputError unless prompts of `length` tokens, with all their ids in `ids`, can be continued; `most` is the
    greatest number of tokens."""
    if not len(ids):
        raise InputError("generate: the prompt is empty; expected at least one token")
    low, high = min(ids), max(ids)
    if low < 0 or high >= config.vocab_size:
        raise InputError(f"generate: token {low if low < 0 else high} is outside the vocabulary of {config.vocab_size}")
    if max_new_tokens < 1:
        raise InputError(f"generate: max_new_tokens is {max_new_tokens}; expected at least 1")
    if length + max_new_tokens > most:
        raise InputError(
            f"generate: prompt ({length}) and new tokens ({max_new_tokens}) make {length + max_new_tokens}, the maximum"
            f" here is {most}"
        )
