"""One decoding step of many sequences of unequal lengths, each in its row of a cache.

A step is bound to a batch size once: what does not change from step to step is made ready, and on a GPU it is captured
in a CUDA graph, so that no Python runs between its kernels. Shapes: [B] sequences, [V] vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.linear import ONE_OR_TWO, laid_out, packed
from ...kernels.linear_step import prepared_linear
from ...kernels.mamba_step import PreparedNorm, takes_prepared
from ...kernels.norm import rms_norm
from ..attention import AttentionStep, Places
from ..errors import InputError
from ..hybrid import HybridLM
from ..mamba2 import MambaStep, Stored, as_it_is
from ..mlp import MLPStep
from .cache import Cache, KeyValues, MambaState

WARM_UP = 2  # runs before a capture: kernels are compiled, libraries find their workspace


class Decoder:
    """Steps of the first B rows of a cache, for any B. `graphs` captures them (None: on a GPU); `pack` keeps a copy of
    the matrices of a float32 model on the CPU in the order in which oneDNN reads them fastest for several rows."""

    def __init__(self, model: HybridLM, cache: Cache, *, graphs: bool | None = None, pack: bool = False) -> None:
        self.model, self.cache, self.pack = model, cache, pack
        self.packed: dict[Tensor, Tensor] = {}
        self.graphs = model.head_weight.is_cuda if graphs is None else graphs
        self.pool: Any = None  # the graphs' memory: they run one after the other, and share it
        self.bound: dict[int, Step | GraphedStep] = {}

    @torch.inference_mode()
    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Logits [B, V] after one more token [B] each; they hold until the next step. Raises InputError where a row is
        full."""
        lengths = self.cache.lengths[: len(tokens)]
        if not 0 < len(tokens) <= len(self.cache.lengths) or max(lengths) >= self.cache.max_length:
            raise InputError(
                f"decode: {len(tokens)} sequences of up to {max(lengths, default=0)} tokens do not fit a cache of"
                f" {len(self.cache.lengths)} x {self.cache.max_length}"
            )
        if len(tokens) not in self.bound:
            self.bound[len(tokens)] = self.bind(tokens, lengths)
        logits = self.bound[len(tokens)](tokens, lengths)
        self.cache.lengths[: len(tokens)] = [length + 1 for length in lengths]
        return logits

    def bind(self, tokens: Sequence[int] | Tensor, lengths: Sequence[int]) -> Step | GraphedStep:
        batch = len(tokens)
        step = Step(self.model, self.cache, batch, self.stored if self.pack and batch > ONE_OR_TWO else as_it_is)
        if not self.graphs:
            return step
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        step.load(tokens, lengths)
        return GraphedStep(step, self.pool)

    def stored(self, weight: Tensor) -> Tensor:
        """A matrix, packed when it is first asked for."""
        if weight not in self.packed:
            self.packed[weight] = packed(weight, len(self.cache.lengths))
        return self.packed[weight]


class Step:
    """The step of a batch size: `tokens` and `lengths` [B] are read where they lie, caches are written in place."""

    def __init__(self, model: HybridLM, cache: Cache, batch: int, stored: Stored = as_it_is) -> None:
        self.model, self.config, self.max_length = model, model.config, cache.max_length
        self.inputs = torch.zeros((2, batch), dtype=torch.int64, device=model.head_weight.device)
        self.tokens, self.lengths = self.inputs.unbind()
        self.states = [None if layer is None else layer.rows(0, batch) for layer in cache.layers]
        self.head = prepared_linear(stored(model.head_weight), batch)
        self.norm: Callable[[Tensor, Tensor], Tensor] = lambda x, weight: rms_norm(x, weight, model.config.norm_eps)
        if takes_prepared(model.head_weight, model.norm_f.weight):
            self.norm = PreparedNorm((batch, model.config.hidden_size), model.config.norm_eps)
        self.layers: list[tuple[Tensor, Callable[..., Tensor], bool]] = []
        blocks: Any = model.layers
        for block, state in zip(blocks, self.states, strict=True):
            mixer = block.mixer
            if isinstance(state, MambaState):
                mixer = MambaStep(mixer, state, stored)
                mixer.prepare()
            elif isinstance(state, KeyValues):
                mixer = AttentionStep(mixer, state, stored)
            else:
                mixer = MLPStep(mixer, batch, stored)
            self.layers.append((block.norm.weight, mixer, isinstance(state, KeyValues)))

    def __call__(self, tokens: Sequence[int] | Tensor, lengths: Sequence[int]) -> Tensor:
        self.load(tokens, lengths)
        return self.run()

    def load(self, tokens: Sequence[int] | Tensor, lengths: Sequence[int]) -> None:
        if isinstance(tokens, Tensor):
            self.tokens.copy_(tokens)
            self.lengths.copy_(torch.tensor(lengths))
        else:
            self.inputs.copy_(torch.tensor((tokens, lengths)))

    def run(self, *, moves: bool = True) -> Tensor:
        """Logits [B, V] of the tokens that are loaded; unless it `moves` the SSM and convolution states are afterwards
        what they were, at the price of a copy of one layer's."""
        config = self.config
        hidden = F.embedding(self.tokens, self.model.embeddings.weight)
        places = None
        if "*" in config.pattern:
            places = Places.of(self.lengths, config, self.max_length, hidden.dtype)
        for (norm, mix, attends), state in zip(self.layers, self.states, strict=True):
            u = self.norm(hidden, norm)
            with contextlib.nullcontext() if moves else unmoved(state):
                out = mix(u, places) if attends else mix(u)
            hidden += out
            del out  # or it would be there beside the next layer's tensors
        return self.head(self.norm(hidden, self.model.norm_f.weight))


class GraphedStep:
    """A loaded step as a CUDA graph: one launch replays all its kernels. The runs before the capture move no states;
    the keys and values that they write are those that the first replay writes again."""

    def __init__(self, step: Step, pool: Any) -> None:
        self.step, self.graph = step, torch.cuda.CUDAGraph()
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                step.run(moves=False)
        torch.cuda.current_stream().wait_stream(beside)
        with torch.cuda.graph(self.graph, pool=pool):
            self.logits = step.run()

    def __call__(self, tokens: Sequence[int] | Tensor, lengths: Sequence[int]) -> Tensor:
        self.step.load(tokens, lengths)
        self.graph.replay()
        return self.logits


@contextlib.contextmanager
def unmoved(state: KeyValues | MambaState | None) -> Iterator[None]:
    """A layer's SSM and convolution state is afterwards what it was."""
    tensors = (state.ssm, state.conv) if isinstance(state, MambaState) else ()
    kept = [tensor.clone() for tensor in tensors]
    yield
    for tensor, before in zip(tensors, kept, strict=True):
        tensor.copy_(before)


@torch.no_grad()
def lay_out(model: HybridLM) -> None:
    """Stores the matrices of a float32 model on the CPU as a decoding step reads them fastest. Values, shapes and
    memory stay; the order of sums changes, and with it their rounding."""
    for weight in model.parameters():
        if weight.dim() == 2 and weight.dtype == torch.float32 and weight.device.type == "cpu":
            weight.data = laid_out(weight.data)
