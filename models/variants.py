"""Layers of experts that differ from layer to layer in an expert's width and in how many a token chooses, as Puzzle
leaves them (nemotron_h_puzzle): each such pair is a kind of layers with a letter of its own, `HybridConfig.variants`
says which.

Their widths are no axis: a config.json has one for each layer already, and what chooses among units here would give
all of them the same. Experts, the shared expert and the stream are cut as in any layer of experts.
"""

from __future__ import annotations

import dataclasses
import functools
import string
from typing import TYPE_CHECKING, Any

from . import moe
from .axes import Dimension, Factor, Parts
from .errors import InputError
from .layer import LayerKind

if TYPE_CHECKING:
    from .config import HybridConfig

LETTERS = string.ascii_lowercase + string.digits + "αβγδεζηθικλμνξοπρστυφχψω"
OWN_AXES, OWN_FIELDS = ("expert_ffn", "top_k"), ("moe_intermediate_size", "num_experts_per_tok")


@functools.cache
def variant_kind(letter: str) -> LayerKind:
    """The kind of layers that a letter of `LETTERS` stands for, whatever its pair is in a config."""
    return dataclasses.replace(
        moe.KIND,
        letter=letter,
        like=moe.KIND.letter,
        fields=tuple(name for name in moe.KIND.fields if name not in OWN_FIELDS),
        check=functools.partial(check_variant, letter),
        tensors=variant_tensors,
        build=build_variant,
        chosen=functools.partial(chosen_of, letter),
        scores={axis: source for axis, source in moe.KIND.scores.items() if axis not in OWN_AXES},
        ranks={field: sharing for field, sharing in moe.KIND.ranks.items() if field not in OWN_FIELDS},
        aligned=(("moe_shared_expert_intermediate_size",),),
        size_label=lambda config: "",
    )


def of_variant(config: HybridConfig, letter: str) -> HybridConfig:
    """A config of one layer of experts as the variant has them. Raises InputError where the config has none such."""
    for own, width, chosen in config.variants:
        if own == letter:
            return config.replace(
                pattern=moe.KIND.letter, variants=(), mtp_steps=0, moe_intermediate_size=width,
                num_experts_per_tok=chosen,
            )  # fmt: skip
    raise InputError(f"config: the pattern {config.pattern} has the unknown letter {letter!r}")


def check_variant(letter: str, config: HybridConfig) -> None:
    of_variant(config, letter)  # which is checked like any other


def chosen_of(letter: str, config: HybridConfig) -> tuple[int, int]:
    return moe.KIND.chosen(of_variant(config, letter))


def build_variant(config: HybridConfig, layer: int, **place: Any) -> moe.MixtureOfExperts:
    return moe.MixtureOfExperts(of_variant(config, config.pattern[layer]), layer, **place)


def variant_tensors(config: HybridConfig, layer: int, hidden: Dimension) -> Parts:
    """Those of any layer of experts, an expert's neurons on no axis."""

    def settled(dimension: Dimension) -> Dimension:
        return tuple(
            tuple(Factor(None, size) if axis is not None and axis.kind in OWN_AXES else Factor(axis, size)
                  for axis, size in segment)
            for segment in dimension
        )  # fmt: skip

    tensors = moe.KIND.tensors(of_variant(config, config.pattern[layer]), layer, hidden)
    return {name: (role, tuple(map(settled, dimensions))) for name, (role, dimensions) in tensors.items()}
