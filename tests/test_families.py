"""llama and qwen3: transformers' classes and ours compute the same, folders go both ways, and blocks stay whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from limbeck.kernels.rotary import rotary, rotary_angles
from limbeck.models.attention import token_positions
from limbeck.models.axes import Axis
from limbeck.models.checkpoint import load_config, load_model, open_checkpoint, save_model
from limbeck.models.config import HybridConfig
from limbeck.models.errors import InputError
from limbeck.models.families.family import pieces_of, published_name, stored_tensors
from limbeck.models.families.known import FAMILIES
from limbeck.models.generate.cache import Cache
from limbeck.models.generate.generate import generate
from limbeck.models.hybrid import HybridLM, initialize
from limbeck.prune.choose import kept_layers, select
from limbeck.prune.depth import random_layers, score_layers
from limbeck.prune.importance import score_widths
from limbeck.prune.repair import Repair, repair_model
from limbeck.prune.slice import slice_config
from limbeck.prune.target import Target
from limbeck.prune.width_metrics import ActivationScores, RandomScores
from limbeck.tests.family_helpers import theirs_of
from limbeck.tests.helpers import (
    assert_close,
    cached_logits,
    dense_config,
    random_config,
    random_model,
    tiny_config,
)
from limbeck.tests.pruning_helpers import draw_rows, naive_mse
from safetensors.torch import load_file, save_file

DENSE = ("llama", "qwen3")


CASES = [(family, seed) for family in DENSE for seed in range(12)]


IDS = [f"{family}-{seed}" for family, seed in CASES]


def draw_ids(config: HybridConfig, seed: int) -> torch.Tensor:
    """Batches of 1 to 3 rows of 1 to 40 tokens."""
    return torch.randint(config.vocab_size, (1 + seed % 3, (1, 2, 7, 16, 33, 40)[seed % 6]))


@pytest.mark.parametrize(("family", "seed"), CASES, ids=IDS)
def test_logits_and_gradients(family: str, seed: int, tmp_path: Path) -> None:
    """The weights cross over through the folder that transformers writes."""
    config = dense_config(seed, family)
    theirs = theirs_of(config, tmp_path / "config")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert ours.config == config
    ids = draw_ids(config, seed)
    expected, found = theirs(ids, use_cache=False).logits, ours(ids)
    assert_close("logits", expected, found, 1e-5)
    along = torch.randn(expected.shape)
    (expected * along).sum().backward()
    (found * along).sum().backward()
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    assert gradients.keys() == set(stored_tensors(config))
    for name, weight in ours.named_parameters():
        gradient = gradients[pieces_of(config)[name][0].stored]
        assert weight.grad is not None and gradient is not None
        # Queries and keys of a single token decide nothing: their gradient is zero but for rounding.
        if ids.shape[1] > 1 or not any(part in name for part in ("q_", "k_")):
            assert_close(name, gradient, weight.grad, 1e-4)


@pytest.mark.parametrize(("family", "seed"), CASES, ids=IDS)
def test_our_folder_opens_in_transformers(family: str, seed: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = dense_config(seed, family)
    ours = random_model(config, seed, torch.float32)
    save_model(ours, tmp_path / "ours", max_shard_bytes=(9000, 10**9)[seed % 2])
    assert load_config(tmp_path / "ours") == config
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs).__name__ == FAMILIES[family].architecture
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids = draw_ids(config, seed)
    with torch.no_grad():
        assert_close("logits", theirs(ids, use_cache=False).logits, ours(ids), 1e-5)


@pytest.mark.parametrize("family", DENSE)
def test_cached_steps_equal_transformers_cache(family: str, tmp_path: Path) -> None:
    config = dense_config(4, family)
    theirs = theirs_of(config, tmp_path / "config")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    ids = torch.randint(config.vocab_size, (2, 30))
    assert_close("logits", *cached_logits(ours, theirs, ids, 17), 1e-5)


@pytest.mark.parametrize(("family", "seed"), CASES, ids=IDS)
def test_cached_generation_is_the_full_forward(family: str, seed: int) -> None:
    config = dense_config(seed, family)
    model = random_model(config, seed)
    prompt = draw_ids(config, seed)
    found = generate(model, prompt, 8, prefill_chunk=1 + seed % 7)
    expected = prompt
    with torch.no_grad():
        for _ in range(8):
            expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("family", "seed"), CASES[::3], ids=IDS[::3])
def test_packed_documents_equal_separate_ones(family: str, seed: int) -> None:
    """Positions begin anew with each document; after a cache, those of the first one continue."""
    config = dense_config(seed, family)
    model = random_model(config, seed)
    ids = torch.randint(config.vocab_size, (2, 24))
    lengths = ((5, 1, 18), (9, 9, 6))
    seq_idx = torch.stack([torch.repeat_interleave(torch.tensor([4, 9, 2]), torch.tensor(row)) for row in lengths])
    with torch.no_grad():
        alone = [
            torch.cat([model(part[None]) for part in row.split(cuts)], 1)
            for row, cuts in zip(ids, lengths, strict=True)
        ]
        assert_close("packed", torch.cat(alone), model(ids, seq_idx=seq_idx), 1e-12)
        cache = Cache(config, 2, 40, dtype=torch.float64)
        before = torch.randint(config.vocab_size, (2, 7))
        model(before, cache=cache)
        found = model(ids, seq_idx=seq_idx, cache=cache)
        for row, cuts in enumerate(lengths):
            first = torch.cat((before[row], ids[row, : cuts[0]]))[None]
            assert_close("continues", model(first)[:, 7:], found[row : row + 1, : cuts[0]], 1e-12)
            assert_close("begins anew", alone[row][:, cuts[0] :], found[row : row + 1, cuts[0] :], 1e-12)


def test_positions_by_hand() -> None:
    seq_idx = torch.tensor([[3, 3, 3, 5, 5, 3], [1, 2, 2, 2, 2, 2]])
    assert token_positions(6, 0, seq_idx, torch.device("cpu")).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    assert token_positions(6, 10, seq_idx, torch.device("cpu")).tolist() == [[10, 11, 12, 0, 1, 0], [10, 0, 1, 2, 3, 4]]
    assert token_positions(3, 10, None, torch.device("cpu")).tolist() == [[10, 11, 12]]


def test_only_the_distance_of_two_tokens_counts() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i: int, j: int) -> float:
        turned = [rotary(x, *rotary_angles(torch.tensor([[p]]), 8, 1e4, torch.float64)) for x, p in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    assert score(5, 2) == pytest.approx(score(105, 102), rel=1e-12)
    assert score(5, 2) != pytest.approx(score(5, 3), rel=1e-3)


@pytest.mark.parametrize("family", DENSE)
def test_every_weight_is_initialised(family: str) -> None:
    config = dense_config(3, family)
    model = HybridLM(config)
    initialize(model, torch.Generator().manual_seed(0))
    for name, weight in model.named_parameters():
        assert torch.isfinite(weight).all(), name
        assert ("norm" in name) == bool((weight == 1).all()), name


def test_names_go_both_ways() -> None:
    for config in (dense_config(5, "llama"), dense_config(6, "qwen3"), random_config(3), tiny_config()):
        for name, _ in HybridLM(config, device="meta").named_parameters():
            (piece,) = pieces_of(config)[name]
            assert stored_tensors(config)[piece.stored].pieces == (piece,) and piece.scale == 1
    config = dense_config(5, "qwen3")
    names = {ours: pieces[0].stored for ours, pieces in pieces_of(config).items()}
    assert names["layers.5.norm.weight"] == "model.layers.2.post_attention_layernorm.weight"
    assert names["layers.4.mixer.q_norm.weight"] == "model.layers.2.self_attn.q_norm.weight"
    for stranger in (
        "model.layers.2.mixer.x",
        "model.layers.x.mlp.y",
        "model.layers.2",
        "norm.weight",
        "model.head",
        "",
    ):
        assert published_name(config, stranger) not in stored_tensors(config)


def test_a_wrong_tensor_is_named(tmp_path: Path) -> None:
    config = dense_config(8, "llama").replace(tie_word_embeddings=True)
    save_model(random_model(config, 0, torch.float32), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    # Old checkpoints hold what follows from the config; a tied head may stand there again.
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), 
            "lm_head.weight": weights["model.embed_tokens.weight"].clone()}  # fmt: skip
    save_file(weights | more, file)
    assert len(open_checkpoint(tmp_path / "model").names()) == len(weights)
    for change, said in (
        ({"model.layers.0.mlp.side_proj.weight": torch.ones(2)}, "as model.embed_tokens.weight"),
        ({"model.layers.99.mlp.up_proj.weight": torch.ones(2)}, "unexpected tensor model.layers.99"),
        ({"model.layers.0.self_attn.q_norm.weight": torch.ones(2)}, "unexpected tensor"),
        ({"model.norm.weight": torch.ones(2)}, r"tensor model.norm.weight has shape \[2\]"),
        ({"lm_head.weight": torch.ones(2, 2)}, r"tensor lm_head.weight has shape \[2, 2\]"),
    ):
        save_file(weights | change, file)
        with pytest.raises(InputError, match=said):
            open_checkpoint(tmp_path / "model")
    save_file({name: weight for name, weight in weights.items() if "mlp.up" not in name}, file)
    with pytest.raises(InputError, match=r"tensor model.layers.0.mlp.up_proj.weight.*missing"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("family", DENSE)
def test_depth_removes_whole_blocks(family: str) -> None:
    """Against each block dropped from a fresh model, with whole logits."""
    config = dense_config(0, family).replace(pattern="*-" * 5)
    model = random_model(config)
    batch = draw_rows(config.vocab_size, rows=3)
    steps: list[tuple[int, int]] = []
    scores = score_layers(model, [batch], remove=6, table="all", on_step=lambda *step: steps.append(step))
    gone: list[int] = []
    for step in range(3):
        stack = [layer for layer in range(0, 10, 2) if layer not in gone]
        measured = {layer: naive_mse(model, [batch], [*gone, layer, layer + 1]) for layer in stack}
        assert scores.candidates[step] == pytest.approx(measured, rel=1e-9)
        first = min(measured, key=lambda layer: measured[layer])
        gone += [first, first + 1]
    assert list(scores.order) == gone
    assert [done for done, _ in steps] == [5, 9, 12] and {total for _, total in steps} == {12}
    assert score_layers(model, [batch], remove=6, pairs=True).order == scores.order
    for seed in range(10):
        order = random_layers(config, remove=8, seed=seed).order
        assert [layer + 1 for layer in order[::2]] == list(order[1::2]) and not any(layer % 2 for layer in order[::2])
    kept = random_layers(config, remove=4, seed=0, min_layers={"mlp": 3})
    assert len(kept.order) == 4
    smaller = slice_config(config, select(config, RandomScores(0).scores(config), scores.order, Target(layers=2)))
    assert HybridConfig.from_hf(smaller.to_hf()).pattern == "*-*-"


def test_half_blocks_are_refused() -> None:
    config = dense_config(0, "llama").replace(pattern="*-" * 3)
    for options in ({"remove": 1}, {"remove": 6}, {"remove": 4, "min_layers": {"attention": 2}}):
        with pytest.raises(InputError, match=r"a number of at most \d, which is what 3 layers") as caught:
            random_layers(config, seed=0, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"expected 1\.\.3"):
        kept_layers(config, (0, 1), 5)
    with pytest.raises(InputError, match="not whole blocks"):
        kept_layers(config, (1, 2), 2)
    assert kept_layers(config, (2, 3), 2) == (0, 1, 4, 5)


@pytest.mark.parametrize("family", DENSE)
@torch.no_grad()
def test_neurons_are_scored_by_what_down_proj_reads(family: str) -> None:
    """A neuron whose gate is shut ranks last with ffn_source=act, whatever its up projection says."""
    config = dense_config(2, family)
    model = random_model(config)
    neuron = 3
    model.state_dict()["layers.1.mixer.gate_proj.weight"][neuron] = 0
    batch = draw_rows(config.vocab_size)
    scores = {
        source: score_widths(model, [batch], ActivationScores(ffn_source=source))[Axis("ffn", 1)]
        for source in ("pre", "act")
    }
    assert scores["act"][neuron] == 0 < scores["pre"][neuron]
    up = model.state_dict()["layers.1.mixer.up_proj.weight"]
    seen: dict[str, torch.Tensor] = {}
    model(batch.input_ids, seq_idx=batch.seq_idx, observe=lambda kind, i, x: seen.update({kind: x}) if i == 1 else None)
    assert_close("pre", seen["hidden"] @ up.T, seen["ffn"], 1e-12)


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize(
    "repair", (Repair(), Repair(rotate=True), Repair(least_squares=True, norms="measured")), ids=str
)
def test_pruned_and_repaired_folders_open_in_transformers(family: str, repair: Repair, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = dense_config(1, family).replace(
        pattern="*-" * 3, num_attention_heads=6, num_key_value_heads=2, hidden_size=48, intermediate_size=40,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = random_model(config, dtype=torch.float32)
    rows = draw_rows(config.vocab_size)
    target = Target(layers=2, hidden_size=32, intermediate_size=24, num_attention_heads=4)
    selection = select(config, score_widths(model, [rows]), score_layers(model, [rows], remove=2).order, target)
    smaller = repair_model(model, selection, [rows], repair)
    save_model(smaller, tmp_path / "smaller")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "smaller", dtype=torch.float32)
    assert theirs.config.num_hidden_layers == 2 and theirs.config.tie_word_embeddings
    with torch.no_grad():
        expected = theirs(rows.input_ids, use_cache=False).logits
        assert_close("logits", expected, smaller(rows.input_ids), 1e-5)
