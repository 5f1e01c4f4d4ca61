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

from ..kernels.linear import laid_out, linear
from ..kernels.norm import rms_norm
from .attention import AttentionStep, Places
from .cache import Cache, KeyValues, MambaState
from .errors import InputError
from .hybrid import HybridLM
from .mamba2 import MambaStep

WARM_UP = 2  # runs before a capture: kernels are compiled, libraries find their workspace


class Decoder:
    """Steps of the first B rows of a cache, for any B. `graphs` captures them (None: on a GPU)."""

    def __init__(self, model: HybridLM, cache: Cache, *, graphs: bool | None = None) -> None:
        self.model, self.cache = model, cache
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
            self.bound[len(tokens)] = self.bind(len(tokens))
        logits = self.bound[len(tokens)](tokens, lengths)
        self.cache.lengths[: len(tokens)] = [length + 1 for length in lengths]
        return logits

    def bind(self, batch: int) -> Step | GraphedStep:
        step = Step(self.model, self.cache, batch)
        if not self.graphs:
            return step
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        return GraphedStep(step, self.pool)


class Step:
    """The step of a batch size: `tokens` and `lengths` [B] are read where they lie, caches are written in place."""

    def __init__(self, model: HybridLM, cache: Cache, batch: int) -> None:
        self.model, self.config, self.max_length = model, model.config, cache.max_length
        self.inputs = torch.zeros((2, batch), dtype=torch.int64, device=model.head_weight.device)
        self.tokens, self.lengths = self.inputs.unbind()
        self.states = [None if layer is None else layer.rows(0, batch) for layer in cache.layers]
        self.layers: list[tuple[Tensor, Callable[..., Tensor], bool]] = []
        blocks: Any = model.layers
        for block, state in zip(blocks, self.states, strict=True):
            mixer = block.mixer
            if isinstance(state, MambaState):
                mixer = MambaStep(mixer, state)
            elif isinstance(state, KeyValues):
                mixer = AttentionStep(mixer, state)
            else:
                mixer = mixer.forward  # no hooks: a step has nobody to tell
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

    def run(self) -> Tensor:
        """Logits [B, V] of the tokens that are loaded."""
        config, eps = self.config, self.config.norm_eps
        hidden = F.embedding(self.tokens, self.model.embeddings.weight)
        places = None
        if "*" in config.pattern:
            places = Places.of(self.lengths, config, self.max_length, hidden.dtype)
        for norm, mix, attends in self.layers:
            u = rms_norm(hidden, norm, eps)
            hidden = hidden + (mix(u, places) if attends else mix(u))
        return linear(rms_norm(hidden, self.model.norm_f.weight, eps), self.model.head_weight)


class GraphedStep:
    """A step as a CUDA graph: one launch replays all its kernels. The states that the runs before the capture move are
    put back; what they write into keys and values lies where the next token's go."""

    def __init__(self, step: Step, pool: Any) -> None:
        self.step, self.graph = step, torch.cuda.CUDAGraph()
        with unmoved(step.states):
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(WARM_UP):
                    step.run()
            torch.cuda.current_stream().wait_stream(beside)
        with torch.cuda.graph(self.graph, pool=pool):
            self.logits = step.run()

    def __call__(self, tokens: Sequence[int] | Tensor, lengths: Sequence[int]) -> Tensor:
        self.step.load(tokens, lengths)
        self.graph.replay()
        return self.logits


@contextlib.contextmanager
def unmoved(states: Sequence[KeyValues | MambaState | None]) -> Iterator[None]:
    """The SSM and convolution states are afterwards what they were."""
    tensors = [tensor for state in states if isinstance(state, MambaState) for tensor in (state.ssm, state.conv)]
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
