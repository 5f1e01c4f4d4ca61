"""What the tests of the page show on it: drawn figures of every kind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from limbeck.distill.gap.measure import summarise
from limbeck.distill.gap.sums import Sums
from limbeck.distill.gap.token_groups import CLASSES
from limbeck.models.cost.hardware import Hardware
from limbeck.models.cost.inference import memory, verdict
from limbeck.tests.helpers import tiny_config
from safetensors.numpy import save_file


def gap_of(*names: str) -> dict[str, Any]:
    """A gap of 12 documents with drawn figures, as gap.json has it."""
    draw = np.random.default_rng(0)
    sums, sizes = {}, {i: np.array([50.0, 190.0]) for i in range(12)}
    for number, name in enumerate(("teacher", *names)):
        sums[name] = Sums()
        sums[name].position = np.stack((np.full(64, 0.2 * number), np.ones(64)))
        for i in range(12):
            sums[name].documents[i] = np.array(
                [120 + 10 * number + draw.normal(), 9.0 * number, 50 - 7 * number, 8.0 * number, 50 - 5 * number,
                 50 + 90 * number, 50 - 6 * number]
            )  # fmt: skip
        groups = {"context": 24, "class": len(CLASSES), "domain": 2}
        rows = {
            kind: (np.arange(count)[:, None] < 5) * draw.random((count, 1)) * [[9, 20, 2.0 * number, 8]]
            for kind, count in groups.items()
        }
        sums[name].groups = {kind: dict.fromkeys(range(12), row) for kind, row in rows.items()}
        sums[name].bins = {i: np.outer(np.arange(15.0), (1, 0.5, 0.25)) for i in range(12)}
        sums[name].ranks = np.array([0, 400, 200 * number])
    content = summarise(sums, sizes, 64, 50, 0, ("ab/", "*.py")).to_json()
    pieces = [{"text": "x =\n  ", "kl": 0.05, "teacher": "1", "student": "2"},
              {"text": "<b>", "kl": 5.5, "teacher": " '\"&", "student": "\n"}]  # fmt: skip
    written = {"length": {"value": 9.5, "low": 8.0, "high": 11.0}, "identical": {"value": 0.5, "low": 0.4, "high": 0.6}}
    content["worst"] = {name: [{"document": "a/<i>.py", "mean_kl": 2.5, "pieces": pieces}] for name in names}
    part = {"answered": {"value": 0.75, "low": 0.5, "high": 0.95}, "nats": {"value": 3.25, "low": 3.0, "high": 3.5}}
    content["probes"] = {"multi-key": {"2048": dict.fromkeys(sums, part)}}
    content["continuation"] = dict.fromkeys(names, written)
    answers = {"acc,none": 0.25, "acc_stderr,none": 0.02}
    content["tasks"] = {name: {"arc_easy": answers} for name in sums}
    return content | {"parameters": {name: 7_130_096 - 1_899_836 * (i > 0) for i, name in enumerate(sums)}}


def scores_folder(folder: Path, pattern: str, **sizes: int) -> Path:
    """A scores folder with drawn scores, three layers of which may go."""
    folder.mkdir()
    draw = np.random.default_rng(1)
    tensors = {"hidden": draw.random((len(pattern) + 1, sizes["hidden"]))}
    for layer, letter in enumerate(pattern):
        if letter == "-":
            tensors[f"ffn.{layer}"] = draw.random(sizes["ffn"])
        elif letter == "*":
            tensors[f"attn_heads.{layer}"] = draw.random(sizes["heads"])
        else:
            tensors[f"mamba_heads.{layer}"] = draw.random((sizes["mamba"], 8))
    save_file(tensors, folder / "scores.safetensors")
    candidates = [{str(layer): 0.5 + layer for layer in range(len(pattern))}]
    layers = {"order": [3, 1, 0], "metric": "mse", "values": [0.0375, 0.0625, 0.25], "candidates": candidates}
    (folder / "scores.json").write_text(json.dumps({"pattern": pattern, "layers": layers}))
    return folder


def fit(budget_gib: float) -> dict[str, Any]:
    hardware = Hardware("testcard", 2.0, budget_gib, 600.0, 70.0)
    config = tiny_config(intermediate_size=6000)
    budget = hardware.budget(0.0, 0.0, 0.0)
    report = memory(config, 4096, 2, budget=budget)
    content = dataclasses.asdict(report) | {"total": report.total}
    answer = dataclasses.asdict(verdict(config, report, budget))
    return {"memory": content, "verdict": answer, "hardware": dataclasses.asdict(hardware)}


def facts(seed: int = 0, **options: Any) -> dict[str, Any]:
    return {
        "made_by": "limbeck score",
        "inputs": {"model": "ab" * 32},
        "options": {"seed": seed, **options},
        "versions": {"limbeck": "9.8.7", "torch": "2.99"},
        "fingerprint": "0123456789abcdef" * 4,
    }


SELECTION = {
    "layers": [0, 1, 2, 4, 5],
    "kept": {
        "hidden": list(range(20)),
        "ffn(1)": [0, 5, 7],
        "mamba_heads(0)": [0, 3],
        "mamba_heads(2)": [1, 2],
        "mamba_heads(5)": [0, 1],
        "mamba_head_dim(0)": [0, 1, 4],
    },
}


def page_content(tmp_path: Path) -> dict[str, Any]:
    """Everything that a page can show, as `write_page` takes it; files go into `tmp_path`."""
    records = [{"step": i, "tokens": 512 * i, "loss": 2 / i} for i in range(1, 9)]
    records[-1]["validation_kl"] = 0.2468
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {
        "title": "A report",
        "gap": gap_of("pruned", "distilled"),
        "provenance": {"scores": facts(seed=41), "pruned": facts()},
        "scores": scores_folder(tmp_path / "scores", "M-M-*M", hidden=32, ffn=40, heads=4, mamba=6),
        "metrics": tmp_path / "metrics.jsonl",
        "memory": {"teacher": fit(1.0), "student": fit(1.0)},
        "selection": SELECTION,
    }
