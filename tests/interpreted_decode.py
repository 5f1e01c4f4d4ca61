"""Kernels of a decoding step in Triton's interpreter, and the step that they make; run as interpreted_ssm.py is."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from typing import Any

import pytest
import torch
from limbeck.kernels import launch
from limbeck.kernels.mamba_step import mamba_step, mamba_step_op, separate_step
from limbeck.kernels.norm import add_norm_op, add_rms_norm, rms_norm
from limbeck.models.generate.cache import Cache
from limbeck.models.generate.decode import Decoder, DecodingStep
from limbeck.models.generate.generate import prefill
from limbeck.models.hybrid import HybridLM
from limbeck.tests.helpers import assert_close, random_model, tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

assert os.environ.get("TRITON_INTERPRET") == "1", "run by tests/test_decode_triton.py"

VALUES = 1e-5
HALF = 3e-3  # float16 keeps 11 bits
NINE = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"  # Nemotron-Nano-9B-v2


class StepCase:
    """One drawn step; z, what the convolution reads and dt are slices of one tensor, as in_proj gives them."""

    def __init__(self, seed: int) -> None:
        draw, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        normal = self.normal
        self.groups = draw.choice((1, 1, 2, 3))
        heads, head_dim = self.groups * draw.choice((1, 2)), draw.choice((4, 5, 16, 24) if seed < 10 else (48, 80))
        state, self.width = draw.choice((8, 12, 32)), draw.choice((2, 3, 4))
        self.batch = min(draw.randint(1, 5), max(6 // heads, 1))  # the interpreter takes long for a program
        self.inner, self.channels = heads * head_dim, heads * head_dim + 2 * self.groups * state
        self.sizes = (self.inner, self.channels, heads)
        self.conv = normal(self.batch + 2, self.width - 1, self.channels).mT[1:-1]
        self.ssm = normal(self.batch + 2, heads, head_dim, state)[1:-1]
        self.weights = (
            normal(self.width, self.channels).mT,
            normal(self.channels) if draw.random() < 0.7 else None,
            -torch.exp(normal(heads)),
            normal(heads),
            normal(heads),
            1 + 0.1 * normal(self.inner) if draw.random() < 0.8 else None,
        )
        limit = draw.choice(((0.0, math.inf), (0.01, 0.5)))
        self.options = (*limit, 1e-5, draw.random() < 0.4)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def inputs(self) -> tuple[Tensor, ...]:
        return self.normal(self.batch, sum(self.sizes)).split(self.sizes, -1)

    def arrived(self) -> Tensor:
        return torch.zeros(self.batch, self.groups, dtype=torch.int32)


def check_step(case: StepCase, dtype: torch.dtype, state_dtype: torch.dtype, ratio: float) -> None:
    """Two steps equal those of the separate operators in float64, and rows beside the batch's stay as they are."""
    conv, ssm, arrived = case.conv.to(dtype), case.ssm.to(state_dtype), case.arrived()
    exact: list[Tensor] = [conv.double(), ssm.double()]
    weights = [None if weight is None else weight.to(dtype) for weight in case.weights]
    wide = [None if weight is None else weight.double() for weight in weights]
    for _ in range(2):
        rows = [each.to(dtype) for each in case.inputs()]
        expected = separate_step(*exact, arrived, *(each.double() for each in rows), *wide, *case.options)
        found = mamba_step(conv, ssm, arrived, *rows, *weights, *case.options)
        assert found.dtype == dtype and not arrived.any()
        assert_close("y", expected, found, ratio)
    assert_close("conv", exact[0], conv, 0)
    assert_close("ssm", exact[1], ssm, ratio)


@pytest.fixture
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the cases norm wider groups than the last program has in registers at a time."""
    if request.getfixturevalue("seed") % 2:
        monkeypatch.setattr(launch.triton_module("mamba_step_triton"), "MOST_NORMED", 8)


@pytest.mark.parametrize("seed", range(6))
def test_step(seed: int, narrow: None) -> None:
    check_step(StepCase(seed), torch.float32, torch.float32, VALUES)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 100))
def test_step_many(seed: int, narrow: None) -> None:
    check_step(StepCase(seed), torch.float32, torch.float32, VALUES)


@pytest.mark.parametrize(("seed", "state"), ((1, torch.float32), (2, torch.float16)))
def test_step_in_float16(seed: int, state: torch.dtype) -> None:
    check_step(StepCase(seed), torch.float16, state, HALF)


def test_rows_of_nan_stay_alone() -> None:
    """A row whose states and inputs are NaN leaves the other's answer and states as they are alone, bit for bit."""
    case = StepCase(3)
    rows = case.inputs()
    outputs = []
    for poisoned in (False, True):
        conv, ssm, inputs, arrived = (
            case.conv.clone(),
            case.ssm.clone(),
            [each.clone() for each in rows],
            case.arrived(),
        )
        for tensor in (conv, ssm, *inputs) if poisoned else ():
            tensor[1::2] = torch.nan
        y = mamba_step(conv, ssm, arrived, *inputs, *case.weights, *case.options)
        assert bool(y[1].isnan().all()) == poisoned and not arrived.any()
        outputs.append([tensor[::2] for tensor in (y, conv, ssm)])
    for clean, beside in zip(*outputs, strict=True):
        assert torch.equal(clean, beside)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("size", (5, 48, 2100))
def test_sum_and_norm_are_both_of_them(size: int, dtype: torch.dtype) -> None:
    """The sum is the rounded one that stands by itself, and its norm the norm's, bit for bit."""
    x, more, weight = torch.randn(3, 1, size).to(dtype), torch.randn(3, 1, 2 * size).to(dtype), torch.randn(size)
    added, weight = more[..., size:], weight.to(dtype)
    total = x + added
    assert torch.equal(add_rms_norm(x, added, weight, 1e-5), rms_norm(total, weight, 1e-5))
    assert torch.equal(x, total)
    with pytest.raises(ValueError, match="add_rms_norm: x, added and weight have the shapes"):
        add_rms_norm(x, added[:2], weight, 1e-5)


def decoded(model: HybridLM, ids: Tensor, prompt: int) -> Tensor:
    """Logits of the tokens after a prompt, step by step, [B, T - prompt, V]."""
    cache = Cache(model.config, *ids.shape)
    prefill(model, ids[:, :prompt], cache, 4)
    decoder = Decoder(model, cache, graphs=False)
    return torch.stack([decoder.step(token).clone() for token in ids[:, prompt:].T], 1)


CONFIGS = {
    "hybrid": tiny_config(pattern="M*-", mamba_num_heads=2, vocab_size=23),
    "parallel, norm first": tiny_config(pattern="P-", mamba_num_heads=2, vocab_size=23, norm_before_gate=True),
}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_decoding_is_the_full_forward(name: str) -> None:
    """The states that a step leaves are those that a prefill leaves: steps after one, and a prefill after steps."""
    model, ids = random_model(CONFIGS[name], dtype=torch.float32), torch.randint(23, (2, 7))
    exact = random_model(CONFIGS[name])
    exact.load_state_dict(model.state_dict())
    expected = exact(ids)
    assert_close("logits", expected[:, 4:], decoded(model, ids, 4).double(), 1e-5)
    cache = Cache(model.config, 2, 7)
    prefill(model, ids[:, :3], cache, 8)
    decoder = Decoder(model, cache, graphs=False)
    decoder.step(ids[:, 3])
    decoder.step(ids[:, 4])
    assert_close("prefill after steps", expected[:, -1], prefill(model, ids[:, 5:], cache, 8).double(), 1e-5)


class Launches(TorchDispatchMode):
    """The kernels that a GPU would run: those of Triton by name, and torch's operators but for views and new memory."""

    FREE = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::lift_fresh")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        enqueue = launch.Launch.enqueue

        def counted(one: launch.Launch, on: Tensor) -> None:
            self.names[one.kernel.__name__] += 1
            enqueue(one, on)

        monkeypatch.setattr(launch.Launch, "enqueue", counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not func.name().startswith(("limbeck::", *self.FREE)):
            self.names[func.name()] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_launches_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 9B's layers, narrow: 4 a Mamba-2 layer or MLP, 9 an attention layer, and 7 outside of them."""
    assert [NINE.count(letter) for letter in "M-*"] == [27, 25, 4]
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 9, "head_dim": 2}
    sizes |= {"mamba_num_heads": 1, "mamba_head_dim": 4, "n_groups": 1, "ssm_state_size": 4}
    model = random_model(tiny_config(pattern=NINE, **sizes), dtype=torch.float32)
    step = DecodingStep(model, Cache(model.config, 1, 4))
    step([1], [0])  # makes what all steps share
    with Launches(monkeypatch) as launches:
        step.logits_of_loaded()
    ours = {"mamba_step": 27, "norm_forward": 57, "relu2_forward": 25, "decode_parts": 4, "decode_join": 4}
    assert {name: count for name, count in launches.names.items() if "::" not in name} == ours
    assert launches.names.total() == 27 * 4 + 25 * 4 + 4 * 9 + 7, launches.names


def test_opcheck() -> None:
    """Schema, fake tensors and autograd of the operators with the Triton kernels in them."""
    torch.use_deterministic_algorithms(False)  # opcheck compares with memory that it leaves unwritten
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    case = StepCase(2)
    step = (case.conv, case.ssm, case.arrived(), *case.inputs(), *case.weights, *case.options)
    torch.library.opcheck(mamba_step_op, step, test_utils=utilities)
    torch.library.opcheck(
        add_norm_op, (torch.randn(2, 5), torch.randn(2, 5), torch.randn(5), 1e-5), test_utils=utilities
    )
