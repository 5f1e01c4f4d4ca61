"""What a config costs: counts beside the table of axes, and tokens a second by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill.report.exported import ExportForm
from limbeck.models.axes import tensor_table
from limbeck.models.checkpoint import Checkpoint, open_checkpoint, save_model
from limbeck.models.cost.hardware import Hardware
from limbeck.models.cost.inference import memory
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.cost.ranks import rank_counts
from limbeck.models.cost.speed import flops_per_token, throughput
from limbeck.models.cost.stored_weights import of_checkpoint, whole_counts
from limbeck.models.errors import InputError
from limbeck.models.stored import StoredPlace
from limbeck.scripts.run.resolve import model_config
from limbeck.tests.gguf_helpers import gguf_config
from limbeck.tests.helpers import random_config, random_model, tiny_config

A10G = Hardware("a10g", 22.49, 22.06, 600, 70)


NOWHERE = Hardware("none", 1, 1, 0, 0)


LARGE, SMALL = model_config("nemotron-nano-12b-v2"), model_config("nemotron-nano-9b-v2")


@pytest.mark.parametrize("seed", range(40))
def test_counts_are_the_tables(seed: int) -> None:
    config = random_config(seed)
    table = tensor_table(config).values()
    assert count_parameters(config) == sum(tensor.numel for tensor in table)
    matrices = sum(tensor.numel for tensor in table if len(tensor.shape) == 2)
    if not config.tie_word_embeddings:
        matrices -= config.vocab_size * config.hidden_size
    attention = config.pattern.count("*") * config.num_attention_heads * config.head_dim * 10
    if "M" not in config.pattern:
        assert flops_per_token(config, 10) == 2 * (matrices + attention)
    else:
        assert flops_per_token(config, 10) > 2 * (matrices + attention)


def test_throughput_by_hand() -> None:
    """One MLP layer: a prefill of 100 tokens bound by FLOPs, a step bound by bytes."""
    config = tiny_config(pattern="-", vocab_size=10, hidden_size=8, intermediate_size=16)
    card = Hardware("toy", 1, 1, 1e-6, 1e-9)  # 1,000 bytes/s, 1,000 FLOP/s
    options: dict[str, Any] = {"compute_efficiency": 0.5, "bandwidth_efficiency": 0.25}
    found = throughput(config, card, input_tokens=100, output_tokens=10, batch=2, **options)
    layer, head, norms = 2 * 8 * 16, 10 * 8, 2 * 8
    prefill = 2 * (100 * 2 * layer + 2 * head) / 500
    step = max(2 * 2 * (layer + head) / 500, 2 * (layer + head + norms) / 250)
    assert found is not None and found.batch == 2
    assert found.prefill_seconds == pytest.approx(prefill) and found.step_seconds == pytest.approx(step)
    assert found.tokens_per_second == pytest.approx(20 / (prefill + 10 * step))


def test_throughput_of_the_published_9b() -> None:
    """arXiv 2508.14444: 156.42 tokens/s at 8k in, 16k out, batch 8 on an A10G."""
    found = throughput(SMALL, A10G, input_tokens=8192, output_tokens=16384, batch=8)
    assert found is not None and found.tokens_per_second == pytest.approx(156.42, rel=0.02)
    budget = A10G.budget(0.05, 1.3, 0.6)
    largest = throughput(SMALL, A10G, input_tokens=8192, output_tokens=16384, budget=budget)
    assert largest is not None
    assert memory(SMALL, 24576, largest.batch).total <= budget < memory(SMALL, 24576, largest.batch + 1).total
    assert throughput(LARGE, A10G, input_tokens=8192, output_tokens=16384, budget=budget) is None
    assert throughput(SMALL, NOWHERE, input_tokens=8, output_tokens=8, batch=1) is None


@pytest.mark.parametrize(
    "wrong",
    (
        {"input_tokens": 0},
        {"output_tokens": 0},
        {"batch": 0},
        {"compute_efficiency": 0.0},
        {"bandwidth_efficiency": 1.5},
        {"batch": None},
    ),
)
def test_throughput_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="throughput"):
        throughput(tiny_config(), A10G, **({"input_tokens": 8, "output_tokens": 8, "batch": 1} | wrong))


def test_numbers_of_gpus_that_are_named_work(tmp_path: Path) -> None:
    """Groups of 32 columns in 96: of the four numbers of GPUs that share the model out, two cut a group."""
    pytest.importorskip("compressed_tensors")
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32}
    config = gguf_config("llama", 256, pattern="*-", intermediate_size=768, **sizes)
    save_model(random_model(config, 0, torch.float32), tmp_path / "model")
    form = ExportForm("w4a16", "bfloat16", None, 8, 0)
    (tmp_path / "out").mkdir()
    form.write(tmp_path / "out", tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "out")
    refused, works = list[int](), list[int]()
    for count in rank_counts(config):
        try:
            of_checkpoint(checkpoint, torch.bfloat16, count)
            works.append(count)
        except InputError as error:
            refused.append(count)
            assert str(error).endswith(f"whole ones: {', '.join(map(str, whole_counts(config, places(checkpoint))))}")
    assert refused and works == whole_counts(config, places(checkpoint)) and len(works) > 1


def places(checkpoint: Checkpoint) -> dict[str, StoredPlace]:
    return {name: place for stored in checkpoint.stored.values() for name, place in stored.places.items()}
