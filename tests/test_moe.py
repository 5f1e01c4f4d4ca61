"""nemotron_h with experts: transformers' class and ours compute the same, and folders go both ways."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models.axes import Axis, axis_sizes, tensor_table
from limbeck.models.checkpoint import load_model, open_checkpoint, save_model
from limbeck.models.config import HybridConfig
from limbeck.models.errors import InputError
from limbeck.models.families.family import pieces_of
from limbeck.models.generate.cache import Cache
from limbeck.models.generate.generate import generate
from limbeck.models.hybrid import HybridLM
from limbeck.models.moe import Router
from limbeck.prune.slice import slice_model
from limbeck.tests.family_draws import nemotron_config
from limbeck.tests.family_helpers import BIAS, check_parity, some_slow
from limbeck.tests.helpers import assert_close, moe_config, random_model
from limbeck.tests.pruning_helpers import draw_selection
from safetensors import safe_open


@pytest.mark.parametrize("latent", (False, True), ids=("plain", "latent"))
@pytest.mark.parametrize("seed", some_slow(24, 8))
def test_transformers_computes_the_same(seed: int, latent: bool, tmp_path: Path) -> None:
    check_parity(nemotron_config(seed, latent), seed, tmp_path)


def test_experts_are_one_by_one_on_the_disk_and_the_router_is_float32(tmp_path: Path) -> None:
    model = random_model(moe_config(moe_latent_size=8), dtype=torch.float32)
    save_model(model, tmp_path / "narrow", dtype=torch.bfloat16)
    with safe_open(tmp_path / "narrow" / "model.safetensors", "pt") as stored:
        for layer in (1, 3, 5):
            mixer = f"backbone.layers.{layer}.mixer."
            assert stored.get_slice(mixer + "experts.5.down_proj.weight").get_shape() == [8, 12]
            assert stored.get_tensor(mixer + "experts.0.up_proj.weight").dtype == torch.bfloat16
            own = model.layers[layer].mixer.gate
            assert torch.equal(stored.get_tensor(mixer + "gate.weight"), own.weight)
            assert torch.equal(stored.get_tensor(mixer + "gate." + BIAS), own.e_score_correction_bias)
    narrow = load_model(tmp_path / "narrow", torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in narrow.state_dict().items()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        f"layers.{layer}.mixer.gate.{name}" for layer in (1, 3, 5) for name in ("weight", BIAS)
    }
    save_model(narrow, tmp_path / "again")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("narrow", "again")]
    assert files[0] == files[1]
    assert narrow(torch.randint(97, (2, 9))).isfinite().all()


def test_the_bias_chooses_and_never_weighs() -> None:
    torch.manual_seed(0)
    router = Router(moe_config(norm_topk_prob=False, routed_scaling_factor=3.0), dtype=torch.bfloat16)
    assert router.weight.dtype == router.e_score_correction_bias.dtype == torch.float32
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias = torch.tensor([9.0, 0, 0, 8.0, 0, 0])
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    indices, weights = router(x)
    assert all(sorted(row) == [0, 3] for row in indices.tolist())
    expected = 3 * torch.sigmoid(x.float() @ router.weight.T).gather(1, indices)
    assert torch.equal(weights, expected)


def test_a_softmax_router_weighs_the_chosen_logits() -> None:
    torch.manual_seed(0)
    router = Router(moe_config(router="softmax", routed_scaling_factor=1.0))
    torch.nn.init.normal_(router.weight)
    x = torch.randn(5, 32)
    indices, weights = router(x)
    logits, best = (x @ router.weight.T).sort(descending=True)
    assert torch.equal(indices, best[:, :2])
    assert_close("weights", logits[:, :2].exp() / logits[:, :2].exp().sum(1, keepdim=True), weights, 1e-6)


OTHERS = {
    "sigmoid": {},
    "groups, latent": {"n_group": 3, "topk_group": 2, "moe_latent_size": 8},
    "softmax, gated": {"router": "softmax", "gated_mlp": True, "activation": "silu", "routed_scaling_factor": 1.0},
    "nothing shared": {"moe_shared_expert_intermediate_size": 0, "norm_topk_prob": False},
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_decoding_packing_and_padding(name: str) -> None:
    config = moe_config(**OTHERS[name])
    model = random_model(config)
    ids = torch.randint(config.vocab_size, (2, 24))
    whole = model(ids)
    cache = Cache(config, 2, 24, dtype=torch.float64, ssm_dtype=torch.float64)
    parts = [model(part, cache=cache) for part in ids.split((5, 1, 1, 9, 8), 1)]
    assert_close("decoding", whole, torch.cat(parts, 1), 1e-9)
    prompt, text = ids, generate(model, ids, 6)
    for _ in range(6):
        prompt = torch.cat((prompt, model(prompt)[:, -1:].argmax(-1)), 1)
    assert torch.equal(text, prompt)
    seq_idx = (torch.arange(24) > 9).int().expand(2, 24)
    alone = torch.cat([model(ids[:, :10]), model(ids[:, 10:])], 1)
    assert_close("documents", alone, model(ids, seq_idx=seq_idx), 1e-12)
    other = ids.clone()
    other[:, 17:] = 0  # what comes after does not matter, whichever experts it takes
    assert_close("padding", whole[:, :17], model(other)[:, :17], 1e-12)


AXES_OF_EXPERTS = ("experts", "expert_ffn", "shared_ffn", "hidden")


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_slicing_keeps_its_laws(name: str, tmp_path: Path) -> None:
    config = moe_config(n_routed_experts=12, **OTHERS[name])
    model, draw = random_model(config), random.Random(len(name))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {name: spec.shape for name, spec in tensor_table(config).items()}
    everything = {axis: tuple(range(size)) for axis, size in axis_sizes(config).items()}
    selection = draw_selection(config, (), draw)
    same = slice_model(model, type(selection)(selection.layers, everything)).state_dict()
    assert all(torch.equal(tensor, same[key]) for key, tensor in model.state_dict().items())
    for kinds in (*((kind,) for kind in AXES_OF_EXPERTS), AXES_OF_EXPERTS):
        if "shared_ffn" in kinds[:1] and not config.moe_shared_expert_intermediate_size:
            continue
        selection = draw_selection(config, kinds, draw)
        if len(selection.kept.get(Axis("experts", 1), range(12))) < 6:  # fewer than a token's choices, in its groups
            continue
        smaller = slice_model(model, selection)
        shapes = {name: tuple(tensor.shape) for name, tensor in smaller.state_dict().items()}
        assert shapes == {name: spec.shape for name, spec in tensor_table(smaller.config).items()}
        assert smaller(torch.randint(config.vocab_size, (1, 5))).isfinite().all()
        kept = selection.kept.get(Axis("experts", 3))
        if kept is not None and config.router == "sigmoid":
            bias = model.layers[3].mixer.gate.e_score_correction_bias
            assert torch.equal(smaller.layers[3].mixer.gate.e_score_correction_bias, bias[list(kept)])


@torch.no_grad()
def test_experts_that_no_token_chooses_may_go() -> None:
    model = random_model(moe_config())
    for layer in (1, 3, 5):
        model.layers[layer].mixer.gate.e_score_correction_bias[[1, 4]] = -9.0
    ids = torch.randint(97, (2, 15))
    kept = {Axis("experts", layer): (0, 2, 3, 5) for layer in (1, 3, 5)}
    selection = draw_selection(model.config, (), random.Random(0))
    smaller = slice_model(model, type(selection)(selection.layers, kept))
    assert smaller.config.n_routed_experts == 4
    assert_close("logits", model(ids), smaller(ids), 1e-12)


def test_gradients_are_repeatable_and_independent_of_checkpointing() -> None:
    model, ids = random_model(moe_config(), dtype=torch.float32), torch.randint(97, (2, 15))
    gradients = []
    for recompute in (False, False, True):
        for block in model.layers:
            block.recompute = recompute
        model.zero_grad()
        model(ids).square().sum().backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))


def test_layers_of_experts_are_spelled_as_moe() -> None:
    hf = moe_config().to_hf()
    types = ["mamba", "moe", "attention", "moe", "mlp", "moe"]
    for name in ("layers_block_type", "layer_types"):
        for kinds in (types, [{"mamba": "linear_attention", "attention": "full_attention"}.get(x, x) for x in types]):
            other = {key: value for key, value in hf.items() if key != "hybrid_override_pattern"} | {name: kinds}
            assert HybridConfig.from_hf(other) == moe_config()
    assert HybridConfig.from_hf(hf | {"moe_latent_size": None, "intermediate_size": 48}) == moe_config()
    assert "n_group" not in moe_config(pattern="M-").to_hf()
    # A model without experts says nothing of them: other readers would take it for one with experts.
    plain = HybridConfig.from_hf(hf | {"hybrid_override_pattern": "M-", "num_hidden_layers": 2})
    assert plain.n_routed_experts == 0 and "n_routed_experts" not in plain.to_hf()
    assert [len(pieces_of(moe_config())[f"layers.1.mixer.experts.{end}_proj"]) for end in ("up", "down")] == [6, 6]


@pytest.mark.parametrize(
    ("change", "says"),
    (
        ({"num_experts_per_tok": 7}, "num_experts_per_tok .7. is more than the experts to choose from .6 of"),
        ({"n_group": 4}, "n_routed_experts .6. is not divisible by n_group .4."),
        ({"n_group": 3, "topk_group": 1, "num_experts_per_tok": 3}, "more than the experts to choose from .2 of"),
        ({"n_group": 6}, "at least 2"),
        ({"topk_group": 2}, "topk_group .2. is more than n_group .1."),
        ({"n_shared_experts": 2}, "n_shared_experts is 2; expected 1"),
        ({"moe_shared_expert_intermediate_size": 0}, "needs a width"),
        ({"n_routed_experts": None}, "n_routed_experts or num_local_experts is missing"),
        ({"moe_latent_size": -8}, "moe_latent_size is -8"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act='silu'"),
    ),
)
def test_wrong_configs_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        HybridConfig.from_hf(moe_config().to_hf() | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    (
        ({"router": "hash"}, "router 'hash' is unknown; known: sigmoid, softmax"),
        ({"router": "softmax", "n_group": 2}, "no groups of experts"),
        ({"gated_mlp": True}, "silu with one"),
    ),
)
def test_wrong_kinds_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        moe_config(**change)


@pytest.mark.parametrize("change", ({"router": "softmax"}, {"moe_shared_expert_intermediate_size": 0}))
def test_what_no_reader_of_the_family_has_is_not_written(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        moe_config(**change).to_hf()


def test_a_folder_says_which_expert_is_missing(tmp_path: Path) -> None:
    save_model(random_model(moe_config(), dtype=torch.float32), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"n_routed_experts": 7}))
    with pytest.raises(InputError, match=r"mixer\.gate\.e_score_correction_bias has shape \[6\], expected \[7\]"):
        open_checkpoint(tmp_path / "model")


def test_every_weight_is_the_tables() -> None:
    for changes in OTHERS.values():
        config = moe_config(**changes)
        model = HybridLM(config, device="meta", dtype=torch.bfloat16)
        for name, tensor in model.state_dict().items():
            spec = tensor_table(config)[name]
            assert tensor.dtype == spec.dtype(torch.bfloat16) and tensor.shape == spec.shape, name
        assert sum(p.numel() for p in model.parameters()) == sum(
            spec.numel for spec in tensor_table(config).values() if not spec.name.endswith(BIAS)
        )
