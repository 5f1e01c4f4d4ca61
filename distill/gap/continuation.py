"""How long a student writes what its teacher writes: greedy continuations of held-out prompts, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ...models.generate.generate import generate
from ...models.hybrid import HybridLM
from ...models.placement import placed
from ..text.packing import Corpus
from .statistics import Estimate, resampled


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Tokens from the start on which student and teacher agree (of `new_tokens` at most, so that identical
    continuations are counted short), and the share of prompts that both continue alike to the end."""

    length: Estimate
    identical: Estimate


def continuations(
    teacher: HybridLM,
    students: Mapping[str, HybridLM],
    prompts: Tensor,
    new_tokens: int,
    *,
    eos_token_id: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
    device: torch.device | None = None,
) -> dict[str, Continuation]:
    """Each student's agreement with the teacher over prompts [N, T], one of a document each; intervals over prompts. On
    a `device` where one is given.

    What comes after an end of text that both wrote is not looked at: it counts as agreement to the end.
    """
    wanted = greedy_tokens(teacher, prompts, new_tokens, eos_token_id, device)
    written = {name: greedy_tokens(each, prompts, new_tokens, eos_token_id, device) for name, each in students.items()}
    return agreement(wanted, written, resamples, seed)


@torch.no_grad()
def greedy_tokens(
    model: HybridLM, prompts: Tensor, new_tokens: int, eos_token_id: int | None, device: torch.device | None
) -> Tensor:
    """What a model writes after prompts [N, T]: [N, new_tokens], the end of text again where it ended before."""
    with placed(model, device):
        tokens = generate(model, prompts, new_tokens, eos_token_id=eos_token_id)[:, prompts.shape[1] :].cpu()
    missing = new_tokens - tokens.shape[1]  # every sequence ended before
    return torch.nn.functional.pad(tokens, (0, missing), value=-1 if eos_token_id is None else eos_token_id)


def agreement(wanted: Tensor, written: Mapping[str, Tensor], resamples: int, seed: int) -> dict[str, Continuation]:
    """How long each student's tokens [N, T] are the teacher's, those `wanted`; intervals over the N."""
    new_tokens, results = wanted.shape[1], {}
    for name, tokens in written.items():
        same = (tokens == wanted).long().cumprod(1).sum(1).double().numpy()
        drawn = resampled({"length": same, "identical": same == new_tokens, "prompts": np.ones(len(same))},
                          resamples, seed)  # fmt: skip
        results[name] = Continuation(*(drawn[key].over(drawn["prompts"]).estimate() for key in ("length", "identical")))
    return results


def draw_prompts(corpus: Corpus, count: int, length: int, seed: int, begin: Sequence[int] = ()) -> Tensor | None:
    """Prompts [count, length] from as many documents, at drawn places; fewer where fewer documents have that many
    tokens, None where none has. Each starts with the tokens that texts `begin` with, as documents do, at least one
    follows."""
    lengths = np.diff(corpus.starts) - 1  # not the end of text
    long = np.flatnonzero(lengths >= length)
    if not len(long):
        return None
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(long)[:count]
    size = max(length - len(begin), 1)
    starts = corpus.starts[chosen] + (length - size) + generator.integers(0, lengths[chosen] - length + 1)
    prompts = np.stack([[*begin, *corpus.ids[start : start + size]] for start in starts])
    return torch.from_numpy(prompts.astype(np.int64))
