"""What one document, or a few, can say: figures without intervals, and a warning."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from limbeck.distill.gap.evaluation import Details, continue_texts, gap_content
from limbeck.distill.gap.measure import measure_gap
from limbeck.distill.gap.statistics import Estimate, Totals
from limbeck.distill.report.gap_rows import few_documents
from limbeck.distill.report.gap_tables import gap_tables
from limbeck.distill.report.report import write_page
from limbeck.distill.text.packing import check_measurable, tokenize
from limbeck.distill.text.records import Document
from limbeck.models.checkpoint import load_model
from limbeck.models.errors import InputError
from limbeck.models.hybrid import HybridLM
from limbeck.models.tokenizer import load_tokenizer
from limbeck.scripts.run.resolve import ZOO
from limbeck.tests.helpers import compress_command, limbeck, make_workshop
from limbeck.tests.training_helpers import draw_batch


def disturbed(model: HybridLM, layer: int) -> HybridLM:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.layers[layer].parameters():
            weight.mul_(1 + 0.3 * torch.randn_like(weight))
    return other


def test_one_document_tells_no_interval(tmp_path: Path) -> None:
    """Nothing that is resampled of it is one: no interval, no p, in figures, page and tables; few are warned of."""
    found = Totals(1.0, np.ones(100), 1)
    assert found.estimate() == Estimate(1.0, None, None) and found.p_value() is None and not found.estimate().holds(1.0)
    text = tokenize([Document("a/one.py", Path(json.__file__).read_text())], load_tokenizer(ZOO))
    batches, model = list(text.sample(batch_size=2, seq_len=96, seed=0, max_tokens=400)), load_model(ZOO)
    students = {"pruned": disturbed(model, 3), "distilled": disturbed(model, 5)}
    report = measure_gap(model, students, batches, resamples=50)
    for each in report.models.values():
        assert each.kl.low is each.perplexity.high is each.calibration.ece.low is None
    assert set(report.differences[0].p.values()) == {None}
    gap = gap_content(report, {"teacher": model, **students}, text, load_tokenizer(ZOO), "x", "all")
    assert "Of one document there are no intervals" in few_documents(gap)
    assert few_documents(gap | {"documents": 9}).startswith("Intervals and p-values are over 9 documents only")
    assert few_documents(gap | {"documents": 10}) == ""
    said = json.dumps([list(table) for table in gap_tables(gap)])
    assert ".." not in said and "p 0" not in said and "None" not in said
    (tmp_path / "page").mkdir()
    page = write_page(tmp_path / "page", "gap.html", title="x", gap=gap, provenance={}).read_text()
    assert "Of one document there are no intervals" in page and "None" not in page


def test_nothing_to_measure_is_said_before_training(tmp_path: Path) -> None:
    """A twentieth of such a text is one token, whose next is another text's; nothing of it is needed where nothing is
    measured."""
    root = make_workshop(tmp_path)
    data = root / "few.jsonl"
    data.write_text("".join(json.dumps({"text": f"a few short words {number}"}) + "\n" for number in range(8)))
    model, out = root / "model", root / "out"
    distil = ["distill", f"teacher={model}", f"student={model}", f"data={data}", f"output={out}", "device=cpu",
              "distill.train.steps=2", "distill.seq_len=8", "distill.batch=2", "distill.train.warmup_steps=0",
              "wandb=off"]  # fmt: skip
    evaluate = ["evaluate", f"teacher={model}", f"data={data}", f"output={root / 'gap'}", "seq_len=8", "device=cpu"]
    for command in (distil, [*evaluate, "split=validation"]):
        code, said, err = limbeck(*command)
        assert code == 2 and err.count("\n") == 1 and "few.jsonl: the split 'validation' has no token to measure" in err
        assert "step" not in said
    chain = [
        word for word in compress_command(root, root / "chain") if not word.startswith(("data=", "distill.seq_len"))
    ]
    code, _, err = limbeck(*chain, f"data={data}", "distill.seq_len=8")
    assert code == 2 and "the split 'validation' has no token" in err and not (root / "chain").exists(), err
    data.write_text("".join(json.dumps({"text": f"word {number}"}) + "\n" for number in range(8)))
    code, _, err = limbeck(*distil)
    assert code == 2 and "leave no validation text" in err
    code, _, err = limbeck(*distil, "distill.train.evaluate_every=0")
    assert code == 0, err


def test_bytes_that_are_none_are_no_text() -> None:
    batch = draw_batch(0)
    check_measurable([batch], "x", "test")
    with pytest.raises(InputError, match=r"data=x: the split 'test' has no token to measure"):
        check_measurable([dataclasses.replace(batch, n_bytes=torch.zeros_like(batch.n_bytes))], "x", "test")


def test_texts_that_are_too_short_to_be_continued_are_said() -> None:
    model, tokenizer, said = load_model(ZOO), load_tokenizer(ZOO), list[str]()
    text = tokenize([Document("a", "short")], tokenizer)

    def continued(details: Details) -> tuple[dict[str, Any], list[dict[str, str]]]:
        return continue_texts(model, {"other": model}, text, tokenizer, details, 0, None, said.append)

    assert continued(Details(prompts=0)) == ({}, []) and not said
    assert continued(Details()) == ({}, [])
    assert said == ["note: no text is continued, since no document has 64 tokens; give fewer as details.prompt_tokens"]
