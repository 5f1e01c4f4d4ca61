"""A config of any family beside transformers' class of it: logits, gradients, folders, steps, padding, documents."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models.checkpoint import load_config, load_model, save_model
from limbeck.models.config import HybridConfig
from limbeck.models.families.family import pieces_of, stored_tensors
from limbeck.models.families.known import FAMILIES
from limbeck.models.generate.cache import Cache
from limbeck.models.generate.decode import Decoder
from limbeck.models.hybrid import HybridLM
from limbeck.tests.helpers import assert_close, cached_logits, random_model


def some_slow(count: int, quick: int) -> list[Any]:
    """Seeds, the first few for every day."""
    return [seed if seed < quick else pytest.param(seed, marks=pytest.mark.slow) for seed in range(count)]


BIAS = "e_score_correction_bias"  # of a router: it chooses, and has no gradient


def theirs_of(config: HybridConfig, folder: Path) -> Any:
    """transformers' model of a config, by way of its config.json alone, with weights that all matter."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder)).eval()
    assert type(model).__name__ == FAMILIES[config.family].architecture
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(0, 1 / math.sqrt(weight.shape[-1]))
            elif name.endswith("dt_bias"):
                weight.uniform_(-4, 0)
            elif name.endswith("bias"):
                weight.normal_(0, 0.3)
            else:
                weight.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith(BIAS):
                buffer.normal_(0, 0.3)
    return model


def check_parity(config: HybridConfig, seed: int, folder: Path) -> tuple[float, float]:
    """Float32 on a CPU: logits to 1e-5 and every gradient to 1e-4 (relative RMS, which is returned, of gradients the
    worst); their folder is read and ours opened; steps after a prompt, padding and packed documents change nothing."""
    if not FAMILIES[config.family].ties:
        config = config.replace(tie_word_embeddings=False)
    theirs = theirs_of(config, folder / "config")
    theirs.save_pretrained(folder / "theirs")
    ours = load_model(folder / "theirs")
    assert ours.config == config
    assert ours.config.to_hf().items() >= config.to_hf().items()
    # Token 0 may be the padding, whose row has no gradient there.
    ids = torch.randint(1, config.vocab_size, (1 + seed % 3, (2, 1, 7, 16, 33, 40)[seed % 6]))
    expected, found = theirs(ids, use_cache=False).logits, ours(ids)
    logits = assert_close("logits", expected, found, 1e-5)
    gradients = check_gradients(ours, theirs, expected, found)
    with torch.no_grad():
        check_our_folder(ours, theirs, ids, folder)
        check_steps(ours, theirs)
        check_padding(ours, theirs)
    check_documents(config, seed)
    return logits, gradients


def check_gradients(ours: HybridLM, theirs: Any, expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest relative RMS error of a tensor's gradient, of those that are more than rounding."""
    along = torch.randn(expected.shape)
    (expected * along).sum().backward()
    (found * along).sum().backward()
    gradients = published_gradients(ours.config, theirs)
    assert gradients.keys() == {name for name in stored_tensors(ours.config) if not name.endswith(BIAS)}
    stored = {name: torch.full_like(gradient, torch.nan) for name, gradient in gradients.items()}
    for name, weight in ours.named_parameters():
        assert weight.grad is not None, name
        for piece in pieces_of(ours.config)[name]:
            rows, place = (flat_rows(tensor) for tensor in (weight.grad, stored[piece.stored]))
            place[piece.begin : piece.begin + piece.rows] = rows[piece.start : piece.start + piece.rows]
    largest, worst = max(float(gradient.abs().max()) for gradient in gradients.values()), 0.0
    for name, own in stored.items():
        gradient = gradients[name]
        # Where all but nothing is left of larger terms (queries of a single token, what all keys have in common without
        # positions, a step before a norm of one token), the gradient is rounding.
        if float(gradient.abs().max()) <= 1e-4 * largest:
            assert float((gradient - own).abs().max()) <= 1e-6 * largest, name
        else:
            worst = max(worst, assert_close(name, gradient, own, 1e-4))
    return worst


def published_gradients(config: HybridConfig, theirs: Any) -> dict[str, torch.Tensor]:
    """transformers' gradients by the names of the hub, where nemotron_h's experts, stacked in memory, are one by
    one."""
    found: dict[str, torch.Tensor] = {}
    for name, weight in theirs.named_parameters():
        name = published(name, FAMILIES[config.family].prefixes[0])
        if name.endswith(("mixer.experts.up_proj", "mixer.experts.down_proj")):
            place, _, end = name.rpartition(".")
            found |= {f"{place}.{unit}.{end}.weight": gradient for unit, gradient in enumerate(weight.grad)}
        else:
            found[name] = weight.grad
    return found


def published(name: str, prefix: str) -> str:
    """The name on the hub, in a family whose names begin so, of a tensor that transformers calls otherwise in
    memory."""
    name = prefix + name.removeprefix("model.") if prefix and name.startswith("model.") else name
    for theirs, ours in {
        "moe.router.weight": "moe.router.layer.weight",
        "moe.experts.gate_up_proj": "moe.input_linear.weight",
        "moe.experts.down_proj": "moe.output_linear.weight",
    }.items():
        name = name.replace(theirs, ours)
    return name


def flat_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A view with all dimensions but the last as rows, as `Piece` counts them."""
    return tensor.view(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor


def check_our_folder(ours: HybridLM, theirs: Any, ids: torch.Tensor, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_model(ours, folder / "ours", max_shard_bytes=9000)
    assert load_config(folder / "ours") == ours.config
    opened, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert type(opened) is type(theirs)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    own = dict(theirs.named_parameters())
    assert all(torch.equal(weight, own[name]) for name, weight in opened.named_parameters())
    assert_close("opened", opened(ids, use_cache=False).logits, ours(ids), 1e-5)


def check_steps(ours: HybridLM, theirs: Any) -> None:
    """A prompt in two parts and cached steps after it: as transformers', and as a decoder's."""
    ids = torch.randint(ours.config.vocab_size, (2, 15))
    whole = ours(ids)
    if any(kind.state_bytes(ours.config, 1, 1, 1).token for kind in ours.config.kinds):
        expected, found = cached_logits(ours, theirs, ids, 9)  # transformers cannot without attention
        assert_close("cached", expected, found, 1e-5)
        assert_close("prefill", whole, found, 1e-5)
    cache = Cache(ours.config, 2, 20)
    ours(ids[:, :4], cache=cache)
    ours(ids[:, 4:9], cache=cache)
    cache.lengths = [9, 9]
    decoder = Decoder(ours, cache)
    for place in range(9, 15):
        assert_close("decoder", whole[:, place], decoder.step(ids[:, place].tolist()), 1e-5)


def check_padding(ours: HybridLM, theirs: Any) -> None:
    """What stands after a text changes nothing in it; transformers pads before it, with a mask."""
    ids = torch.randint(ours.config.vocab_size, (1, 12))
    assert_close("after", ours(ids)[:, :7], ours(ids[:, :7]), 1e-5)
    mask = torch.tensor([[0] * 5 + [1] * 7])
    padded = torch.cat([ids[:, 7:], ids[:, :7]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = theirs(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert_close("before", expected[:, 5:], ours(ids[:, :7]), 1e-5)


def check_documents(config: HybridConfig, seed: int) -> None:
    """Documents side by side in float64: as alone, gradients with respect to the others' tokens are zero."""
    model = random_model(config, seed, torch.float64)
    ids = torch.randint(config.vocab_size, (1, 17))
    cuts = (5, 1, 11)
    seq_idx = torch.repeat_interleave(torch.tensor([4, 9, 2]), torch.tensor(cuts))[None]
    embedded = model.embed(ids).detach().requires_grad_()
    hidden = model.hidden_states(ids, seq_idx=seq_idx, embedded=embedded)
    alone = torch.cat([model.hidden_states(part) for part in ids.split(cuts, 1)], 1)
    assert_close("packed", alone, hidden, 1e-10)
    (gradient,) = torch.autograd.grad(hidden[:, 6:].square().sum(), embedded)
    assert not gradient[:, :6].any() and bool(gradient[:, 6:].any())
