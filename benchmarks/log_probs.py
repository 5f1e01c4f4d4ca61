"""Log-probabilities of sampled tokens: the engine's, as it draws them, beside the trainer's forward of the whole rows.

    python -m limbeck.benchmarks.log_probs MODEL [--tokens 96] [--slots 1,8]

The 50 prompts of `greedy`, continued by so many tokens at temperature 1, so many sequences at a time. Both are in
float32 on a CPU; the same forward in float64 says how far either is from what is right. On-policy distillation takes
them for equal.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from limbeck.benchmarks.greedy import PROMPTS
from limbeck.models.checkpoint import load_model
from limbeck.models.generate.engine import Completion, Engine, Request
from limbeck.models.generate.sampling import Sampling
from limbeck.models.hybrid import HybridLM
from limbeck.models.provenance import provenance
from limbeck.models.tokenizer import load_tokenizer
from torch import Tensor


def drawn(model: HybridLM, requests: list[Request], tokens: int, slots: int) -> list[Completion]:
    longest = max(len(request.prompt) for request in requests) + tokens
    return Engine(model, slots=slots, max_length=longest).complete(requests)


@torch.no_grad()
def of_rows(model: HybridLM, requests: list[Request], completions: list[Completion]) -> Tensor:
    """The forward's log-probabilities of the drawn tokens, float64, request after request."""
    found = []
    for request, completion in zip(requests, completions, strict=True):
        logits = model(torch.tensor([[*request.prompt, *completion.tokens]]))[0, len(request.prompt) - 1 : -1]
        found.append(logits.double().log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0])
    return torch.cat(found)


def compared(name: str, first: Tensor, second: Tensor) -> str:
    apart = (first - second).abs()
    relative = (apart.square().mean() / second.square().mean()).sqrt().item()
    highest, most = apart.max().item(), apart.quantile(0.99).item()
    return f"| {name} | {relative:.1e} | {apart.mean().item():.1e} | {most:.1e} | {highest:.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--slots", default="1,8")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    requests = [
        Request(tokenizer.prompt(prompt), options.tokens, Sampling(1.0, seed=number), stop_tokens=(), logprobs=True)
        for number, prompt in enumerate(PROMPTS)
    ]
    model, exact = load_model(options.model), load_model(options.model, torch.float64)
    for slots in map(int, options.slots.split(",")):
        completions = drawn(model, requests, options.tokens, slots)
        engine = torch.tensor([one for found in completions for one in found.logprobs], dtype=torch.float64)
        trainer, right = (of_rows(which, requests, completions) for which in (model, exact))
        print(f"\n| {len(engine):,} tokens, {slots} at a time | relative RMS | mean | 99% below | largest |")
        print("|---|---|---|---|---|")
        print(compared("engine, trainer", engine, trainer))
        print(compared("trainer, float64", trainer, right))
        print(compared("engine, float64", engine, right), flush=True)
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in provenance().items()))


if __name__ == "__main__":
    main()
