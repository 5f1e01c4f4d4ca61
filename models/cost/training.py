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
from collections.abc import Iterator

import torch

from ..axes import MATRICES, tensor_table
from ..config import HybridConfig
from ..errors import InputError
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
    "hidden states",
    "loss",
    "layer at work",
)
TEACHERS = ("online", "cached", "none")
OPTIMIZERS = ("adamw", "muon")
DEVICES = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Training:
    """What decides the memory of a step: rows that go through the models at once, tokens a row, and how.

    `batch` are the rows of a step, in all processes: more of them than go through at once come in several
    micro-batches, with gradients there from the start (None: so it is taken to be). `packed`: rows hold documents, as
    in all training here. `dtype` is that of weights in use and of activations; the optimizer moves float32 copies of
    less, and with `quantized` those that rounded weights are made from. `teacher` is "online", "cached" (its top-k
    tokens, from files) or "none" (cross-entropy). `processes` share weights, gradients and the optimizer's state
    (FSDP2); `context_parallel` of them split each row. `hidden_streams` pairs of hidden states are compared, and with
    `trains_ahead` multi-token prediction is trained (its activations are not counted). `rows_given`: the micro-batch is
    the user's, and not what is left for a process.
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
    context_parallel: int = 1
    device: str = "cuda"
    hidden_streams: int = 0
    trains_ahead: bool = False
    rows_given: bool = False

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or self.seq_len < 1 or self.processes < 1:
            raise InputError(
                f"train: micro_batch ({self.micro_batch}), seq_len ({self.seq_len}) and processes ({self.processes})"
                " must be at least 1"
            )
        if self.context_parallel < 1 or self.processes % self.context_parallel or self.seq_len < self.context_parallel:
            raise InputError(
                f"train: context_parallel is {self.context_parallel}; expected a divisor of the processes"
                f" ({self.processes}), and no more than a row has tokens ({self.seq_len})"
            )
        if self.batch is not None and (self.batch < 1 or self.batch % self.groups):
            whose = f"{self.groups} groups of {self.context_parallel}" if self.context_parallel > 1 else self.processes
            raise InputError(
                f"train: a batch of {self.batch} rows is not for {whose} processes; give a multiple of {self.groups}"
            )
        for name, known in (("teacher", TEACHERS), ("optimizer", OPTIMIZERS), ("device", DEVICES)):
            if getattr(self, name) not in known:
                raise InputError(f"train: {name} is {getattr(self, name)!r}; known: {', '.join(known)}")

    @property
    def accumulates(self) -> bool:
        return self.batch is None or self.batch // self.groups > self.micro_batch

    @property
    def groups(self) -> int:
        """Those that share a batch's rows: processes, or groups of them that split each."""
        return self.processes // self.context_parallel

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
            context_parallel=self.context_parallel,
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
    carried *= 4 if training.trains_ahead else 1  # with gradients and two moments
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
    narrow, split = training.width < stored, training.processes > 1
    of_model = training.width
    if narrow and split:  # rows are kept as the optimizer moves them, or rounded beside what it moves
        of_model = stored if training.quantized else 0
    held = 0 if teacher is None or training.teacher_offload else count_parameters(teacher)
    return {
        "student weights": shard(size * of_model, training),
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
    tokens = -(-training.micro_batch * training.seq_len // training.context_parallel)
    # Of each pair in float32: what the two differ by, and the student's norm; and the teacher's states until then.
    compared = training.hidden_streams * tokens * 8 * student.hidden_size
    theirs = 0 if teacher is None else training.hidden_streams * tokens * teacher.hidden_size
    loss = {
        "gradients": before,
        "gathered layers": whole + target,
        "kept for the backward": sum(kept) + step.final + step.shared + compared,
        "hidden states": theirs * training.teacher_dtype.itemsize,
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
                "kept for the backward": sum(kept[: layer + 1]) + step.shared + compared,
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
