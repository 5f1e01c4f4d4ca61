"""Whether a training step fits a card, from configs alone: what a process holds, line by line, at the fullest moment.

Between steps: the student's weights; where they have less than four bytes, float32 copies that the optimizer moves;
AdamW's two moments a weight or Muon's one for the layers' matrices, and an average of the weights, all in the dtype
that the optimizer moves, as gradients are; the teacher's weights. Processes share them (FSDP2), and then keep no narrow
copy. During a step, in turn: the teacher's forward pass, the loss, its backward, that of every layer from last to
first, the embedding's, the optimizer. Gradients are all there from the second micro-batch on, else they come layer
after layer. FSDP2 has two blocks at a time in one piece, and the head for the whole pass; in the backward their
gradients as well, and a block's once more in the dtype in which it is summed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch

from ..axes import MATRICES, tensor_table
from ..config import HybridConfig
from ..errors import InputError
from .inference import largest
from .parameters import count_parameters, kind_sizes
from .trace_step import StepLoad, forward_peak, step_trace

LINES = (
    "student weights",
    "master copies",
    "gradients",
    "optimizer state",
    "weight average",
    "teacher weights",
    "gathered layers",
    "kept for the backward",
    "loss",
    "layer at work",
)
TEACHERS = ("online", "cached", "none")
OPTIMIZERS = ("adamw", "muon")
DEVICES = ("cpu", "cuda")
MOST_PROCESSES = 1024


@dataclasses.dataclass(frozen=True)
class Training:
    """What decides the memory of a step: rows that go through the models at once, tokens a row, and how.

    `batch` are the rows of a step, in all processes: more of them than go through at once come in several
    micro-batches, with gradients there from the start (None: so it is taken to be). `packed`: rows hold documents, as
    in all training here. `dtype` is that of weights in use and of activations; the optimizer moves float32 copies of
    less, and with `quantized` those that rounded weights are made from. `teacher` is "online", "cached" (its top-k
    tokens, from files) or "none" (cross-entropy). `processes` share weights, gradients and the optimizer's state
    (FSDP2).
    """

    micro_batch: int = 1
    seq_len: int = 8192
    batch: int | None = None
    packed: bool = True
    dtype: torch.dtype = torch.bfloat16
    optimizer: str = "adamw"
    checkpointing: bool = False
    average: bool = False
    quantized: bool = False
    teacher: str = "online"
    teacher_dtype: torch.dtype = torch.bfloat16
    teacher_offload: bool = False
    processes: int = 1
    device: str = "cuda"

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or self.seq_len < 1 or self.processes < 1:
            raise InputError(
                f"train: micro_batch ({self.micro_batch}), seq_len ({self.seq_len}) and processes ({self.processes})"
                " must be at least 1"
            )
        if self.batch is not None and (self.batch < 1 or self.batch % self.processes):
            raise InputError(
                f"train: a batch of {self.batch} rows is not for {self.processes} processes; give a multiple of them"
            )
        for name, known in (("teacher", TEACHERS), ("optimizer", OPTIMIZERS), ("device", DEVICES)):
            if getattr(self, name) not in known:
                raise InputError(f"train: {name} is {getattr(self, name)!r}; known: {', '.join(known)}")

    @property
    def accumulates(self) -> bool:
        return self.batch is None or self.batch // self.processes > self.micro_batch

    @property
    def width(self) -> int:
        """Bytes a number."""
        return self.dtype.itemsize

    @property
    def stored(self) -> int:
        """Bytes of a number that the optimizer moves, and of its gradient."""
        return max(4, self.width)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def load(self, teacher: HybridConfig | None) -> StepLoad:
        """What of it decides how much memory layers and loss take."""
        return StepLoad(
            micro_batch=self.micro_batch,
            seq_len=self.seq_len,
            packed=self.packed,
            dtype=self.dtype,
            on_gpu=self.on_gpu,
            checkpointing=self.checkpointing,
            gradients="elsewhere" if self.processes > 1 else "added" if self.accumulates else "new",
            teacher=self.teacher,
            teacher_hidden=0 if teacher is None else teacher.hidden_size,
            teacher_dtype=self.teacher_dtype,
        )


@dataclasses.dataclass(frozen=True)
class TrainReport:
    """The moments of a step, each with its lines in bytes (those of `LINES` that it has)."""

    moments: dict[str, dict[str, int]]

    @property
    def fullest(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def lines(self) -> dict[str, int]:
        """All lines at the fullest moment."""
        return {line: self.moments[self.fullest].get(line, 0) for line in LINES}

    @property
    def total(self) -> int:
        return sum(self.lines.values())


def train_memory(student: HybridConfig, teacher: HybridConfig | None, training: Training) -> TrainReport:
    """Bytes of one process at the moments of a step. Raises InputError where an online teacher's config is missing."""
    if training.teacher == "online" and teacher is None:
        raise InputError("train: an online teacher needs a config; give teacher=, or training.teacher=cached")
    teacher = teacher if training.teacher == "online" else None
    carried = (count_parameters(student) - count_parameters(student.replace(mtp_steps=0))) * training.stored
    student = student.replace(mtp_steps=0)  # multi-token prediction is carried along, whole in every process
    teacher = None if teacher is None else teacher.replace(mtp_steps=0)
    always, moments = standing(student, teacher, training), {}
    always["student weights"] += carried
    for name, lines in moments_of(student, teacher, training):
        assert set(lines) <= set(LINES), lines
        moments[name] = always | lines
    return TrainReport(moments)


def standing(student: HybridConfig, teacher: HybridConfig | None, training: Training) -> dict[str, int]:
    """What is there between the steps."""
    size, single, stored = count_parameters(student), 0, training.stored
    if training.optimizer == "muon":
        single = sum(kind_sizes(student)[letter].matrices for letter in student.pattern)
    narrow = training.width < stored
    held = 0 if teacher is None or training.teacher_offload else count_parameters(teacher)
    return {
        "student weights": 0 if narrow and training.processes > 1 else shard(size * training.width, training),
        "master copies": shard(size * stored, training) if narrow or training.quantized else 0,
        "optimizer state": shard((2 * size - single) * stored, training),
        "weight average": shard(size * stored, training) if training.average else 0,
        "teacher weights": shard(held * training.teacher_dtype.itemsize, training),
    }


def shard(size: int, training: Training) -> int:
    """A process's share."""
    return -(-size // training.processes)


def moments_of(
    student: HybridConfig, teacher: HybridConfig | None, training: Training
) -> Iterator[tuple[str, dict[str, int]]]:
    """The moments of a step with what they hold beside `standing`."""
    b, stored = training.width, training.stored
    head, sizes = student.vocab_size * student.hidden_size, kind_sizes(student)
    gradients = shard(count_parameters(student) * stored, training)
    before = gradients if training.accumulates else 0
    apart, target, load = training.processes > 1, 0, training.load(teacher)
    whole = pieces(student, b) if apart else 0
    turned = 2 * whole + max(sizes[kind].parameters for kind in student.pattern) * stored * apart
    if teacher is not None:
        c, away = training.teacher_dtype.itemsize, apart or training.teacher_offload
        target = teacher.vocab_size * teacher.hidden_size * c * away
        work = forward_peak(teacher, load.forward_alone())
        yield (
            "teacher forward",
            {"gradients": before, "gathered layers": pieces(teacher, c) * away, "layer at work": work},
        )
    step = step_trace(student, load)
    kept = [step.kept[kind] for kind in student.pattern]
    loss = {
        "gradients": before,
        "gathered layers": whole + target,
        "kept for the backward": sum(kept) + step.final + step.shared,
    }
    yield "loss", loss | {"loss": step.loss}
    yield "loss backward", loss | {"gathered layers": whole, "loss": step.loss_backward}
    done = 0 if student.tie_word_embeddings else head * stored
    for layer in reversed(range(student.num_layers)):
        kind = student.pattern[layer]
        done += sizes[kind].parameters * stored
        yield (
            f"layer {layer} ({kind}) backward",
            {
                "gradients": before or shard(done, training),
                "gathered layers": turned,
                "kept for the backward": sum(kept[: layer + 1]) + step.shared,
                "layer at work": step.backward[kind] - kept[layer],
            },
        )
    # Of several processes each has the embedding's gradient whole.
    yield (
        "embedding backward",
        {
            "gradients": gradients,
            "gathered layers": head * (3 * b + stored) * apart,
            "layer at work": step.embedding,
        },
    )
    yield "optimizer", {"gradients": gradients, "layer at work": muon_work(student, training)}


def pieces(config: HybridConfig, width: int) -> int:
    """The two largest blocks and the head, in one piece."""
    sizes = sorted(kind_sizes(config)[letter].parameters for letter in config.pattern)
    return width * (config.vocab_size * config.hidden_size + sum(sizes[-2:]))


def muon_work(config: HybridConfig, training: Training) -> int:
    """What Muon holds for its largest matrix: the update, two iterates, and two products of rows (distill/muon.py)."""
    if training.optimizer != "muon":
        return 0
    alike = config.replace(pattern="".join(sorted(set(config.pattern))))
    tensors = [tensor for tensor in tensor_table(alike).values() if tensor.layer is not None]
    shapes = [tensor.shape for tensor in tensors if tensor.role in MATRICES]
    width = 2 if training.on_gpu else 4
    return max(math.prod(shape) * (2 * width + training.width) + 2 * min(shape[-2:]) ** 2 * width for shape in shapes)


@dataclasses.dataclass(frozen=True)
class Knob:
    """Something to turn: what it saves alone and whether that is enough; what is held with all above it turned as well
    (None once those are enough), and whether that is."""

    name: str
    saves: int
    fits_alone: bool
    together: int | None
    fits: bool


def knobs(student: HybridConfig, teacher: HybridConfig | None, training: Training, budget: float) -> list[Knob]:
    """What to turn so that a step fits `budget` bytes, cheapest first; what changes nothing is left out."""

    def over(how: Training) -> float:
        return train_memory(student, teacher, how).total - budget

    answers, above = [], training
    for turn in TURNS:
        alone, name = turn(training, over)
        enough = over(above) <= 0
        before, (above, name) = above, (above, name) if enough else turn(above, over)
        if alone != training or above != before:
            together = None if enough else int(over(above) + budget)
            saves = int(over(training) - over(alone))
            answers.append(Knob(name, saves, over(alone) <= 0, together, over(above) <= 0))
    return answers


Turned = tuple[Training, str]
Over = Callable[[Training], float]  # bytes beyond the budget


def checkpoint_blocks(how: Training, over: Over) -> Turned:
    return dataclasses.replace(how, checkpointing=True), "activation checkpointing"


def single_rows(how: Training, over: Over) -> Turned:
    return dataclasses.replace(how, micro_batch=1), "micro_batch 1"


def half_width(how: Training, over: Over) -> Turned:
    narrow = {name: min(getattr(how, name), torch.bfloat16, key=lambda dtype: dtype.itemsize) for name in DTYPES}
    return dataclasses.replace(how, **narrow), "bfloat16 weights, of the teacher too"


def cache_teacher(how: Training, over: Over) -> Turned:
    return dataclasses.replace(how, teacher="cached" if how.teacher == "online" else how.teacher), "cached teacher"


def more_processes(how: Training, over: Over) -> Turned:
    """The least number that fits, of those that share the batch evenly; none other helps."""
    for count in range(how.processes, MOST_PROCESSES + 1):
        if how.batch is None or how.batch % count == 0:
            rows = how.micro_batch if how.batch is None else min(how.micro_batch, how.batch // count)
            more = dataclasses.replace(how, processes=count, micro_batch=rows)
            if over(more) <= 0:
                return more, f"{count:,} GPUs"
    return how, f"more than {MOST_PROCESSES:,} GPUs"


def offload_teacher(how: Training, over: Over) -> Turned:
    return dataclasses.replace(how, teacher_offload=how.teacher_offload or how.teacher == "online"), "teacher offload"


def shorter_rows(how: Training, over: Over) -> Turned:
    """The longest row that fits, of a multiple of 256 tokens; 256 if none does."""
    most = max(1, how.seq_len // 256)
    count = largest(lambda count: over(dataclasses.replace(how, seq_len=256 * count)), 0, most, most)
    length = min(how.seq_len, 256 * max(count, 1))
    return dataclasses.replace(how, seq_len=length), f"seq_len {length:,}"


DTYPES = ("dtype", "teacher_dtype")
TURNS = (
    checkpoint_blocks, single_rows, half_width, cache_teacher, more_processes, offload_teacher, shorter_rows
)  # fmt: skip
