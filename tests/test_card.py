"""The exported folder's card: figures of the very model, the base model's terms, and nothing made up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from limbeck.distill.report.card import TRANSFORMERS, Published, front_matter, read_licence, write_card
from limbeck.models.checkpoint import load_config
from limbeck.models.config import HybridConfig
from limbeck.models.fingerprint import fingerprint_of
from limbeck.models.hub import origins
from limbeck.prune.scores import LayerScores, Scores, save_scores
from limbeck.prune.width_metrics import RandomScores
from limbeck.tests.helpers import limbeck, make_workshop, tiny_config
from limbeck.tests.page_content import gap_of


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("card"))


@pytest.mark.parametrize(
    ("text", "expected"),
    (
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# x", {"license": "apache-2.0"}),
        ("---\nlicense: other\nlicense_name: its-own\nlicense_link: >-\n  https://example.org/a\n---\n",
         {"license": "other", "license_name": "its-own", "license_link": "https://example.org/a"}),
        ("---\nlicense: 'mit'\n", {}), ("# license: mit\n", {}), ("", {}),
        ("---\ntags:\n  license: mit\n---\nlicense: gpl\n", {}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {"license": ["mit", "apache-2.0"]}),
        ("---\nlicense: {a: b}\nlicense_name: [{c: d}, 7]\n---\n", {"license_name": ["7"]}),
        ("---\nlicense: " + 3000 * "[" + "\n---\n", {}),
    ),
    ids=range(9),
)  # fmt: skip
def test_terms_in_a_cards_head(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert front_matter(tmp_path / "README.md") == expected


def test_a_folders_terms(tmp_path: Path) -> None:
    assert read_licence(tmp_path).keys == {} and read_licence(tmp_path).files == ()
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    assert read_licence(tmp_path).keys == {"license": "mit"}
    (tmp_path / "config.json").write_text('{"license": ["mit", "apache-2.0"]}')
    both = read_licence(tmp_path)
    (tmp_path / "both").mkdir()
    write_card(tmp_path / "both", tiny_config(), published("bfloat16"), both)
    text = (tmp_path / "both" / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == ["mit", "apache-2.0"] == both.keys["license"]
    assert "`license: mit, apache-2.0`" in text
    (tmp_path / "README.md").write_text("---\nlicense: other\n---\n")
    for name in ("LICENSE", "Notice.txt", "licensed.py", "LICENCE-weights.pdf"):
        (tmp_path / name).write_text(name)
    found = read_licence(tmp_path)
    assert found.keys == {"license": "other"}
    assert [path.name for path in found.files] == ["LICENCE-weights.pdf", "LICENSE", "Notice.txt"]
    (tmp_path / "out").mkdir()
    write_card(tmp_path / "out", tiny_config(), published("bfloat16", "Not compared."), found)
    text = (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "Notice.txt").read_text() == "Notice.txt"
    assert "\nlicense: other\n" in text.split("---")[1] and "[LICENSE](LICENSE)" in text and "`license: other`." in text
    assert "Not compared." in text and "How near" not in text


def test_models_and_data_sets_of_the_hub(tmp_path: Path) -> None:
    """Those that a model was made of, as the folders before it say."""
    (tmp_path / "distilled").mkdir()
    sources = {"teacher": "hf:our/large@1", "student.model": "hf:our/large@1", "data": "hf:our/text@2:en:train"}
    (tmp_path / "distilled" / "limbeck.json").write_text(json.dumps({"sources": sources}))
    found = origins({"model": tmp_path / "distilled", "data": "hf:our/calibration@3:default:train"})
    assert found["model.data"] == sources["data"] and found["data"].startswith("hf:our/calibration")
    card = published("fp8", "Not compared.")
    write_card(tmp_path, tiny_config(), card, read_licence(tmp_path), sources=found)
    text = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["datasets"] == ["our/calibration", "our/text"] and head["base_model"] == ["our/large"]


def published(dtype: str, checked: str = "") -> Published:
    return Published(dtype, TRANSFORMERS, checked)


def measured(*names: str) -> dict[str, Any]:
    """A gap as export gives it to the card."""
    gap = gap_of(*names) | {"data": {"data": "text", "split": "test", "dtype": "float32"}, "tasks": {}}
    gap["continuation"] = {name: found | {"new_tokens": 16} for name, found in gap["continuation"].items()}
    return gap


def test_figures_of_the_gap(tmp_path: Path) -> None:
    gap = measured("pruned", "distilled")
    write_card(tmp_path, tiny_config(), published("float16"), read_licence(tmp_path), gap, "distilled")
    text = (tmp_path / "README.md").read_text()
    for name, model in gap["models"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1] == f"{gap['parameters'][name]:,}" and len(cells) == 6
        for cell, key in zip(cells[2:], ("bits_per_byte", "kl", "agreement", "mass_kept"), strict=True):
            assert cell == "{value:.4f} [{low:.4f}, {high:.4f}]".format(**model[key])
    assert sum(line.startswith("| teacher |") for line in text.splitlines()) == 2 and "Answers to" not in text
    assert f"recovered {100 * gap['recovery']['value']:.1f}% [" in text and 'This model is "distilled"' in text
    assert "does not name them" in text


def rows_of(text: str, title: str) -> dict[str, dict[str, str]]:
    """The cells of a card's table by row and column, of which the first columns are as the title says."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(title))
    end = lines.index("", start)
    columns, _, *rows = ([cell.strip() for cell in line[1:-1].split(" | ")] for line in lines[start:end])
    assert all(len(row) == len(columns) for row in rows)
    return {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in rows}


def test_further_figures_and_tasks(tmp_path: Path) -> None:
    """A second table has what else gap.json tells of the models, a third their answers to task suites."""
    gap = measured("pru|ned", "distilled")
    answers = {"acc,none": 0.5, "acc_stderr,none": 0.0125, "acc_norm,none": 0.25, "acc_norm_stderr,none": 0.01}
    gap["tasks"] = {name: {"next|line": answers} for name in gap["models"]}
    (pair,) = (pair for pair in gap["differences"] if pair["first"] != "teacher")
    write_card(tmp_path, tiny_config(), published("float16"), read_licence(tmp_path), gap, "distilled")
    text = (tmp_path / "README.md").read_text()
    found = rows_of(text, "| model | cross-entropy |")
    assert list(found) == ["teacher", "pru\\|ned", "distilled"]
    for name, model in gap["models"].items():
        figures = {
            "cross-entropy": model["cross_entropy"], "perplexity": model["perplexity"],
            "reverse KL": model["reverse_kl"], "top-5 agreement": model["top5_agreement"],
            "mean rank": model["mean_rank"], "ECE": model["calibration"]["ece"],
            "same greedy text, of 16 tokens": gap["continuation"].get(name, {}).get("length"),
        }  # fmt: skip
        cells = {key: "" if value is None else "{value:.4f} [{low:.4f}, {high:.4f}]".format(**value)
                 for key, value in figures.items()}  # fmt: skip
        assert found[name.replace("|", "\\|")] == cells
    apart = rows_of(text, "| models |")["distilled - pru\\|ned"]["forward KL"]
    assert apart == "{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**pair["kl"]) + f", p {pair['p']['kl']:.3f}"
    assert rows_of(text, "| task, metric |") == {
        "next\\|line, acc": dict.fromkeys(found, "0.5000 \N{PLUS-MINUS SIGN} 0.0125"),
        "next\\|line, acc_norm": dict.fromkeys(found, "0.2500 \N{PLUS-MINUS SIGN} 0.0100"),
    }
    gap["continuation"] = {}
    write_card(tmp_path, tiny_config(), published("float16"), read_licence(tmp_path), gap, "distilled")
    text = (tmp_path / "README.md").read_text()
    assert list(rows_of(text, "| model | cross-entropy |")["teacher"])[-1] == "ECE" and "greedy" not in text


def test_export_carries_figures_and_terms(workshop: Path, tmp_path: Path) -> None:
    """evaluate, then export with gap= and base=; the figures of another model are refused."""
    model, data = workshop / "model", f"data={workshop / 'text'}"
    base = tmp_path / "base"
    base.mkdir()
    for file in model.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: house-terms\n---\n")
    (base / "LICENSE").write_text("terms")
    small = ("seq_len=32", "split=all", "tokens=256", "details.prompts=2", "details.prompt_tokens=8",
             "details.new_tokens=4", "details.resamples=20", "probes=[needle]", "details.probe_lengths=[128]",
             "details.probe_count=2")  # fmt: skip
    gap = tmp_path / "gap"
    assert limbeck("evaluate", f"teacher={base}", f"+student.mine={model}", data, f"output={gap}", *small)[0] == 0
    found = json.loads((gap / "gap.json").read_text())
    assert found["continuation"]["mine"]["length"]["value"] == 4 and found["models"]["mine"]["kl"]["value"] == 0
    assert len(found["worst"]["mine"]) > 0 and found["memory"]["mine"]["throughput"]["tokens_per_second"] > 0
    assert found["probes"]["needle"]["128"]["mine"] == found["probes"]["needle"]["128"]["teacher"]
    assert {"by_class", "by_domain", "by_context"} <= found["models"]["mine"].keys()
    out = tmp_path / "out"
    code, _, err = limbeck("export", f"model={model}", f"base={base}", f"gap={gap}", f"output={out}", "dtype=float32")
    assert code == 0, err
    text = (out / "README.md").read_text()
    assert "house-terms" in text and (out / "LICENSE").read_text() == "terms" and 'This model is "mine"' in text
    assert f"{found['models']['mine']['bits_per_byte']['value']:.4f} [" in text and "measured in float32" in text
    assert rows_of(text, "| model | cross-entropy |")["mine"]["same greedy text, of 4 tokens"].startswith("4.0000 [")
    needle = found["probes"]["needle"]["128"]["mine"]
    assert rows_of(text, "| probe |")["needle, 128 tokens"]["mine"].endswith(f"; {needle['nats']['value']:.1f}")
    fits = rows_of(text, "| model | for |")["mine"]
    assert fits["together"] == f"{found['memory']['mine']['memory']['total'] / 2**30:.3f} GiB" and fits["fits"] == "yes"
    assert (out / "gap.png").read_bytes() == (gap / "plots" / "gap.png").read_bytes() and "](gap.png)" in text
    for arguments, says in (((f"model={out}", f"gap={gap}"), "measured other models"),
                            ((f"model={model}", f"gap={model}"), "no folder of limbeck evaluate"),
                            ((f"model={model}", f"base={tmp_path / 'none'}"), "neither a folder")):  # fmt: skip
        code, _, err = limbeck("export", *arguments, f"output={tmp_path / 'no'}")
        assert code == 2 and says in err and err.count("\n") == 1, err
        assert not (tmp_path / "no").exists()


def random_scores(folder: Path, config: HybridConfig) -> None:
    save_scores(folder, Scores(RandomScores(0).scores(config), LayerScores(), {"pattern": config.pattern}))


@pytest.mark.slow
def test_scores_of_a_model_of_the_same_shape_make_no_map(workshop: Path, tmp_path: Path) -> None:
    model, scores = workshop / "model", tmp_path / "scores"
    random_scores(scores, load_config(model))
    for number, made_from in enumerate((fingerprint_of(model), "00" * 32)):
        made = {"made_by": "limbeck score", "inputs": {"model": made_from}, "options": {}, "versions": {}}
        (scores / "limbeck.json").write_text(json.dumps(made | {"fingerprint": "0"}))
        gap = tmp_path / str(number)
        code, text, err = limbeck(
            "evaluate", f"teacher={model}", f"data={workshop / 'text'}", f"output={gap}", "split=all", "seq_len=32",
            "tokens=64", f"scores={scores}", "details.resamples=10",
        )  # fmt: skip
        assert code == 0, err
        assert ("of another model" in text) == bool(number)
        assert ("Importance of units" in (gap / "gap.html").read_text()) != bool(number)


def test_what_evaluate_refuses(workshop: Path, tmp_path: Path) -> None:
    """One line and exit code 2 before anything is measured, and no folder."""
    model, out = workshop / "model", tmp_path / "no"
    other = tmp_path / "other"
    shutil.copytree(model, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    scores, shorter = tmp_path / "scores", tmp_path / "shorter"
    config = load_config(model)
    random_scores(scores, config.replace(intermediate_size=8))
    random_scores(shorter, config.replace(pattern=config.pattern[1:]))
    (tmp_path / "task.yaml").write_text("task: [\n")
    for word, says in (
        ("details.resamples=0", "details.resamples is 0"),
        ("probes=[noodle]", "'noodle' is unknown"),
        (f"scores={model}", "limbeck score"),
        (f"scores={scores}", "has scores of shape (8,)"),
        (f"scores={shorter}", "are of another model than the teacher"),
        ("batch=0", "batch is 0; expected at least 1"),
        ("seq_len=0", "seq_len is 0; expected at least 1"),
        ("tokens=-1", "tokens is -1; expected at least 1"),
        (f"+student.other={other}", "token"),
        ("details.new_tokens=1000000", "details.prompt_tokens + new_tokens is 1,000,064"),
        ("probes=[multi-key] details.probe_lengths=[20]", "multi-key of 20 tokens leaves"),
        (f"tasks=[{tmp_path / 'task.yaml'}]", "task.yaml cannot be read"),
    ):
        words = word.split(" ") if "probes" in word else [word]
        student = [] if "student" in word else [f"+student.same={model}"]
        code, text, err = limbeck(
            "evaluate", f"teacher={model}", *student, f"data={workshop / 'text'}", f"output={out}", "split=all", *words
        )
        assert code == 2 and says in err and err.count("\n") == 1, (word, err)
        assert "evaluating" not in text and not out.exists(), word
