"""How a model is scored: the options of `limbeck score`, and what of them stands for which metric."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from pydantic import PositiveInt

from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.kinds import check_sources, kind_by_key
from ..models.quantities import check_between
from .depth import step_size
from .width_metrics import AGGREGATED, ActivationScores, MagnitudeScores, RandomScores, TaylorScores, WidthMetric


@dataclasses.dataclass(frozen=True)
class Importance:
    """How to score; see conf/importance/, where each method has only what it reads."""

    method: Literal["activation", "taylor", "magnitude", "random"]
    remove_layers: int | None
    pairs: bool
    min_layers: dict[str, int]
    depth_tokens: PositiveInt = 8192
    depth_batch: PositiveInt = 1
    depth_metric: Literal["mse", "kl", "perplexity", "block_influence"] = "mse"
    iterative: bool = True
    depth_table: Literal["first", "all"] = "first"
    tokens: PositiveInt = 16384
    aggregate_batch: str = "l2"
    aggregate_sequence: str = "mean"
    mamba_source: str = "x"
    ffn_source: str = "pre"
    state_source: str = "now"
    expert_source: str = "reap"
    times_output: bool = False

    def __post_init__(self) -> None:
        check_between(self, "importance.", 0, math.inf, "remove_layers")
        check_sources(self, "importance.", **AGGREGATED)
        for kind, number in self.min_layers.items():
            kind_by_key(kind, "importance.min_layers")
            if number < 0:
                raise InputError(f"importance.min_layers.{kind} is {number}; expected at least 0")

    def width_metric(self, seed: int) -> WidthMetric:
        """What scores the widths; `seed` is for the random baseline."""
        if self.method == "random":
            return RandomScores(seed)
        if self.method == "magnitude":
            return MagnitudeScores()
        if self.method == "taylor":
            return TaylorScores()
        return ActivationScores(
            self.aggregate_batch, self.aggregate_sequence, self.mamba_source, self.ffn_source, self.state_source,
            self.expert_source, self.times_output,
        )  # fmt: skip

    def settled(self, config: HybridConfig, removed: int | None = None) -> Importance:
        """With the number of layers to put in order, as the config's num_hidden_layers counts them: where none is given
        as many as are `removed`, or one step's."""
        if self.remove_layers is not None:
            return self
        count = step_size(config, self.pairs) // config.block_size if removed is None else removed
        return dataclasses.replace(self, remove_layers=count)
