"""One decoding step of many sequences of unequal lengths, each in its row of a cache.

A step is bound to a batch size once: what does not change from step to step is made ready, and on a GPU the model's
call is captured in a CUDA graph, so that no Python runs between its kernels. Shapes: [B] sequences, [V] vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.linear import ONE_OR_TWO, laid_out, packed
from ...kernels.linear_step import prepared_linear
from ...kernels.mamba_step import PreparedNorm, takes_prepared
from ...kernels.norm import add_rms_norm
from ..axes import Role, tensor_table
from ..errors import InputError
from ..hybrid import HybridLM
from .cache import Cache

WARM_UP = 2  # runs before a capture: kernels are compiled, libraries find their workspace


class Decoder:
    """Steps of the first B rows of a cache, for any B. `graphs` captures them (None: on a GPU); `pack` keeps a copy of
    the matrices of a float32 model on the CPU in the order in which oneDNN reads them fastest for several rows."""

    def __init__(self, model: HybridLM, cache: Cache, *, graphs: bool | None = None, pack: bool = False) -> None:
        self.model, self.cache, self.pack = model, cache, pack
        self.packed: dict[Tensor, Tensor] = {}
        self.graphs = model.head_weight.is_cuda if graphs is None else graphs
        self.pool: Any = None  # the graphs' memory: they run one after the other, and share it
        self.steps: dict[int, DecodingStep | GraphedStep] = {}

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
        if len(tokens) not in self.steps:
            self.steps[len(tokens)] = self.bind(tokens, lengths)
        logits = self.steps[len(tokens)](tokens, lengths)
        self.cache.lengths[: len(tokens)] = [length + 1 for length in lengths]
        return logits

    def bind(self, tokens: Sequence[int] | Tensor, lengths: Sequence[int]) -> DecodingStep | GraphedStep:
        batch = len(tokens)
        packs = self.pack and batch > ONE_OR_TWO
        step = DecodingStep(self.model, self.cache.rows(0, batch), self.stored if packs else None)
        if not self.graphs:
            return step
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        step.load(tokens, lengths)
        return GraphedStep(step, self.pool)

    def stored(self, weight: Tensor) -> Tensor:
        """A matrix, packed when it is first used."""
        if weight not in self.packed:
            self.packed[weight] = packed(weight, len(self.cache.lengths))
        return self.packed[weight]


class DecodingStep:
    """`HybridLM.decode` of a batch size: `tokens` and `lengths` [B] are read where they lie, caches written in place.
    What layers make once (`layer.Context`) is kept here; `stored` gives the order that a matrix is to be read in."""

    def __init__(self, model: HybridLM, cache: Cache, stored: Callable[[Tensor], Tensor] | None = None) -> None:
        self.model, self.cache, self.stored = model, cache, stored
        self.batch = len(cache.lengths)
        self.inputs = torch.zeros((2, self.batch), dtype=torch.int64, device=model.head_weight.device)
        self.tokens, self.lengths = self.inputs.unbind()
        self.products: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        weight = model.norm_f.weight
        self.norm: Callable[[Tensor, Tensor | None, Tensor, float], Tensor] = add_rms_norm
        if takes_prepared(model.head_weight, weight):
            prepared = PreparedNorm((self.batch, 1, len(weight)), model.config.norm_eps)
            self.norm = lambda x, added, weight, eps: prepared(x if added is None else x.add_(added), weight)
        self.made: dict[Hashable, Any] = {}

    def __call__(self, tokens: Sequence[int] | Tensor, lengths: Sequence[int]) -> Tensor:
        self.load(tokens, lengths)
        return self.logits_of_loaded()

    def load(self, tokens: Sequence[int] | Tensor, lengths: Sequence[int]) -> None:
        if isinstance(tokens, Tensor):
            self.tokens.copy_(tokens)
            self.lengths.copy_(torch.tensor(lengths))
        else:
            self.inputs.copy_(torch.tensor((tokens, lengths)))

    def logits_of_loaded(self) -> Tensor:
        """Logits [B, V] of the tokens that are loaded."""
        return self.model.decode(self.tokens, self.lengths, self.cache, self)

    def project(self, module: nn.Linear, x: Tensor) -> Tensor:
        product = self.products.get(module)
        if product is None:
            weight = module.weight if self.stored is None else self.stored(module.weight)
            product = self.products[module] = prepared_linear(weight, self.batch)
        return product(x)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    @contextlib.contextmanager
    def unmoved(self) -> Iterator[None]:
        """SSM and convolution states are after each layer what they were, at the price of a copy of one layer's."""
        kept: list[Tensor] = []

        def recurrent(layer: int) -> tuple[Tensor, ...]:
            state = self.cache.layers[layer]
            return () if state is None else state.recurrent()

        def keep(block: Any, _: Any) -> None:
            kept.extend(tensor.clone() for tensor in recurrent(block.layer))

        def restore(block: Any, *_: Any) -> None:
            for tensor in reversed(recurrent(block.layer)):
                tensor.copy_(kept.pop())

        hooks = [hook for block in self.model.layers for hook in (
            block.register_forward_pre_hook(keep), block.register_forward_hook(restore)
        )]  # fmt: skip
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class GraphedStep:
    """A loaded step as a CUDA graph: one launch replays all its kernels. The runs before the capture leave the states
    as they were; the keys and values that they write are those that the first replay writes again."""

    def __init__(self, step: DecodingStep, pool: Any) -> None:
        self.step, self.graph = step, torch.cuda.CUDAGraph()
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside), step.unmoved():
            for _ in range(WARM_UP):
                step.logits_of_loaded()
        torch.cuda.current_stream().wait_stream(beside)
        with torch.cuda.graph(self.graph, pool=pool):
            self.logits = step.logits_of_loaded()

    def __call__(self, tokens: Sequence[int] | Tensor, lengths: Sequence[int]) -> Tensor:
        self.step.load(tokens, lengths)
        self.graph.replay()
        return self.logits


@torch.no_grad()
def lay_out(model: HybridLM) -> None:
    """Stores the matrices of a float32 model on the CPU as a decoding step reads them fastest. Values, shapes and
    memory stay; the order of sums changes, and with it their rounding."""
    table = tensor_table(model.config)
    for name, weight in model.named_parameters():
        is_matrix = table[name].role in (Role.MATRIX, Role.TABLE)
        if is_matrix and weight.dtype == torch.float32 and weight.device.type == "cpu":
            weight.data = laid_out(weight.data)
