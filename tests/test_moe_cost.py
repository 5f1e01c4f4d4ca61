"""What models of experts cost: published counts, active parameters, memory as simulated, bytes read by a step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from limbeck.models.axes import tensor_table
from limbeck.models.checkpoint import save_model
from limbeck.models.config import HybridConfig
from limbeck.models.cost.hardware import Hardware, Place
from limbeck.models.cost.inference import memory
from limbeck.models.cost.parameters import count_active, count_parameters, num_tensors, unused, weight_bytes
from limbeck.models.cost.peak import measure
from limbeck.models.cost.simulate import simulate
from limbeck.models.cost.speed import flops_per_token, throughput, weights_read
from limbeck.models.families.family import stored_tensors
from limbeck.models.hybrid import HybridLM
from limbeck.scripts.run.resolve import model_config
from limbeck.tests.helpers import limbeck, moe_config, random_model

NANO, SUPER = model_config("nemotron-3-nano-30b-a3b"), model_config("nemotron-3-super-120b-a12b")
# Widths of the published report; the order of its layers is not in it, and does not matter to a count.
ULTRA = SUPER.replace(
    pattern="M" * 48 + "E" * 48 + "*" * 12, hidden_size=8192, num_attention_heads=64, mamba_num_heads=256,
    moe_intermediate_size=5120, moe_shared_expert_intermediate_size=10240, moe_latent_size=2048,
)  # fmt: skip
A10G = Place("cuda", 80, "8.6")


@pytest.mark.parametrize(
    ("config", "parameters", "active"),
    (
        (NANO, 31_577_937_344, 3_580_073_408),
        (SUPER, 120_668_687_360, 12_770_216_960),
        (ULTRA, 549_308_968_960, 56_058_818_560),
        (model_config("nemotron-3-nano-4b"), 3_973_556_832, 3_973_556_832),
    ),
    ids=("nano", "super", "ultra", "4b"),
)
def test_published_counts(config: HybridConfig, parameters: int, active: int) -> None:
    assert (count_parameters(config), count_active(config)) == (parameters, active)


def test_the_cut_that_is_published() -> None:
    """NVIDIA's own: 31.58B to 22.28B, 3.58B active to 3.00B."""
    cut = NANO.replace(hidden_size=2304, n_routed_experts=104, moe_shared_expert_intermediate_size=3072)
    assert count_parameters(cut) == 22_276_865_600
    assert round(count_active(cut) / 1e9, 2) == 3.00


def test_tensors_are_those_of_the_hub() -> None:
    stored = stored_tensors(NANO)
    assert num_tensors(NANO) == len(stored) == 6243
    assert stored["backbone.layers.1.mixer.experts.127.up_proj.weight"].shape == (1856, 2688)
    assert stored["backbone.layers.51.mixer.gate.e_score_correction_bias"].shape == (128,)
    latent = stored_tensors(SUPER)
    assert latent["backbone.layers.1.mixer.experts.511.down_proj.weight"].shape == (1024, 2688)
    assert latent["backbone.layers.1.mixer.fc2_latent_proj.weight"].shape == (4096, 1024)


@pytest.mark.parametrize(("context", "batch"), ((8192, 1), (600, 4), (1, 2)))
def test_memory_of_the_30b_is_its_simulation(context: int, batch: int) -> None:
    found = simulate(NANO, context, batch, place=A10G).peak
    assert memory(NANO, context, batch, place=A10G).peak == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("latent", (0, 32))
def test_memory_is_a_measured_runs(latent: int) -> None:
    config = moe_config(hidden_size=64, moe_intermediate_size=96, vocab_size=512, moe_latent_size=latent, chunk_size=64)
    model = random_model(config, dtype=torch.float32)
    options: dict[str, Any] = {"chunk": 150, "weight_dtype": torch.float32, "place": Place("cpu", 1)}
    run = measure(model, 300, 2, chunk=150)
    report = memory(config, 300, 2, **options)
    assert run.peak == pytest.approx(report.peak, rel=0.02)
    assert run.peak == pytest.approx(simulate(config, 300, 2, **options).peak, rel=0.02)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_bytes_are_the_models(dtype: torch.dtype) -> None:
    """A router is float32 in any of them, and its bias, which is no parameter, is there as well."""
    config = moe_config()
    model = HybridLM(config, device="meta", dtype=dtype)
    assert weight_bytes(config, dtype) == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert count_parameters(config) == sum(weight.numel() for weight in model.parameters())


def test_work_is_that_of_the_chosen() -> None:
    """By hand, of two layers of experts: router, two of six experts, the shared one, the head."""
    config = moe_config(pattern="EE")
    experts, shared, router = 2 * 2 * 32 * 12, 2 * 32 * 20, 6 * 32
    assert flops_per_token(config, 10) == 2 * (2 * (experts + shared + router) + 97 * 32)
    matrices = 2 * (3 * experts + shared + router)
    assert count_parameters(config) - count_active(config) == 2 * 2 * experts
    assert sum(spec.numel for spec in tensor_table(config).values() if len(spec.shape) > 1) == matrices + 2 * 97 * 32


def test_a_step_reads_the_experts_that_are_chosen() -> None:
    """A batch of b tokens leaves an expert with probability (1 - 2 / 6)^b: by counting all choices of two tokens."""
    config, pairs = moe_config(pattern="E"), list(itertools.combinations(range(6), 2))
    numbers = [len({*one, *other}) for one in pairs for other in pairs]
    one_expert = 2 * 32 * 12
    assert unused(config, 2) == pytest.approx((6 - sum(numbers) / len(numbers)) * one_expert)
    read = weights_read(config, torch.float32, 2)
    assert read == pytest.approx(weight_bytes(config, torch.float32) - 4 * (97 * 32 + unused(config, 2)))
    slow = Hardware("toy", 1, 1, 1e-6, 1e3)  # 1,000 bytes/s, and no limit of FLOPs to speak of
    options: dict[str, Any] = {"bandwidth_efficiency": 1.0, "weight_dtype": torch.float32}
    found = throughput(config, slow, input_tokens=1000, output_tokens=4, batch=2, **options)
    assert found is not None and found.step_seconds == pytest.approx(read / 1000)
    assert found.prefill_seconds == pytest.approx((weight_bytes(config, torch.float32) - 4 * 97 * 32) / 1000)
    # Nano at batch 1 reads less than an eighth of its weights.
    assert weights_read(NANO, torch.bfloat16, 1) < weight_bytes(NANO, torch.bfloat16) / 8


@pytest.mark.slow
def test_commands_take_it(tmp_path: Any) -> None:
    words = ["model=nemotron-3-nano-30b-a3b", "hardware=h100", f"output={tmp_path / 'fit'}", "fit.context=8192"]
    code, out, err = limbeck("memory-fit", *words)
    assert code in (0, 3) and "59.0" in out, (out, err)  # GiB of weights in bfloat16
    save_model(random_model(moe_config(), dtype=torch.float32), tmp_path / "model")
    code, _, err = limbeck(
        "memory-fit", f"model={tmp_path / 'model'}", f"output={tmp_path / 'small'}", "fit.context=64"
    )
    assert code == 0, err
