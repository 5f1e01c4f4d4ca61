"""The laws of slicing over drawn mixtures of experts: groups, latent sizes, both routers, with and without a gate."""

from __future__ import annotations

import random

import pytest
import torch
from limbeck.models.axes import HIDDEN, Axis, axis_sizes, tensor_table
from limbeck.models.config import HybridConfig
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.hybrid import HybridLM
from limbeck.prune.choose import select
from limbeck.prune.slice import Selection, slice_model
from limbeck.prune.target import Target
from limbeck.prune.width_metrics import RandomScores
from limbeck.tests.helpers import assert_close, moe_config, random_model

SEEDS = range(24)


def draw_config(seed: int) -> HybridConfig:
    draw = random.Random(seed)
    groups = draw.choice((1, 1, 2))
    gate = {"gated_mlp": True, "activation": "silu"} if draw.random() < 0.5 else {}
    return moe_config(
        pattern=draw.choice(("E", "ME", "E*E", "ME-E")),
        n_routed_experts=groups * draw.choice((3, 4, 5)),
        num_experts_per_tok=draw.choice((1, 2)),
        n_group=groups,
        topk_group=groups,
        moe_intermediate_size=draw.choice((5, 8, 12)),
        moe_latent_size=draw.choice((0, 0, 8)),
        moe_shared_expert_intermediate_size=draw.choice((0, 8, 20)),
        norm_topk_prob=draw.random() < 0.7,
        router="softmax" if groups == 1 and draw.random() < 0.4 else "sigmoid",
        norm_eps=1e-24,
        **gate,
    )


def draw_target(config: HybridConfig, seed: int) -> Target:
    """Fewer of all that experts have."""
    draw = random.Random(seed)
    groups, each = config.n_group, config.n_routed_experts // config.n_group
    sizes = {
        "n_routed_experts": groups * draw.randint(2, each - 1),
        "moe_intermediate_size": draw.randint(1, config.moe_intermediate_size - 1),
        "hidden_size": draw.randint(8, 31),
    }
    if config.moe_shared_expert_intermediate_size:
        sizes["moe_shared_expert_intermediate_size"] = draw.randint(1, config.moe_shared_expert_intermediate_size - 1)
    return Target(**sizes)  # type: ignore[arg-type]


@torch.no_grad()
def silence(model: HybridLM, selection: Selection) -> None:
    """Makes what goes contribute nothing: no token chooses the experts, no matrix gives the neurons or channels."""
    config, weights = model.config, model.state_dict()
    for axis, size in axis_sizes(config).items():
        gone = [unit for unit in range(size) if unit not in selection.kept.get(axis, range(size))]
        for name, spec in tensor_table(config).items():
            if axis.kind == "hidden" and (name == "embeddings.weight" or spec.writes_stream):
                dimension = 1 if name == "embeddings.weight" else len(spec.dimensions) - 2
                weights[name].index_fill_(dimension, torch.tensor(gone, dtype=torch.int64), 0)
            elif axis.kind in ("expert_ffn", "shared_ffn") and spec.dimensions[-1][0][0].axis == axis:
                weights[name][..., gone] = 0
        if axis.kind == "experts" and gone:
            weights[f"layers.{axis.layer}.mixer.gate.e_score_correction_bias"][gone] = -9


@pytest.mark.parametrize("seed", SEEDS)
def test_all_that_stays_is_the_identity(seed: int) -> None:
    config = draw_config(seed)
    model = random_model(config, seed)
    everything = {axis: tuple(range(size)) for axis, size in axis_sizes(config).items()}
    same = slice_model(model, Selection(tuple(range(config.num_layers)), everything))
    assert same.config == config
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("seed", SEEDS)
def test_shapes_counts_and_silence(seed: int) -> None:
    """Each layer loses units of its own; the router loses the rows and the numbers of the experts that go."""
    config = draw_config(seed)
    model, target = random_model(config, seed), draw_target(config, seed)
    selection = select(config, RandomScores(seed).scores(config), (), target)
    smaller = slice_model(model, selection)
    table = tensor_table(smaller.config)
    assert {name: tuple(tensor.shape) for name, tensor in smaller.state_dict().items()} == {
        name: spec.shape for name, spec in table.items()
    }
    assert count_parameters(smaller.config) == sum(weight.numel() for weight in smaller.parameters())
    assert {name: getattr(smaller.config, name) for name in target.widths} == target.widths
    for layer, kind in enumerate(config.kinds):
        if kind.experts is not None:
            experts, hidden = list(selection.kept[Axis("experts", layer)]), list(selection.kept[HIDDEN])
            per_group = config.n_routed_experts // config.n_group
            counts = {sum(expert // per_group == group for expert in experts) for group in range(config.n_group)}
            assert len(counts) == 1
            gate = model.get_parameter(f"layers.{layer}.mixer.gate.weight")[experts][:, hidden]
            assert torch.equal(smaller.get_parameter(f"layers.{layer}.mixer.gate.weight"), gate)
    if config.router == "softmax":  # whose tokens always choose some: an expert that gives nothing leaves a gap
        kept = {axis: units for axis, units in selection.kept.items() if axis.kind != "experts"}
        selection = Selection(selection.layers, kept)
    silence(model, selection)
    ids = torch.randint(config.vocab_size, (2, 9))
    with torch.no_grad():
        assert_close("logits", model(ids), slice_model(model, selection)(ids), 1e-8)
