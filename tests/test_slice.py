"""The laws of slicing, over random configs: every axis alone, and all together."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from limbeck.models.axes import AXES, HIDDEN, Axis, axis_sizes, group_axis, tensor_table
from limbeck.models.config import HybridConfig
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.errors import InputError
from limbeck.models.hybrid import HybridLM
from limbeck.prune.slice import (
    Selection,
    kept_rows,
    slice_config,
    slice_model,
    slice_tensors,
)
from limbeck.tests.helpers import any_config, assert_close, random_config, random_model, tiny_config
from limbeck.tests.pruning_helpers import draw_selection

KINDS: tuple[Sequence[str], ...] = (*((kind,) for kind in (*AXES, "layers")), (*AXES, "layers"))


@pytest.mark.parametrize("seed", range(62))
def test_keeping_all_is_the_identity(seed: int) -> None:
    config = any_config(seed)
    model = random_model(config, seed, torch.float32)
    everything = {axis: tuple(range(size)) for axis, size in axis_sizes(config).items()}
    for kept in ({}, everything):
        same = slice_model(model, Selection(tuple(range(config.num_layers)), kept))
        assert same.config == config
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, same.state_dict()[name]), name


@pytest.mark.parametrize("seed", range(62))
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_shapes_count_and_contents(seed: int, kinds: Sequence[str]) -> None:
    """The result is a model of the new config, and every entry stands where numpy-like indexing by hand puts it."""
    config = any_config(seed)
    selection = draw_selection(config, kinds, random.Random(seed))
    model = random_model(config, seed)
    smaller = slice_config(config, selection)
    tensors = dict(slice_tensors(model.state_dict().__getitem__, config, selection, rescale_norms=False))
    table = tensor_table(smaller)
    assert list(tensors) == list(table)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {n: t.shape for n, t in table.items()}
    assert sum(tensor.numel() for tensor in tensors.values()) == count_parameters(smaller)
    assert (smaller.n_groups, smaller.conv_kernel) == (config.n_groups, config.conv_kernel)
    weights = model.state_dict()
    hidden = list(selection.kept.get(HIDDEN, range(config.hidden_size)))
    for new, old in enumerate(selection.layers):
        if config.pattern[old] != "M":
            continue
        source, found = weights[f"layers.{old}.mixer.in_proj.weight"], tensors[f"layers.{new}.mixer.in_proj.weight"]
        heads = selection.kept.get(Axis("mamba_heads", old), range(config.mamba_num_heads))
        channels = selection.kept.get(Axis("mamba_head_dim", old), range(config.mamba_head_dim))
        inner = [head * config.mamba_head_dim + channel for head in heads for channel in channels]
        states = 2 * config.n_groups * config.ssm_state_size
        di = config.d_inner
        every = range(states // 2)
        both = [*(kept := selection.kept.get(Axis("ssm_state", old), every)), *(states // 2 + n for n in kept)]
        rows = [
            *inner,
            *(di + i for i in inner),
            *(2 * di + n for n in both),
            *(2 * di + states + h for h in heads),
        ]
        assert torch.equal(found, source[rows][:, hidden])
        conv = weights[f"layers.{old}.mixer.conv1d.weight"]
        assert torch.equal(tensors[f"layers.{new}.mixer.conv1d.weight"], conv[[*inner, *(di + n for n in both)]])
        per_group = [sum(head // (config.mamba_num_heads // config.n_groups) == g for head in heads)
                     for g in range(config.n_groups)]  # fmt: skip
        assert len(set(per_group)) == 1


def silence(model: HybridLM, selection: Selection) -> None:
    """Makes every unit that will go contribute nothing."""
    config, weights = model.config, model.state_dict()
    gone = {
        axis: [unit for unit in range(size) if unit not in selection.kept.get(axis, range(size))]
        for axis, size in axis_sizes(config).items()
    }
    with torch.no_grad():
        # A channel of the residual stream that nobody writes is zero everywhere.
        for name, tensor in tensor_table(config).items():
            if name == "embeddings.weight":
                weights[name][:, gone[HIDDEN]] = 0
            elif (
                len(tensor.dimensions) == 2
                and tensor.dimensions[0] == tensor_table(config)["norm_f.weight"].dimensions[0]
            ):
                weights[name][gone[HIDDEN]] = 0
        for layer, letter in enumerate(config.pattern):
            prefix = f"layers.{layer}.mixer."
            if layer not in selection.layers:
                weights[prefix + {"M": "out_proj", "*": "o_proj", "-": "down_proj"}[letter] + ".weight"].zero_()
            if letter == "-":
                weights[prefix + "up_proj.weight"][gone[Axis("ffn", layer)]] = 0
            elif letter == "*":
                values = weights[prefix + "v_proj.weight"].unflatten(0, (config.num_key_value_heads, -1))
                values[gone[Axis("kv_groups", layer)]] = 0
                columns = weights[prefix + "o_proj.weight"].unflatten(1, (config.num_attention_heads, -1))
                columns[:, gone[Axis("attn_heads", layer)]] = 0
            else:
                shape = (config.mamba_num_heads, config.mamba_head_dim)
                zeroed = [weights[prefix + "in_proj.weight"][config.d_inner : 2 * config.d_inner],
                          weights[prefix + "conv1d.weight"][: config.d_inner]]  # fmt: skip
                if config.conv_bias:
                    zeroed.append(weights[prefix + "conv1d.bias"][: config.d_inner])
                b_rows = [weights[prefix + "in_proj.weight"][2 * config.d_inner :],
                          weights[prefix + "conv1d.weight"][config.d_inner :]]  # fmt: skip
                if config.conv_bias:
                    b_rows.append(weights[prefix + "conv1d.bias"][config.d_inner :])
                for rows in b_rows:  # B is zero there, and so is that part of the state
                    rows[gone[Axis("ssm_state", layer)]] = 0
                for rows in zeroed:  # x is zero there, and so is the scan's output
                    grouped = rows.unflatten(0, shape)
                    grouped[gone[Axis("mamba_heads", layer)]] = 0
                    grouped[:, gone[Axis("mamba_head_dim", layer)]] = 0


@pytest.mark.parametrize("seed", range(62))
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_removing_what_contributes_nothing_changes_nothing(seed: int, kinds: Sequence[str]) -> None:
    """With eps next to nothing (RMS over fewer channels divides by a smaller count; the norms' weights make up for
    that, but not for the share of eps)."""
    config = any_config(seed).replace(norm_eps=1e-24)
    model = random_model(config, seed)
    selection = draw_selection(config, kinds, random.Random(seed))
    silence(model, selection)
    ids = torch.randint(config.vocab_size, (2, 2 * config.chunk_size + 1))
    with torch.no_grad():
        expected, found = model(ids), slice_model(model, selection)(ids)
    assert_close("logits", expected, found, 1e-6)
    if any(len(kept) < axis_sizes(config)[axis] for axis, kept in selection.kept.items() if axis.kind == "hidden"):
        plain = slice_model(model, selection, rescale_norms=False)(ids)
        assert (plain - expected).abs().max() > 1e-4 * expected.abs().max(), "the rescaling is what does it"


def test_selections_that_cannot_be() -> None:
    config = tiny_config()
    layers = tuple(range(6))
    heads = Axis("mamba_heads", 0)
    for wrong in (
        Selection((1, 0)),
        Selection((0, 9)),
        Selection(layers, {HIDDEN: (0, 0)}),
        Selection(layers, {HIDDEN: ()}),
        Selection(layers, {heads: (0, 1, 2, 4)}),
        Selection(layers, {heads: (4, 5, 0, 1)}),
        Selection(layers, {Axis("mamba_heads", i): (0, 1, 2, 4, 5) for i in (0, 2, 5)}),
        Selection(layers, {Axis("ffn", 1): (1, 2)}),
        Selection(layers, {Axis("kv_groups", 3): (1,)}),  # without its heads
        Selection(layers, {Axis("kv_groups", 3): (1,), Axis("attn_heads", 3): (0, 1)}),  # another's heads
        Selection(layers, {Axis("ffn", 0): (1,)}),
    ):
        with pytest.raises(InputError):
            slice_config(config, wrong)


@pytest.mark.parametrize("seed", range(50))
def test_silent_units_of_every_axis_at_once(seed: int) -> None:
    """All three kinds of layers, of which one goes, and every axis of the others loses at least one unit."""
    draw = random.Random(seed)
    pattern = list("MM**--")
    draw.shuffle(pattern)
    heads = {"num_attention_heads": 2 * draw.randint(2, 4), "mamba_num_heads": 2 * draw.randint(2, 4)}
    gated = {"gated_mlp": True, "activation": "silu"} if draw.random() < 0.5 else {}
    tied = {"tie_word_embeddings": draw.random() < 0.5}
    config = tiny_config(pattern="".join(pattern), norm_eps=1e-24, **heads, **gated, **tied)
    layers = tuple(sorted(draw.sample(range(6), 5)))
    selection = draw_selection(config, tuple(AXES), draw)
    while any(len(units) == axis_sizes(config)[axis] for axis, units in selection.kept.items()):
        selection = draw_selection(config, tuple(AXES), draw)
    kept = {axis: units for axis, units in selection.kept.items() if axis.layer in (None, *layers)}
    selection = Selection(layers, kept)
    model = random_model(config, seed)
    silence(model, selection)
    ids = torch.randint(config.vocab_size, (2, 19))
    seq_idx = torch.tensor([[0] * 19, [0] * 5 + [1] * 14], dtype=torch.int32)
    with torch.no_grad():
        smaller = slice_model(model, selection)
        assert_close("logits", model(ids, seq_idx=seq_idx), smaller(ids, seq_idx=seq_idx), 1e-9)
    for width in {axis.row.width for axis in kept}:
        assert getattr(smaller.config, width) < getattr(config, width), width


@pytest.mark.parametrize("seed", range(10))
def test_a_permutation_inside_the_groups_leaves_the_logits(seed: int) -> None:
    draw = random.Random(seed)
    config = random_config(seed)
    kept: dict[Axis, tuple[int, ...]] = {}
    sizes = axis_sizes(config)
    for axis in sorted(sizes, key=lambda axis: group_axis(axis) is not None):  # groups before what lives in them
        groups, owner = axis.groups(config), group_axis(axis)
        share = sizes[axis] // groups
        order = range(groups) if owner is None else kept[owner]
        kept[axis] = tuple(group * share + unit for group in order for unit in draw.sample(range(share), share))
    model = random_model(config, seed)
    shuffled = slice_model(model, Selection(tuple(range(config.num_layers)), kept))
    ids = torch.randint(config.vocab_size, (2, 13))
    with torch.no_grad():
        assert_close("logits", model(ids), shuffled(ids), 1e-9)


def test_kept_rows_of_in_proj_by_hand() -> None:
    config = HybridConfig("M", 5, 3, mamba_num_heads=2, mamba_head_dim=3, n_groups=1, ssm_state_size=1)
    kept = {Axis("mamba_heads", 0): (1,), Axis("mamba_head_dim", 0): (0, 2)}
    rows = kept_rows(tensor_table(config)["layers.0.mixer.in_proj.weight"].dimensions[0], kept)
    # z rows 0..5, x rows 6..11 (head 1 is the second three of each), B and C 12..13, dt 14..15
    assert rows.tolist() == [3, 5, 9, 11, 12, 13, 15]


def test_the_source_is_read_tensor_by_tensor_and_keeps_its_dtype() -> None:
    config = tiny_config()
    weights = {name: weight.bfloat16() for name, weight in random_model(config).state_dict().items()}
    selection = draw_selection(config, (*AXES, "layers"), random.Random(1))
    read: list[str] = []

    def get_tensor(name: str) -> torch.Tensor:
        read.append(name)
        return weights[name]

    for number, (_, tensor) in enumerate(slice_tensors(get_tensor, config, selection), 1):
        assert len(read) == number
        assert tensor.dtype == torch.bfloat16
