"""The config.json of a small nemotron_h_puzzle model: layers of experts with widths of their own."""

from __future__ import annotations

from typing import Any

from limbeck.tests.helpers import moe_config

WIDTHS = ((12, 2), None, (8, 3), (12, 2), (20, 1))  # of the layers E * E E E: an expert's width, experts a token


def puzzle(**changes: Any) -> dict[str, Any]:
    """The contents of a config.json."""
    plain = moe_config(pattern="ME*EEE", num_experts_per_tok=3, moe_latent_size=16).to_hf()
    gone = ("hybrid_override_pattern", "moe_intermediate_size", "num_experts_per_tok")
    shared = {name: plain[name] for name in ("n_routed_experts", "moe_latent_size")}
    shared |= {"moe_shared_expert_intermediate_size": 20}
    blocks: list[dict[str, Any]] = [{"block_type": "mamba"}]
    for pair in WIDTHS:
        own = {} if pair is None else {"moe_intermediate_size": pair[0], "num_experts_per_tok": pair[1], **shared}
        blocks.append({"block_type": "attention" if pair is None else "moe", **own})
    hf = {name: value for name, value in plain.items() if name not in gone}
    hf |= {"model_type": "nemotron_h_puzzle", "num_hidden_layers": None, "block_configs": blocks,
           "layers_block_type": [block["block_type"] for block in blocks]}  # fmt: skip
    return hf | changes
