"""How good the shipped model is: bits per byte on held-out files beside gzip, xz and unigram models, and its card.

    python -m limbeck.benchmarks.zoo_card [--model models/zoo] [--write]

The test split of the running Python's standard library; the model reads rows of 512 tokens of packed documents with
an empty state at each row's start. gzip -9 and xz -9 compress each file by itself, and all files in one piece; the
unigram models count bytes and tokens of the training split. `--write` writes README.md and curve.png into the folder.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
from pathlib import Path

import numpy as np
from limbeck.distill.gap.measure import Estimate, measure_gap
from limbeck.distill.text.packing import tokenize
from limbeck.distill.text.records import Document
from limbeck.distill.text.resolve import documents
from limbeck.models.checkpoint import load_model
from limbeck.models.config import HybridConfig
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.provenance import provenance
from limbeck.models.tokenizer import Tokenizer, load_tokenizer

ZOO = Path(__file__).parents[1] / "models" / "zoo"


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


def measure(folder: Path) -> tuple[dict[str, float], Estimate, int]:
    tokenizer = load_tokenizer(folder)
    train, test = (list(documents("stdlib", split)) for split in ("train", "test"))
    batches = tokenize(test, tokenizer).sample(batch_size=8, seq_len=512)
    found = measure_gap(load_model(folder), {}, batches).models["teacher"].bits_per_byte
    rows = {"this model": found.value, **compressors(test), **unigrams(train, test, tokenizer)}
    return rows, found, len(test)


def card(folder: Path, config: HybridConfig, rows: dict[str, float], interval: Estimate, files: int) -> str:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held = [record for record in records if "validation_loss" in record]
    last = records[-1]
    table = "\n".join(f"| {name} | {value:.3f} |" for name, value in rows.items())
    facts = "\n".join(f"- {name}: {value}" for name, value in provenance().items())
    return f"""---
library_name: transformers
license: apache-2.0
tags: [limbeck, nemotron_h, mamba-2]
---
# The small trained hybrid of limbeck

{count_parameters(config):,} parameters, bf16; layers `{config.pattern}` (M Mamba-2, * attention, - MLP), hidden
{config.hidden_size}, FFN {config.intermediate_size}, {config.mamba_num_heads} Mamba heads x {config.mamba_head_dim} in
{config.n_groups} groups, state {config.ssm_state_size}, {config.num_attention_heads} query and
{config.num_key_value_heads} key-value heads x {config.head_dim}. Its own byte-level BPE tokenizer has
{config.vocab_size:,} tokens. It opens in transformers' `NemotronHForCausalLM`.

## What it was made of
`limbeck pretrain recipe=zoo`, then `limbeck pretrain recipe=zoo-longer init=` its result: the sources of Python 3.11's
standard library (their licence is the PSF's), split by file into train, validation and test by the sha256 of the
file's name; {last["tokens"]:,} tokens of the training split ({last["step"]:,} steps of 4,096), Muon for the layers'
matrices and AdamW for the rest, two CPU cores. Loss on the validation split at the end {last["validation_loss"]:.3f}
nats a token, {held[-3]["validation_loss"] - last["validation_loss"]:.3f} below that of 200 steps before.
`metrics.jsonl` and `curve.png` hold the curve of both runs: in each the rate rises anew and falls to zero, and the
curve flattens with it; more text would still help.

## How good it is
Bits per byte on the {files} test files ([{interval.low:.3f}, {interval.high:.3f}] is this model's 95% interval over
files):

| | bits per byte |
|---|---|
{table}

It is a model to try tools on, not to work with. Measured by `benchmarks/zoo_card.py`:
{facts}
"""


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
    parser.add_argument("--model", type=Path, default=ZOO)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows, interval, files = measure(options.model)
    for name, value in rows.items():
        print(f"{name:28}{value:8.3f} bits per byte")
    for name, fact in provenance().items():
        print(f"{name}: {fact}")
    if options.write:
        curve(options.model)
        text = card(options.model, load_model(options.model).config, rows, interval, files)
        (options.model / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
