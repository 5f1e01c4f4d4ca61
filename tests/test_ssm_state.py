"""The state's indices as an axis: what they are worth by hand, cut in each group, and what a scan makes of it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from limbeck.kernels.state_energy import state_energy
from limbeck.models import mamba2
from limbeck.models.axes import Axis
from limbeck.models.config import HybridConfig
from limbeck.models.errors import InputError
from limbeck.models.hybrid import HybridLM
from limbeck.prune.choose import select
from limbeck.prune.importance import score_widths
from limbeck.prune.repair import Repair, repair_model
from limbeck.prune.slice import slice_config, slice_model
from limbeck.prune.target import Target
from limbeck.prune.width_metrics import ActivationScores, MagnitudeScores, RandomScores, TaylorScores
from limbeck.tests.helpers import Largest, assert_close, random_model, tiny_config
from limbeck.tests.pruning_helpers import draw_rows
from torch import Tensor
from torch.nn.functional import cross_entropy


def by_tokens(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, document: Tensor, to_come: bool) -> Tensor:
    """The definition, one state [H, P, N] after the other."""
    batch, tokens, heads, _ = x.shape
    groups, width = B.shape[2:]
    energy = x.new_zeros(batch, tokens, groups, width)
    for row in range(batch):
        state = x.new_zeros(heads, x.shape[3], width)
        for t in range(tokens):
            if t and document[row, t] != document[row, t - 1]:
                state = torch.zeros_like(state)
            rate = step[row, t] * A
            of_head = B[row, t].repeat_interleave(heads // groups, 0)
            state = state * rate.exp()[:, None, None]
            state = state + step[row, t][:, None, None] * x[row, t][:, :, None] * of_head[:, None]
            squares, decay = state.square().sum(1), torch.ones_like(rate)  # [H, N], [H]
            for q in range(t, tokens if to_come else t + 1):
                if document[row, q] != document[row, t]:
                    break
                decay = decay if q == t else decay * (step[row, q] * A).exp()
                read = C[row, q].square().repeat_interleave(heads // groups, 0)
                energy[row, t] += (squares * read * decay.square()[:, None]).unflatten(0, (groups, -1)).sum(1)
    return energy.sqrt()


@pytest.mark.parametrize("to_come", (False, True))
@pytest.mark.parametrize("seed", range(6))
def test_energy_is_its_definition(seed: int, to_come: bool) -> None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    groups, heads, tokens = draw.choice((1, 2)), 4, draw.choice((1, 7, 19))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, dt, bias, A = normal(2, tokens, heads, 3), normal(2, tokens, heads), normal(heads), -normal(heads).exp()
    B, C = normal(2, tokens, groups, 5), normal(2, tokens, groups, 5)
    document = (torch.rand(2, tokens, generator=generator) < 0.15).cumsum(1).int()
    limits = (0.1, 1.5)
    step = torch.nn.functional.softplus(dt + bias).clamp(*limits)
    expected = by_tokens(x, step, A, B, C, document, to_come)
    options: dict[str, Any] = {
        "dt_bias": bias,
        "dt_softplus": True,
        "dt_limit": limits,
        "chunk_size": draw.choice((4, 8)),
        "seq_idx": document,
    }
    assert_close("energy", expected, state_energy(x, dt, A, B, C, to_come=to_come, **options), 1e-9)
    single = [tensor.float() for tensor in (x, dt, A, B, C)]
    found = state_energy(*single, to_come=to_come, **options | {"dt_bias": bias.float()})
    assert found.dtype == torch.float32
    assert_close("energy", expected.float(), found, 1e-4)


def test_no_state_of_a_token_is_held() -> None:
    tokens, heads, head_dim, state = 256, 4, 16, 32
    x, dt, B = torch.randn(1, tokens, heads, head_dim), torch.randn(1, tokens, heads), torch.randn(1, tokens, 1, state)
    with Largest() as largest:
        state_energy(x, dt, -torch.ones(heads), B, B, to_come=True, dt_softplus=True, chunk_size=16)
    assert largest.numel <= tokens * heads * head_dim < tokens * heads * head_dim * state


def without(model: HybridLM, layer: int, index: int, part: str) -> None:
    """Silences one index of the state: B's or C's row is zero."""
    config, weights = model.config, model.state_dict()
    row = config.n_groups * config.ssm_state_size * (part == "C") + index
    prefix = f"layers.{layer}.mixer."
    with torch.no_grad():
        weights[prefix + "in_proj.weight"][2 * config.d_inner + row] = 0
        weights[prefix + "conv1d.weight"][config.d_inner + row] = 0
        weights[prefix + "conv1d.bias"][config.d_inner + row] = 0


@pytest.mark.parametrize("metric", ("now", "to_come", "taylor"))
def test_silent_indices_rank_last_and_go_unnoticed(metric: str) -> None:
    """One in each group, of either matrix; the logits stay, and the folder's config has one width."""
    config = tiny_config(norm_eps=1e-24)
    model = random_model(config)
    gone = {0: (3, 16 + 9), 2: (0, 31), 5: (7, 16)}
    for layer, indices in gone.items():
        for index, part in zip(indices, "BC", strict=True):
            without(model, layer, index, part)
    batch = draw_rows(config.vocab_size)
    scores = score_widths(
        model, [batch], TaylorScores() if metric == "taylor" else ActivationScores(state_source=metric)
    )
    for layer, indices in gone.items():
        assert tuple((scores[Axis("ssm_state", layer)] == 0).nonzero().flatten().tolist()) == indices
    selection = select(config, scores, (), Target(ssm_state_size=15))
    for layer, indices in gone.items():
        assert selection.kept[Axis("ssm_state", layer)] == tuple(n for n in range(32) if n not in indices)
    smaller = slice_model(model, selection)
    assert smaller.config == config.replace(ssm_state_size=15) == slice_config(config, selection)
    with torch.no_grad():
        assert_close("logits", model(batch.input_ids), smaller(batch.input_ids), 1e-9)


def test_the_score_is_what_the_layer_loses() -> None:
    """Of one head channel a group, without a decay of it by others, the error of y without an index is its energy."""
    config = tiny_config(pattern="M")
    model = random_model(config)
    seen: dict[str, Tensor] = {}

    class Seen:
        names = ("mamba_state",)

        def __call__(self, name: str, layer: int, tensor: Tensor) -> None:
            seen[name] = tensor.detach()

    ids = torch.randint(config.vocab_size, (2, 21))
    model.hidden_states(ids, observe=Seen())
    assert seen["mamba_state"].shape == (2, 21, 32)
    outputs: list[Tensor] = []
    for silent in (False, True):
        if silent:
            without(model, 0, 5, "C")
        found: list[Tensor] = []

        def spy(y: Tensor, *rest: object, kept: list[Tensor] = found) -> Tensor:
            kept.append(y.detach())
            return y

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mamba2, "gated_rms_norm", spy)
            model.hidden_states(ids)
        outputs += found
    lost = (outputs[0] - outputs[1]).square().sum(-1).sqrt()
    assert_close("lost", lost, seen["mamba_state"][..., 5], 1e-6)


def test_taylor_is_the_slope_when_an_index_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against central differences of every row's loss with B scaled, though C is what the metric is shown."""
    config = tiny_config(pattern="M-*M")
    model, batch, eps = random_model(config), draw_rows(config.vocab_size, rows=3), 1e-5
    scores = score_widths(model, [batch], TaylorScores())
    split, scaled = mamba2.Mamba2Mixer.split_heads, {"layer": 0, "index": 0, "by": 1.0}

    def shrunk(mixer: mamba2.Mamba2Mixer, conv_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, B, C = split(mixer, conv_out)
        factors = torch.ones(32, dtype=B.dtype)
        if mixer.layer == scaled["layer"]:
            factors[int(scaled["index"])] = scaled["by"]
        return x, B * factors.view(2, 16), C

    monkeypatch.setattr(mamba2.Mamba2Mixer, "split_heads", shrunk)
    for layer in (0, 3):
        for index in (0, 5, 16, 31):
            sides = []
            for by in (1 + eps, 1 - eps):
                scaled |= {"layer": layer, "index": index, "by": by}
                with torch.no_grad():
                    logits = model(batch.input_ids, seq_idx=batch.seq_idx)
                sides.append([float(cross_entropy(*row)) for row in zip(logits, batch.labels, strict=True)])
            slopes = [abs(up - down) / (2 * eps) for up, down in zip(*sides, strict=True)]
            expected = pytest.approx(sum(slopes) / len(slopes), rel=1e-4, abs=1e-8)
            assert float(scores[Axis("ssm_state", layer)][index]) == expected, (layer, index)


def test_baselines_and_options() -> None:
    config = tiny_config()
    model, axis, batch = random_model(config), Axis("ssm_state", 0), draw_rows(config.vocab_size)
    weights = model.state_dict()
    rows = weights["layers.0.mixer.in_proj.weight"].square().sum(1)[2 * config.d_inner : 2 * config.d_inner + 64]
    conv = weights["layers.0.mixer.conv1d.weight"].square().sum((1, 2))[config.d_inner :]
    magnitude = MagnitudeScores().scores(config, weights.__getitem__)
    assert_close("magnitude", (rows + conv).unflatten(0, (2, -1)).sum(0).sqrt(), magnitude[axis], 1e-6)
    assert RandomScores(1).scores(config)[axis].shape == (32,)
    plain, read = (score_widths(model, [batch], ActivationScores(times_output=times)) for times in (False, True))
    assert torch.equal(plain[axis], read[axis])  # no matrix reads an index
    assert not torch.equal(plain[axis], score_widths(model, [batch], ActivationScores(state_source="to_come"))[axis])
    with pytest.raises(InputError, match="now, to_come, c"):
        ActivationScores(state_source="sideways")
    older = {axis: scores for axis, scores in plain.items() if axis.kind != "ssm_state"}
    assert select(config, older, (), Target(hidden_size=24)) == select(config, plain, (), Target(hidden_size=24))
    with pytest.raises(InputError, match="score the model again"):
        select(config, older, (), Target(ssm_state_size=8))
    with pytest.raises(InputError, match=r"1\.\.16"):
        select(config, plain, (), Target(ssm_state_size=17))


@torch.no_grad()
def test_half_of_the_state_is_repaired() -> None:
    """Least squares brings the logits of the tokens that it is fitted on nearer than slicing alone."""
    config: HybridConfig = tiny_config()
    model, batch = random_model(config), draw_rows(config.vocab_size, rows=20, tokens=65)
    selection = select(config, score_widths(model, [batch]), (), Target(ssm_state_size=8))
    logits, distances = model(batch.input_ids, seq_idx=batch.seq_idx), []
    for repair in (Repair(norms="none"), Repair(norms="measured", least_squares=True)):
        smaller = repair_model(model, selection, [batch], repair)
        difference = smaller(batch.input_ids, seq_idx=batch.seq_idx) - logits
        distances.append(difference[batch.labels != -100].square().mean().item())
    assert 0 < distances[1] < 0.85 * distances[0], distances
