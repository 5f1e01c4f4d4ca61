"""Training through the rounding of an export format: what is computed is what the exported folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill.gap.measure import measure_gap
from limbeck.distill.losses import cross_entropy_loss
from limbeck.distill.parallel import load_trained, prepare
from limbeck.distill.quantised import WeightRounding, quantised
from limbeck.distill.trainer import train
from limbeck.models import processes
from limbeck.models.checkpoint import load_model, save_model
from limbeck.models.errors import InputError
from limbeck.models.generate.cache import Cache
from limbeck.models.hybrid import HybridLM
from limbeck.models.quantise import rounded_input
from limbeck.models.rounding import ROUNDINGS
from limbeck.models.served_inputs import load_served, rounds_inputs, token_rounding
from limbeck.tests.gguf_helpers import gguf_config, write_tokenizer
from limbeck.tests.helpers import EXPERTS, assert_close, limbeck, random_model, tiny_config
from limbeck.tests.processes_helpers import run_workers
from limbeck.tests.training_helpers import batches_from, draw_batch, options, weights
from safetensors.torch import load_file, save_file

MIXTURE = EXPERTS | {"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64}


def model_of(name: str, vocabulary: int = 97, dtype: torch.dtype = torch.float32, **changes: Any) -> HybridLM:
    family = "nemotron_h" if name == "experts" else name
    return random_model(gguf_config(family, vocabulary, **(MIXTURE if name == "experts" else {}) | changes), 1, dtype)


@pytest.mark.parametrize("form", ROUNDINGS)
@pytest.mark.parametrize("name", ("llama", "nemotron_h", "experts"))
def test_it_computes_with_what_export_writes(name: str, form: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    size = write_tokenizer(tmp_path / "words", "gpt-2")
    model = model_of(name, size).bfloat16().float()
    save_model(model, tmp_path / "model", tokenizer_from=tmp_path / "words")
    code, _, err = limbeck("export", f"model={tmp_path / 'model'}", f"output={tmp_path / 'out'}", f"format={form}",
                           "check_tokens=8")  # fmt: skip
    assert code == 0, err
    before, read = weights(model), weights(load_model(tmp_path / "out"))
    with quantised(prepare(model), form):
        for key, weight in weights(model).items():
            stored = weight if torch.equal(weight, before[key]) else weight.bfloat16().float()  # as readers have it
            assert torch.equal(stored, read[key]), key
        assert any(not torch.equal(weight, before[key]) for key, weight in weights(model).items())
        assert (model.round_input is None) == (form == "w4a16")
    assert model.round_input is None
    for key, weight in weights(model).items():
        assert torch.equal(weight, before[key]), key


@pytest.mark.parametrize("form", ("fp8", "w8a8"))
@pytest.mark.parametrize("name", ("nemotron_h", "experts"))
def test_what_was_trained_is_what_is_measured(name: str, form: str, tmp_path: Path) -> None:
    """The figures of a student while it learns through rounding are those of its export, inputs rounded as a server
    does, once its weights are in bfloat16 as readers have them. Read for anything else inputs are as they are."""
    pytest.importorskip("compressed_tensors")
    size = write_tokenizer(tmp_path / "words", "gpt-2")
    model = model_of(name, size).bfloat16().float()
    save_model(model, tmp_path / "model", tokenizer_from=tmp_path / "words")
    words = (f"model={tmp_path / 'model'}", f"output={tmp_path / 'out'}", f"format={form}", "check_tokens=8")
    assert limbeck("export", *words)[0] == 0
    after, plain = load_served(tmp_path / "out", torch.float32, "cpu"), load_model(tmp_path / "out")
    assert plain.round_input is None and after.round_input is not None
    rows = [draw_batch(seed, count=3, length=40) for seed in range(2)]
    teacher = load_model(tmp_path / "model")
    with torch.no_grad(), quantised(prepare(model), form) as within:
        for key, weight in within.model.state_dict().items():
            weight.copy_(plain.state_dict()[key])
        before = measure_gap(teacher, {"it": within.model}, rows).models["it"]
        logits = within.model(rows[0].input_ids)
    found = {key: measure_gap(teacher, {"it": it}, rows).models["it"] for key, it in (("s", after), ("p", plain))}
    assert found["s"] == before != found["p"]
    with torch.no_grad():
        assert torch.equal(logits, after(rows[0].input_ids))


def test_how_inputs_are_rounded_is_known_by_the_config() -> None:
    group = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    config = {"config_groups": {"group_0": {"input_activations": group}}}
    assert token_rounding(config) is ROUNDINGS["fp8"] and rounds_inputs(config)
    whole = {"config_groups": {"group_0": {"input_activations": group | {"type": "int", "symmetric": True}}}}
    assert token_rounding(whole) is ROUNDINGS["w8a8"]
    for change in ({"strategy": "group"}, {"dynamic": False}, {"num_bits": 4}, {"symmetric": False}):
        other = {"config_groups": {"group_0": {"input_activations": group | change}}}
        assert token_rounding(other) is None and rounds_inputs(other)
    assert not rounds_inputs({"config_groups": {"group_0": {"input_activations": None}}})
    assert rounds_inputs({"quant_method": "modelopt", "quant_algo": "FP8"}) and rounds_inputs({"quant_method": "fp8"})
    assert not rounds_inputs({"quant_method": "gptq"})


@pytest.mark.parametrize("name", ("nemotron_h", "experts"))
def test_gradients_are_those_at_the_rounded_weights(name: str) -> None:
    """In a format that leaves activations alone."""
    model, other, rows = model_of(name), model_of(name), draw_batch(0)
    trained = prepare(model)
    with quantised(trained, "w4a16") as within:
        other.load_state_dict(model.state_dict())
        cross_entropy_loss(model, rows, 50.0).backward()
        within.gradients()
        found = {weight.name: weight.local.grad for weight in within.weights}
    cross_entropy_loss(other, rows, 50.0).backward()
    for key, weight in other.named_parameters():
        assert_close(key, weight.grad, found[key], 1e-6)


@pytest.mark.parametrize("form", ("fp8", "w8a8"))
def test_inputs_are_rounded_token_by_token(form: str) -> None:
    rounding = ROUNDINGS[form]
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 5)[:, None]
    x[0, 0] = 0
    y = rounded_input(x, rounding)
    largest = x.abs().amax(-1, keepdim=True)
    assert torch.equal(y[0, 0], x[0, 0])
    step = torch.maximum(x.abs() / 16, largest / 448 * 2**-9) if form == "fp8" else largest / 254
    assert ((y - x).abs() <= 1.001 * step).all() and not torch.equal(x, y)
    one = rounded_input(x[1:, 3:4], rounding)
    assert torch.equal(one, y[1:, 3:4])  # by no other token


@pytest.mark.parametrize("name", ("nemotron_h", "experts"))
def test_what_experts_and_projections_read_is_rounded(name: str) -> None:
    model, ids = model_of(name), torch.arange(3, 30)[None]
    shown: dict[str, torch.Tensor] = {}
    with torch.no_grad(), quantised(prepare(model), "w8a8"):
        rounded = model(ids, observe=lambda key, layer, x: shown.setdefault(key, x))
        model.round_input = None
        assert not torch.equal(rounded, model(ids))
    if name == "experts":
        act = shown["expert_ffn_act"]  # [B, T, I, k]: at most 255 values a token and choice
        steps = act / (act.abs().amax(2, keepdim=True) / 127)
        assert_close("whole numbers", steps.round(), steps, 1e-5)


@pytest.mark.parametrize("name", ("nemotron_h", "experts"))
def test_decoding_is_prefill_while_it_learns(name: str) -> None:
    """What a student writes in training comes of the same rounding as what it is trained on (in float64, since a number
    at the border of two steps may fall to either side of it)."""
    model, ids = model_of(name, dtype=torch.float64), torch.arange(3, 15)[None]
    with torch.no_grad(), quantised(prepare(model), "w8a8"):
        whole, cache = model(ids), Cache(model.config, 1, 16, dtype=torch.float64, ssm_dtype=torch.float64)
        steps = [model.decode(ids[:, step], torch.tensor([step]), cache) for step in range(12)]
    assert_close("logits", whole[0], torch.cat(steps), 1e-5)


def test_killed_and_resumed_it_is_the_same(tmp_path: Path) -> None:
    whole, parts = model_of("experts"), model_of("experts")
    how = options(quantize="w8a8", save_every=2)
    train(whole, cross_entropy_loss, batches_from, how, tmp_path / "whole")
    for stop in (3, None):
        train(parts, cross_entropy_loss, batches_from, how, tmp_path / "parts", stop_after=stop)
    plain = model_of("experts")
    train(plain, cross_entropy_loss, batches_from, options(save_every=2), tmp_path / "plain")
    changed = weights(plain)
    for key, weight in weights(whole).items():
        assert torch.equal(weight, weights(parts)[key]), key
    assert any(not torch.equal(weight, changed[key]) for key, weight in weights(whole).items())


def test_bfloat16_weights_are_rounded_from_float32_copies() -> None:
    model = model_of("llama")
    trained = prepare(model, torch.bfloat16)
    with quantised(trained, "w8a8") as within:
        for weight in within.weights:
            if weight.used is not None:
                assert weight.parameter.dtype == torch.bfloat16 and weight.local.dtype == torch.float32
                assert torch.equal(weight.parameter, weight.used(weight.local).bfloat16())
        assert any(weight.used is not None for weight in within.weights)


def learn(folder: str | Path, split: bool) -> dict[str, torch.Tensor]:
    """Two steps through w8a8 in as many processes as there are: the weights, whole, and the last gradient."""
    place = (Path(folder) / "model", torch.float32, torch.device("cpu"))
    trained, rows = load_trained(*place, split=split), [draw_batch(seed, 4, 12, 97) for seed in range(2)]
    mine = slice(None) if processes.count() == 1 else slice(2 * processes.rank(), 2 * processes.rank() + 2)
    with quantised(trained, "w8a8") as within:
        for batch in rows:
            within.zero_grad()
            cross_entropy_loss(within.model, batch.rows(mine.start or 0, mine.stop or 4), 50.0).backward()
            within.gradients()
            with torch.no_grad():
                for weight in within.weights:
                    weight.local.sub_(0.1 * weight.local.grad)
            within.moved()
        found = {f"gradient {w.name}": w.whole(w.local.grad).clone() for w in within.weights}
        learned = {w.name: w.whole(w.local.detach()).clone() for w in within.weights}
        used = [w for w in within.weights if w.used is not None]
        assert len(used) > 3 and all(w.split == (split and processes.count() > 1) for w in used)
    for weight in trained.weights:  # afterwards it has what was learned, not what that was rounded to
        there: Any = weight.parameter.detach()
        kept = there.to_local() if weight.split else there
        assert torch.equal(kept, weight.local) and torch.equal(weight.whole(kept), learned[weight.name]), weight.name
    return found | learned


def learn_together(folder: str) -> None:
    for split in (True, False):
        found = learn(folder, split)
        if processes.rank() == 0:
            whole = {name: value.contiguous() for name, value in found.items()}
            save_file(whole, Path(folder) / f"{split}.safetensors")


@pytest.mark.parametrize("name", ("nemotron_h", "experts"))
@pytest.mark.slow
def test_two_processes_learn_what_one_does(name: str, tmp_path: Path) -> None:
    """Every process rounds the rows that are its own, of matrices and of stacks of experts."""
    changes = {"n_routed_experts": 3} if name == "experts" else {}
    save_model(model_of(name, 97, **changes), tmp_path / "model")
    expected = learn(tmp_path, False)
    run_workers(learn_together, tmp_path)
    for split in (True, False):
        found = load_file(tmp_path / f"{split}.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(f"{split} {key}", value, found[key], 1e-5)


@pytest.mark.parametrize("form", ROUNDINGS)
def test_a_process_may_have_no_rows(form: str) -> None:
    used = WeightRounding(ROUNDINGS[form], 32 if ROUNDINGS[form].grouped else 0)
    for shape in ((0, 64), (0, 5, 64)):
        assert used(torch.empty(shape)).shape == shape
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([used(rows[:2]), used(rows[2:])]), used(rows))


def test_what_cannot_be() -> None:
    with pytest.raises(InputError, match=r"quantize 'int3' is unknown; known: fp8, w8a8, w4a16"):
        options(quantize="int3")
    assert options(quantize="int8") == options(quantize="w8a8") and options().quantize is None
    odd = random_model(tiny_config(intermediate_size=33, hidden_size=36), 0, torch.float32)
    with pytest.raises(InputError, match="w4a16 needs"), quantised(prepare(odd), "w4a16"):
        pass
