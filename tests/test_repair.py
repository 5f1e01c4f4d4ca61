"""Repair after slicing: what must not change does not, and what it is for gets better."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from limbeck.kernels.activation import relu2
from limbeck.kernels.norm import rms_norm
from limbeck.models.axes import HIDDEN, Axis, Dimension, Factor, Parts, Role, tensor_table
from limbeck.models.config import HybridConfig
from limbeck.models.errors import InputError
from limbeck.models.hybrid import HybridLM
from limbeck.models.kinds import KINDS
from limbeck.models.layer import Context, LayerKind, ScoreSource
from limbeck.prune.repair import Repair, repair_model, repair_tensors, rms_ratios
from limbeck.prune.rotation import rotated
from limbeck.prune.slice import Selection, filled, slice_config, slice_model
from limbeck.prune.source_pass import source_pass
from limbeck.tests.helpers import any_config, assert_close, random_model, tiny_config
from limbeck.tests.pruning_helpers import draw_selection
from torch import Tensor, nn

ALL = [
    Repair(rotate=rotate, norms=norms, least_squares=fit)
    for rotate in (False, True)
    for norms in ("none", "count", "measured")
    for fit in (False, True)
] + [
    Repair(local_steps=2),
    Repair(True, "count", True, local_steps=2),
    Repair(least_squares=True, reselect=True),
    Repair(True, "measured", True, reselect=True),
]


@dataclasses.dataclass(frozen=True)
class Rows:
    input_ids: Tensor
    labels: Tensor
    seq_idx: Tensor


def rows(config: HybridConfig, count: int = 3, length: int = 40, seed: int = 0) -> list[Rows]:
    """Packed batches of two rows, a document boundary in each, a few positions that do not count."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(config.vocab_size, (2, length), generator=generator)
        labels = ids.roll(-1, 1)
        labels[:, -3:] = -100
        found.append(Rows(ids, labels, (torch.arange(length) >= length // 3).long().expand(2, -1)))
    return found


def logits(model: HybridLM, batches: list[Rows]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch.input_ids, seq_idx=batch.seq_idx) for batch in batches])


@pytest.mark.parametrize("repair", ALL, ids=str)
@pytest.mark.parametrize("seed", (*range(4), 50, 51))
def test_where_nothing_is_cut_nothing_changes(repair: Repair, seed: int) -> None:
    config = any_config(seed)
    model, batches = random_model(config, seed), rows(config)
    everything = Selection(tuple(range(config.num_layers)))
    same = repair_model(model, everything, batches, repair)
    assert same.config == slice_config(config, everything)
    assert_close("logits", logits(model, batches), logits(same, batches), 1e-5)


@pytest.mark.parametrize("repair", ALL, ids=str)
@pytest.mark.parametrize("seed", (*range(6), 50, 51))
def test_the_tensors_are_those_of_the_smaller_config(repair: Repair, seed: int) -> None:
    config = any_config(seed)
    model = random_model(config, seed, torch.float32).to(torch.bfloat16)
    kinds = ("hidden", "ffn", "attn_heads", "mamba_heads", "mamba_head_dim", "layers")
    selection = draw_selection(config, kinds, random.Random(seed))
    steps: list[tuple[int, int]] = []
    found = list(
        repair_tensors(
            model.state_dict().__getitem__,
            config,
            selection,
            rows(config),
            repair,
            on_step=lambda done, total: steps.append((done, total)),
        )
    )
    table = tensor_table(slice_config(config, selection))
    assert [name for name, _ in found] == list(table)
    assert all(tensor.shape == table[name].shape and tensor.dtype == torch.bfloat16 for name, tensor in found)
    assert all(torch.isfinite(tensor).all() for _, tensor in found)
    if repair.needs_data:
        assert steps[-1][0] == steps[-1][1] and [done for done, _ in steps] == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("repair", ALL, ids=str)
def test_the_source_is_left_as_it_was(repair: Repair) -> None:
    """Where nothing is cut, tensors are passed on as they are: the repair must not write into them."""
    config = tiny_config()
    model = random_model(config, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    selection = Selection(tuple(range(1, config.num_layers)))
    repair_model(model, selection, rows(config), repair)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def living_in(directions: int, **changes: object) -> HybridLM:
    """A model whose stream lives in so many of 32 directions, none of them a channel."""
    model = random_model(tiny_config(norm_eps=1e-12, **changes))
    turn, _ = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))
    inside = turn[:, :directions] @ turn[:, :directions].T
    for name, weight in model.named_parameters():
        if name == "embeddings.weight":
            weight.data = weight.data @ inside
        elif name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
            weight.data = inside @ weight.data
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_directions_without_energy_are_cut_without_loss(tied: bool) -> None:
    """A rotation finds them, channels do not. A tied embedding stays tied: its final norm's weights are alike."""
    model = living_in(20, tie_word_embeddings=tied)
    if tied:
        model.norm_f.weight.data.fill_(1.7)
    config, batches = model.config, rows(model.config)
    selection = Selection(tuple(range(config.num_layers)), {HIDDEN: tuple(range(20))})
    exact = repair_model(model, selection, batches, Repair(rotate=True))
    assert exact.config == slice_config(config, selection) and exact.config.tie_word_embeddings == tied
    assert_close("logits", logits(model, batches), logits(exact, batches), 1e-6)
    unseen = rows(config, seed=9)
    assert_close("unseen text", logits(model, unseen), logits(exact, unseen), 1e-6)


def test_channels_whose_final_norm_is_an_outlier_are_not_turned() -> None:
    """With a tied embedding: three channels of other weight stay channels, with their weight, and none is lost."""
    model = living_in(32, tie_word_embeddings=True)
    outliers = {4: 5.0, 7: -2.0, 30: 0.1}
    model.norm_f.weight.data.fill_(1.7)
    for channel, value in outliers.items():
        model.norm_f.weight.data[channel] = value
    everything = Selection(tuple(range(model.config.num_layers)), {HIDDEN: tuple(range(31))})
    get, place = model.state_dict().__getitem__, ("cpu", torch.float64)
    found, same = source_pass(get, model.config, rows(model.config), everything, *place, rotate=True, reselect=False)
    assert found is not None and found.fixed == 3 and same is everything
    assert {int(column.argmax()) for column in found.turn[:, :3].T} == set(outliers)
    get = rotated(model.state_dict().__getitem__, model.config, found, "cpu")
    turned = filled(model.config, ((name, get(name)) for name in tensor_table(model.config)), model)
    assert sorted(turned.norm_f.weight.tolist()[:3]) == sorted(outliers.values())
    batches = rows(model.config)
    assert_close("logits", logits(model, batches), logits(turned, batches), 1e-6)


def test_a_norm_takes_the_measured_ratio() -> None:
    """Half of the channels, of RMS 3 where the others have 4: what is left is divided by 3, not by sqrt(12.5)."""
    kept = torch.tensor([0, 2])
    stream = torch.tensor([[3.0, 4.0, -3.0, 4.0]]).double()
    weight = torch.tensor([2.0, 0.5, 1.0, 3.0]).double()
    normed = rms_norm(stream, weight, 0.0)
    ratio = rms_ratios([normed], weight, kept, 1)
    assert_close("ratio", torch.tensor([3 / math.sqrt(12.5)], dtype=torch.float64), ratio, 1e-12)
    assert_close("norm", normed[:, kept], rms_norm(stream[:, kept], weight[kept] * ratio, 0.0), 1e-12)


@pytest.mark.parametrize("kinds", [("ffn",), ("mamba_heads",), ("attn_heads",), ("hidden",), ("layers",)])
def test_least_squares_brings_the_stream_nearer(kinds: tuple[str, ...]) -> None:
    config = tiny_config(pattern="M-*M-")
    model, batches = random_model(config), rows(config, count=20)
    selection = draw_selection(config, kinds, random.Random(3))
    if kinds == ("layers",):
        selection = Selection((0, 2, 3, 4))
    expected = logits(model, batches)
    plain = (logits(slice_model(model, selection), batches) - expected).square().mean()
    fitted = repair_model(model, selection, batches, Repair(least_squares=True, norms="measured"))
    assert fitted.config == slice_config(config, selection)
    assert (logits(fitted, batches) - expected).square().mean() < 0.7 * plain


class TwoMLPs(nn.Module):
    """Two branches on one input, whose outputs add up."""

    def __init__(self, config: HybridConfig, layer: int, **place: Any) -> None:
        super().__init__()
        self.layer = layer
        self.left_in, self.right_in = (
            nn.Linear(config.hidden_size, config.intermediate_size, bias=False, **place) for _ in range(2)
        )
        self.left_out, self.right_out = (
            nn.Linear(config.intermediate_size, config.hidden_size, bias=False, **place) for _ in range(2)
        )

    def forward(self, u: Tensor, context: Context) -> Tensor:
        left, right = relu2(context.project(self.left_in, u)), 1e-3 * relu2(context.project(self.right_in, u))
        context.note("left_act", self.layer, left)
        context.note("right_act", self.layer, right)
        return context.project(self.left_out, left) + context.project(self.right_out, right)


def two_mlp_tensors(config: HybridConfig, layer: int, hidden: Dimension) -> Parts:
    ffn: Dimension = ((Factor(Axis("ffn", layer), config.intermediate_size),),)
    shapes = {"in": (ffn, hidden), "out": (hidden, ffn)}
    return {f"{name}_{end}.weight": (Role.MATRIX, shapes[end]) for name in ("left", "right") for end in shapes}


def test_writers_of_one_layer_are_fitted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch whose inputs are a thousandth of the other's is refitted as well: cut to half, both find what is left,
    and the stream comes nearer than by slices, or by refitting either alone."""
    kind = LayerKind(
        letter="=", name="two MLPs", key="two", fields=("intermediate_size",), tensors=two_mlp_tensors, build=TwoMLPs,
        writers={"left_out.weight": "left_act", "right_out.weight": "right_act"},
        scores={"ffn": ScoreSource({"": "left_act"})},
    )  # fmt: skip
    monkeypatch.setitem(KINDS, "=", kind)
    config = tiny_config(pattern="=", intermediate_size=16, tie_word_embeddings=True)
    model, batches = random_model(config), rows(config, count=20)
    with torch.no_grad():
        model.state_dict()["layers.0.mixer.right_out.weight"].mul_(1e3)
    selection = Selection((0,), {Axis("ffn", 0): tuple(range(8))})
    expected, errors = logits(model, batches), {}
    for name, writers in {"none": {}, "both": kind.writers, "left": {"left_out.weight": "left_act"}}.items():
        object.__setattr__(kind, "writers", writers)
        repair = Repair(least_squares=bool(writers))
        errors[name] = float(
            (logits(repair_model(model, selection, batches, repair), batches) - expected).square().mean()
        )
    assert errors["both"] < 0.9 * errors["left"] < 0.9 * errors["none"], errors


def test_wrong_options() -> None:
    config = tiny_config()
    with pytest.raises(InputError, match="norms is 'some'"):
        Repair(norms="some")
    with pytest.raises(InputError, match="ridge"):
        Repair(ridge=0.0)
    with pytest.raises(InputError, match=r"local_steps is -1; expected 0 or more"):
        Repair(local_steps=-1)
    for rate in (0.0, 1.0, math.nan):
        with pytest.raises(InputError, match="local_rate"):
            Repair(local_rate=rate)
    empty = [dataclasses.replace(batch, labels=batch.labels.fill_(-100)) for batch in rows(config)]
    everything = Selection(tuple(range(config.num_layers)))
    with pytest.raises(InputError, match="no counted token"):
        repair_model(random_model(config), everything, empty, Repair(least_squares=True))
