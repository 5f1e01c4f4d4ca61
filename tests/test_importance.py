"""Importance of widths and layers: definitions by hand, independence of batching, silence ranks last, files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from limbeck.models import offload as layers
from limbeck.models.axes import HIDDEN, Axis
from limbeck.models.config import HybridConfig
from limbeck.models.errors import InputError
from limbeck.models.hybrid import HybridLM
from limbeck.prune.choose import select
from limbeck.prune.depth import random_layers, score_layers
from limbeck.prune.importance import score_widths
from limbeck.prune.scores import LayerScores, Scores, load_scores, save_scores, width_score_shapes
from limbeck.prune.target import Target
from limbeck.prune.width_metrics import ActivationScores, MagnitudeScores, RandomScores, TaylorScores
from limbeck.tests.helpers import assert_close, dense_config, random_model, tiny_config
from limbeck.tests.pruning_helpers import Rows, draw_rows, naive_mse
from torch import Tensor
from torch.nn import functional as F


def observed(model: HybridLM, batch: Rows, kind: str, layer: int) -> Tensor:
    found = []
    model.hidden_states(
        batch.input_ids,
        seq_idx=batch.seq_idx,
        observe=lambda k, i, tensor: found.append(tensor.detach().double()) if (k, i) == (kind, layer) else None,
    )
    (tensor,) = found
    return tensor


def by_loops(values: Tensor, counted: Tensor, over_batch: str, over_sequence: str) -> Tensor:
    """values [B, T, U...] -> [U...], sample by sample."""

    def aggregate(stack: Tensor, how: str) -> Tensor:
        if how == "mean":
            return stack.abs().mean(0)
        return stack.square().sum(0).sqrt() if how == "l2" else stack.var(0, correction=0)

    samples = [aggregate(row[mask], over_sequence) for row, mask in zip(values, counted, strict=True) if mask.any()]
    return aggregate(torch.stack(samples), over_batch)


@pytest.mark.parametrize(
    ("over_batch", "over_sequence"), [("l2", "mean"), ("mean", "mean"), ("l2", "l2"), ("var", "var")]
)
def test_widths_are_what_the_papers_say(over_batch: str, over_sequence: str) -> None:
    config = tiny_config()
    model = random_model(config)
    batch = draw_rows(config.vocab_size)
    batch.labels[3] = -100  # a row that does not count
    counted = batch.labels != -100
    how = {"aggregate_batch": over_batch, "aggregate_sequence": over_sequence}
    scores = score_widths(model, [batch], ActivationScores(**how))  # type: ignore[arg-type]
    assert {axis: tuple(value.shape) for axis, value in scores.items()} == width_score_shapes(config)
    for layer in (0, 3, config.num_layers):
        expected = by_loops(observed(model, batch, "hidden", layer), counted, over_batch, over_sequence)
        assert_close("hidden", expected, scores[HIDDEN][layer], 1e-9)
    heads = observed(model, batch, "attn_heads", 3).square().sum(-1).sqrt()
    for axis, values in (
        (Axis("ffn", 1), observed(model, batch, "ffn", 1)),
        (Axis("attn_heads", 3), heads),
        (Axis("mamba_heads", 2), observed(model, batch, "mamba_x", 2)),
    ):
        assert_close(str(axis), by_loops(values, counted, over_batch, over_sequence), scores[axis], 1e-9)


def test_ffn_and_mamba_sources() -> None:
    config = tiny_config()
    model = random_model(config)
    batch = draw_rows(config.vocab_size)
    counted = batch.labels != -100
    for source, kind in (("x", "mamba_x"), ("z", "mamba_z"), ("out", "mamba_out")):
        found = score_widths(model, [batch], ActivationScores(mamba_source=source))[Axis("mamba_heads", 0)]
        assert_close(kind, by_loops(observed(model, batch, kind, 0), counted, "l2", "mean"), found, 1e-9)
    found = score_widths(model, [batch], ActivationScores(ffn_source="act"))[Axis("ffn", 1)]
    assert_close("ffn_act", by_loops(observed(model, batch, "ffn_act", 1), counted, "l2", "mean"), found, 1e-9)


def test_batching_and_order_of_samples_do_not_matter() -> None:
    """In float32: the same scores to 1e-5, and the very same units."""
    config = tiny_config(hidden_size=40, intermediate_size=96)
    model = random_model(config, dtype=torch.float32)
    batch = draw_rows(config.vocab_size)
    target = Target(hidden_size=24, intermediate_size=50, num_attention_heads=2, mamba_num_heads=4, mamba_head_dim=5)
    whole = score_widths(model, [batch])
    order = torch.randperm(8).tolist()
    for parts in ([[i] for i in range(8)], [order], [[i] for i in order], [order[:3], order[3:]]):
        found = score_widths(model, [batch.take(rows) for rows in parts])
        for axis, value in whole.items():
            assert_close(str(axis), value, found[axis], 1e-5)
        assert select(config, found, (), target) == select(config, whole, (), target)


def test_padding_does_not_count() -> None:
    config = tiny_config()
    model = random_model(config)
    batch = draw_rows(config.vocab_size, rows=1)
    batch.labels[0, 15:] = -100
    changed = Rows(batch.input_ids.clone(), batch.labels, batch.seq_idx)
    changed.input_ids[0, 15:] = 0
    before, after = score_widths(model, [batch]), score_widths(model, [changed])
    for axis, value in before.items():
        assert_close(str(axis), value, after[axis], 1e-12)
    changed.input_ids[0, 0] = (changed.input_ids[0, 0] + 1) % config.vocab_size
    assert not torch.allclose(score_widths(model, [changed])[HIDDEN], before[HIDDEN])


@torch.no_grad()
def test_units_that_contribute_nothing_rank_last() -> None:
    config = tiny_config()
    model = random_model(config)
    weights = model.state_dict()
    hidden, neuron, head, channel, query = 5, 7, 3, 2, 1
    for name, weight in weights.items():
        if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
            weight[hidden] = 0
    weights["embeddings.weight"][:, hidden] = 0
    weights["layers.1.mixer.up_proj.weight"][neuron] = 0
    x = weights["layers.2.mixer.in_proj.weight"][config.d_inner : 2 * config.d_inner].unflatten(0, (8, 8))
    x[head] = 0
    x[:, channel] = 0
    weights["layers.3.mixer.o_proj.weight"].unflatten(1, (4, 8))[:, query] = 0
    batch = draw_rows(config.vocab_size)
    widths = score_widths(model, [batch])
    target = Target(hidden_size=31, intermediate_size=47, mamba_num_heads=6, mamba_head_dim=7)
    kept = select(config, widths, (), target).kept
    assert hidden not in kept[HIDDEN]
    assert neuron not in kept[Axis("ffn", 1)]
    assert head not in kept[Axis("mamba_heads", 2)]
    assert channel not in kept[Axis("mamba_head_dim", 2)]
    # A unit that is busy but that nobody reads: only the weights after it can tell.
    read = score_widths(model, [batch], ActivationScores(times_output=True))
    assert read[Axis("attn_heads", 3)][query] == 0 < widths[Axis("attn_heads", 3)][query]
    assert query not in select(config, read, (), Target(num_attention_heads=2)).kept[Axis("attn_heads", 3)]


def losses(model: HybridLM, batch: Rows) -> list[float]:
    """The mean cross-entropy of each row's labels, of whole logits."""
    with torch.no_grad():
        logits = model(batch.input_ids, seq_idx=batch.seq_idx)
    return [float(F.cross_entropy(row, labels)) for row, labels in zip(logits, batch.labels, strict=True)]


READERS = {"M": ("in_proj",), "*": ("q_proj", "k_proj", "v_proj"), "-": ("up_proj", "gate_proj")}
WRITERS = {"ffn": "down_proj", "attn_heads": "o_proj", "mamba_heads": "out_proj"}


def columns_of(config: HybridConfig, axis: Axis, unit: int) -> list[tuple[str, slice]]:
    """The columns of matrices that read a unit; of hidden those of its layer's norm, here layer or the head."""
    if axis.kind != "hidden":
        size = {"ffn": 1, "attn_heads": config.head_dim, "mamba_heads": 1}[axis.kind]
        return [(f"layers.{axis.layer}.mixer.{WRITERS[axis.kind]}.weight", slice(unit * size, (unit + 1) * size))]
    if axis.layer == config.num_layers:
        return [("lm_head.weight", slice(unit, unit + 1))]
    assert axis.layer is not None
    names = READERS[config.pattern[axis.layer]]
    return [(f"layers.{axis.layer}.mixer.{name}.weight", slice(unit, unit + 1)) for name in names]


@pytest.mark.parametrize("family", ("nemotron_h", "qwen3"))
@torch.no_grad()
def test_taylor_is_the_slope_of_the_loss_when_a_unit_shrinks(family: str) -> None:
    """Against central differences of every row's loss, unit by unit of every axis; the same whatever the batches."""
    config = dense_config(1).replace(tie_word_embeddings=False) if family == "qwen3" else tiny_config(pattern="M-*M-*")
    model = random_model(config)
    weights, batch, eps = model.state_dict(), draw_rows(config.vocab_size, rows=3), 1e-5
    scores = score_widths(model, [batch], TaylorScores())
    assert {axis: tuple(value.shape) for axis, value in scores.items()} == width_score_shapes(config)
    for axis, values in scores.items():
        if axis.kind == "ssm_state":  # no columns read an index: tests/test_ssm_state.py
            continue
        rows = [Axis("hidden", row) for row in range(config.num_layers + 1)] if axis == HIDDEN else [axis]
        for number, own in enumerate(rows):
            found = values[number] if axis == HIDDEN else values.flatten()
            for unit in (0, 1, len(found) // 2, len(found) - 1):
                columns = [(name, where) for name, where in columns_of(config, own, unit) if name in weights]
                sides = []
                for scale in (1 + eps, 1 - eps):
                    kept = [weights[name][:, where].clone() for name, where in columns]
                    for name, where in columns:
                        weights[name][:, where] *= scale
                    sides.append(losses(model, batch))
                    for (name, where), before in zip(columns, kept, strict=True):
                        weights[name][:, where] = before
                slopes = [abs(up - down) / (2 * eps) for up, down in zip(*sides, strict=True)]
                assert float(found[unit]) == pytest.approx(sum(slopes) / len(slopes), rel=1e-5, abs=1e-8), (own, unit)
    parts = score_widths(model, [batch.take([2]), batch.take([0, 1])], TaylorScores())
    for axis, value in scores.items():
        assert_close(str(axis), value, parts[axis], 1e-12)
    again = score_widths(model, [batch], TaylorScores())
    assert all(torch.equal(again[axis], value) for axis, value in scores.items())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


@torch.no_grad()
def test_taylor_is_nothing_where_nobody_reads() -> None:
    """A neuron, a head, a head channel and a channel of a norm whose readers are zero; rows without labels too."""
    config = tiny_config()
    model = random_model(config)
    weights = model.state_dict()
    weights["layers.1.mixer.down_proj.weight"][:, 7] = 0
    weights["layers.3.mixer.o_proj.weight"][:, 8:16] = 0
    weights["layers.2.mixer.out_proj.weight"][:, 3 * 8 + 2] = 0
    weights["layers.0.mixer.in_proj.weight"][:, 5] = 0
    weights["lm_head.weight"][:, 6] = 0
    batch = draw_rows(config.vocab_size)
    scores = score_widths(model, [batch], TaylorScores())
    zero = {Axis("ffn", 1): 7, Axis("attn_heads", 3): 1, Axis("mamba_heads", 2): 3 * 8 + 2, HIDDEN: 5}
    for axis, values in scores.items():
        expected = {zero[axis]} if axis in zero else set()
        expected |= {6 * config.hidden_size + 6} if axis == HIDDEN else set()
        assert set((values.flatten() == 0).nonzero().flatten().tolist()) == expected, axis
    silent = dataclasses.replace(batch, labels=torch.full_like(batch.labels, -100))
    beside = score_widths(model, [silent, batch], TaylorScores())
    assert all(torch.equal(beside[axis], value) for axis, value in scores.items())
    with pytest.raises(InputError, match="no counted token"):
        score_widths(model, [silent], TaylorScores())


def test_magnitude_is_the_norm_of_a_units_weights() -> None:
    config = tiny_config()
    model = random_model(config)
    weights = model.state_dict()
    scores = MagnitudeScores().scores(config, weights.__getitem__)
    up, down = weights["layers.1.mixer.up_proj.weight"], weights["layers.1.mixer.down_proj.weight"]
    expected = (up.square().sum(1) + down.square().sum(0)).sqrt()
    assert_close("ffn", expected, scores[Axis("ffn", 1)], 1e-6)
    q, o = weights["layers.3.mixer.q_proj.weight"], weights["layers.3.mixer.o_proj.weight"]
    expected = (q.square().sum(1) + o.square().sum(0)).unflatten(0, (4, 8)).sum(1).sqrt()
    assert_close("attention", expected, scores[Axis("attn_heads", 3)], 1e-6)
    table = weights["embeddings.weight"].square().sum(0) + weights["lm_head.weight"].square().sum(0)
    assert_close("hidden", table.sqrt(), scores[HIDDEN][config.num_layers], 1e-6)
    assert_close("hidden", (up.square().sum(0) + down.square().sum(1)).sqrt(), scores[HIDDEN][1], 1e-6)
    di, heads = config.d_inner, config.mamba_num_heads
    rows = weights["layers.0.mixer.in_proj.weight"].square().sum(1)
    conv = weights["layers.0.mixer.conv1d.weight"].square().sum((1, 2))[:di]
    out = weights["layers.0.mixer.out_proj.weight"].square().sum(0)
    per_head = (rows[:di] + rows[di : 2 * di] + conv + out).unflatten(0, (heads, -1)).sum(1) + rows[-heads:]
    assert_close("mamba", per_head.sqrt(), torch.linalg.vector_norm(scores[Axis("mamba_heads", 0)], dim=1), 1e-6)


@pytest.mark.parametrize("pairs", (False, True))
def test_layers_go_greedily_by_the_logits(pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against dropping each candidate from a fresh model, with whole logits; and with fewer layers run."""
    monkeypatch.setattr(layers, "HEAD_ROWS", 40)  # the head's 97 rows in three parts
    config = tiny_config(pattern="M-M*-M*")
    model = random_model(config)
    batch = draw_rows(config.vocab_size, rows=4)
    batches = [batch.take([0, 1, 2]), batch.take([3])]
    seen: list[tuple[int, int]] = []
    scores = score_layers(model, batches, remove=4, pairs=pairs, table="all", on_step=lambda *step: seen.append(step))
    size, naive_evaluations = 2 if pairs else 1, 0
    gone: list[int] = []
    for step in range(4 // size):
        stack = [layer for layer in range(7) if layer not in gone]
        measured = {
            stack[i]: naive_mse(model, batches, [*gone, *stack[i : i + size]]) for i in range(len(stack) - size + 1)
        }
        naive_evaluations += len(measured) * (len(stack) - size)
        assert scores.candidates[step] == pytest.approx(measured, rel=1e-9)
        first = min(measured, key=lambda layer: measured[layer])
        gone += stack[stack.index(first) : stack.index(first) + size]
        assert scores.values[step] == pytest.approx(measured[first], rel=1e-9)
    assert list(scores.order) == gone
    assert scores.layer_evaluations < naive_evaluations
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert len({total for _, total in seen}) == 1 and seen[-1][0] == seen[-1][1]


def test_an_empty_layer_goes_first_and_a_least_number_stays() -> None:
    config = tiny_config(pattern="M-M*-M")
    model = random_model(config)
    with torch.no_grad():
        model.state_dict()["layers.3.mixer.o_proj.weight"].zero_()
    batches = [draw_rows(config.vocab_size)]
    assert score_layers(model, batches, remove=2).order[0] == 3
    assert score_layers(model, batches, remove=2).values[0] == 0
    kept = score_layers(model, batches, remove=3, min_layers={"attention": 1, "mlp": 1, "mamba": 1})
    assert 3 not in kept.order and len(kept.order) == 3
    drawn = {random_layers(config, remove=3, seed=seed, min_layers={"attention": 1}).order for seed in range(20)}
    assert len(drawn) > 5 and not any(3 in order for order in drawn)
    assert random_layers(config, remove=3, seed=1) == random_layers(config, remove=3, seed=1)


@pytest.mark.parametrize(
    ("options", "said"),
    (
        ({"remove": 6}, "at most 5"),
        ({"remove": -1}, "at most 5"),
        ({"remove": 3, "pairs": True}, "an even number"),
        ({"remove": 1, "min_layers": {"attn": 1}}, "unknown kind 'attn'"),
        ({"remove": 3, "min_layers": {"mamba": 3, "mlp": 2}}, "at most 1"),
        ({"remove": 2, "pairs": True, "min_layers": {"mamba": 3}}, "lets no two neighbours"),
    ),
)
def test_wrong_depth_options(options: dict, said: str) -> None:
    config = tiny_config(pattern="M-M*-M" if "neighbours" not in said else "-M-M-M")
    with pytest.raises(InputError, match=said) as caught:
        score_layers(random_model(config), [draw_rows(config.vocab_size, rows=1)], **options)
    with pytest.raises(InputError, match=said):
        random_layers(config, seed=0, **options)
    assert "\n" not in str(caught.value)


def test_wrong_width_options_and_data() -> None:
    config = tiny_config()
    model = random_model(config)
    batch = draw_rows(config.vocab_size, rows=2)
    for option in (
        "aggregate_batch",
        "aggregate_sequence",
        "mamba_source",
        "ffn_source",
        "state_source",
        "expert_source",
    ):
        with pytest.raises(InputError, match=rf"importance\.{option} is 'median'; known: "):
            ActivationScores(**{option: "median"})  # type: ignore[arg-type]
    nothing = Rows(batch.input_ids, torch.full_like(batch.labels, -100), batch.seq_idx)
    for batches in ([], [nothing]):
        with pytest.raises(InputError, match="no counted token"):
            score_widths(model, batches)
        with pytest.raises(InputError, match="no counted token"):
            score_layers(model, batches, remove=1)
    with torch.no_grad():
        model.state_dict()["layers.1.mixer.up_proj.weight"][3, 3] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        score_widths(model, [batch])


def test_scores_come_back_from_their_folder_in_the_same_bytes(tmp_path: Path) -> None:
    config = tiny_config()
    layers = LayerScores((3, 1), (0.5, 0.75), ({0: 1.5, 3: 0.5}, {0: 2.0, 1: 0.75}), 17)
    scores = Scores(RandomScores(1).scores(config), layers, {"method": "random", "seed": 1})
    for name in ("a", "b"):
        save_scores(tmp_path / name, scores)
    for file in ("scores.safetensors", "scores.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    found = load_scores(tmp_path / "a")
    assert (found.layers, found.metadata) == (scores.layers, scores.metadata)
    assert found.widths.keys() == scores.widths.keys()
    assert all(torch.equal(found.widths[axis], value) for axis, value in scores.widths.items())
    with pytest.raises(InputError, match="exists already"):
        save_scores(tmp_path / "a", scores)


def test_a_broken_scores_folder(tmp_path: Path) -> None:
    scores = Scores(RandomScores(1).scores(tiny_config()), LayerScores())
    with pytest.raises(InputError, match="does not exist"):
        load_scores(tmp_path / "none")
    for number, (file, content) in enumerate(
        (
            ("scores.safetensors", b""),
            ("scores.safetensors", b"not a tensor file"),
            ("scores.json", b"{"),
            ("scores.json", b"[]"),
            ("scores.json", b"{}"),
            ("scores.json", b"\xff"),
            ("scores.json", b'{"layers": {"order": ["a"], "values": [], "candidates": [], "layer_evaluations": 0}}'),
        )
    ):
        save_scores(tmp_path / str(number), scores)
        (tmp_path / str(number) / file).write_bytes(content)
        with pytest.raises(
            InputError, match=r"cannot be read|is no valid JSON|not UTF-8|expected|is missing"
        ) as caught:
            load_scores(tmp_path / str(number))
        assert file in str(caught.value)
