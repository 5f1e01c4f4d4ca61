"""nemotron_h_puzzle: nemotron_h whose layers of experts have widths and choices of their own, one of `block_configs` a
layer. Source: NVIDIA's Nemotron-Labs-3-Puzzle; vLLM reads it, transformers has no class of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import moe
from ..errors import InputError
from ..variants import LETTERS
from . import nemotron_h

if TYPE_CHECKING:
    from ..config import HybridConfig

NAME, BLOCKS, STEP_BLOCKS = "nemotron_h_puzzle", "block_configs", "mtp_block_configs"
OWN = ("moe_intermediate_size", "num_experts_per_tok")  # of each layer
SHARED = ("n_routed_experts", "moe_latent_size", "moe_shared_expert_intermediate_size")  # the same in all
TYPES = {"M": "mamba", "*": "attention", "-": "mlp", moe.KIND.letter: "moe"}


def read_puzzle(hf: Mapping[str, Any]) -> dict[str, Any]:
    blocks, ahead = (blocks_of(hf, name) for name in (BLOCKS, STEP_BLOCKS))
    if not blocks:
        raise InputError(f"config: {BLOCKS} is missing; {NAME} has one of them for each layer")
    if not hf.get(nemotron_h.STEPS):  # what is said of steps that there are none of
        ahead = []
    experts = [block for block in (*blocks, *ahead) if block["block_type"] == TYPES[moe.KIND.letter]]
    plain = {name: value for name, value in hf.items() if name not in (BLOCKS, STEP_BLOCKS)}
    plain["layers_block_type"] = [block["block_type"] for block in blocks]
    if ahead:
        plain[nemotron_h.STEP_TYPES] = [block["block_type"] for block in ahead]
    for name in SHARED:
        values = [block.get(name) for block in experts]
        if any(value != values[0] for value in values):
            raise InputError(f"config: {BLOCKS} have several values of {name}; expected one, as every tool here has")
        if values:
            plain[name] = values[0]
    pairs = list(dict.fromkeys(pair_of(block) for block in experts))
    plain |= {name: max((pair[number] for pair in pairs), default=None) for number, name in enumerate(OWN)}
    fields = nemotron_h.read_nemotron_h(plain) | {"family": NAME}
    if len(pairs) > 1:
        if len(pairs) > len(LETTERS):
            raise InputError(f"config: {BLOCKS} have {len(pairs)} kinds of experts; at most {len(LETTERS)} are known")
        letters = dict(zip(pairs, LETTERS, strict=False))
        fields["variants"] = tuple((letter, *pair) for pair, letter in letters.items())
        for field, own in (("pattern", blocks), ("mtp_pattern", ahead)):
            if own:
                fields[field] = "".join(
                    letter if letter != moe.KIND.letter else letters[pair_of(block)]
                    for letter, block in zip(fields[field], own, strict=True)
                )
    return fields


def blocks_of(hf: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    """The blocks of a list. Raises InputError where they are none."""
    blocks = hf.get(name) or []
    if not isinstance(blocks, list) or not all(
        isinstance(block, Mapping) and isinstance(block.get("block_type"), str) for block in blocks
    ):
        raise InputError(f'config: {name} is no list of blocks such as {{"block_type": "mamba"}}')
    return blocks


def pair_of(block: Mapping[str, Any]) -> tuple[int, int]:
    """An expert's width, and how many a token chooses. Raises InputError."""
    pair = tuple(block.get(name) for name in OWN)
    for name, value in zip(OWN, pair, strict=True):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"config: {name} of a block is {value!r}; expected a whole number of at least 1")
    return pair  # type: ignore[return-value]


def write_puzzle(config: HybridConfig) -> dict[str, Any]:
    pairs = {letter: pair for letter, *pair in config.variants}
    pairs[moe.KIND.letter] = [getattr(config, name) for name in OWN]

    def block(letter: str) -> dict[str, Any]:
        if letter not in pairs:
            return {"block_type": TYPES[letter]}
        shared = {name: value for name in SHARED if (value := getattr(config, name))}
        return {"block_type": TYPES[moe.KIND.letter], **dict(zip(OWN, pairs[letter], strict=True)), **shared}

    def plain(pattern: str) -> str:
        return "".join(moe.KIND.letter if letter in pairs else letter for letter in pattern)

    same = config.replace(
        pattern=plain(config.pattern), mtp_pattern=plain(config.mtp_pattern), variants=(), family="nemotron_h"
    )
    hf = nemotron_h.write_nemotron_h(same) | {"num_hidden_layers": None}
    for name in ("hybrid_override_pattern", nemotron_h.STEP_PATTERN, *OWN):
        hf.pop(name, None)
    hf["layers_block_type"] = [TYPES[letter] for letter in same.pattern]
    hf[BLOCKS] = [block(letter) for letter in config.pattern]
    if config.mtp_steps:
        hf[STEP_BLOCKS] = [block(letter) for letter in config.mtp_pattern]
    return hf


FAMILY = dataclasses.replace(
    nemotron_h.FAMILY, read=read_puzzle, write=write_puzzle, architecture="NemotronHPuzzleForCausalLM",
    transformers=False,
)  # fmt: skip
