"""A training step of a few layers on tensors without memory: what autograd keeps of each kind of layer, and the highest
moments of the loss and of each kind's backward (`training` puts a model together of them).

Autograd takes no tensors of a GPU that is not there: these lie on the CPU instead, and go through a GPU's operators,
whose own workspaces stand beside them in kernels/. Rows of documents have a mask on the CPU alone: a GPU's attention
skips blocks. Every answer is kept. Shapes: [B, T] rows and tokens, [n] tokens of all rows, [V] vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...kernels.linear_kl import linear_cross_entropy, linear_kl
from ...kernels.linear_topk_kl import TopK, linear_topk_kl
from ...kernels.tracing import tracing
from ..axes import WHOLE, tensor_table
from ..config import HybridConfig
from ..hybrid import HybridLM
from ..row_split import RowSplit
from .hardware import Place
from .parameters import num_tensors
from .simulate import Stand, Tracker, without_memory
from .trace import alike

TOP_K = 64  # tokens of a cached teacher, as conf/cache-teacher.yaml has them
GRADIENTS = (
    "new",
    "added",
    "elsewhere",
)  # of a step; added to those before; kept by others (FSDP2)


@dataclasses.dataclass(frozen=True)
class StepLoad:
    """What decides the memory of a step on one process, beside the number of layers."""

    micro_batch: int
    seq_len: int
    packed: bool
    dtype: torch.dtype
    on_gpu: bool
    checkpointing: bool = False
    gradients: str = "new"
    teacher: str = "none"
    teacher_hidden: int = 0
    teacher_dtype: torch.dtype = torch.bfloat16
    context_parallel: int = 1

    @property
    def tokens(self) -> int:
        """Of a row in this process."""
        return -(-self.seq_len // self.context_parallel)

    @property
    def stored(self) -> torch.dtype:
        """Of the gradients, and of what the optimizer moves."""
        return self.dtype if self.dtype.itemsize >= 4 else torch.float32

    def forward_alone(self) -> StepLoad:
        """Of the teacher, which has no gradients."""
        return StepLoad(
            self.micro_batch, self.seq_len, self.packed, self.teacher_dtype, self.on_gpu,
            context_parallel=self.context_parallel,
        )  # fmt: skip


class TracedSplit(RowSplit):
    """Of the processes that share rows the last, which sees the keys of all; nothing is exchanged."""

    def all_gather(self, parts: Tensor, mine: Tensor) -> None:
        pass

    def reduce_scatter(self, mine: Tensor, parts: Tensor) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class StepTrace:
    """Bytes. `kept` by autograd of a layer of each kind, its input among them; `shared` by all layers and kept once;
    `final`, the last norm's. At the highest moment of the `loss` and of its backward beside what is kept; of a layer's
    `backward` beside what is kept below it and its own gradients; of the `embedding`'s backward beside all gradients.
    """

    kept: Mapping[str, int]
    shared: int
    final: int
    loss: int
    loss_backward: int
    backward: Mapping[str, int]
    embedding: int


@contextlib.contextmanager
def running(config: HybridConfig, dtype: torch.dtype, on_gpu: bool) -> Iterator[tuple[HybridLM, Tracker]]:
    """A model without memory in training, and what counts its tensors."""
    empty = HybridLM(config, device="meta", dtype=dtype)
    tracker = Tracker(Place("cuda" if on_gpu else "cpu", 132 if on_gpu else 1), "cpu")
    with tracing(gpu=on_gpu), FakeTensorMode(), tracker, Stand():
        yield without_memory(empty, "cpu"), tracker


def rows_of(load: StepLoad) -> tuple[Tensor, dict[str, Any]]:
    """Tokens [B, T], and what `hidden_states` is told of them: where documents begin (a GPU's masks of documents are
    blocks, and take next to nothing), and which part of the rows they are."""
    ids = torch.zeros(load.micro_batch, load.tokens, dtype=torch.int64)
    count, seq_idx = load.context_parallel, None
    if load.packed and not load.on_gpu:
        seq_idx = torch.zeros(load.micro_batch, load.tokens * count, dtype=torch.int32)
    if count == 1:
        return ids, {"seq_idx": seq_idx}
    part = TracedSplit(None, count, count - 1).part(load.tokens * count, seq_idx)
    return ids, {"seq_idx": None if seq_idx is None else part.own(seq_idx), "part": part}


@functools.lru_cache(maxsize=1024)
@torch.no_grad()
def forward_peak(config: HybridConfig, load: StepLoad) -> int:
    """Bytes at the highest moment of a forward pass without gradients, weights apart."""
    with running(alike(config), load.dtype, load.on_gpu) as (model, tracker):
        ids, rows = rows_of(load)
        before = tracker.begin()
        model.hidden_states(ids, **rows)
        return tracker.peak.bytes - before


def step_trace(config: HybridConfig, load: StepLoad) -> StepTrace:
    kinds = sorted(set(config.pattern))
    last = min(kinds, key=lambda kind: num_tensors(config.replace(pattern=kind)))
    return run_step(config.replace(pattern="".join(kinds) + last), load)


@functools.lru_cache(maxsize=1024)
def run_step(config: HybridConfig, load: StepLoad) -> StepTrace:
    """Of a pattern that has each kind once, and another layer after them."""
    marks, before = run_all(config, load)
    return marks.told(config, load, before)


def run_all(config: HybridConfig, load: StepLoad) -> tuple[Marks, int]:
    """A step of all layers of a config: its moments, and the bytes of weights, gradients and tokens before it."""
    with running(config, load.dtype, load.on_gpu) as (model, tracker):
        mind(model, load)
        marks = Marks(model, tracker)
        ids, rows = rows_of(load)
        teacher_head = None
        if load.teacher == "online":
            teacher_head = torch.empty(config.vocab_size, load.teacher_hidden, dtype=load.teacher_dtype)
        before = tracker.begin()
        loss = loss_of(model, ids, rows, teacher_head, load, marks)
        marks.note("loss")
        loss.backward()
        marks.note("embedding")
    return marks, before


def mind(model: HybridLM, load: StepLoad) -> None:
    """Makes the weights ask for gradients, and these go where a step has them: matrices in few bits hand theirs over to
    float32 copies, vectors are float32."""
    table = tensor_table(model.config)
    for path, weight in list(model.named_parameters()):
        place, _, field = path.rpartition(".")
        dtype = load.stored if table[path].role in WHOLE else load.dtype
        setattr(model.get_submodule(place), field, nn.Parameter(weight.detach().to(dtype)))
    given: dict[nn.Parameter, Tensor] = {}
    for block in model.layers:
        block.recompute = load.checkpointing  # type: ignore[assignment]
        block.mix = stood_in(block.mix)  # type: ignore[assignment, arg-type]
    for parameter in model.parameters():
        if load.gradients == "added":
            given[parameter] = torch.zeros(parameter.shape, dtype=load.stored)
        parameter.register_post_accumulate_grad_hook(functools.partial(hand_over, given, load))
        if load.gradients == "added" and parameter.dtype == load.stored:
            parameter.grad = given.pop(parameter)


def stood_in(mix: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A layer that has `Stand` in the backward pass as well, which runs without modes of functions."""

    def mixed(*inputs: Any) -> Tensor:
        with Stand():
            return mix(*inputs)

    return mixed


def hand_over(given: dict[nn.Parameter, Tensor], load: StepLoad, parameter: nn.Parameter) -> None:
    """As `distill.parallel.lowered` does it with a gradient that has just been added up."""
    if load.gradients == "elsewhere":
        parameter.grad = None
    elif parameter.dtype != load.stored:
        assert parameter.grad is not None
        moved = parameter.grad.to(load.stored)
        given[parameter] = given[parameter].add_(moved) if parameter in given else moved
        parameter.grad = None


def loss_of(
    model: HybridLM, ids: Tensor, rows: dict[str, Any], teacher_head: Tensor | None, load: StepLoad, marks: Marks
) -> Tensor:
    """As `distill.losses` has it; the teacher's answer is there before the student runs."""
    labels, options = ids.flatten(), dict[str, Any](normalizer=1.0)
    if teacher_head is not None:
        target = torch.empty(labels.numel(), load.teacher_hidden, dtype=load.teacher_dtype)
    elif load.teacher == "cached":
        numbers, log_probs = (torch.zeros(labels.numel(), TOP_K, dtype=dtype) for dtype in (torch.int64, torch.float32))
        top = TopK(numbers, log_probs, torch.zeros(labels.numel()))
    marks.begin()
    hidden = model.hidden_states(ids, **rows)
    marks.end(hidden)
    hidden = hidden.flatten(0, 1)
    if teacher_head is not None:
        return linear_kl(hidden, model.head_weight, target, teacher_head, labels=labels, **options).loss
    if load.teacher == "cached":
        return linear_topk_kl(hidden, model.head_weight, top, labels=labels, **options).loss
    return linear_cross_entropy(hidden, model.head_weight, labels, **options).loss


class Marks:
    """Bytes that are live before each layer of the forward pass, and at the highest moment of each part of the step:
    "loss", its backward ("head"), every layer's by number, "embedding"."""

    def __init__(self, model: HybridLM, tracker: Tracker) -> None:
        self.model, self.tracker = model, tracker
        self.live: list[int] = []
        self.peaks: dict[str | int, int] = {}
        self.held: list[Any] = []
        self.given, self.before_layers, self.shared, self.after = 0, set[int](), 0, 0
        for block in model.layers:
            block.register_forward_pre_hook(self.enter)

    def enter(self, block: Any, inputs: tuple[Any, ...]) -> None:
        """Before a layer: what comes until its input's gradient is known is its backward's."""
        layer = len(self.live)
        self.live.append(self.tracker.now)
        if not layer:
            self.before_layers = set(self.tracker.live) - {inputs[0].untyped_storage()._cdata}
        inputs[0].register_hook(lambda _: self.note(layer))

    def begin(self) -> None:
        self.given = self.tracker.now

    def end(self, hidden: Tensor) -> None:
        """After the layers and the last norm. What was made before the layers, is none's input and still there is
        shared by them; it is held to the end, as it would be for layers below."""
        self.after = self.tracker.now
        self.shared = self.tracker.bytes_of(self.before_layers) - self.given
        self.held = [self.tracker.live[key].end() for key in self.before_layers if key in self.tracker.live]
        hidden.register_hook(lambda _: self.note("head"))

    def note(self, part: str | int) -> None:
        """A part of the step is over."""
        self.peaks[part] = self.tracker.peak.bytes
        self.tracker.begin()

    def told(self, config: HybridConfig, load: StepLoad, before: int) -> StepTrace:
        width = load.dtype.itemsize
        stream = load.micro_batch * load.tokens * config.hidden_size * width
        shared = self.shared
        kept = [after - start for start, after in zip(self.live, self.live[1:], strict=False)]
        # The last layer is of a kind that is there before it.
        pattern = config.pattern
        below = [sum(kept[:layer]) for layer in range(len(kept) + 1)]
        everything = below[-1] + kept[pattern.index(pattern[-1])]
        final = self.after - self.given - shared - everything - stream
        rest = before + everything + shared + final
        backward = {
            pattern[layer]: self.peaks[layer] - before - below[layer] - shared - self.gradients(layer, load)
            for layer in range(len(kept))
        }
        return StepTrace(
            dict(zip(pattern, kept, strict=False)),
            shared,
            final,
            self.peaks["loss"] - rest,
            self.peaks["head"] - rest,
            backward,
            self.peaks["embedding"] - before - shared - self.gradients(-1, load),
        )

    def gradients(self, layer: int, load: StepLoad) -> int:
        """Bytes of the gradients that are new in the step and there after a layer's backward (-1: the embedding's)."""
        if load.gradients != "new":
            return 0
        model = self.model
        parts: list[Any] = [model.norm_f, *list(model.layers)[max(layer, 0) :]]
        weights = [weight for part in parts for weight in part.parameters()]
        if layer < 0 or not model.config.tie_word_embeddings:
            weights.append(model.head_weight)
        if layer < 0 and not model.config.tie_word_embeddings:
            weights.append(model.embeddings.weight)
        return sum(weight.numel() for weight in weights) * load.stored.itemsize
