"""How to train, checked before anything is read."""

from __future__ import annotations

import dataclasses
import math

from ..models.errors import InputError

SCHEDULES = ("cosine", "wsd")
OPTIMIZERS = ("adamw", "muon")
KEEPS = ("last", "best")


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How to train. Rates are per step; `micro_batch` rows go through the model at once in each process (0: all).

    `schedule`: "cosine" from `learning_rate` to `final_ratio` times it, or "wsd": constant, then linear to
    `final_ratio` over the last `decay_fraction` of the steps; both after a linear warm-up. `optimizer`: "adamw", or
    "muon" for the matrices of the layers with AdamW (at `adamw_ratio` times the rate) for the rest.

    What is left in the end: `keep` the "last" weights or the "best" by held-out figures; with `ema_decay` above 0
    their exponential moving average; with `average_states` above 1 the mean of so many last states.
    `activation_checkpointing` keeps a layer's input alone and runs the layer twice; `compile` goes through
    torch.compile. A step whose loss or gradient is not finite is skipped; `max_skipped` of them in a row end the
    run, as do `data_timeout` seconds without a batch.
    """

    steps: int
    learning_rate: float
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup_steps: int = 20
    decay_fraction: float = 0.3
    final_ratio: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    adamw_ratio: float = 1.0
    clip_norm: float = 1.0
    micro_batch: int = 0
    save_every: int = 100
    evaluate_every: int = 0
    log_every: int = 10
    keep: str = "last"
    ema_decay: float = 0.0
    average_states: int = 1
    activation_checkpointing: bool = False
    compile: bool = False
    max_skipped: int = 10
    data_timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.save_every < 1 or self.log_every < 1 or self.micro_batch < 0:
            raise InputError(
                f"training: steps ({self.steps}), save_every ({self.save_every}) and log_every ({self.log_every})"
                f" must be at least 1, micro_batch ({self.micro_batch}) at least 0"
            )
        for name, known in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS), ("keep", KEEPS)):
            if getattr(self, name) not in known:
                raise InputError(f"training: {name} {getattr(self, name)!r} is unknown; known: {', '.join(known)}")
        if not (0 < self.learning_rate < math.inf and self.clip_norm > 0):
            raise InputError(
                f"training: learning_rate ({self.learning_rate}) and clip_norm ({self.clip_norm}) must be more than 0"
            )
        if self.max_skipped < 1 or self.average_states < 1 or not self.data_timeout > 0:
            raise InputError(
                f"training: max_skipped ({self.max_skipped}) and average_states ({self.average_states}) must be at"
                f" least 1, data_timeout ({self.data_timeout}) more than 0"
            )
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"training: ema_decay is {self.ema_decay}; expected 0 (none) to below 1, such as 0.999")
        if self.average_states > 1 and (self.ema_decay or self.keep == "best"):
            raise InputError(
                f"training: average_states={self.average_states} is a mean of the last states, and goes neither with"
                " ema_decay nor with keep=best; leave one of them out"
            )
        if self.keep == "best" and not self.evaluate_every:
            raise InputError("training: keep=best needs held-out figures; give evaluate_every, such as 100")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "cosine":
            done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
            share = (1 + math.cos(math.pi * done)) / 2
        else:
            share = min(1.0, (self.steps - step) / max(1.0, self.decay_fraction * self.steps))
        return self.learning_rate * (self.final_ratio + (1 - self.final_ratio) * share)
