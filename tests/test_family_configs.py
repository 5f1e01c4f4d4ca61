"""How the dense families spell a config.json: every spelling read alike, wrong ones refused in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from limbeck.models.checkpoint import save_model
from limbeck.models.config import HybridConfig
from limbeck.models.errors import InputError
from limbeck.models.families.known import FAMILIES
from limbeck.models.hybrid import HybridLM
from limbeck.models.kinds import KINDS
from limbeck.tests.family_draws import falcon_config, granite_config, nemotron_config, stretched_config
from limbeck.tests.helpers import dense_config, random_config
from limbeck.tests.puzzle_config import puzzle

DENSE = ("llama", "qwen3")


def spelled(family: str, **changes: Any) -> dict[str, Any]:
    hf = dense_config(8, family).to_hf()
    return {key: value for key, value in (hf | changes).items() if value != "absent"}


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize(
    "change",
    (
        {"rope_scaling": None},
        {"rope_theta": "absent", "rope_parameters": {"rope_theta": 12345.0, "rope_type": "default"}},
        {"rope_theta": 12345.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 12345, "rope_scaling": {"type": "default", "rope_theta": 12345.0}},
        {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "sliding_window": 4096},
        {"layer_types": ["full_attention"] * 9},
        {"model_type": "same", "auto_map": {"AutoModel": "x.Y"}},
    ),
)
def test_every_spelling_is_read_alike(family: str, change: dict[str, Any]) -> None:
    change = {key: family if value == "same" else value for key, value in change.items()}
    found = HybridConfig.from_hf(
        spelled(family, rope_theta=12345.0) | {k: v for k, v in change.items() if v != "absent"}
    )
    assert found == dense_config(8, family).replace(rope_theta=12345.0)
    assert "auto_map" not in found.to_hf() and "layer_types" not in found.to_hf()


def test_a_silent_config_is_transformers_default() -> None:
    transformers = pytest.importorskip("transformers")
    least = {"num_hidden_layers": 2, "vocab_size": 40, "hidden_size": 32, "num_attention_heads": 4,
             "intermediate_size": 20}  # fmt: skip
    llama = HybridConfig.from_hf({"model_type": "llama", **least})
    qwen3 = HybridConfig.from_hf({"model_type": "qwen3", **least, "num_key_value_heads": 2})
    for found, theirs in (
        (llama, transformers.LlamaConfig(**least)),
        (qwen3, transformers.Qwen3Config(**least, num_key_value_heads=2)),
    ):
        assert found.pattern == "*-*-" and found.rope_theta == theirs.rope_parameters["rope_theta"] == 10000.0
        assert found.norm_eps == theirs.rms_norm_eps
        for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings",
                     "bos_token_id", "eos_token_id", "pad_token_id"):  # fmt: skip
            assert getattr(found, name) == getattr(theirs, name), name
    assert HybridConfig.from_hf({"model_type": "llama", **least, "eos_token_id": [2, 3]}).eos_token_id == (2, 3)
    assert HybridConfig.from_hf({"model_type": "llama", **least, "eos_token_id": None}).eos_token_id is None


def configs_of(seed: int) -> list[HybridConfig]:
    """One of each family, everything that matters drawn, with and without layers of each kind."""
    own = [falcon_config(seed), granite_config(seed), granite_config(seed, experts=True), nemotron_config(seed)]
    own += [nemotron_config(seed, latent=True), random_config(seed), stretched_config(seed), stretched_config(seed + 1)]
    assert FAMILIES.keys() == {config.family for config in own} | {"nemotron_h_puzzle"}
    return [*own, HybridConfig.from_hf(puzzle())]


def changes_of(config: HybridConfig) -> Iterator[dict[str, Any]]:
    """Zero, and another value, of every field that the config.json of a config speaks of."""
    content, kinds = config.to_hf(), {*KINDS.values()} - {*config.kinds}
    unused = {field for kind in kinds for field in (*kind.fields, *kind.optional)}
    unused -= {field for kind in config.kinds for field in (*kind.fields, *kind.optional)}
    for field, names in config.family_record.spellings.items():
        value = getattr(config, field)
        if field not in unused and any(name in content for name in names):
            others = {bool: (not value,), int: (0, 1, 7), float: (0.0, 0.25)}.get(type(value), (0, 7))
            yield from ({field: other} for other in others)
    yield from ({"eos_token_id": other} for other in (None, (0, 3)))
    for each in dataclasses.fields(config.multipliers):
        if each.name != "mamba_parts":
            zero: dict[str, Any] = {each.name: 0.0}
            with contextlib.suppress(InputError):  # of several 0 leaves nothing
                yield {"multipliers": dataclasses.replace(config.multipliers, **zero)}
    if config.mamba_num_heads:
        yield from ({"dt_limit": limit} for limit in ((0.0, 0.5), (0.25, math.inf), (0.25, 0.5)))


@pytest.mark.parametrize("seed", range(6))
def test_every_number_is_read_as_it_was_written(seed: int) -> None:
    """Zeros, too: where a file were silent of one that is not a reader's default, another number would be read."""
    seen: dict[str, int] = {}
    for config in configs_of(seed):
        for change in changes_of(config):
            try:
                changed = config.replace(**change)
                content = json.loads(json.dumps(changed.to_hf()))
            except InputError:
                continue
            assert HybridConfig.from_hf(content) == changed, change
            seen |= {field: seen.get(field, 0) + 1 for field in change}
    assert seen["norm_eps"] == 18 and seen["max_position_embeddings"] == 27 and seen["multipliers"] == 9


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize(
    ("change", "said"),
    (
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "all layers"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "part of each head"),
        ({"rope_parameters": {"rope_theta": 7.0}}, "different things"),
        ({"rope_theta": "big"}, 'rope_theta is "big"'),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "factor 0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4, "beta_slow": 40}}, "beta_slow 40"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}, "rope_parameters": {"rope_theta": 12345.0}}, "different"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor 1.0"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": "long"}, "original_max_position_embeddings"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": math.inf}, "is inf; expected a whole number"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 0}, "original_max_position_embeddings 0"),
        ({"rope_scaling": LLAMA3 | {"factor": "eight"}}, 'rope_scaling.factor is "eight"'),
        ({"attention_bias": 1}, "attention_bias is 1"),
        ({"use_sliding_window": True}, "sliding"),
        ({"layer_types": ["sliding_attention"]}, "sliding"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_hidden_layers": "absent"}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": "absent"}, "hidden_size"),
        ({"num_attention_heads": "absent"}, "num_attention_heads"),
        ({"head_dim": 7}, "even head_dim"),
    ),
)
def test_wrong_configs_are_refused(family: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        HybridConfig.from_hf(spelled(family, **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    (
        ({"pattern": "*--*"}, "whole blocks"),
        ({"pattern": "*-*"}, "whole blocks"),
        ({"rope_theta": None}, "rope_theta"),
        ({"qk_norm": True}, "qk_norm is True"),
        ({"activation": "relu2", "gated_mlp": False}, "activation is 'relu2'"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 40}, "no multiple"),
        ({"family": "qwen3"}, "qk_norm is False"),
        ({"family": "qwen3", "qk_norm": True, "mlp_bias": True}, "mlp_bias is True"),
        ({"family": "nemotron_h"}, "activation is 'silu'"),
    ),
)
def test_what_cannot_be_said_is_not_written(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    config = dense_config(8, "llama").replace(**change)
    with pytest.raises(InputError, match=said) as caught:
        save_model(HybridLM(config), tmp_path / "out")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
