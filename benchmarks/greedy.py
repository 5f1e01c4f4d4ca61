"""Whether an exported model writes what transformers writes of it: greedy tokens after prompts, compared one by one.

    python -m limbeck.benchmarks.greedy FOLDER [--prompts 20] [--tokens 64]

FOLDER is an exported folder, or the output of `limbeck compress`, whose `exported` is taken. Both are in float32 on a
CPU; limbeck continues the prompts, beginnings of Python, in one batch of its engine, transformers one by one. Prints
how many texts are the same and where others part, and ends with exit code 3 where any does. Needs transformers.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from limbeck.models.checkpoint import load_model
from limbeck.models.generate.engine import Engine, Request
from limbeck.models.provenance import provenance
from limbeck.models.tokenizer import load_tokenizer

BEGINNINGS = (
    "import ", "from os import ", "def {}(self, x):\n    ", "class {}(object):\n", "    for i in {}:\n", "# {}\n",
    "if {} is None:\n    raise ", "    return {}", "with open({}) as ", "assertEqual({}, ",
)  # fmt: skip
NAMES = ("value", "parse_args", "Node", "self._lock", "b'data'")
PROMPTS = [begin.format(name) for name in NAMES for begin in BEGINNINGS]


class Pair(NamedTuple):
    """Tokens after a prompt, limbeck's and transformers', and the texts that they are."""

    prompt: str
    found: list[int]
    expected: list[int]
    text: str
    expected_text: str

    @property
    def same(self) -> int:
        """So many of the first tokens are the same."""
        alike = (ours == theirs for ours, theirs in zip(self.found, self.expected, strict=False))
        return sum(itertools.takewhile(bool, alike))


def continued(folder: Path, prompts: Sequence[str], tokens: int) -> Iterator[Pair]:
    """Each prompt as both continue it by so many tokens, or to the end that they write."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    requests = [Request(tokenizer.prompt(prompt), tokens) for prompt in prompts]
    longest = max(len(request.prompt) for request in requests) + tokens
    engine = Engine(load_model(folder), max_length=longest, slots=4, prefill_chunk=5, tokenizer=tokenizer)
    for prompt, request, found in zip(prompts, requests, engine.complete(requests), strict=True):
        ids = torch.tensor([request.prompt])
        output = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        expected = output[0, ids.shape[1] :].tolist()
        yield Pair(prompt, found.tokens, expected, found.text, tokenizer.decode(expected, skip_special_tokens=True))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=20, choices=range(1, len(PROMPTS) + 1), metavar="1..50")
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args(words)
    folder = options.folder / "exported" if (options.folder / "exported").is_dir() else options.folder
    pairs = list(continued(folder, PROMPTS[: options.prompts], options.tokens))
    same = [pair for pair in pairs if pair.found == pair.expected]
    for pair in pairs:
        if pair not in same:
            print(f"{pair.prompt!r}: {pair.same} tokens are the same, then {pair.text!r} and {pair.expected_text!r}")
    print(f"{len(same)} of {len(pairs)} prompts: the same {options.tokens} greedy tokens as transformers")
    print(", ".join(f"{name} {value}" for name, value in provenance().items()))
    return 0 if len(same) == len(pairs) else 3


if __name__ == "__main__":
    raise SystemExit(main())
