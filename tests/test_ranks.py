"""What a GPU holds where vLLM shares a model out: beside shards that a rule written out here cuts, tensor by tensor,
and vLLM's formulas for states and caches; the models of the shards, added up, compute what the whole does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from limbeck.models.axes import Role, tensor_table
from limbeck.models.checkpoint import Checkpoint, open_checkpoint, save_model
from limbeck.models.config import HybridConfig
from limbeck.models.cost.fit import Fit
from limbeck.models.cost.hardware import Hardware
from limbeck.models.cost.inference import memory
from limbeck.models.cost.parameters import count_parameters, weight_bytes
from limbeck.models.cost.ranks import rank_config, rank_counts
from limbeck.models.cost.speed import throughput
from limbeck.models.cost.stored_weights import of_checkpoint
from limbeck.models.cost.tables import speed_sentence
from limbeck.models.hybrid import HybridLM
from limbeck.models.layer import Context
from limbeck.models.named import model_config, names, read_hardware
from limbeck.tests.helpers import EXPERTS, any_config, assert_close, limbeck, moe_config, random_model, tiny_config
from torch import Tensor

SMALL, LARGE = model_config("nemotron-nano-9b-v2"), model_config("nemotron-nano-12b-v2")
WIDE = {"vocab_size": 70, "mamba_num_heads": 8, "n_groups": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
        "intermediate_size": 48}  # fmt: skip
CASES = [(any_config(seed), count) for seed in (*range(12), 50, 51, 53, 57) for count in rank_counts(any_config(seed))]
CASES += [(tiny_config(**WIDE), 2), (tiny_config(**WIDE), 4), (tiny_config(**WIDE | {"n_groups": 1}), 8)]
CASES += [(moe_config(**WIDE), 4), (moe_config(**WIDE | {"mtp_pattern": "*E", "mtp_steps": 1}), 2)]


def shard(part: str, whole: Tensor, config: HybridConfig, rank: int, ranks: int) -> Tensor:
    """A rank's share of a tensor, by the tensor's name within its layer."""
    c = config

    def even(tensor: Tensor, dim: int = 0) -> Tensor:
        assert tensor.shape[dim] % ranks == 0
        return tensor.chunk(ranks, dim)[rank]

    def units(tensor: Tensor, count: int) -> Tensor:
        """Of `count` units of rows, of which there may be fewer than ranks: then each is copied."""
        blocks = tensor.unflatten(0, (count, -1))
        return (even(blocks) if count >= ranks else blocks[rank * count // ranks][None]).flatten(0, 1)

    def channels(tensor: Tensor) -> list[Tensor]:
        x, b, c_ = tensor.split((c.d_inner, c.n_groups * c.ssm_state_size, c.n_groups * c.ssm_state_size))
        return [even(x), units(b, c.n_groups), units(c_, c.n_groups)]

    name = re.sub(r"^(mixer\.)?(mamba\.|attention\.|shared_experts\.)?", "", part)
    if part in ("embeddings.weight", "lm_head.weight"):
        return even(torch.cat([whole, whole.new_zeros(-len(whole) % 64, whole.shape[1])]))
    if name == "in_proj.weight":
        z, conv, dt = whole.split((c.d_inner, c.conv_dim, c.mamba_num_heads))
        return torch.cat([even(z), *channels(conv), even(dt)])
    if name in ("conv1d.weight", "conv1d.bias"):
        return torch.cat(channels(whole))
    if name in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
        return units(whole, c.num_key_value_heads)
    if name in ("A_log", "D", "dt_bias", "q_proj.weight", "q_proj.bias", "up_proj.weight", "up_proj.bias",
                "gate_proj.weight", "gate_proj.bias") or part.endswith("mixer.norm.weight"):  # fmt: skip
        return even(whole)
    if name in ("out_proj.weight", "o_proj.weight", "down_proj.weight"):
        return even(whole, 1)
    if name in ("experts.up_proj", "experts.gate_proj"):
        return even(whole, 1)
    if name == "experts.down_proj":
        return even(whole, 2)
    assert name in ("norm.weight", "norm_f.weight", "q_norm.weight", "k_norm.weight", "gate.weight", "o_proj.bias",
                    "gate.e_score_correction_bias", "down_proj.bias", "fc1_latent_proj.weight",
                    "fc2_latent_proj.weight"), name  # fmt: skip
    return whole


@pytest.mark.parametrize(("config", "ranks"), CASES)
def test_a_rank_holds_its_shards(config: HybridConfig, ranks: int) -> None:
    """Every tensor's shape; each number of the whole is somewhere; together they have the whole, what is copied, and
    the rows that pad the vocabulary."""
    own, total, copied = tensor_table(rank_config(config, ranks)), 0, 0
    table = {name: spec for name, spec in tensor_table(config).items() if spec.ahead is None or ranks == 1}
    assert own.keys() == table.keys()
    if ranks == 1:
        assert rank_config(config, 1) == config
        return
    for name, spec in table.items():
        numbers = torch.arange(1, spec.numel + 1).reshape(spec.shape)
        parts = [shard(spec.part, numbers, config, rank, ranks) for rank in range(ranks)]
        assert {tuple(part.shape) for part in parts} == {own[name].shape}, name
        seen = torch.cat([part.flatten() for part in parts])
        assert set(numbers.flatten().tolist()) <= set(seen.tolist()), name
        if spec.role is not Role.BUFFER:
            total += sum(part.numel() for part in parts)
            copied += len(seen) - spec.numel
    assert total == ranks * count_parameters(rank_config(config, ranks))
    assert total == count_parameters(config.replace(mtp_steps=0)) + copied


@torch.no_grad()
@pytest.mark.parametrize("ranks", (2, 4))
def test_the_sum_of_the_ranks_is_the_whole(ranks: int) -> None:
    """What the shards' models add to the stream, layer by layer."""
    config = tiny_config(**WIDE | EXPERTS | {"pattern": "M*-E", "num_key_value_heads": 2})
    whole, narrow = random_model(config, 3), rank_config(config, ranks)
    outputs = []
    u = torch.randn(2, 9, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for rank in range(ranks):
        part = HybridLM(narrow, dtype=torch.float64)
        table = tensor_table(config)
        part.load_state_dict({name: shard(table[name].part, tensor, config, rank, ranks)
                              for name, tensor in whole.state_dict().items()})  # fmt: skip
        outputs.append([layer(u, Context(past=0, shared=shared(part, u))) for layer in part.layers])
    for number, layer in enumerate(whole.layers):
        found = sum(each[number] for each in outputs)
        assert_close(f"layer {number}", layer(u, Context(past=0, shared=shared(whole, u))), found, 1e-12)


def shared(model: HybridLM, u: Tensor) -> dict:
    return {kind.share: kind.share(model.config, Context(), u.shape[1], u.device, u.dtype)
            for kind in model.config.kinds if kind.share is not None}  # fmt: skip


def test_states_and_caches_by_hand() -> None:
    """vLLM's mamba2_state_shape and Attention: heads / n, groups / n or one, key-value heads / n or one."""
    for name in names("model"):
        config = model_config(name)
        for ranks in rank_counts(config):
            c, groups = config, config.n_groups
            extra = 0 if not groups or groups % ranks == 0 else ranks - groups  # extra_groups_for_head_shards
            conv = (c.d_inner + 2 * (groups + extra) * c.ssm_state_size) // ranks * (c.conv_kernel - 1) * 2
            ssm = c.mamba_num_heads // ranks * c.mamba_head_dim * c.ssm_state_size * 4
            token = 2 * 2 * max(1, c.num_key_value_heads // ranks) * c.head_dim
            report = memory(config, 1000, 3, chunk=None, tensor_parallel=ranks)
            mamba = sum(kind.state_bytes(c, 1, 1, 1).ssm > 0 for kind in c.kinds)
            attention = sum(kind.state_bytes(c, 1, 1, 1).token > 0 for kind in c.kinds)
            assert (report.ssm, report.conv) == (3 * mamba * ssm, 3 * mamba * conv)
            assert report.kv == 3000 * attention * token
            assert report.weights == weight_bytes(rank_config(config, ranks), torch.bfloat16)


def test_two_of_a_card_hold_what_one_does_not() -> None:
    """The 12B at 131,072 tokens; what vLLM makes of the part, and what is said to help on one card."""
    for name in ("a10g", "rtx3090", "l4", "rtx4090"):
        card = read_hardware(name)
        one, two = (Fit(context=131072, tensor_parallel=count).estimate(LARGE, card) for count in (1, 2))
        assert not one.fits and two.fits and two.memory.weights < 0.51 * one.memory.weights
        assert one.changes()[-1].name == "2 GPUs (tensor_parallel=2)"
        assert one.memory.peak - one.changes()[-1].saved == two.memory.peak
        # Keys, values and states are halved, and a block of as many tokens is half as large.
        assert two.memory.vllm.block_size == one.memory.vllm.block_size == 1312
        assert 2 * two.memory.vllm.bytes_per_request == one.memory.vllm.bytes_per_request
        assert two.memory.vllm.max_num_seqs > one.memory.vllm.max_num_seqs == 0
        assert "--tensor-parallel-size 2" in two.vllm_flags() and not any("tensor" in each for each in one.vllm_flags())
        # Both sets of logits are gathered, beside the part that is made here.
        vocabulary = 2 * LARGE.vocab_size
        assert two.memory.logits == 2 * vocabulary + vocabulary // 2 and one.memory.logits == 2 * vocabulary


def test_speed_of_two_cards_by_hand() -> None:
    """Half of the work, and a ring's exchange of the stream after the embedding and every layer."""
    card, sizes = read_hardware("h100"), {"input_tokens": 100, "output_tokens": 10, "batch": 4}
    one, two = (throughput(SMALL, card, **sizes, tensor_parallel=count) for count in (1, 2))
    assert one is not None and two is not None
    seconds = (SMALL.num_layers + 1) * SMALL.hidden_size * 2 / (450e9 * 0.7)  # 2 (n - 1) / n = 1 for two
    assert two.step_seconds == pytest.approx(one.step_seconds / 2 + 4 * seconds, rel=1e-3)
    assert two.prefill_seconds == pytest.approx(one.prefill_seconds / 2 + 400 * seconds, rel=1e-3)
    lonely = Hardware("card", 80, 79, 3000, 900)
    assert throughput(SMALL, lonely, **sizes, tensor_parallel=2) is None
    estimate = Fit(context=1000, tensor_parallel=2).estimate(SMALL, lonely)
    assert "hardware.interconnect_gb_s" in speed_sentence(estimate)
    sentence = speed_sentence(Fit(context=3000, tensor_parallel=2).estimate(SMALL, card))
    assert "each after 1,000 read and 2,000 to write" in sentence and "the 450 GB/s one way" in sentence


@pytest.mark.parametrize("form", ("fp8", "w8a8", "w4a16"))
def test_quantised_weights_are_shared_out(form: str, tmp_path: Path) -> None:
    """Numbers and scales of rows are cut with them; scales of groups of columns with these, those of rows not."""
    pytest.importorskip("compressed_tensors")
    checkpoint = rounded_folder(tmp_path, form, intermediate_size=256)
    whole, part = (of_checkpoint(checkpoint, torch.bfloat16, count) for count in (1, 2))
    assert whole is not None and part is not None
    up, down = 256 * 128, 128 * 256
    group = 128 if checkpoint.config.hidden_size % 128 == 0 else 64
    by_hand = {
        1: {"w4a16": (up + down) // 2 + 2 * (up + down) // group + 32}.get(form, up + down + 2 * (256 + 128)),
        2: {"w4a16": (up + down) // 4 + (up + down) // group + 32}.get(form, (up + down) // 2 + 2 * (128 + 128)),
    }
    norm = 2 * 128
    assert whole.layers[1].all == by_hand[1] + norm and part.layers[1].all == by_hand[2] + norm


def rounded_folder(root: Path, form: str, **widths: int) -> Checkpoint:
    """An export of a random model."""
    sizes = {"vocab_size": 128, "hidden_size": 128, "mamba_num_heads": 8, "n_groups": 2, "mamba_head_dim": 32,
             "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "ssm_state_size": 16}  # fmt: skip
    model = random_model(tiny_config(pattern="M-*-", **sizes | widths), 1, torch.float32).bfloat16()
    save_model(model, root / "model")
    code, _, err = limbeck("export", f"model={root / 'model'}", f"output={root / 'out'}", f"format={form}")
    assert code == 0, err
    return open_checkpoint(root / "out")


def test_groups_of_columns_stay_whole(tmp_path: Path) -> None:
    """192 of 384 columns are one group of 128 and a half."""
    pytest.importorskip("compressed_tensors")
    rounded_folder(tmp_path, "w4a16", intermediate_size=384)
    code, _, err = limbeck("memory-fit", f"model={tmp_path / 'out'}", "context=64", "tensor_parallel=2")
    assert code == 2 and "192 columns of" in err and "128 columns each" in err and err.count("\n") == 1


def test_command(tmp_path: Path) -> None:
    words = ("memory-fit", "model=nemotron-nano-12b-v2", "hardware=rtx3090", "tensor_parallel=2")
    code, text, _ = limbeck(*words, f"output={tmp_path / 'fit'}")
    content = json.loads((tmp_path / "fit" / "result.json").read_text())
    assert code == 0 and "on each of 2 rtx3090" in text and "--tensor-parallel-size 2" in text
    assert content["tensor_parallel"] == 2 and "--tensor-parallel-size 2" in content["vllm_flags"]
    assert content["memory"]["weights"] == memory(LARGE, 1, chunk=None, tensor_parallel=2).weights
    assert "tokens a second: " in text and "assumed" in text


@pytest.mark.parametrize(
    ("words", "says"),
    (
        ("tensor_parallel=3", "mamba_num_heads (128) does not share out over so many GPUs as vLLM does it; give 1, 2,"),
        ("tensor_parallel=16", "n_groups (8)"),
        ("tensor_parallel=0", "tensor_parallel"),
        ("tensor_parallel=2 method=simulation", "fit.tensor_parallel is 2"),
        ("tensor_parallel=2 hardware=cpu hardware.usable_gib=64", "expected 1, or a GPU"),
    ),
)
def test_command_refuses(words: str, says: str) -> None:
    code, _, err = limbeck("memory-fit", "model=nemotron-nano-9b-v2", *words.split())
    assert code == 2 and says in err and err.count("\n") == 1
