"""Text from a model: prefill in chunks, then one token at a time over the cache.

Shapes: [B] sequences of equal length, [T] tokens, [V] vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.linear import linear
from .cache import Cache
from .errors import InputError
from .hybrid import HybridLM

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
    """input_ids [B, T] with up to `max_new_tokens` tokens behind them, [B, T + new].

    Temperature 0 takes the likeliest token; else tokens are drawn from softmax(logits / temperature), cut to the
    top_k likeliest, to the smallest set of probability top_p, to those of at least min_p times the likeliest. A
    sequence that has produced an `eos_token_id` goes on with it, and when all have, generation ends. Memory of the
    prefill is bounded by `prefill_chunk` tokens. `on_token` [B] sees each new token.

    Raises InputError for an empty or too long prompt, ids outside the vocabulary, and options out of range.
    """
    check_options(temperature, top_k, top_p, min_p, max_new_tokens, prefill_chunk)
    check_prompt(model, input_ids, max_new_tokens)
    batch, length = input_ids.shape
    head = model.head_weight
    cache = Cache(model.config, batch, length + max_new_tokens, dtype=head.dtype, device=head.device)
    generator = torch.Generator(device=head.device).manual_seed(seed)
    ends = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    logits = prefill(model, input_ids.to(head.device), cache, prefill_chunk)
    ended = torch.zeros(batch, dtype=torch.bool, device=head.device)
    tokens = [input_ids.to(head.device)]
    for left in range(max_new_tokens, 0, -1):
        token = choose(logits, temperature, top_k, top_p, min_p, generator)
        if ends:
            token = torch.where(ended, ends[0], token)
            for end in ends:
                ended |= token == end
        tokens.append(token[:, None])
        if on_token is not None:
            on_token(token)
        if left == 1 or (ends and bool(ended.all())):
            break
        logits = decode_one_token(model, token, cache)
    return torch.cat(tokens, 1)


def prefill(model: HybridLM, input_ids: Tensor, cache: Cache, chunk: int) -> Tensor:
    """Runs the prompt [B, T] into the cache, and gives the logits [B, V] after its last token."""
    for start in range(0, input_ids.shape[1], chunk):
        hidden = model.hidden_states(input_ids[:, start : start + chunk], cache=cache)
    return linear(hidden[:, -1], model.head_weight)


def decode_one_token(model: HybridLM, token: Tensor, cache: Cache) -> Tensor:
    """Logits [B, V] after one more token [B]."""
    return model(token[:, None], cache=cache)[:, 0]


def choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    generator: torch.Generator,
) -> Tensor:
    """The next tokens [B] from logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1)
    scores, order = (logits.float() / temperature).sort(-1, descending=True)
    if top_k is not None:
        scores[:, top_k:] = -math.inf
    probabilities = scores.softmax(-1)
    if top_p is not None:
        # A token stays while those before it do not yet reach top_p; the first always stays.
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= top_p] = 0
    if min_p is not None:
        probabilities[probabilities < min_p * probabilities[:, :1]] = 0
    return order.gather(1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]


def check_options(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    max_new_tokens: int,
    prefill_chunk: int,
) -> None:
    if not 0 <= temperature < math.inf:
        raise InputError(f"generate: temperature is {temperature}; expected 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise InputError(f"generate: top_k is {top_k}; expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"generate: top_p is {top_p}; expected more than 0 and at most 1")
    if min_p is not None and not 0 <= min_p <= 1:
        raise InputError(f"generate: min_p is {min_p}; expected 0 to 1")
    if max_new_tokens < 1 or prefill_chunk < 1:
        raise InputError(
            f"generate: max_new_tokens ({max_new_tokens}) and prefill_chunk ({prefill_chunk}) must be at least 1"
        )


def check_prompt(model: HybridLM, input_ids: Tensor, max_new_tokens: int) -> None:
    if input_ids.dim() != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 1:
        raise InputError(f"generate: the prompt is empty (shape {tuple(input_ids.shape)}); expected at least one token")
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= model.config.vocab_size:
        raise InputError(
            f"generate: token {low if low < 0 else high} is outside the vocabulary of {model.config.vocab_size}"
        )
    length = input_ids.shape[1] + max_new_tokens
    if length > model.config.max_position_embeddings:
        raise InputError(
            f"generate: prompt ({input_ids.shape[1]}) and new tokens ({max_new_tokens}) make {length},"
            f" the model's maximum is {model.config.max_position_embeddings}"
        )
