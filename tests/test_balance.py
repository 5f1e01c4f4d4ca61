"""Experts stay in use while they train: the routers' biases follow the load of a step, and a resumed run its bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill.balance import ExpertBalance
from limbeck.distill.losses import cross_entropy_loss
from limbeck.distill.options import TrainOptions
from limbeck.distill.trainer import train
from limbeck.models.errors import InputError
from limbeck.models.hybrid import HybridLM
from limbeck.models.moe import Router
from limbeck.tests.helpers import moe_config, random_model
from limbeck.tests.training_helpers import batches_from, draw_batch, model_of


def moe_model() -> HybridLM:
    return random_model(
        moe_config(pattern="MEM*E", vocab_size=97, n_routed_experts=8, num_experts_per_tok=2), dtype=torch.float32
    )


def routers(model: HybridLM) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Router)]


def run(model: HybridLM, folder: Path, steps: int, **changes: Any) -> list[dict[str, Any]]:
    options = TrainOptions(steps, 1e-3, warmup_steps=1, save_every=2, log_every=1, **changes)
    train(model, cross_entropy_loss, batches_from, options, folder)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_biases_go_against_the_load() -> None:
    model = moe_model()
    balance = ExpertBalance(model, 0.25)
    before = [router.e_score_correction_bias.clone() for router in routers(model)]
    chosen: list[torch.Tensor] = []
    hooks = [router.register_forward_hook(lambda _, __, out: chosen.append(out[0])) for router in routers(model)]
    ids = draw_batch(0).input_ids
    model(ids)
    with torch.no_grad():
        model(ids)  # an evaluation counts nothing
    figures = balance.move()
    ratios, idle = [], []
    for router, bias, indices in zip(routers(model), before, chosen, strict=False):
        load = torch.bincount(indices.flatten(), minlength=8).double()
        moved = router.e_score_correction_bias - bias
        torch.testing.assert_close(moved, 0.25 * (load.mean() - load).sign().to(bias))
        ratios.append(float(load.max() / load.mean()))
        idle.append(int((load == 0).sum()))
    assert figures == {"expert_load": pytest.approx(max(ratios)), "idle_experts": max(idle)}
    balance.detach()
    for hook in hooks:
        hook.remove()
    model(ids)
    assert all(not load.any() for load in balance.loads)


def test_training_spreads_the_load(tmp_path: Path) -> None:
    """With all tokens at two experts at first, the others are chosen after some steps; without it they stay idle."""
    loads = {}
    for rate in (0.0, 0.3):
        model = moe_model()
        for router in routers(model):
            router.e_score_correction_bias[:2] += 2
        records = run(model, tmp_path / str(rate), 12, expert_balance=rate)
        assert ("expert_load" in records[-1]) == (rate > 0)
        balance = ExpertBalance(model, 1.0)
        model(draw_batch(0).input_ids)
        loads[rate] = balance.move()
        balance.detach()
    assert loads[0.0]["idle_experts"] == 6 and loads[0.3]["idle_experts"] == 0
    assert loads[0.3]["expert_load"] < loads[0.0]["expert_load"]


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    whole, halved = moe_model(), moe_model()
    run(whole, tmp_path / "whole", 6, expert_balance=0.01)
    options = TrainOptions(6, 1e-3, warmup_steps=1, save_every=2, log_every=1, expert_balance=0.01)
    train(halved, cross_entropy_loss, batches_from, options, tmp_path / "halved", stop_after=4)
    again = moe_model()
    run(again, tmp_path / "halved", 6, expert_balance=0.01)
    assert not torch.equal(routers(whole)[0].e_score_correction_bias, routers(moe_model())[0].e_score_correction_bias)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_models_without_such_a_router_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no expert layer"):
        run(model_of(0), tmp_path, 1, expert_balance=0.1)
    with pytest.raises(InputError, match="expert_balance"):
        TrainOptions(1, 1e-3, expert_balance=-1.0)
