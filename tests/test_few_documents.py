"""What one document, or a few, can say: figures without intervals, and a warning."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
from limbeck.distill.gap.evaluation import gap_content
from limbeck.distill.gap.measure import measure_gap
from limbeck.distill.gap.statistics import Estimate, Totals
from limbeck.distill.report.gap_rows import few_documents
from limbeck.distill.report.gap_tables import gap_tables
from limbeck.distill.report.report import write_page
from limbeck.distill.text.packing import tokenize
from limbeck.distill.text.records import Document
from limbeck.models.checkpoint import load_model
from limbeck.models.hybrid import HybridLM
from limbeck.models.tokenizer import load_tokenizer
from limbeck.scripts.run.resolve import ZOO


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
