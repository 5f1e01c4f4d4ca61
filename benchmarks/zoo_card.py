"""How good a shipped model is: bits per byte on held-out files beside gzip, xz and unigram models, and its card.

    python -m limbeck.benchmarks.zoo_card [--model zoo] [--write]

The test split of the running Python's standard library; the model reads rows of 512 tokens of packed documents with
an empty state at each row's start. gzip -9 and xz -9 compress each file by itself, and all files in one piece; the
unigram models count bytes and tokens of the training split. Of a mixture of experts the table of their use on the same
files is added. `--write` writes README.md and curve.png into the folder.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from limbeck.distill.gap.measure import Estimate, measure_gap
from limbeck.distill.report.experts import COLUMNS, use_row
from limbeck.distill.text.packing import Batch, tokenize
from limbeck.distill.text.records import Document
from limbeck.distill.text.resolve import documents
from limbeck.models.checkpoint import load_model
from limbeck.models.config import HybridConfig
from limbeck.models.cost.parameters import count_active, count_parameters
from limbeck.models.named import SHIPPED, read_yaml
from limbeck.models.provenance import provenance
from limbeck.models.tokenizer import Tokenizer, load_tokenizer

RECIPES = Path(__file__).parents[1] / "conf" / "recipe"
STEP = 4096  # tokens
WIDTH = 118
CURVES = (
    "`metrics.jsonl` and `curve.png` hold the curve of both runs: in each the rate rises anew and falls to zero, and"
    " the\ncurve flattens with it; more text would still help."
)


def made(name: str) -> str:
    return f"`limbeck pretrain recipe={name}`, then `limbeck pretrain recipe={name}-longer init=` its result"


def compressors(documents: list[Document]) -> dict[str, float]:
    """Bits per byte of gzip -9 and xz -9."""
    texts = [document.text.encode() for document in documents]
    whole, total = b"".join(texts), sum(map(len, texts))
    sizes = {
        "gzip -9, file by file": sum(len(gzip.compress(text, 9)) for text in texts),
        "xz -9, file by file": sum(len(lzma.compress(text, preset=9)) for text in texts),
        "gzip -9, all files in one": len(gzip.compress(whole, 9)),
        "xz -9, all files in one": len(lzma.compress(whole, preset=9)),
    }
    return {name: 8 * size / total for name, size in sizes.items()}


def unigrams(train: list[Document], test: list[Document], tokenizer: Tokenizer) -> dict[str, float]:
    """Bits per byte of the training split's byte and token frequencies (plus one each)."""

    def bits(train_ids: np.ndarray, test_ids: np.ndarray, size: int) -> float:
        counts = np.bincount(train_ids, minlength=size) + 1.0
        return float(-(np.log2(counts / counts.sum())[test_ids]).sum())

    def as_bytes(documents: list[Document]) -> np.ndarray:
        return np.frombuffer(b"".join(document.text.encode() for document in documents), dtype=np.uint8)

    total = len(as_bytes(test))
    tokens = [tokenize(documents, tokenizer).ids[:] for documents in (train, test)]
    return {
        "unigram over bytes": bits(as_bytes(train), as_bytes(test), 256) / total,
        "unigram over tokens": bits(tokens[0], tokens[1], tokenizer.vocab_size) / total,
    }


def packed(folder: Path, split: str = "test") -> list[Batch]:
    return list(tokenize(list(documents("stdlib", split)), load_tokenizer(folder)).sample(batch_size=8, seq_len=512))


def measure(folder: Path) -> tuple[dict[str, float], Estimate, int]:
    tokenizer = load_tokenizer(folder)
    train, test = (list(documents("stdlib", split)) for split in ("train", "test"))
    found = measure_gap(load_model(folder), {}, packed(folder)).models["teacher"].bits_per_byte
    rows = {"this model": found.value, **compressors(test), **unigrams(train, test, tokenizer)}
    return rows, found, len(test)


def expert_use(folder: Path) -> dict[int, list[int]]:
    """By layer how many tokens of the test files chose each expert; empty without experts."""
    model, uses = load_model(folder), dict[int, Any]()
    names = {kind.experts.use for kind in model.config.kinds if kind.experts is not None}

    class Counter:
        def __init__(self, counted: torch.Tensor) -> None:
            self.names, self.counted = names, counted

        def __call__(self, name: str, layer: int, activation: torch.Tensor) -> None:
            if name in self.names:
                uses[layer] = uses.get(layer, 0) + activation[self.counted].sum(0, dtype=torch.float64)

    if names:
        with torch.no_grad():
            for batch in packed(folder):
                model(batch.input_ids, seq_idx=batch.seq_idx, observe=Counter(batch.labels >= 0))
    return {layer: [int(count) for count in counts] for layer, counts in sorted(uses.items())}


def shape(config: HybridConfig) -> str:
    """What the model is made of."""
    said = ", ".join(dict.fromkeys(f"{kind.letter} {kind.name}" for kind in config.kinds))
    parts = [f"layers `{config.pattern}` ({said})", f"hidden {config.hidden_size}"]
    if not config.n_routed_experts:
        parts.append(f"FFN {config.intermediate_size}")
    if config.n_routed_experts:
        parts.append(
            f"{config.n_routed_experts} experts of {config.moe_intermediate_size} neurons, {config.num_experts_per_tok}"
            f" a token ({count_active(config):,} parameters), and a shared one of"
            f" {config.moe_shared_expert_intermediate_size}"
        )
    parts.append(f"{config.mamba_num_heads} Mamba heads x {config.mamba_head_dim} in {config.n_groups} groups")
    parts.append(f"state {config.ssm_state_size}")
    parts.append(f"{config.num_attention_heads} query and {config.num_key_value_heads} key-value heads")
    return f"{count_parameters(config):,} parameters, bf16; {', '.join(parts)} x {config.head_dim}."


def card(folder: Path, config: HybridConfig, rows: dict[str, float], interval: Estimate, files: int) -> str:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held = [record for record in records if "validation_loss" in record]
    last = records[-1]
    fallen = held[-3]["validation_loss"] - last["validation_loss"]
    table = "\n".join(f"| {name} | {value:.3f} |" for name, value in rows.items())
    facts = "\n".join(f"- {name}: {value}" for name, value in provenance().items())
    rate = read_yaml(RECIPES / f"{folder.name}.yaml").get("train", {}).get("expert_balance", 0)
    balanced = f"; routers' biases move by {rate} a step towards equal load" if rate else ""
    origin = (
        f"{made(folder.name)}: the sources of Python 3.11's standard library (their licence is the PSF's), split by"
        f" file into train, validation and test by the sha256 of the file's name; {last['tokens']:,} tokens of the"
        f" training split ({last['step']:,} steps of {STEP:,}), Muon for the layers' matrices and AdamW for the rest"
        f"{balanced}, two CPU cores. Loss on the validation split at the end {last['validation_loss']:.3f} nats a"
        f" token, {fallen:.3f} below that of 200 steps before."
    )
    return f"""---
library_name: transformers
license: apache-2.0
tags: [limbeck, nemotron_h, mamba-2]
---
# {"The small mixture of experts" if config.n_routed_experts else "The small trained hybrid"} of limbeck

{wrapped(shape(config))} Its own byte-level BPE tokenizer has
{config.vocab_size:,} tokens. It opens in transformers' `NemotronHForCausalLM`.

## What it was made of
{wrapped(origin)}
{CURVES}

## How good it is
Bits per byte on the {files} test files ([{interval.low:.3f}, {interval.high:.3f}] is this model's 95% interval over
files):

| | bits per byte |
|---|---|
{table}
{use_table(folder)}
It is a model to try tools on, not to work with. Measured by `benchmarks/zoo_card.py`:
{facts}
"""


def wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False)


def use_table(folder: Path) -> str:
    uses = expert_use(folder)
    if not uses:
        return ""
    columns = [COLUMNS[0], *COLUMNS[3:]]
    rows = ["| " + " | ".join((str(layer), *use_row(counts, None)[2:])) + " |" for layer, counts in uses.items()]
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    said = (
        "What the routers choose on those files: the most and the least used expert's number and its share (1 is an"
        " equal one), experts\nthat no token chose, and the entropy of the choices over that of equal ones:"
    )
    return "\n" + "\n".join([said, "", *head, *rows]) + "\n"


def curve(folder: Path) -> None:
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["tokens"] for r in records], [r["loss"] for r in records], alpha=0.5, label="training batch")
    held = [r for r in records if "validation_loss" in r]
    axes.plot([r["tokens"] for r in held], [r["validation_loss"] for r in held], "o-", markersize=3, label="validation")
    axes.set(xlabel="tokens", ylabel="cross-entropy (nats a token)", ylim=(math.floor(held[-1]["validation_loss"]), 7))
    axes.legend(frameon=False)
    figure.savefig(folder / "curve.png", dpi=120, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="zoo", choices=list(SHIPPED))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    folder = SHIPPED[options.model]
    rows, interval, files = measure(folder)
    for name, value in rows.items():
        print(f"{name:28}{value:8.3f} bits per byte")
    for name, fact in provenance().items():
        print(f"{name}: {fact}")
    if options.write:
        curve(folder)
        text = card(folder, load_model(folder).config, rows, interval, files)
        (folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
