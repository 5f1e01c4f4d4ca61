"""On-policy distillation: before a step the student continues prompts, and learns from its teacher on what it wrote.

The weights that write are those in training, module by module: nothing is copied, and the engine's caches are gone
before the forward pass. What is written follows from the weights, the seed and the number of the step alone, so that a
run that is killed and resumed writes the same. Shapes: [B] rows, [T] tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.divergence import Divergence
from ..kernels.linear_kl import LinearKL, linear_kl
from ..kernels.linear_reverse_kl import linear_reverse_kl
from ..models import processes
from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.generate.engine import Completion, Engine, Request
from ..models.generate.sampling import Sampling
from ..models.hybrid import HybridLM
from .hidden import Pairing
from .losses import Distillation, token_weights
from .options import DistillLoss, DistillOptions
from .parallel import check_share, share
from .rollout_options import Rollouts
from .teacher import CachedTeacher
from .text.prompts import MixedBatch


class Slot(NamedTuple):
    """A prompt's place in a batch: its row, the column where it begins, and its tokens."""

    row: int
    begin: int
    prompt: list[int]


def slots_of(batch: MixedBatch, rows: Sequence[int], width: int) -> list[Slot]:
    """The prompts in some rows of a batch of whole slots."""
    found = []
    for row in (row for row in rows if batch.is_own[row]):
        for begin in range(0, batch.input_ids.shape[1] - width + 1, width):
            size = int((batch.doc_id[row, begin : begin + width] >= 0).sum())
            found.append(Slot(row, begin, batch.input_ids[row, begin : begin + size].tolist()))
    return found


def seed_of(*numbers: int) -> int:
    """A seed that no other numbers share, for all that is known."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()) >> 1


@torch.no_grad()
def continuations_of(
    model: HybridLM, slots: Sequence[Slot], how: Rollouts, ends: tuple[int, ...] | None, seed: int, step: int
) -> list[Completion]:
    """What the model, as it stands, writes after each prompt, with the log-probability of each token. Raises
    InputError where the caches do not fit the memory."""
    if not slots:
        return []
    requests = [
        Request(
            slot.prompt,
            how.new_tokens,
            Sampling(how.temperature, top_p=how.top_p, seed=seed_of(seed, step, slot.row, slot.begin)),
            stop_tokens=ends,
            logprobs=True,
        )
        for slot in slots
    ]
    with plain_layers(model):
        # An engine of its own for every step: a decoder keeps what it makes of the weights, and those move.
        at_once = min(how.at_once or len(slots), len(slots))
        engine = Engine(model, max_length=how.width, slots=at_once, prepare=False, graphs=False)
        return engine.complete(requests)


@contextlib.contextmanager
def plain_layers(model: HybridLM) -> Iterator[None]:
    """Layers as they stand where a training step runs them compiled, for its own shapes."""
    compiled = [block.__dict__.pop("mix", None) for block in model.layers]
    try:
        yield
    finally:
        for block, mix in zip(model.layers, compiled, strict=True):
            if mix is not None:
                block.__dict__["mix"] = mix


def with_continuations(batch: MixedBatch, written: Sequence[tuple[Slot, list[int]]]) -> MixedBatch:
    """The batch with what was written after its prompts, whose tokens alone have labels."""
    ids, labels, documents = batch.input_ids.clone(), batch.labels.clone(), batch.doc_id.clone()
    for (row, begin, prompt), tokens in written:
        first = begin + len(prompt)
        new = torch.tensor(tokens)
        ids[row, first : first + len(new)] = new
        labels[row, first - 1 : first - 1 + len(new)] = new
        documents[row, first : first + len(new)] = documents[row, begin]
    return dataclasses.replace(batch, input_ids=ids, labels=labels, doc_id=documents)


class OwnText(Distillation):
    """The distance from the teacher on text that the student wrote; `sums` [tokens, -log q of the drawn tokens,
    KL(student || teacher)] are those of all calls since they were taken."""

    def __init__(self, teacher: HybridLM, options: DistillLoss, how: Rollouts, pairing: Pairing | None) -> None:
        super().__init__(teacher, dataclasses.replace(options, divergence=how.divergence, ce_weight=0.0), pairing)
        self.how, self.sums = how, torch.zeros(3, dtype=torch.float64)

    def divergence(self, student: HybridLM, hidden: Tensor, target: Tensor, rows: Any, normalizer: float) -> Tensor:
        how, heads = self.how, (student.head_weight, self.teacher_model.head_weight)
        labels, weights = rows.labels.flatten(), token_weights(rows)
        shared: dict[str, Any] = {"labels": labels, "token_weights": weights, "kl_weight": self.kl_weight,
                                  "normalizer": normalizer}  # fmt: skip
        if how.estimator == "full":
            found = linear_kl(
                hidden, heads[0], target, heads[1],
                temperature=self.options.temperature, divergence=how.divergence, **shared,
            )  # fmt: skip
        else:
            part = {"top_k": min(how.k, len(heads[0]))} if how.estimator == "top_k" else {"clip": how.clip}
            found = linear_reverse_kl(hidden, heads[0], target, heads[1], **part, **shared)
        self.note(found, self.exact(found, hidden, heads, target, labels), labels)
        return found.loss

    @torch.no_grad()
    def exact(
        self, found: LinearKL, hidden: Tensor, heads: tuple[Tensor, Tensor], target: Tensor, labels: Tensor
    ) -> Tensor:
        """KL(student || teacher) [tokens] over the whole vocabulary at temperature 1, where the loss is something
        else."""
        reverse = Divergence.REVERSE.option
        if self.how.estimator == "full" and self.how.divergence == reverse and self.options.temperature == 1:
            return found.kl
        return linear_kl(hidden, heads[0], target, heads[1], divergence=reverse, labels=labels).kl

    def note(self, found: LinearKL, kl: Tensor, labels: Tensor) -> None:
        assert found.cross_entropy is not None
        parts = ((labels >= 0).double().sum(), found.cross_entropy.double().sum(), kl.double().sum())
        self.sums += torch.stack(parts).cpu()


class OnPolicy:
    """A `loss_of` for `trainer.train` and its batches of `text.prompts.prompt_batches`: on the text as `Distillation`,
    on the student's own rows as `how` says. `ends` are the tokens that end a text (None: those of its config).

    Raises InputError where the teacher is a cache: it has said nothing about text that is yet to be written.
    """

    def __init__(
        self,
        teacher: HybridLM | CachedTeacher,
        options: DistillLoss,
        how: Rollouts,
        *,
        seed: int,
        ends: tuple[int, ...] | None = None,
        pairing: Pairing | None = None,
    ) -> None:
        if isinstance(teacher, CachedTeacher):
            raise InputError("distill.rollouts need the teacher itself: a cache has no answer to text that is yet to be"
                             " written; leave teacher_cache out")  # fmt: skip
        self.how, self.seed, self.ends = how, seed, ends
        self.text, self.own = Distillation(teacher, options, pairing), OwnText(teacher, options, how, pairing)
        self.lengths = torch.zeros(3, dtype=torch.float64)

    def at(self, step: int) -> None:
        self.text.at(step)
        self.own.at(step)

    def written(self, model: HybridLM, batch: MixedBatch, step: int) -> MixedBatch:
        """The batch with the model's continuations of its prompts. Every process writes those of its own rows, and has
        to call it. Raises InputError."""
        slots = slots_of(batch, share(len(batch.input_ids)), self.how.width)
        with processes.together():
            completions = continuations_of(model, slots, self.how, self.ends, self.seed, step)
        ended = sum(each.finished == "stop" for each in completions)
        self.lengths = torch.tensor(
            [len(completions), sum(len(each.tokens) for each in completions), ended], dtype=torch.float64
        )
        mine = [(slot, each.tokens) for slot, each in zip(slots, completions, strict=True)]
        return with_continuations(batch, [written for part in processes.gather(mine) for written in part])

    def __call__(self, student: HybridLM, rows: MixedBatch, normalizer: float) -> Tensor:
        own = bool(rows.is_own.any()), not bool(rows.is_own.all())
        parts = [loss(student, rows.of(which), normalizer)
                 for loss, which, some in ((self.own, True, own[0]), (self.text, False, own[1])) if some]  # fmt: skip
        return torch.stack(parts).sum()

    def figures(self) -> dict[str, float]:
        """Of the step's continuations: tokens of one, the share that ended by themselves, and per token -log q of what
        was drawn, which estimates the student's entropy, and KL(student || teacher). Every process has to call it."""
        count, length, ended, tokens, drawn, kl = processes.all_sum(torch.cat((self.lengths, self.own.sums))).tolist()
        self.own.sums = torch.zeros(3, dtype=torch.float64)
        return {
            "rollout_length": length / count,
            "rollout_ended": ended / count,
            "rollout_entropy": drawn / tokens,
            "rollout_kl": kl / tokens,
        }


def stage_loss(
    teacher: HybridLM | CachedTeacher, how: DistillOptions, pairing: Pairing | None, seed: int, ends: tuple[int, ...]
) -> Distillation | OnPolicy:
    """What a stage is trained on, whose text is drawn from `seed`."""
    if how.rollouts is None or not how.own_rows:
        return Distillation(teacher, how.loss, pairing)
    return OnPolicy(teacher, how.loss, how.rollouts, seed=seed, ends=ends, pairing=pairing)


def check_student(how: DistillOptions, longest: int, whole: bool) -> None:
    """Raises InputError where a student of `longest` positions, `whole` in every process or split among them, cannot
    write what a stage is to read, or be sliced as a stage needs it."""
    if how.nested is not None and not whole:
        raise InputError(
            "distill.nested slices matrices that are whole in every process, and these are split among them (FSDP2):"
            " give shard=false"
        )
    if how.rollouts is None or not how.own_rows:
        return
    if not whole:
        raise InputError(
            "distill.rollouts need a student that is whole in every process, and this one is split among them (FSDP2):"
            " give shard=false"
        )
    if how.rollouts.width > longest:
        raise InputError(
            f"distill.rollouts: prompt_tokens and new_tokens make {how.rollouts.width}, and the student is made for"
            f" {longest} (its config's max_position_embeddings); give fewer"
        )


def check_plan(plan: Sequence[DistillOptions], student: HybridConfig, whole: bool) -> None:
    """Raises InputError where the processes cannot share a stage's batches, or a student, `whole` in every process or
    split among them, is none for a stage."""
    for how in plan:
        check_share(how.batch, how.seq_len, how.train.context_parallel)
        check_student(how, student.max_position_embeddings, whole)
