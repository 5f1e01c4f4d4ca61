"""How experts are used: counted while a model is scored, kept with the scores, shown on the page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from limbeck.distill.gap.measure import measure_gap
from limbeck.distill.report.experts import COLUMNS, ranges, student_rows, use_row
from limbeck.distill.report.report import write_page
from limbeck.models.axes import Axis
from limbeck.models.checkpoint import save_model
from limbeck.prune.choose import select
from limbeck.prune.importance import score_widths
from limbeck.prune.repair import Repair
from limbeck.prune.scores import LayerScores, Scores, load_scores, save_scores
from limbeck.prune.target import Target
from limbeck.prune.width_metrics import ActivationScores, MagnitudeScores, TaylorScores
from limbeck.scripts.prune import kept_units
from limbeck.tests.helpers import limbeck, make_workshop, moe_config, random_model, tiny_config
from limbeck.tests.page_content import facts, gap_of
from limbeck.tests.pruning_helpers import draw_rows
from limbeck.tests.training_helpers import draw_batch
from torch import Tensor


def test_uses_are_counted_beside_the_scores() -> None:
    config = moe_config()
    model, batch = random_model(config), draw_rows(config.vocab_size, rows=5)
    for metric in (ActivationScores(), ActivationScores(expert_source="frequency", aggregate_batch="mean")):
        uses: dict[int, Tensor] = {}
        scores = score_widths(model, [batch.take([0, 1]), batch.take([2, 3, 4])], metric, uses=uses)
        assert uses.keys() == {1, 3, 5}
        for layer, counts in uses.items():
            assert counts.shape == (6,) and float(counts.sum()) == 2 * int((batch.labels != -100).sum()), layer
        plain = score_widths(model, [batch], metric)
        assert all(torch.allclose(values, plain[axis], rtol=1e-9) for axis, values in scores.items())
    for quiet in (MagnitudeScores(), TaylorScores()):
        uses = {}
        score_widths(model, [batch], quiet, uses=uses)
        assert not any(counts.any() for counts in uses.values())


def test_a_row_of_the_table() -> None:
    assert len(COLUMNS) == 1 + len(use_row([1, 1], None))
    cells = use_row([10, 0, 30, 0, 20, 60], [0, 1, 2, 5])
    assert cells == ["4 of 6", "83.3%", "5 (3.00)", "1 (0.00)", "1", "0.648"]
    assert use_row([4, 4], None) == ["2 of 2", "100.0%", "0 (1.00)", "0 (1.00)", "0", "1.000"]
    assert use_row([0, 0], [1])[1:] == ["0.0%", "1 (0.00)", "1 (0.00)", "1", "1.000"]
    assert [ranges(numbers) for numbers in ([], [4], [0, 1, 2, 5, 7, 8])] == ["-", "4", "0-2, 5, 7-8"]
    stays = {"3": [0, 4, 5]}
    for uses, first in (({"1": [8, 0, 1]}, ["3", "3", "0 (2.67)"]), ({"1": [8, 0]}, ["1", "2", "0 (2.00)"])):
        ((layer, cells),) = student_rows(uses, ["0", "3"], stays)
        assert [layer, *(cell.value for cell in cells[:2])] == first
    assert student_rows({"1": [0, 0, 9]}, ["0", "3"], stays)[0][1][1].value == "5 (3.00)"


@pytest.mark.parametrize("cut", (pytest.param(False, marks=pytest.mark.slow), True))
def test_the_page_shows_which_stayed(cut: bool, tmp_path: Path) -> None:
    config = moe_config()
    model, batch, uses = random_model(config), draw_rows(config.vocab_size, rows=5), dict[int, Tensor]()
    widths = score_widths(model, [batch], uses=uses)
    counts = {str(layer): [int(count) for count in own] for layer, own in uses.items()}
    save_scores(tmp_path / "scores", Scores(widths, LayerScores(), {"pattern": config.pattern, "expert_uses": counts}))
    selection = select(config, widths, (), Target(n_routed_experts=4, num_experts_per_tok=1, keep_layers=(0, 1, 2, 3)))
    gap = gap_of("pruned") | {"expert_uses": {"teacher": {"1": [9] * 6}, "pruned": {"1": [5, 2, 2, 1], "3": [4] * 4}}}
    page = write_page(
        tmp_path, "report.html", title="Experts", gap=gap, provenance={"scores": facts()},
        scores=tmp_path / "scores", selection=kept_units(selection, config, Repair()) if cut else None,
    )  # fmt: skip
    text = page.read_text()
    assert "of all choices" in text and text.count("4 of 6" if cut else "6 of 6") == (2 if cut else 3)
    share = sum(counts["3"][expert] for expert in selection.kept[Axis("experts", 3)]) / sum(counts["3"])
    assert (f"{share:.1%}" in text) or not cut
    assert (tmp_path / "plots" / "importance-experts.png").is_file()
    kept = {layer: list(selection.kept[Axis("experts", layer)]) for layer in (1, 3)}
    assert ("Which stay" in text) == cut and "How pruned uses its experts" in text and "How teacher uses" not in text
    assert all((f">{ranges(numbers)}<" in text) == cut for numbers in kept.values())
    assert f"{kept[1][0] if cut else 0} (2.00)" in text


def test_a_measurement_counts_the_choices_of_every_model() -> None:
    config = moe_config()
    model, other = random_model(config), random_model(config.replace(n_routed_experts=4), seed=1)
    batch = draw_batch(0, 3, 12, config.vocab_size)
    report = measure_gap(model, {"other": other, "itself": model}, [batch, batch], resamples=2)
    counted = int((batch.labels >= 0).sum())
    assert report.expert_uses["teacher"] == report.expert_uses["itself"] and report.expert_uses.keys() == {
        "teacher", "other", "itself"
    }  # fmt: skip
    for name, experts in (("teacher", 6), ("other", 4)):
        uses = report.expert_uses[name]
        assert uses.keys() == {"1", "3", "5"}
        assert all(len(own) == experts and sum(own) == 2 * 2 * counted for own in uses.values())
    assert not model.layers[1].mixer.gate._forward_hooks
    plain = random_model(tiny_config())
    assert measure_gap(plain, {}, [batch], resamples=2).expert_uses == {}


def test_the_command_keeps_them_with_the_scores(tmp_path: Path) -> None:
    root = make_workshop(tmp_path)
    config = moe_config(vocab_size=320, pad_token_id=0, extra={"time_step_min": 1e-6})
    save_model(random_model(config, dtype=torch.float32), tmp_path / "moe", tokenizer_from=root / "words")
    words = [f"model={tmp_path / 'moe'}", f"data={root / 'text'}", "seq_len=32", "batch=2", "device=cpu"]
    words += ["importance.tokens=128", "importance.depth_tokens=64"]
    for source in ("reap", "logits"):
        out = tmp_path / source
        assert limbeck("score", *words, f"output={out}", f"importance.expert_source={source}")[0] == 0
        counts = load_scores(out).metadata["expert_uses"]
        assert counts.keys() == {"1", "3", "5"} and all(sum(own) == sum(counts["1"]) > 100 for own in counts.values())
        target = ["target.n_routed_experts=4", "target.num_experts_per_tok=1", "target.ssm_state_size=8"]
        prune = [f"model={tmp_path / 'moe'}", f"scores={out}", f"output={tmp_path / f'{source}-pruned'}", "device=cpu"]
        merge = ["repair.whole_experts=0.5", f"data={root / 'text'}", "repair.tokens=128", "seq_len=32", "batch=2"]
        code, said, err = limbeck("prune", *prune, *target, *merge)
        assert code == 0 and "active parameters" in said, err
    code, _, err = limbeck("prune", *prune[:2], f"output={tmp_path / 'none'}", "target.n_routed_experts=1")
    assert code == 2 and err.count("\n") == 1 and "num_experts_per_tok (2)" in err and not (tmp_path / "none").exists()
