"""The page: it stands alone, parses, says every number, escapes what it is given, and is the same twice."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from limbeck.distill import plots
from limbeck.distill.gap import summarise
from limbeck.distill.gap_sums import Sums
from limbeck.distill.report import kept_units, unit_scores, write_page
from limbeck.models.cost import Hardware, memory, verdict
from limbeck.tests.helpers import tiny_config
from safetensors.numpy import load_file, save_file

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Outline(HTMLParser):
    """Checks that what opens is closed in order, and collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: collections.Counter[str] = collections.Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def outline(path: Path) -> Outline:
    found = Outline()
    found.feed(path.read_text(encoding="utf-8"))
    found.close()
    assert not found.open
    return found


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
    content = summarise(sums, sizes, 64, 50, 0).to_json()
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


@pytest.fixture
def everything(tmp_path: Path) -> dict[str, Any]:
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


def page(folder: Path, **content: Any) -> Path:
    folder.mkdir()
    return write_page(folder, "report.html", **content)


def test_it_stands_alone_and_parses(everything: dict[str, Any], tmp_path: Path) -> None:
    path = page(tmp_path / "out", **everything)
    text, found = path.read_text(), outline(path)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & found.tags.keys()
    assert "http" not in text and "@import" not in text and "//" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.S)
    for tag, name, value in found.attributes:
        assert not name.startswith("on") and name not in ("src", "srcset", "action", "data"), (tag, name)
        if "href" in name:
            assert value.startswith("#"), value
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {
        f"#{value}" for _, name, value in found.attributes if name == "id"
    }
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids)), "pictures' ids clash"
    assert {value for _, name, value in found.attributes if "href" in name} <= {f"#{value}" for value in ids}
    assert ("meta", "name", "viewport") in found.attributes and "@media print" in text
    light, dark = text.split("prefers-color-scheme: dark")
    for role in plots.THEME:
        assert f"--{role}: " in light and f"--{role}: " in dark.split("</style>")[0], role
    assert not set(plots.THEME.values()) & set(re.findall("#[0-9a-f]{6}", text.split("</style>")[1]))
    pictures = sorted(file.name for file in (tmp_path / "out" / "plots").iterdir())
    assert len(pictures) == found.tags["svg"] + 1  # the overview of the gap is for documents
    assert all((tmp_path / "out" / "plots" / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)


def test_every_number_is_there(everything: dict[str, Any], tmp_path: Path) -> None:
    found = outline(page(tmp_path / "out", **everything))
    text = " ".join(found.text)
    gap = everything["gap"]
    for name, model in gap["models"].items():
        assert name in found.text and f"{gap['parameters'][name]:,}" in found.text
        for key in ("cross_entropy", "perplexity", "bits_per_byte", "kl", "agreement"):
            assert f"{model[key]['value']:.4f}" in found.text, (name, key)
            assert f"{model[key]['low']:.4f} to {model[key]['high']:.4f}" in found.text, (name, key)
    for pair in gap["differences"]:
        for key in ("cross_entropy", "bits_per_byte", "kl", "agreement"):
            assert f"{pair[key]['value']:+.4f}" in found.text, (pair["first"], pair["second"], key)
    assert f"{gap['recovery']['value']:.0%}" in found.text
    student = everything["memory"]["student"]
    for part in ("weights", "kv", "ssm", "conv", "total"):
        assert f"{student['memory'][part] / 2**20:,.2f} MiB" in found.text, part
    assert f"{student['verdict']['largest_context']:,}" in found.text and "1.00 GiB" in found.text
    assert f"{student['memory']['vllm']['block_size']:,}" in found.text
    for wanted in ("0.0375", "0.0625", "0.25", "3 (MLP)", "removed", "kept", "0.247", "8 steps, 4,096 tokens"):
        assert wanted in text, wanted
    for wanted in ("41", "limbeck score", "limbeck 9.8.7, torch 2.99", "0123456789ab", "ab" * 32):
        assert wanted in text, wanted
    for title in ("Residual channels", "FFN neurons", "Mamba heads", "Mamba head channels", "Attention heads"):
        assert title in text, title


def test_hostile_names_are_text(everything: dict[str, Any], tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    everything["gap"] = gap_of(bad, 'a"b&c', "cost $x_{1$")
    everything["provenance"] = {bad: facts(note="</pre><b onclick='x'>")}
    path = page(tmp_path / "out", **(everything | {"title": bad, "memory": {"student": fit(0.001), bad: fit(1.0)}}))
    found = outline(path)
    assert not found.tags["script"] and not any(name == "onclick" for _, name, _ in found.attributes)
    assert found.text.count(bad) >= 3 and "cost $x_{1$" in found.text and 'a"b&c' in found.text
    assert "does not fit testcard at 4,096 tokens \N{MULTIPLICATION SIGN} 2" in found.text


def test_the_same_twice_and_from_the_files_alone(everything: dict[str, Any], tmp_path: Path) -> None:
    first = page(tmp_path / "a", **everything).read_bytes()
    content = {
        key: json.loads(json.dumps(value)) if isinstance(value, dict) else value for key, value in everything.items()
    }
    assert page(tmp_path / "b", **content).read_bytes() == first
    for file in (tmp_path / "a" / "plots").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / "plots" / file.name).read_bytes()


def test_what_is_not_given_is_left_out(tmp_path: Path) -> None:
    found = outline(page(tmp_path / "out", title="Gap", gap=gap_of(), provenance={"evaluate": facts()}))
    text = " ".join(found.text)
    assert found.tags["svg"] == 3 and "teacher" in text
    for title in ("Distillation", "Importance", "Memory", "Differences"):
        assert title not in text


def test_units_are_added_up_as_in_choosing(everything: dict[str, Any]) -> None:
    found = unit_scores(everything["scores"], "M-M-*M", SELECTION)
    tensors = load_file(everything["scores"] / "scores.safetensors")
    assert list(found)[:3] == ["hidden", "mamba_head_dim(0)", "mamba_heads(0)"]
    assert np.allclose(found["hidden"], tensors["hidden"][[0, 1, 2, 4, 5, 6]].sum(0))  # layer 3 has gone
    assert np.allclose(found["mamba_heads(0)"], (tensors["mamba_heads.0"][:, [0, 1, 4]] ** 2).sum(1) ** 0.5)
    assert np.allclose(found["mamba_heads(2)"], (tensors["mamba_heads.2"] ** 2).sum(1) ** 0.5)
    assert np.allclose(found["mamba_head_dim(0)"], (tensors["mamba_heads.0"] ** 2).sum(0) ** 0.5)
    kept = kept_units(found, SELECTION)
    assert kept["ffn(1)"] == [0, 5, 7] and kept["ffn(3)"] == [] and kept["attn_heads(4)"] == [0, 1, 2, 3]


def test_a_large_model_makes_no_large_page(everything: dict[str, Any], tmp_path: Path) -> None:
    pattern = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
    scores = scores_folder(tmp_path / "large", pattern, hidden=5120, ffn=20480, heads=40, mamba=128)
    selection = {"layers": [i for i in range(62) if i not in (0, 1, 3)], "kept": {"hidden": list(range(0, 5120, 2))}}
    path = page(tmp_path / "out", **(everything | {"scores": scores, "selection": selection}))
    assert path.stat().st_size < 2**20
    outline(path)
