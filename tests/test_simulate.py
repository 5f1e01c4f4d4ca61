"""The simulation counts what it should, the estimate is the simulation's, and both are a measured run's."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from limbeck.benchmarks import memory as benchmark
from limbeck.benchmarks.published import PUBLISHED
from limbeck.kernels.attention import cpu_workspace, decode_workspace, flash_workspace
from limbeck.models.config import HybridConfig
from limbeck.models.cost import trace
from limbeck.models.cost.hardware import Place, libraries, round_up
from limbeck.models.cost.inference import memory, verdict
from limbeck.models.cost.peak import check_memory, measure, random_model
from limbeck.models.cost.simulate import Simulation, Stand, Tracker, picked, simulate
from limbeck.models.errors import CheckFailed, InputError
from limbeck.models.generate.cache import Cache
from limbeck.models.generate.decode import DecodingStep
from limbeck.models.generate.generate import prefill
from limbeck.models.hybrid import HybridLM
from limbeck.models.mamba2 import MambaState
from limbeck.scripts.run.resolve import model_config
from limbeck.tests.helpers import any_config, tiny_config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

A10G, CPU = Place("cuda", 80, "8.6"), Place("cpu", 1)
SMALL = PUBLISHED["nemotron-nano-9b-v2"]


@contextlib.contextmanager
def counted_runs() -> Iterator[list[trace.Traced]]:
    """What is run on tensors without memory meanwhile."""
    runs: list[trace.Traced] = []
    running = trace.running

    def noted(traced: trace.Traced) -> Any:
        runs.append(traced)
        return running(traced)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "running", noted)
        yield runs


def both(config: HybridConfig, context: int, batch: int, **options: Any) -> tuple[int, Simulation]:
    """What comes and goes: bytes by the estimate, and the simulation."""
    place = options.get("place", A10G)
    report = memory(config, context, batch, **options)
    return report.transient + libraries(place, context), simulate(config, context, batch, **options)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_those_of_conf(name: str) -> None:
    assert model_config(name) == PUBLISHED[name]


def test_tracker_counts_what_lives() -> None:
    """By hand: 1000 floats are 4096 bytes in blocks of 512; views are free, and what is dropped is gone."""
    tracker = Tracker(A10G)
    with FakeTensorMode(), tracker:
        a = torch.empty(1000, device="cuda")
        assert tracker.now == 4096
        tracker.begin()
        b = a.view(10, 100)
        assert tracker.now == tracker.peak.bytes == 4096
        c = b + 1
        assert tracker.now == 8192
        d = c.to(torch.bfloat16)
        assert tracker.now == 10240 and torch.empty(3).numel() == 3  # what lies on the CPU does not count
        del c, d
        assert tracker.now == 4096
        a += 1
        assert tracker.now == 4096 and tracker.peak.bytes == 10240 and "_to_copy" in str(tracker.peak.operator)
        assert sorted(live.size for live in tracker.peak.live) == [2048, 4096]
        del a, b
        assert tracker.now == 0


ROWS, COLUMNS = torch.tensor([0, 2]), torch.tensor([3, 1])
INDICES: tuple[Any, ...] = (
    0, -1, slice(1, 3), slice(None, None, 2), None, ..., (..., 0), (slice(None), 1), (0, ..., None),
    (None, ..., -1, None), (slice(None), ROWS), (ROWS,), (0, slice(None), COLUMNS), (0, 1, 2),
)  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_stand_in_indexes_as_torch(index: Any) -> None:
    tensor = torch.arange(60).view(3, 4, 5)
    assert torch.equal(picked(tensor, index), tensor[index])
    wanted, found = tensor.clone(), tensor.clone()
    wanted[index] = 7
    with Stand():
        assert torch.equal(found[index], tensor[index])
        found[index] = torch.tensor(7)
    assert torch.equal(found, wanted)


def test_workspaces_by_hand() -> None:
    """One sequence, 8 groups: 160 programs wanted of 80 multiprocessors, 20 shares, up to 32. FlashAttention: 48 blocks
    on 108 slots are shared in two (0.89 busy), 320 blocks not at all."""
    assert decode_workspace(1, 40, 8, 128, 80) == (4 * 40 * 32 * 128, 4 * 40 * 32)
    assert flash_workspace(1, 48, 64, 8192, 128, 54) == (4 * 2 * 48 * 64 * 128, 4 * 2 * 48 * 64)
    assert flash_workspace(1, 40, 512, 131072, 128, 132) == (0, 0)
    assert cpu_workspace(512, 1000, 32, 1) == (4 * 64 * (512 + 2 + 32),)


@pytest.mark.parametrize("seed", [*range(6), *range(50, 52)])
@pytest.mark.parametrize("place", [A10G, CPU], ids=["cuda", "cpu"])
def test_estimate_is_the_simulation(seed: int, place: Place) -> None:
    """One layer of each kind tells what comes and goes in all of them, to the byte, on any config."""
    draw = random.Random(seed)
    config = any_config(seed)
    if place.device == "cuda" and config.head_dim % 8:  # FlashAttention's heads are multiples of 8
        config = config.replace(head_dim=8)
    weight = torch.bfloat16 if place.device == "cuda" else torch.float32
    context, batch, chunk = draw.choice((1, 2, 9, 40)), draw.choice((1, 3, 8)), draw.choice((1, 5, 16, 64))
    requested = {"weight_dtype": weight, "ssm_dtype": draw.choice((torch.float32, torch.bfloat16))}
    estimate, found = both(config, context, batch, chunk=chunk, place=place, **requested)
    assert estimate == found.transient, found


@pytest.mark.parametrize(("context", "batch", "state"), [(131072, 1, torch.float32), (8192, 64, torch.bfloat16)])
def test_estimate_at_the_published_widths(context: int, batch: int, state: torch.dtype) -> None:
    """The first layers of the 9B, every kind among them: what comes and goes to the byte, since no layer adds any."""
    config = SMALL.replace(pattern="M-M*")
    estimate, found = both(config, context, batch, ssm_dtype=state, place=A10G)
    assert estimate == found.transient and found.letter == "M"
    assert memory(SMALL, context, batch, ssm_dtype=state, place=A10G).activations == found.transient - libraries(
        A10G, context
    )
    report = memory(config, context, batch, ssm_dtype=state)
    assert found.caches == report.total - report.weights and found.prompt == round_up(report.prompt, A10G)
    assert found.weights == pytest.approx(report.weights, rel=1e-5)


TINY = tiny_config(pattern="M-*M", head_dim=8, rope_theta=1e4)


@pytest.mark.parametrize(
    ("config", "place"),
    [
        pytest.param(TINY, A10G, id="tiny-cuda"),
        pytest.param(SMALL, CPU, id="9B-cpu"),
        pytest.param(TINY, CPU, id="tiny-cpu", marks=pytest.mark.slow),
        pytest.param(SMALL, A10G, id="9B-cuda", marks=pytest.mark.slow),
    ],
)
def test_what_is_not_run_is_exact(config: HybridConfig, place: Place) -> None:
    """The highest moments by the past, of which few are run: every one is what running it gives."""
    traced = trace.Traced(trace.alike(config), 2 if place.device == "cuda" else 4, 4, place, 3)
    pasts = [0, 100000, 400, 40100, 17, 999, 600, 51300, 800, *range(70000, 70010)]
    for made in (trace.chunk_peaks(traced, 16), trace.chunk_peaks(traced, 300), trace.decode_peaks(traced)):
        growth = trace.Growth(made.run)
        assert [growth.at(past) for past in pasts] == [made.run(past).bytes for past in pasts]


def test_few_are_run() -> None:
    """A verdict looks at many contexts and batches of the 9B, and runs its layers for few of them."""
    report = memory(SMALL, 32768, 2, place=A10G)
    with counted_runs() as runs:
        verdict(SMALL, report, 1.2 * report.peak)
    assert 0 < len(runs) < 60


@pytest.mark.slow
@pytest.mark.parametrize("context", [1024, 8192, 65536, 131072, 524288])
@pytest.mark.parametrize("name", ["nemotron-nano-9b-v2", "nemotron-nano-12b-v2"])
def test_estimate_at_full_size(name: str, context: int) -> None:
    for batch, state in itertools.product((1, 8, 64), (torch.float32, torch.bfloat16)):
        peak = memory(PUBLISHED[name], context, batch, ssm_dtype=state, place=A10G).peak
        assert peak == pytest.approx(
            simulate(PUBLISHED[name], context, batch, ssm_dtype=state, place=A10G).peak, rel=1e-5
        )


def shipped() -> HybridLM:
    from limbeck.models.checkpoint import load_model
    from limbeck.scripts.run.resolve import ZOO

    return load_model(ZOO, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("context", "batch", "chunk", "state"),
    [(82, 2, 80, torch.float32), (600, 2, 60, torch.float32), (2, 33, 8, torch.bfloat16)],
)
def test_a_measured_run_of_the_shipped_model(context: int, batch: int, chunk: int, state: torch.dtype) -> None:
    """Every allocation of a CPU against estimate and simulation: within 2%, and what comes and goes within 5%. The
    second would copy keys and values if decoding two rows did."""
    model = shipped()
    options: dict[str, Any] = {"chunk": chunk, "weight_dtype": torch.float32, "ssm_dtype": state, "place": CPU}
    run = measure(model, context, batch, chunk=chunk, ssm_dtype=state)
    report = memory(model.config, context, batch, **options)
    assert run.peak == pytest.approx(report.peak, rel=0.02)
    assert run.peak - report.total == pytest.approx(report.prompt + report.transient, rel=0.05)
    if context < 500:  # many chunks take the simulation long
        assert run.peak == pytest.approx(simulate(model.config, context, batch, **options).peak, rel=0.02)


def test_inference_keeps_no_state_of_a_chunk() -> None:
    """Weights that want gradients, as a folder's do, make no difference without gradients: 64 chunks, one state."""
    config = tiny_config(pattern="M", mamba_num_heads=2, mamba_head_dim=32, ssm_state_size=64, chunk_size=1)
    model = random_model(config, torch.float32, torch.device("cpu"))
    quiet = measure(model, 65, chunk=64)
    assert measure(model.requires_grad_(True), 65, chunk=64).peak == quiet.peak


def test_a_warm_up_moves_no_state() -> None:
    """The runs before a graph's capture give the step's logits, and leave the caches' states as they were."""
    model = random_model(tiny_config(), torch.float32, torch.device("cpu"))
    cache = Cache(model.config, 2, 9)
    prefill(model, torch.arange(10).view(2, 5), cache, 3)
    step = DecodingStep(model, cache)
    states = [state for state in cache.layers if isinstance(state, MambaState)]
    before = [tensor.clone() for state in states for tensor in (state.ssm, state.conv)]
    step.load([3, 4], cache.lengths)
    with torch.no_grad():
        with step.unmoved():
            warm, warmer, warmest = (step.logits_of_loaded().clone() for _ in range(3))
        assert torch.equal(warm, warmer) and torch.equal(warm, warmest)
        found = [tensor for state in states for tensor in (state.ssm, state.conv)]
        assert all(torch.equal(old, new) for old, new in zip(before, found, strict=True))
        assert torch.equal(warm, step.logits_of_loaded()) and not torch.equal(before[0], found[0])


def test_simulation_says_where_its_peak_is() -> None:
    config = tiny_config(pattern="M-*", intermediate_size=4000)
    found = simulate(config, 64, 2, chunk=16, place=A10G)
    assert (found.layer, found.letter) == (1, "-") and found.phase.startswith("prefill")
    assert found.largest[0][1][-1] == 4000 and found.peak > sum(size for _, _, size in found.largest)
    wide = simulate(tiny_config(vocab_size=5000), 2, 64, place=A10G)
    assert wide.layer is None and wide.phase == "decode"


def test_refusals() -> None:
    with pytest.raises(InputError, match="bfloat16"):
        simulate(tiny_config(), 8, weight_dtype=torch.float32)
    for wrong in ((0, 1, 8), (8, 0, 8), (8, 1, 0)):
        with pytest.raises(InputError, match="at least 1"):
            simulate(tiny_config(), *wrong[:2], chunk=wrong[2])
    with pytest.raises(CheckFailed, match="nothing was allocated"):
        check_memory(tiny_config(), 2**30, torch.device("cpu"), 2**20)
    with pytest.raises(InputError, match="nothing was allocated"):
        check_memory(tiny_config(), 2**60, torch.device("cpu"), None)
    model = random_model(tiny_config(), torch.float32, torch.device("cpu"))
    assert isinstance(model.head_weight, nn.Parameter) and not model.head_weight.requires_grad
    with pytest.raises(InputError, match="leave no prompt"):
        measure(model, 4, steps=4)


@pytest.mark.slow
def test_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--short"]) == 0
    text = capsys.readouterr().out
    assert "nemotron-nano-9b-v2 at 131,072 x 1: floor 18.689 GiB" in text and ": fits 19.657 GiB" in text
    assert "nemotron-nano-12b-v2 at 131,072 x 1: floor 26.068 GiB" in text and ": does not fit" in text
