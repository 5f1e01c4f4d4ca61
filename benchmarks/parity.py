"""Every family beside transformers' class of it: the table of docs/RESULTS.md.

    python -m limbeck.benchmarks.parity [--only NAME ...] [--configs 24]

Small configs are drawn as the tests draw them (tests/family_draws.py), and each is held to all that the tests ask: a
folder of either opens in the other; steps after a prompt, padding and packed documents change nothing
(tests/family_helpers.py). Errors are relative RMS, in float32 on a CPU: of logits, and of the gradient of any tensor
that is more than rounding; of each family the largest. Needs transformers and pytest, and a checkout of the source.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from limbeck.models.config import HybridConfig
from limbeck.models.provenance import provenance
from limbeck.tests.family_draws import falcon_config, granite_config, nemotron_config, stretched_config
from limbeck.tests.family_helpers import check_parity

# How a config is drawn, and how many families share the draws: each has `--configs`.
FAMILIES: dict[str, tuple[Callable[[int], HybridConfig], int]] = {
    "llama and qwen3, `llama3` and YaRN positions, biases": (stretched_config, 2),
    "falcon_h1, without a norm, with one before or after the gate": (falcon_config, 1),
    "granitemoehybrid without experts": (granite_config, 1),
    "granitemoehybrid with experts": (functools.partial(granite_config, experts=True), 1),
    "nemotron_h with experts": (nemotron_config, 1),
    "nemotron_h with experts and latent projections": (functools.partial(nemotron_config, latent=True), 1),
}


def worst_of(drawn: Callable[[int], HybridConfig], configs: int) -> tuple[float, float]:
    """The largest errors of logits and of gradients. Raises AssertionError for what the tests would not let pass."""
    errors = []
    for seed in range(configs):
        with tempfile.TemporaryDirectory() as folder:
            errors.append(check_parity(drawn(seed), seed, Path(folder)))
    return max(logits for logits, _ in errors), max(gradients for _, gradients in errors)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="families whose names begin so")
    parser.add_argument("--configs", type=int, default=24, help="of each family")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    origin = provenance()
    print(", ".join(f"{name} {origin[name]}" for name in ("commit", "torch", "transformers") if origin.get(name)))
    print("| family | configs | logits | gradients |\n|---|---|---|---|")
    for name, (drawn, families) in FAMILIES.items():
        if name.startswith(tuple(options.only)):
            logits, gradients = worst_of(drawn, families * options.configs)
            print(f"| {name} | {families * options.configs} | {logits:.1e} | {gradients:.1e} |", flush=True)


if __name__ == "__main__":
    main()
