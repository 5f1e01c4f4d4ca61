"""Slots, continuous batching and sampling: every sequence is what it would be alone, whatever shares its batch."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from limbeck.kernels.causal_conv1d import causal_conv1d_step
from limbeck.kernels.linear import laid_out, linear, packed
from limbeck.kernels.mamba_step import PreparedStep
from limbeck.kernels.norm import gated_rms_norm
from limbeck.kernels.state_update import state_update
from limbeck.models.attention import KeyValues
from limbeck.models.checkpoint import load_model
from limbeck.models.errors import InputError
from limbeck.models.generate.cache import Cache
from limbeck.models.generate.decode import Decoder, DecodingStep, lay_out
from limbeck.models.generate.engine import Completion, Engine, Event, Request
from limbeck.models.generate.generate import generate
from limbeck.models.generate.sampling import Sampler, Sampling
from limbeck.models.hybrid import HybridLM, initialize
from limbeck.models.mamba2 import MambaState
from limbeck.scripts.run.resolve import ZOO, model_config
from limbeck.tests.helpers import any_config, assert_close, random_model, tiny_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


def fill(model: HybridLM, cache: Cache, row: int, ids: Tensor, cuts: list[int]) -> Tensor:
    """Writes ids [T] into a row in pieces that end at `cuts`; logits [V] after the last."""
    start = 0
    for stop in cuts:
        hidden = model.hidden_states(ids[None, start:stop], cache=cache.rows(row, 1))
        cache.lengths[row] = start = stop
    return linear(hidden[0, -1], model.head_weight)


def poison(cache: Cache, rows: range) -> None:
    """NaN in everything of some rows, and after the length of every other."""
    for layer in cache.layers:
        if isinstance(layer, MambaState):
            layer.ssm[rows.start : rows.stop] = torch.nan
            layer.conv[rows.start : rows.stop] = torch.nan
        elif isinstance(layer, KeyValues):
            for row, length in enumerate(cache.lengths):
                begin = 0 if row in rows else length
                layer.keys[row, :, begin:] = torch.nan
                layer.values[row, :, begin:] = torch.nan


def mixed_batch(model: HybridLM, seed: int, longest: int, steps: int, pack: bool = False) -> tuple[Tensor, Tensor]:
    """Logits of a drawn batch by chunked prefill and steps, and by one full forward each, [sequences, steps, V]; one
    more row is poisoned, and so is what lies after every sequence's end."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch = draw.randint(1, 4)
    prompts = [draw.randint(1, longest) for _ in range(batch)]
    ids = [torch.randint(model.config.vocab_size, (prompt + steps,), generator=generator) for prompt in prompts]
    dtype = model.head_weight.dtype
    state = torch.float64 if dtype == torch.float64 else torch.float32
    cache = Cache(model.config, batch + 1, longest + steps + 3, dtype=dtype, ssm_dtype=state)
    found: list[list[Tensor]] = []
    for row, prompt in enumerate(prompts):
        cuts = sorted({prompt, *(draw.randint(1, prompt) for _ in range(draw.randint(0, 5)))})
        found.append([fill(model, cache, row, ids[row][:prompt], cuts)])
    poison(cache, range(batch, batch + 1))
    decoder = Decoder(model, cache, pack=pack)
    for step in range(steps):
        logits = decoder.step([int(row[prompt + step]) for row, prompt in zip(ids, prompts, strict=True)])
        for row in range(batch):
            found[row].append(logits[row].clone())
    whole = [model(row[None])[0, prompt - 1 :] for row, prompt in zip(ids, prompts, strict=True)]
    return torch.stack(whole), torch.stack([torch.stack(row) for row in found])


@pytest.mark.parametrize("seed", (0, 1, 2, 3, 4, 5, 50, 51, 52))
@torch.no_grad()
def test_steps_of_unequal_lengths_are_the_full_forward(seed: int) -> None:
    model = random_model(any_config(seed))
    assert_close("logits", *mixed_batch(model, seed, 20, 6), 1e-12)


@pytest.mark.parametrize("pack", (False, True))
@pytest.mark.parametrize("seed", (0, 1, 2, 3, 50))
@torch.no_grad()
def test_steps_in_float32(seed: int, pack: bool) -> None:
    """What a CPU does in prepared buffers, and with packed matrices from three rows on."""
    model = random_model(any_config(seed))
    exact, _ = mixed_batch(model, seed, 20, 6)
    single = HybridLM(model.config).eval()
    single.load_state_dict(model.state_dict())
    lay_out(single)
    _, found = mixed_batch(single, seed, 20, 6, pack=pack)
    assert_close("logits", exact, found.double(), 1e-4)


@pytest.mark.parametrize("threads", (1, 2))
@torch.no_grad()
def test_products_whatever_the_layout(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in ((64, 32), (32, 64), (33, 16), (16, 33)):
            weight = torch.randn(shape)
            for lead in ((1,), (2,), (5,), (1, 1), (2, 3)):
                x = torch.randn(*lead, shape[1])
                expected = x.double() @ weight.double().T
                for stored in (weight, laid_out(weight), packed(weight, 3)):
                    assert_close(f"{shape} {lead}", expected, linear(x, stored).double(), 1e-6)
        assert laid_out(torch.empty(64, 32)).stride() == (1, 64) and laid_out(torch.empty(32, 64)).stride() == (64, 1)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("batch,bias,limit", ((1, True, (0.0, math.inf)), (3, False, (0.01, 0.5))))
def test_a_prepared_step_is_the_three_kernels(batch: int, bias: bool, limit: tuple[float, float]) -> None:
    heads, head_dim, groups, state, width = 6, 5, 2, 7, 4
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state
    conv = torch.randn(batch, width - 1, channels).mT
    ssm = torch.randn(batch, heads, head_dim, state)
    weight, conv_bias = torch.randn(channels, width), torch.randn(channels) if bias else None
    A, D, dt_bias, norm = -torch.rand(heads), torch.randn(heads), torch.randn(heads), torch.randn(inner)
    others = [conv.mT.clone().mT, ssm.clone()]
    step = PreparedStep(conv, ssm, weight, conv_bias, A, D, dt_bias, limit, norm, 1e-5, groups)
    for _ in range(3):
        z, conv_in, dt = torch.randn(batch, inner + channels + heads).split((inner, channels, heads), -1)
        mixed = causal_conv1d_step(others[0], conv_in, weight, conv_bias)
        x, B, C = mixed.split((inner, groups * state, groups * state), -1)
        B, C = (part.view(batch, groups, state) for part in (B, C))
        options: dict[str, Any] = {"D": D, "dt_bias": dt_bias, "dt_softplus": True, "dt_limit": limit}
        y = state_update(others[1], x.view(batch, heads, head_dim), dt, A, B, C, **options)
        expected = gated_rms_norm(y.flatten(1), z, norm, 1e-5, groups)
        found = step(*(part.unsqueeze(1) for part in (z, conv_in, dt)))
        assert_close("y", expected, found.squeeze(1), 1e-6)
    assert_close("conv", others[0], conv, 0)
    assert_close("ssm", others[1], ssm, 1e-6)


def shipped() -> HybridLM:
    model = load_model(ZOO, torch.float32)
    lay_out(model)
    return model


def check_shipped(model: HybridLM, seeds: range) -> float:
    """The largest relative RMS error of the drawn batches; greedy tokens are equal in all."""
    worst = 0.0
    for seed in seeds:
        whole, found = mixed_batch(model, seed, 100, 8, pack=seed % 2 == 1)
        difference, size = (found - whole).square().sum((1, 2)), whole.square().sum((1, 2))
        worst = max(worst, float((difference / size).sqrt().max()))
        assert torch.equal(whole.argmax(-1), found.argmax(-1)), seed
    return worst


@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_logits_that_are_not_finite_are_said(temperature: float) -> None:
    model = random_model(tiny_config(vocab_size=97))
    model.head_weight.data[5] = torch.inf
    engine = Engine(model, max_length=16, slots=2)
    with pytest.raises(InputError, match="the logits are not finite"):
        engine.complete([Request([3, 4], 4, Sampling(temperature)), Request([3, 4, 5], 4)])
    with pytest.raises(InputError, match="the logits are not finite"):
        generate(model, torch.tensor([[3, 4]]), max_new_tokens=2, temperature=temperature)


@torch.no_grad()
def test_decode_equals_prefill_on_the_shipped_model() -> None:
    assert check_shipped(shipped(), range(20)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(10))
@torch.no_grad()
def test_decode_equals_prefill_on_the_shipped_model_a_thousand_times(hundred: int) -> None:
    """Half a minute each on one thread of a quiet machine."""
    worst = check_shipped(shipped(), range(100 * hundred, 100 * hundred + 100))
    print(f"largest relative RMS {worst:.2e}")
    assert worst <= 1e-5


@torch.no_grad()
def test_logits_hardly_move_with_the_batch() -> None:
    """A sequence's next logits alone, and in batches of 2, 3, 5 and 8, whose other members come and go."""
    model = shipped()
    cache = Cache(model.config, 8, 80)
    prompts = [torch.randint(3, 4096, (5 + 7 * row,)) for row in range(8)]
    for row, prompt in enumerate(prompts):
        fill(model, cache, row, prompt, [len(prompt)])
    states = [layer for layer in cache.layers if isinstance(layer, MambaState)]
    before = [(state.ssm.clone(), state.conv.clone()) for state in states]
    lengths = list(cache.lengths)
    decoder = Decoder(model, cache, pack=True)
    alone = None
    for batch in (1, 2, 3, 5, 8):
        logits = decoder.step([7] * batch)[0].clone()
        alone = logits if alone is None else alone
        assert_close(f"batch {batch}", alone, logits, 1e-6)
        cache.lengths[:] = lengths
        for state, (ssm, conv) in zip(states, before, strict=True):
            state.ssm.copy_(ssm)
            state.conv.copy_(conv)


@pytest.mark.parametrize("name", ("nemotron-nano-9b-v2", "qwen3-8b"))
@torch.no_grad()
def test_a_step_never_asks_the_host(name: str) -> None:
    """At full size on fake CUDA tensors, which have no values: whatever a CUDA graph could not capture because a number
    has to come back from the GPU would fail here."""
    config = model_config(name)
    model = HybridLM(config, device="meta", dtype=torch.bfloat16)
    with FakeTensorMode():
        for module in model.modules():
            for key, weight in module.named_parameters(recurse=False):
                fake = torch.empty(weight.shape, dtype=weight.dtype, device="cuda")
                module.register_parameter(key, nn.Parameter(fake, requires_grad=False))
        step = DecodingStep(model, Cache(config, 4, 1000, dtype=torch.bfloat16, device="cuda").rows(0, 3))
        logits = step.logits_of_loaded()
    assert logits.shape == (3, config.vocab_size) and logits.device.type == "cuda" and logits.dtype == torch.bfloat16


@pytest.mark.gpu
@torch.inference_mode()
def test_a_captured_step_is_the_step() -> None:
    """On a GPU: replayed graphs of two batch sizes beside steps without a graph; the capture moves no state."""
    model = HybridLM(tiny_config(head_dim=16), dtype=torch.float32, device="cuda").eval()
    initialize(model, torch.Generator("cuda").manual_seed(0), std=0.3)
    caches = [Cache(model.config, 3, 20, device="cuda") for _ in range(2)]
    decoders = [Decoder(model, cache, graphs=graphs) for cache, graphs in zip(caches, (True, False), strict=True)]
    for tokens in ([1, 2], [3, 4], [5, 6, 7], [8, 9], [1, 1, 1]):
        captured, plain = (decoder.step(tokens).clone() for decoder in decoders)
        assert_close("logits", plain, captured, 1e-6)


def greedy(model: HybridLM, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def run(engine: Engine, requests: list[Request], joins: dict[int, Request]) -> dict[int, Completion]:
    """Requests at once, others after so many steps."""
    found: dict[int, Completion] = {}
    for request in requests:
        found[engine.add(request)] = Completion()
    steps = 0
    while engine.busy or joins:
        if steps in joins:
            found[engine.add(joins.pop(steps))] = Completion()
        for event in engine.step():
            found[event.request].add(event)
        steps += 1
        assert steps < 1000
    return found


@pytest.mark.parametrize("slots,chunk", ((1, 4), (2, 3), (3, 100), (8, 5)))
def test_continuous_batching_writes_what_each_would_alone(slots: int, chunk: int) -> None:
    model = random_model(tiny_config())
    draw = random.Random(slots)
    requests = [
        Request([draw.randrange(97) for _ in range(draw.randint(1, 17))], draw.randint(1, 9), stop_tokens=())
        for _ in range(9)
    ]
    engine = Engine(model, max_length=30, slots=slots, prefill_chunk=chunk, ssm_dtype=torch.float64)
    found = run(engine, requests[:5], {3: requests[5], 4: requests[6], 11: requests[7], 40: requests[8]})
    assert len(found) == 9 and not engine.busy
    for request, completion in zip(requests, (found[number] for number in range(9)), strict=True):
        assert completion.tokens == greedy(model, list(request.prompt), request.max_new_tokens)
        assert completion.finished == "length"


def test_cancelled_requests_leave_the_others_alone() -> None:
    model = random_model(tiny_config())
    prompts = [[1, 2, 3], [4] * 9, [5, 6], [7] * 12]
    engine = Engine(model, max_length=40, slots=3, prefill_chunk=2, ssm_dtype=torch.float64)
    found = {engine.add(Request(prompt, 12, stop_tokens=())): Completion() for prompt in prompts}
    for step in range(200):
        if step == 8:  # the first decodes, the third reads
            engine.cancel(0)
        if step == 9:
            engine.cancel(99)
        for event in engine.step():
            found[event.request].add(event)
    assert 0 < len(found[0].tokens) < 12 and not engine.busy
    for number in (1, 2, 3):
        assert found[number].tokens == greedy(model, prompts[number], 12)


def test_a_seed_draws_the_same_whoever_shares_the_batch() -> None:
    model = random_model(tiny_config())
    sampling = Sampling(temperature=1.2, top_k=40, top_p=0.95, min_p=0.01, seed=5)
    mine = Request([1, 2, 3], 10, sampling, stop_tokens=())
    others = [Request([4] * length, 6, Sampling(0.8, seed=length), stop_tokens=()) for length in (1, 5, 9)]
    alone, again = (Engine(model, max_length=30, ssm_dtype=torch.float64).complete([mine])[0] for _ in range(2))
    shared = Engine(model, max_length=30, slots=3, ssm_dtype=torch.float64).complete([*others, mine])[-1]
    assert alone.tokens == again.tokens == shared.tokens
    other = Request([1, 2, 3], 10, Sampling(temperature=1.2, seed=6), stop_tokens=())
    assert Engine(model, max_length=30).complete([other])[0].tokens != alone.tokens


def test_log_probabilities_are_those_of_the_model() -> None:
    model = random_model(tiny_config())
    request = Request([1, 2, 3], 6, Sampling(temperature=2.0), stop_tokens=(), logprobs=True)
    found = Engine(model, max_length=20, ssm_dtype=torch.float64).complete([request])[0]
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3, *found.tokens]]))[0, 2:-1]
    expected = logits.log_softmax(-1)[torch.arange(6), torch.tensor(found.tokens)]
    assert_close("log-probabilities", expected, torch.tensor(found.logprobs, dtype=torch.float64), 1e-6)


def test_stop_tokens_end_a_request() -> None:
    model = random_model(tiny_config())
    tokens = greedy(model, [1, 2], 8)
    end = tokens[4]
    found = Engine(model, max_length=20).complete([Request([1, 2], 8, stop_tokens=(end,))])[0]
    assert found.finished == "stop" and found.tokens == tokens[: tokens.index(end) + 1]


def test_cuts_of_the_distribution() -> None:
    """Each of the cuts by hand, on four probabilities."""
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()

    def left(**options: Any) -> set[int]:
        probabilities, order = Sampling(1.0, **options).probabilities(logits)
        return set(order[probabilities > 0].tolist())

    assert left() == {0, 1, 2, 3}
    assert left(top_k=2) == {1, 3} and left(top_k=9) == {0, 1, 2, 3}
    assert left(top_p=0.5) == {1} and left(top_p=0.51) == {1, 3} and left(top_p=0.76) == {1, 2, 3}
    assert left(min_p=0.25) == {1, 2, 3} and left(min_p=0.5) == {1, 3}
    assert left(top_k=3, min_p=0.4) == {1, 3}


@pytest.mark.parametrize("temperature", (5e-324, 1e-310, 1e-45, 1e-39, 1e-37, 1e-30, 1e-6))
@pytest.mark.parametrize("cut", ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}))
def test_tiny_temperatures_tend_to_the_argmax(temperature: float, cut: dict[str, Any]) -> None:
    logits = torch.randn(97, generator=torch.Generator().manual_seed(0)) * 30
    for given in (logits, logits - 500, logits + 500, logits.bfloat16()):
        probabilities, order = Sampling(temperature, **cut).probabilities(given)
        assert order[0] == given.argmax() and probabilities[0] == 1 and not probabilities[1:].any()
        assert Sampler(Sampling(temperature, **cut), given.device)(given) == given.argmax()


def test_ordinary_temperatures_divide_first() -> None:
    """Bit for bit: seeded draws are what they were."""
    logits = torch.randn(997, generator=torch.Generator().manual_seed(0)) * 30
    for temperature in (0.3, 0.7, 1.0, 1.7):
        expected = (logits / temperature).sort(descending=True, stable=True).values.softmax(-1)
        assert torch.equal(Sampling(temperature).probabilities(logits)[0], expected)


@pytest.mark.parametrize(
    "wrong,says",
    (
        ({"prompt": []}, "empty"),
        ({"prompt": [97]}, "vocabulary"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": [1] * 20}, "make 25"),
        ({"stop": ("x",)}, "tokenizer"),
        ({"thinking_budget": 3}, "tokenizer"),
    ),
)
def test_wrong_requests(wrong: dict[str, Any], says: str) -> None:
    options: dict[str, Any] = {"prompt": [1, 2], "max_new_tokens": 5} | wrong
    with pytest.raises(InputError, match=says):
        Engine(random_model(tiny_config()), max_length=24).add(Request(**options))


def test_wrong_engines() -> None:
    model = random_model(tiny_config(max_position_embeddings=64))
    for options, says in (
        ({"slots": 0}, "slots"),
        ({"max_length": 65}, "maximum is 64"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"slots": 10**9}, "GiB"),
    ):
        with pytest.raises(InputError, match=says):
            Engine(model, **({"max_length": 64} | options))
    full = Cache(model.config, 2, 4)
    full.lengths = [4, 1]
    with pytest.raises(InputError, match="do not fit"):
        Decoder(model, full).step([1])


def test_events_are_plain() -> None:
    model = random_model(tiny_config())
    engine = Engine(model, max_length=20)
    engine.add(Request([1, 2], 1))
    assert list(engine.stream()) == [Event(0, greedy(model, [1, 2], 1)[0], "", None, "length")]
