"""The simple way to generate: a batch of equal prompts, prefilled in chunks, then one token at a time over the cache.
Requests that differ, come and go go through `engine.Engine`.

Shapes: [B] sequences of equal length, [T] tokens, [V] vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.linear import linear
from ..errors import InputError
from ..hybrid import HybridLM
from .cache import Cache
from .decode import Decoder
from .sampling import Sampler, Sampling

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
    top_k likeliest, to the smallest set of probability top_p, to those of at least min_p times the likeliest; row b has
    random numbers of its own, from seed + b. A sequence that has produced an `eos_token_id` goes on with it, and when
    all have, generation ends. Memory of the prefill is bounded by `prefill_chunk` tokens. `on_token` [B] sees each new
    token.

    Raises InputError for an empty or too long prompt, ids outside the vocabulary, and options out of range.
    """
    samplings = [Sampling(temperature, top_k, top_p, min_p, seed + row) for row in range(input_ids.shape[0])]
    check_prompt(model, input_ids, max_new_tokens, prefill_chunk)
    batch, length = input_ids.shape
    head = model.head_weight
    cache = Cache(model.config, batch, length + max_new_tokens, dtype=head.dtype, device=head.device)
    decoder = Decoder(model, cache)
    samplers = [Sampler(sampling, head.device) for sampling in samplings]
    ends = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    logits = prefill(model, input_ids.to(head.device), cache, prefill_chunk)
    ended = torch.zeros(batch, dtype=torch.bool, device=head.device)
    tokens = [input_ids.to(head.device)]
    for left in range(max_new_tokens, 0, -1):
        if temperature == 0:
            token = logits.argmax(-1)
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


def check_prompt(model: HybridLM, input_ids: Tensor, max_new_tokens: int, prefill_chunk: int) -> None:
    if max_new_tokens < 1 or prefill_chunk < 1:
        raise InputError(
            f"generate: max_new_tokens ({max_new_tokens}) and prefill_chunk ({prefill_chunk}) must be at least 1"
        )
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
