"""transformers' native NemotronHForCausalLM and ours compute the same: logits, gradients, generation, both folders.

transformers clamps the step dt from below at `time_step_min` in prefill (and not at all in decoding), the published
code and ours at `time_step_limit`. Each case says which: "floor" gives both the same lower limit of 0.001, "open"
moves transformers' limit down to where no step reaches it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.benchmarks import greedy
from limbeck.benchmarks.greedy import PROMPTS
from limbeck.models.checkpoint import load_model, save_model
from limbeck.models.config import HybridConfig
from limbeck.models.hybrid import HybridLM
from limbeck.models.named import SHIPPED
from limbeck.tests.helpers import cached_logits, limbeck

transformers = pytest.importorskip("transformers")


@dataclasses.dataclass(frozen=True)
class Case:
    config: HybridConfig
    batch: int
    tokens: int
    limit: str


def draw_case(seed: int) -> Case:
    """A tiny model that varies everything that the issue of parity turns on."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    groups = pick(1, 2, 4)
    heads = groups * pick(2, 3)
    kv_heads = pick(1, 2)
    limit = ("open", "floor")[seed % 2]
    chunk = pick(4, 8, 16)
    config = HybridConfig(
        pattern=pick("M", "M-", "M*-", "MM*-M-", "*M-M", "M-M-*-MM", "-*M"),
        vocab_size=pick(61, 128),
        hidden_size=pick(24, 32, 48),
        intermediate_size=pick(40, 64),
        num_attention_heads=kv_heads * pick(1, 2, 3),
        num_key_value_heads=kv_heads,
        head_dim=pick(8, 16),
        mamba_num_heads=heads,
        # The first two cases see to it that 48 and 80 are among them.
        mamba_head_dim=(48, 80)[seed] if seed < 2 else pick(8, 16, 48, 80),
        n_groups=groups,
        ssm_state_size=pick(8, 16, 32),
        conv_kernel=pick(2, 3, 4),
        chunk_size=chunk,
        dt_limit=(0.001, math.inf) if limit == "floor" else (0.0, math.inf),
        extra={"time_step_min": 0.001 if limit == "floor" else 1e-9},
        pad_token_id=0,
    )
    return Case(config, pick(1, 2, 3), pick(1, 2, chunk - 1, chunk, chunk + 1, 2 * chunk, 2 * chunk + 3), limit)


CASES = {f"{seed}-{case.limit}-{case.config.pattern}": case for seed in range(24) if (case := draw_case(seed))}


def theirs_of(case: Case, folder: Path) -> Any:
    """transformers' model of the case's config, with weights larger than it starts with, so that much is at stake."""
    torch.manual_seed(len(case.config.pattern))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(case.config.to_hf()))
    model = transformers.NemotronHForCausalLM(transformers.AutoConfig.from_pretrained(folder)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, 1 / math.sqrt(weight.shape[1]))
            elif name.endswith(("norm.weight", "norm_f.weight")):
                weight.uniform_(0.5, 1.5)
            elif name.endswith("dt_bias"):
                weight.uniform_(-5, 1)
            elif name.endswith((".D", "conv1d.bias")):
                weight.normal_()
    return model


def relative(reference: torch.Tensor, found: torch.Tensor) -> float:
    """Root mean square of the difference, over that of the reference."""
    return (
        ((reference - found).double().square().sum() / reference.double().square().sum().clamp_min(1e-30)).sqrt().item()
    )


def both(case: Case, tmp_path: Path) -> tuple[HybridLM, Any]:
    """The same weights twice; they cross over through the folder that transformers writes."""
    theirs = theirs_of(case, tmp_path / "config")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    if case.limit == "floor":  # transformers says nothing of a lower limit in time_step_limit; see the head
        ours = rebuilt(ours, case.config)
    return ours, theirs


def rebuilt(model: HybridLM, config: HybridConfig) -> HybridLM:
    copy = HybridLM(config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    ours, theirs = both(case, tmp_path)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(case.config.vocab_size, (case.batch, case.tokens), generator=generator)
    expected = theirs(ids, use_cache=False).logits
    found = ours(ids)
    assert relative(expected, found) <= 1e-5
    along = torch.randn(expected.shape, generator=generator)
    (expected * along).sum().backward()
    (found * along).sum().backward()
    gradients = {key.removeprefix("model."): weight.grad for key, weight in theirs.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for key, weight in ours.named_parameters():
        assert weight.grad is not None
        if case.tokens == 1 and key.endswith(("q_proj.weight", "k_proj.weight")):
            # Whoever sees one token alone sees it fully: the gradient is zero, and what fused kernels give is rounding.
            assert max(float(found.abs().max()) for found in (gradients[key], weight.grad)) <= 1e-6 * largest, key
        else:
            assert relative(gradients[key], weight.grad) <= 1e-4, key
    assert gradients.keys() == dict(ours.named_parameters()).keys()


@pytest.mark.parametrize("name", list(CASES)[::4])
def test_our_folder_opens_in_transformers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    ours = rebuilt(both(case, tmp_path)[0], case.config)
    save_model(ours, tmp_path / "ours")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs).__name__ == "NemotronHForCausalLM"
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids = torch.randint(case.config.vocab_size, (2, 9))
    with torch.no_grad():
        assert relative(ours(ids), theirs(ids, use_cache=False).logits) <= 1e-5


def test_cached_steps_equal_transformers_cache(tmp_path: Path) -> None:
    """Prefill and eight cached steps beside theirs, fed the same tokens."""
    case = CASES[next(name for name in CASES if "open" in name and "*" in name)]
    ours, theirs = both(case, tmp_path)
    ids = torch.randint(case.config.vocab_size, (2, 19))
    assert relative(*cached_logits(ours, theirs, ids, 11)) <= 1e-5


PARTS = {"three": PROMPTS[::20], **{str(part): PROMPTS[10 * part - 10 : 10 * part] for part in range(1, 6)}}


@pytest.mark.parametrize("shipped", ("zoo", "zoo-moe"))
@pytest.mark.parametrize("part", ("three", *(pytest.param(name, marks=pytest.mark.slow) for name in "12345")))
def test_greedy_text_is_that_of_transformers(part: str, shipped: str, tmp_path: Path) -> None:
    """A shipped model, exported: 64 tokens after prompts that share the engine's batch, beside `generate` of the
    model that transformers opens, prompt by prompt."""
    exported = tmp_path / "exported"
    code, _, err = limbeck("export", f"model={shipped}", f"output={exported}", "dtype=float32")
    assert code == 0, err
    for pair in greedy.continued(exported, PARTS[part], 64):
        assert pair.found == pair.expected and pair.text == pair.expected_text, pair


def test_the_benchmark_says_where_texts_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "exported").symlink_to(SHIPPED["zoo-moe"])
    assert greedy.main([str(tmp_path), "--prompts", "3", "--tokens", "5"]) == 0
    assert "3 of 3 prompts: the same 5 greedy tokens" in capsys.readouterr().out
    found = [greedy.Pair("a", [1, 2], [1, 2], "b", "b"), greedy.Pair("a", [1, 2], [1, 3], "b", "c")]
    monkeypatch.setattr(greedy, "continued", lambda *arguments: found)
    assert greedy.main([str(tmp_path)]) == 3
    said = capsys.readouterr().out
    assert "'a': 1 tokens are the same, then 'b' and 'c'" in said and "1 of 2 prompts" in said
