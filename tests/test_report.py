"""The page: it stands alone, parses, says every number, escapes what it is given, and is the same twice."""

from __future__ import annotations

import collections
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from limbeck.distill.report import plots
from limbeck.distill.report.page import cell
from limbeck.distill.report.report import kept_units, unit_scores, write_page
from limbeck.distill.report.words import removal_steps
from limbeck.tests.page_content import SELECTION, facts, fit, gap_of, page_content, scores_folder
from safetensors.numpy import load_file

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


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return page_content(tmp_path_factory.mktemp("content"))


@pytest.fixture(scope="module")
def whole(everything: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of everything."""
    return page(tmp_path_factory.mktemp("page") / "out", **everything)


def page(folder: Path, **content: Any) -> Path:
    folder.mkdir()
    return write_page(folder, "report.html", **content)


def test_it_stands_alone_and_parses(whole: Path) -> None:
    text, found = whole.read_text(), outline(whole)
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
    pictures = {kind: sorted((whole.parent / "plots").glob(f"*.{kind}")) for kind in ("png", "svg")}
    assert len(pictures["png"]) == found.tags["svg"] + 1  # the overview of the gap is for documents
    assert [path.stem for path in pictures["png"]] == [path.stem for path in pictures["svg"]]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in pictures["png"])
    assert all(ElementTree.parse(path).getroot().tag.endswith("}svg") for path in pictures["svg"])


def test_every_number_is_there(everything: dict[str, Any], whole: Path) -> None:
    found = outline(whole)
    text = " ".join(found.text)
    gap = everything["gap"]
    for name, model in gap["models"].items():
        assert name in found.text and f"{gap['parameters'][name]:,}" in found.text
        for key in ("cross_entropy", "perplexity", "bits_per_byte", "kl", "agreement", "reverse_kl", "top5_agreement",
                    "mass_kept"):  # fmt: skip
            shown = cell(model[key])
            assert shown.value in found.text and shown.interval in found.text, (name, key)
        rank, ece = model["mean_rank"], model["calibration"]["ece"]
        assert cell(rank).value in found.text and f"; median {model['median_rank']}" in text
        assert cell(ece).value in found.text
        for key in ("by_class", "by_domain"):
            assert all(group in found.text for group in model[key]) and len(model[key]) > 1
    assert "multi-key, 2,048 tokens" in found.text and "0.50 to 0.95" in found.text and "3.25" in found.text
    assert "9.5" in found.text and "8.0 to 11.0 tokens" in found.text
    for pair in gap["differences"]:
        assert f"; p {pair['p']['kl']:.2g}" in text
        for key in ("cross_entropy", "bits_per_byte", "kl", "agreement"):
            assert cell(pair[key], "+").value in found.text, (pair["first"], pair["second"], key)
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


@pytest.mark.parametrize(("value", "low", "high", "shown"), (
    (0.84312, 0.8121, 0.8742, "0.843|0.812 to 0.874"), (21.46, 18.2, 24.9, "21.5|18.2 to 24.9"),
    (1234.6, 900.0, 1600.0, "1235|900 to 1600"), (0.5, 0.5, 0.5, "0.5000|0.5000 to 0.5000"),
    (0.0012, 0.0011, 0.0014, "0.00120|0.00110 to 0.00140"),
    (2.25, 2.25, 2.2500000001, "2.2500|2.2500 to 2.2500"), (0.5, None, None, "0.5000|"),
))  # fmt: skip
def test_intervals_have_two_significant_digits(value: float, low: float, high: float, shown: str) -> None:
    made = cell({"value": value, "low": low, "high": high})
    assert f"{made.value}|{made.interval}" == shown


def test_a_page_says_where_its_figures_come_from(everything: dict[str, Any], tmp_path: Path) -> None:
    """Names, date, place, command, seconds and tokens a stage, sizes before and after, what all models write."""
    run = {"command": "limbeck compress output=a&b", "host": "box", "began": "2031-02-03T04:05:06+00:00",
           "processes": 1, "cpu": "Abacus 9", "seconds": 3725.2, "threads": 2,
           "commit": "abc123", "torch": "9.9", "output": "/x/there",
           "bytes": {"model": 2**21}}  # fmt: skip
    shapes = {"teacher": {"family": "f", "layers": 12, "hidden_size": 256}}
    shapes["pruned"] = shapes["distilled"] = {"family": "f", "layers": 11, "hidden_size": 192}
    gap = everything["gap"] | {
        "architecture": shapes,
        "samples": [{"prompt": "def <f>", "teacher": "(x):", "pruned": "(y):", "distilled": "(z):"}],
    }
    made = {"scores": facts(importance={"tokens": 16384, "depth_tokens": 8192}) | {"run": run},
            "distilled": facts(distill={"batch": 4, "seq_len": 512, "train": {"steps": 235}}) | {
                "run": run | {"seconds": 5.25, "resumed": True}}}  # fmt: skip
    made["gap"] = facts(tokens=10**6) | {"made_by": "limbeck evaluate", "run": run}
    changes = {"gap": gap, "provenance": made, "run": run, "models": {"teacher": "hf:our/big", "pruned": "out/pruned"}}
    found = outline(page(tmp_path / "out", **(everything | changes)))
    text = " ".join(" ".join(found.text).split())
    for wanted in (
        "2031-02-03 04:05:06", "Abacus 9, 2 threads, box", "limbeck compress output=a&b", "1 h 2 min", "up to 24,576",
        "last part) 481,280", "5.2 s (resumed",
        "hf:our/big", "out/pruned", "2.00 MiB", "abc123", "192 75%", "11 92%", "def <f>",
        "(y):", "(z):", "residual channels", "there", "forward KL", "KL(teacher || student)", "reverse KL",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "1,000,000" not in text and f"1 h 2 min {gap['tokens']:,} Abacus 9" in text  # what was read, not wished for
    relative = gap["models"]["distilled"]["perplexity"]["value"] / gap["models"]["teacher"]["perplexity"]["value"] - 1
    assert f"{100 * relative:+.1f}%" in text
    assert "5.50 nats at '<b>': teacher" in text  # without a pointer
    anchors = [value for tag, name, value in found.attributes if tag == "a" and name == "href"]
    assert (
        "#section-stages" in anchors and "#section-models-before-and-after" in anchors and "#section-memory" in anchors
    )


@pytest.mark.slow
def test_memory_of_a_tiny_model_takes_little_place(everything: dict[str, Any], tmp_path: Path) -> None:
    """Beside a card a hundred times as large: no picture, what matters in three lines, the rest folded."""
    for budget, pictures in ((1.0, False), (0.004, True)):
        memory = {"teacher": fit(budget), "student": fit(budget)}
        folder = tmp_path / str(budget)
        found = outline(page(folder, **(everything | {"memory": memory})))
        assert (folder / "plots" / "memory.png").exists() is pictures
        folded = ("details", "class", "folded") in found.attributes
        assert folded is not pictures and "largest context" in " ".join(found.text)


def test_worst_inputs_are_coloured(tmp_path: Path) -> None:
    """Shades by KL, line breaks to be seen, and what a pointer reads; a document's text is text."""
    found = outline(page(tmp_path / "out", title="Gap", gap=gap_of("distilled"), provenance={}))
    spans = [(name, value) for tag, name, value in found.attributes if tag == "span"]
    assert ("class", "kl0") in spans and ("class", "kl5") in spans
    assert ("title", "KL 5.50; teacher ' \\'\"&', student '\\n'") in spans
    assert "<b>" in found.text and not found.tags["i"] and "a/<i>.py \N{MIDDLE DOT} 2.50 nats a token" in found.text
    assert any(text.startswith("x =\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n") for text in found.text)


def test_hostile_names_are_text(everything: dict[str, Any], tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    changes = {
        "title": bad, "gap": gap_of(bad, 'a"b&c', "cost $x_{1$"), "memory": {"student": fit(1.0), bad: fit(0.001)},
        "provenance": {bad: facts(note="</pre><b onclick='x'>")}, "scores": None,
    }  # fmt: skip
    path = page(tmp_path / "out", **(everything | changes))
    found = outline(path)
    assert not found.tags["script"] and not any(name == "onclick" for _, name, _ in found.attributes)
    assert found.text.count(bad) >= 3 and "cost $x_{1$" in found.text and 'a"b&c' in found.text
    assert "does not fit testcard at 4,096 tokens \N{MULTIPLICATION SIGN} 2" in found.text


def test_the_same_twice_and_from_the_files_alone(everything: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    content = {
        key: json.loads(json.dumps(value)) if isinstance(value, dict) else value for key, value in everything.items()
    }
    assert page(tmp_path / "b", **content).read_bytes() == whole.read_bytes()
    for file in (whole.parent / "plots").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / "plots" / file.name).read_bytes()


def test_what_is_not_given_is_left_out(tmp_path: Path) -> None:
    found = outline(page(tmp_path / "out", title="Gap", gap=gap_of(), provenance={"evaluate": facts()}))
    text = " ".join(found.text)
    assert found.tags["svg"] == 3 and "teacher" in text and "Stages" not in text and "Written" not in text
    for title in ("Where the gap is", "Worst inputs", "Distillation", "Importance", "Memory", "Differences"):
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


@pytest.mark.slow
def test_a_turned_stream_has_directions_and_no_channels(everything: dict[str, Any], tmp_path: Path) -> None:
    kept = {name: units for name, units in SELECTION["kept"].items() if name != "hidden"}
    selection = {"layers": SELECTION["layers"], "kept": kept, "principal_directions": 20}
    path = page(tmp_path / "out", **(everything | {"selection": selection}))
    text = " ".join(outline(path).text)
    assert "20 of 32 principal directions stay" in text and "Residual channels" not in text
    assert "Residual channels" in " ".join(outline(page(tmp_path / "channels", **everything)).text)


@pytest.mark.slow
def test_a_large_model_makes_no_large_page(everything: dict[str, Any], tmp_path: Path) -> None:
    pattern = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
    scores = scores_folder(tmp_path / "large", pattern, hidden=5120, ffn=20480, heads=40, mamba=128)
    selection = {"layers": [i for i in range(62) if i not in (0, 1, 3)], "kept": {"hidden": list(range(0, 5120, 2))}}
    changes = {"scores": scores, "selection": selection, "gap": gap_of(), "metrics": None, "memory": None}
    path = page(tmp_path / "out", **(everything | changes))
    assert path.stat().st_size < 2**20
    outline(path)


@pytest.mark.slow
def test_layers_that_go_by_pairs_stand_together(everything: dict[str, Any], tmp_path: Path) -> None:
    scores = scores_folder(tmp_path / "pairs", "*-*-*-", hidden=8, ffn=8, heads=2, mamba=1)
    content = json.loads((scores / "scores.json").read_text())
    content["layers"] |= {"order": [2, 3, 0, 1], "values": [0.0375, 0.0625], "candidates": [{"0": 0.5, "2": 0.0375}]}
    (scores / "scores.json").write_text(json.dumps(content))
    selection = {"layers": [0, 1, 4, 5], "kept": {}}
    text = " ".join(outline(page(tmp_path / "out", **(everything | {"scores": scores, "selection": selection}))).text)
    assert re.search(r"1\s+2 \(attention\), 3 \(MLP\)\s+0.0375\s+removed", text), text
    assert re.search(r"2\s+0 \(attention\), 1 \(MLP\)\s+0.0625\s+kept", text)
    assert "the layers that are missed least" in text


@pytest.mark.slow
def test_nothing_is_called_removed_where_no_student_was_pruned(everything: dict[str, Any], tmp_path: Path) -> None:
    text = " ".join(outline(page(tmp_path / "out", **(everything | {"selection": None}))).text)
    assert "In the order of removal" in text and "0.0625" in text
    assert "removed." not in text.partition("Importance of layers")[2] and "kept" not in text.partition("3 (MLP)")[2]


def test_steps_of_one_layer_of_two_and_without_values() -> None:
    assert removal_steps([3, 1], [0.5, 0.25]) == [((3,), 0.5), ((1,), 0.25)]
    assert removal_steps([8, 9, 20, 21], [0.5, 0.25]) == [((8, 9), 0.5), ((20, 21), 0.25)]
    assert removal_steps([8, 9], []) == []
