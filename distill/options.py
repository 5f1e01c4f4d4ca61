"""How to train and what to learn from a teacher: options, checked before anything is read."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ..kernels.divergence import DIVERGENCES, Divergence
from ..models.errors import InputError
from ..models.quantities import check_between
from ..models.rounding import ALIASES, ROUNDINGS
from .nested_options import WHERE, NestedSizes, check_nested
from .rollout_options import RolloutChanges, Rollouts, changed_rollouts, changes_of, given

SCHEDULES = ("cosine", "wsd")
OPTIMIZERS = ("adamw", "muon")
KEEPS = ("last", "best")
SHAPES = ("linear", "cosine")
COMPARISONS = ("auto", "kept", "fitted")
TEACHER_DTYPES = ("float32", "bfloat16", "float16", "float64")
SPLIT = "context_parallel"
LEFT_OUT = ("stages", "rollouts", "nested")  # of a fingerprint where they are not there, as before there were any


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How to train. Rates are per step; `micro_batch` rows go through the model at once in each process (0: all).

    `schedule`: "cosine" from `learning_rate` to `final_ratio` times it, or "wsd": constant, then linear to
    `final_ratio` over the last `decay_fraction` of the steps; both after a linear warm-up. `optimizer`: "adamw", or
    "muon" for the matrices of the layers with AdamW (at `adamw_ratio` times the rate) for the rest.

    What is left in the end: `keep` the "last" weights or the "best" by held-out figures; with `ema_decay` above 0 their
    exponential moving average; with `average_states` above 1 the mean of so many last states.
    `activation_checkpointing` keeps a layer's input alone and runs the layer twice; `compile` goes through
    torch.compile. `quantize` trains through the rounding of an export format (quantised.py); `context_parallel`
    processes split each row among them (row_parts.py). `expert_balance` above 0 moves the correction biases of a
    mixture's routers so far after each step (balance.py); at 0 they stay as they are. A step whose loss or gradient is
    not finite is skipped; `max_skipped` of them in a row end the run, as do `data_timeout` seconds without a batch.
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
    quantize: str | None = None
    context_parallel: int = 1
    expert_balance: float = 0.0
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
        object.__setattr__(self, "quantize", ALIASES.get(self.quantize, self.quantize))
        if self.quantize is not None and self.quantize not in ROUNDINGS:
            raise InputError(f"training: quantize {self.quantize!r} is unknown; known: {', '.join(ROUNDINGS)}")
        if not (0 < self.learning_rate < math.inf and self.clip_norm > 0):
            raise InputError(
                f"training: learning_rate ({self.learning_rate}) and clip_norm ({self.clip_norm}) must be more than 0"
            )
        if self.max_skipped < 1 or self.average_states < 1 or not self.data_timeout > 0:
            raise InputError(
                f"training: max_skipped ({self.max_skipped}) and average_states ({self.average_states}) must be at"
                f" least 1, data_timeout ({self.data_timeout}) more than 0"
            )
        check_between(self, "training: ", 0, math.inf, "warmup_steps", "evaluate_every", "weight_decay", "adamw_ratio")
        check_between(self, "training: ", 0, 1, "decay_fraction", "final_ratio")
        check_between(self, "training: ", 0, 1, "beta1", "beta2", below=True)
        if self.context_parallel < 1:
            raise InputError(f"training: context_parallel is {self.context_parallel}; expected 1 (rows whole) or more")
        if self.context_parallel > 1 and self.compile:
            raise InputError(
                "training: compile does not go with context_parallel, whose exchanges torch.compile would not see;"
                " leave one of them out"
            )
        if not 0 <= self.expert_balance < math.inf:
            raise InputError(f"training: expert_balance is {self.expert_balance}; expected 0 (none) or more, as 0.001")
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


@dataclasses.dataclass(frozen=True)
class Ramp:
    """From `start` at step 0 to `end` at step `steps` and after, in a straight line or half a cosine."""

    start: float
    end: float
    steps: int
    shape: str = "linear"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"loss: a weight's steps are {self.steps}; expected at least 1")
        if self.shape not in SHAPES:
            raise InputError(f"loss: a weight's shape {self.shape!r} is unknown; known: {', '.join(SHAPES)}")


LossWeight = float | Ramp


def weight_at(weight: LossWeight, step: int) -> float:
    """The weight of a step, counted from 0."""
    if not isinstance(weight, Ramp):
        return weight
    share = min(step / weight.steps, 1.0)
    if weight.shape == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return weight.start + (weight.end - weight.start) * share


def greatest(weight: LossWeight) -> float:
    return max(weight.start, weight.end) if isinstance(weight, Ramp) else weight


def check_weight(name: str, weight: LossWeight) -> None:
    """Raises InputError where a weight is negative at some step."""
    least = min(weight.start, weight.end) if isinstance(weight, Ramp) else weight
    if not 0 <= least <= greatest(weight) < math.inf:
        raise InputError(f"loss: {name} is {weight}; expected 0 or more")


@dataclasses.dataclass(frozen=True)
class HiddenLoss:
    """`streams` pairs of streams, evenly spread over the layers, or the `pairs` (student, teacher) given; `compare` on
    the kept channels, by a fitted map, or "auto": kept where they are known. The map is fitted on `fit_tokens`."""

    weight: LossWeight = 0.0
    streams: int = 4
    pairs: tuple[tuple[int, ...], ...] = ()
    compare: str = "auto"
    fit_tokens: int = 16384

    def __post_init__(self) -> None:
        check_weight("hidden.weight", self.weight)
        if self.compare not in COMPARISONS:
            raise InputError(f"loss: hidden.compare {self.compare!r} is unknown; known: {', '.join(COMPARISONS)}")
        if self.streams < 1 or self.fit_tokens < 1:
            raise InputError(
                f"loss: hidden.streams ({self.streams}) and hidden.fit_tokens ({self.fit_tokens}) must be at least 1"
            )
        if any(len(pair) != 2 for pair in self.pairs):
            raise InputError(f"loss: hidden.pairs is {self.pairs}; expected [student, teacher] streams each")


@dataclasses.dataclass(frozen=True)
class DistillLoss:
    """kl_weight T^2 divergence + ce_weight cross-entropy + hidden.weight distance, per token, at the temperature T.

    `tail`: of a cached teacher, whether the tokens that it does not name count as one bucket or as impossible.
    `mtp_weight`: of the divergence of multi-token prediction, whose layers alone it trains; with 0 they are frozen.
    """

    divergence: str = Divergence.FORWARD.option
    temperature: float = 1.0
    kl_weight: LossWeight = 1.0
    ce_weight: LossWeight = 0.0
    hidden: HiddenLoss = dataclasses.field(default_factory=HiddenLoss)
    tail: bool = True
    mtp_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise InputError(f"loss: divergence {self.divergence!r} is unknown; known: {', '.join(DIVERGENCES)}")
        check_between(self, "loss: ", 0, math.inf, "temperature", above=True)
        check_between(self, "loss: ", 0, math.inf, "mtp_weight")
        check_weight("kl_weight", self.kl_weight)
        check_weight("ce_weight", self.ce_weight)
        if not any(greatest(weight) > 0 for weight in (self.kl_weight, self.ce_weight, self.hidden.weight)):
            raise InputError("loss: kl_weight, ce_weight and hidden.weight are all 0; expected one above 0")

    @property
    def hidden_weighs(self) -> bool:
        """Whether hidden states are compared at any step."""
        return greatest(self.hidden.weight) > 0

    @property
    def reads_teacher(self) -> bool:
        return greatest(self.kl_weight) > 0 or self.hidden_weighs


@dataclasses.dataclass(frozen=True)
class Correction:
    """A teacher's own training on the text before it teaches (arXiv 2408.11796): cross-entropy, for so many steps, or
    as many as read so many tokens; everything else as the student's."""

    steps: int = 0
    tokens: float = 0
    learning_rate: float = 1e-5

    def __post_init__(self) -> None:
        check_between(self, "distill.teacher_correction.", 0, math.inf, "steps", "tokens")
        check_between(self, "distill.teacher_correction.", 0, math.inf, "learning_rate", above=True)
        if (self.steps > 0) == (self.tokens > 0):
            raise InputError(
                f"distill.teacher_correction: steps is {self.steps}, tokens {self.tokens:g}; give one of the two"
            )


TrainChanges = changes_of(TrainOptions, "TrainChanges")


@dataclasses.dataclass(frozen=True)
class StageOptions(TrainChanges):  # type: ignore[misc, valid-type]
    """What a stage does otherwise than the whole; `tokens` stands for steps, as many as read that many tokens. Where
    the whole has no rollouts, those of a stage begin from their defaults."""

    tokens: float | None = None
    seq_len: int | None = None
    batch: int | None = None
    evaluate_tokens: int | None = None
    rollouts: RolloutChanges | None = None

    @property
    def changes(self) -> dict[str, Any]:
        found = given(dataclasses.asdict(self))
        return found if self.rollouts is None else found | {"rollouts": given(found["rollouts"])}


@dataclasses.dataclass(frozen=True)
class DistillOptions:
    """What conf/distill/ sets: the loss, the schedule, and the tokens; `repack` cuts an epoch's rows anew. Each of
    `stages` starts from the weights that the one before it left; none is one stage as it stands. With `rollouts` some
    rows, or all, are text that the student writes itself; with `nested` it is several sizes in one."""

    loss: DistillLoss
    train: TrainOptions
    seq_len: int
    batch: int
    evaluate_tokens: int
    repack: bool = True
    teacher_dtype: str | None = None
    teacher_offload: bool = False
    teacher_correction: Correction | None = None
    stages: tuple[StageOptions, ...] = ()
    rollouts: Rollouts | None = None
    nested: NestedSizes | None = None

    def __post_init__(self) -> None:
        check_between(self, "distill: ", 1, math.inf, "seq_len", "batch")
        check_between(self, "distill: ", 0, math.inf, "evaluate_tokens")
        if not self.stages and self.nested is not None:
            check_nested(self)
        if not self.stages and self.own_rows:
            self.check_rollouts()
        if self.teacher_dtype not in (None, *TEACHER_DTYPES):
            raise InputError(f"dtype {self.teacher_dtype!r} is unknown; known: {', '.join(TEACHER_DTYPES)}")
        if self.loss.mtp_weight and self.train.context_parallel > 1:
            raise InputError(
                f"distill: loss.mtp_weight is {self.loss.mtp_weight:g}, and multi-token prediction reads beyond the end"
                " of a part of a row; train it with context_parallel=1"
            )
        self.plan()

    def plan(self) -> tuple[DistillOptions, ...]:
        """The stages in their order, each with everything that it does. Raises InputError."""
        return tuple(self.stage(number) for number in range(len(self.stages))) or (self,)

    def stage(self, number: int) -> DistillOptions:
        where, changes = f"distill.stages[{number}]", self.stages[number].changes
        tokens = changes.pop("tokens", None)
        if tokens is not None and "steps" in changes:
            raise InputError(f"{where} has both tokens and steps; give one of the two")
        rollouts = changed_rollouts(self.rollouts, changes.pop("rollouts", None))
        own = {name: changes.pop(name) for name in ("seq_len", "batch", "evaluate_tokens") if name in changes}
        train = dataclasses.replace(self.train, **changes)
        stage = dataclasses.replace(self, train=train, stages=(), rollouts=rollouts, **own)
        if tokens is None:
            return stage
        if not 1 <= tokens < math.inf:
            raise InputError(f"{where}.tokens is {tokens:g}; expected at least 1")
        return dataclasses.replace(stage, train=dataclasses.replace(train, steps=stage.steps_for(tokens)))

    def steps_for(self, tokens: float) -> int:
        """As many as read that many tokens."""
        return math.ceil(tokens / (self.batch * self.seq_len))

    def check_rollouts(self) -> None:
        """Raises InputError where the student's own rows do not go with the other options."""
        rollouts, loss = self.rollouts, self.loss
        assert rollouts is not None
        if rollouts.width > self.seq_len:
            raise InputError(
                f"distill.rollouts: prompt_tokens ({rollouts.prompt_tokens}) and new_tokens ({rollouts.new_tokens})"
                f" make {rollouts.width}, and rows have {self.seq_len} tokens (distill.seq_len); give fewer, or longer"
                " rows"
            )
        if self.train.context_parallel > 1:
            split = self.train.context_parallel
            raise InputError(f"distill.rollouts: the student writes whole rows; context_parallel is {split}, not 1")
        if greatest(loss.kl_weight) == 0:
            raise InputError(
                "distill.rollouts: on its own text the student learns from the teacher alone; give a kl_weight above 0"
            )
        if self.own_rows == self.batch and greatest(loss.ce_weight) > 0:
            raise InputError(
                "distill.rollouts: ce_weight counts on rows of the text, and there is none; give ce_weight=0, or"
                " a share below 1"
            )
        if rollouts.estimator != "full" and loss.temperature != 1:
            raise InputError(
                f"distill.rollouts.estimator={rollouts.estimator} is at temperature 1, not loss.temperature="
                f"{loss.temperature:g}; change it, or take estimator=full"
            )

    @property
    def own_rows(self) -> int:
        """Rows of a batch that the student writes itself."""
        return 0 if self.rollouts is None else self.rollouts.rows(self.batch)

    @property
    def text_rows(self) -> int:
        """Rows of a batch that are read from the text."""
        return self.batch - self.own_rows

    @property
    def reads(self) -> tuple[int, int]:
        """Rows of the text that all its steps read, and tokens a row."""
        return self.train.steps * self.text_rows, self.seq_len

    @property
    def rows(self) -> int:
        """Rows that go through a model at once."""
        return self.train.micro_batch or self.batch

    @property
    def tokens(self) -> int:
        """Tokens that all steps of all stages read."""
        return sum(stage.train.steps * stage.batch * stage.seq_len for stage in self.plan())

    @property
    def chosen(self) -> dict[str, Any]:
        """The options that a fingerprint is made of; who computes what of a row is none of them."""
        stages = [stage.changes for stage in self.stages]
        options = dataclasses.asdict(self) | {"stages": stages}
        for train in (options["train"], *stages):
            train.pop(SPLIT, None)
        return {name: value for name, value in options.items() if value or name not in LEFT_OUT}

    def correction(self) -> DistillOptions:
        """How the teacher is trained before it teaches."""
        correction = self.teacher_correction
        assert correction is not None
        steps = correction.steps or self.steps_for(correction.tokens)
        # The teacher answers in its own precision, and nothing is measured meanwhile.
        plain_weights: dict[str, Any] = {"quantize": None, "keep": "last", "evaluate_every": 0}
        train = dataclasses.replace(self.train, steps=steps, learning_rate=correction.learning_rate, **plain_weights)
        plain = dataclasses.replace(self, stages=(), rollouts=None, nested=None, teacher_correction=None)
        return dataclasses.replace(plain, train=train, repack=True)

    def check_one_size(self, where: str) -> None:
        """Raises InputError where several sizes would be trained at once, which only `limbeck distill` does."""
        if self.nested is not None:
            raise InputError(f"{where}: {WHERE} is read by limbeck distill alone; leave it out")
