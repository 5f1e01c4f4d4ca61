"""What is measured of a teacher and its students beside the figures of every token: greedy text and probes;
and where they lie in memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt

from ...models.axes import AXES
from ...models.checkpoint import load_config
from ...models.config import HybridConfig
from ...models.cost.parameters import count_parameters
from ...models.errors import InputError, gib
from ...models.hybrid import HybridLM
from ...models.offload import free_memory
from ...models.placement import release_memory
from ...models.quantities import check_between
from ...models.served_inputs import load_served
from ...models.tokenizer import Tokenizer
from ..text.packing import Corpus
from .continuation import agreement, draw_prompts, greedy_tokens
from .examples import as_text
from .measure import PROMPT, TEACHER, GapReport
from .probes import Probe, make_probe, retrieve

SHARE = 0.8  # of a GPU's free memory that weights may take; the rest is for the work of a batch
MOST_RESAMPLES = 10**6  # each is a number for each figure
SAMPLES = 3  # continuations that are shown
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Details:
    """What is measured beside the figures of every token; see conf/evaluate.yaml."""

    resamples: PositiveInt = 1000
    worst: NonNegativeInt = 6
    prompts: NonNegativeInt = 32
    prompt_tokens: PositiveInt = 64
    new_tokens: PositiveInt = 64
    probe_lengths: tuple[int, ...] = (512, 1024)
    probe_count: PositiveInt = 20
    task_shots: int | None = None
    task_limit: int | None = None

    def __post_init__(self) -> None:
        check_between(self, "details.", 0, math.inf, "task_shots")
        check_between(self, "details.", 1, math.inf, "task_limit")
        check_between(self, "details.", 1, MOST_RESAMPLES, "resamples")

    def check_length(self, longest: int) -> None:
        """Raises InputError where the texts that students continue are longer than what the models are made for."""
        length = self.prompt_tokens + self.new_tokens
        if self.prompts and length > longest:
            raise InputError(
                f"details.prompt_tokens + new_tokens is {length:,}; the models take {longest:,}, give less"
            )


def gap_content(
    report: GapReport, models: Mapping[str, HybridLM], text: Corpus, tokenizer: Tokenizer, data: str, split: str
) -> dict[str, Any]:
    """What gap.json has of a report: parameters, and the worst windows as text; nothing else is measured yet."""
    return report.to_json() | {
        "parameters": {name: count_parameters(model.config) for name, model in models.items()},
        "architecture": {name: architecture(model.config) for name, model in models.items()},
        "data": {"data": data, "split": split, "tokens": report.tokens},
        "worst": {name: [as_text(each, text.names, tokenizer) for each in some] for name, some in report.worst.items()},
        "continuation": {},
        "samples": [],
        "probes": {},
        "tasks": {},
        "memory": {},
    }


def architecture(config: HybridConfig) -> dict[str, Any]:
    """What a table says of a config: its family, layers and widths, those that no layer reads left out."""
    read = {name for kind in config.kinds for name in kind.fields} | {"hidden_size"}
    widths = {row.width: getattr(config, row.width) for row in AXES.values() if row.width in read}
    return {"family": config.family, "layers": config.num_layers, "pattern": config.pattern,
            "vocab_size": config.vocab_size} | widths  # fmt: skip


def load_models(
    folders: Mapping[str, Path], dtype: torch.dtype, device: torch.device, say: Say
) -> tuple[dict[str, HybridLM], torch.device | None]:
    """The models on the device, as a server computes (`served`); where a GPU does not hold all of them, in main memory,
    and the device that each is to come to when its turn comes. Raises InputError where one alone is too large."""
    release_memory()
    away = held_elsewhere(folders, dtype, device, say) if device.type == "cuda" else None
    home = device if away is None else torch.device("cpu")
    return {name: load_served(path, dtype, home) for name, path in folders.items()}, away


def held_elsewhere(
    folders: Mapping[str, Path], dtype: torch.dtype, device: torch.device, say: Say
) -> torch.device | None:
    """The device, where it cannot hold all models together. Raises InputError where it cannot hold one alone."""
    free = free_memory(device)
    sizes = {name: count_parameters(load_config(path)) * dtype.itemsize for name, path in folders.items()}
    if free is None or sum(sizes.values()) <= SHARE * free:
        return None
    largest = max(sizes, key=lambda name: sizes[name])
    if sizes[largest] > SHARE * free:
        raise InputError(
            f"{largest} takes {gib(sizes[largest])} in {dtype}, {device} has {gib(free)} free; expected a narrower"
            f" dtype, or at most {SHARE:.0%} of what is free"
        )
    say(f"the models take {gib(sum(sizes.values()))} together, of {gib(free)} free: they wait in main memory")
    return device


def continue_texts(
    teacher: HybridLM,
    students: Mapping[str, HybridLM],
    text: Corpus,
    tokenizer: Tokenizer,
    details: Details,
    seed: int,
    device: torch.device | None,
    say: Say,
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """How long each student's greedy text is the teacher's, and the first SAMPLES texts of all models after their
    prompts; nothing of either where there is no prompt or no student."""
    first = tokenizer.begin
    prompts = draw_prompts(text, details.prompts, details.prompt_tokens, seed, first) if details.prompts else None
    if prompts is None and details.prompts and students:
        say(f"note: no text is continued, since no document has {details.prompt_tokens} tokens; give fewer as"
            " details.prompt_tokens")  # fmt: skip
    if prompts is None or not students:
        return {}, []
    say(f"continuing {len(prompts)} texts by {details.new_tokens} tokens")
    written = {
        name: greedy_tokens(model, prompts, details.new_tokens, tokenizer.eos_token_id, device)
        for name, model in {TEACHER: teacher, **students}.items()
    }
    samples = [
        {PROMPT: tokenizer.decode(prompts[number, len(first) :].tolist())}
        | {name: continued(tokens[number].tolist(), tokenizer) for name, tokens in written.items()}
        for number in range(min(SAMPLES, len(prompts)))
    ]
    lengths = agreement(written.pop(TEACHER), written, details.resamples, seed)
    size = {"prompts": len(prompts), "new_tokens": details.new_tokens}
    return {name: dataclasses.asdict(each) | size for name, each in lengths.items()}, samples


def continued(tokens: list[int], tokenizer: Tokenizer) -> str:
    """The text of what a model wrote after a prompt, to the end that it may have set."""
    end = tokenizer.eos_token_id
    return tokenizer.decode_within(tokens[: tokens.index(end)] if end in tokens else tokens)


def draw_probes(
    kinds: Sequence[str], details: Details, text: Corpus, tokenizer: Tokenizer, seed: int
) -> dict[tuple[str, int], list[Probe]]:
    """The probes of each kind and length. Raises InputError where a length or the text is too short for one."""
    draw = np.random.default_rng(seed)
    return {
        (kind, length): [make_probe(kind, length, text, tokenizer, draw) for _ in range(details.probe_count)]
        for kind in kinds
        for length in details.probe_lengths
    }


def answer_probes(
    models: Mapping[str, HybridLM],
    probes: Mapping[tuple[str, int], Sequence[Probe]],
    resamples: int,
    seed: int,
    device: torch.device | None,
    say: Say,
) -> dict[str, dict[str, dict[str, Any]]]:
    """How the models answer each kind of probe at each length; the same probes for all."""
    answers: dict[str, dict[str, dict[str, Any]]] = {}
    for (kind, length), drawn in probes.items():
        say(f"probing: {kind}, {length:,} tokens")
        retrieved = retrieve(models, drawn, resamples=resamples, seed=seed, device=device)
        figures = {name: dataclasses.asdict(each) for name, each in retrieved.items()}
        answers.setdefault(kind, {})[str(length)] = figures
    return answers
