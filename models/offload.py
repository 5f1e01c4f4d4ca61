"""Layer after layer of a model, for walks along the residual streams: of one in memory, or read when its turn comes.

A walk over a folder holds two layers, the one that runs and the next, which a thread reads meanwhile; embedding and
head are read in runs of rows. Either source runs the same code on the same numbers: what it gives is equal bit by bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from . import processes
from .checkpoint import Checkpoint, load_model, open_checkpoint, row_blocks
from .config import HybridConfig
from .cost.parameters import count_parameters
from .errors import InputError
from .families.family import tensor_table_of
from .hybrid import HybridLM, Observe, set_tensor
from .multipliers import scaled

OFFLOADS = ("auto", "none", "disk")
STREAM_BYTES = 4 * 2**30
HEAD_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class Numbered:
    """An observer that is told another number of the layer."""

    observe: Observe
    number: int
    names: Container[str]

    def __call__(self, name: str, _: int, tensor: Tensor) -> None:
        self.observe(name, self.number, tensor)


@dataclasses.dataclass
class Layer:
    """Layer `number` of the source: the place `index` of a model."""

    model: HybridLM
    index: int
    number: int
    ready: torch.cuda.Event | None = None

    def forward(self, hidden: Tensor, seq_idx: Tensor, observe: Observe | None = None) -> Tensor:
        """The residual stream [B, T, hidden] after the layer; `observe` is told the source's number."""
        seen = None if observe is None else Numbered(observe, self.number, getattr(observe, "names", ()))
        return self.model.forward_layers(hidden, self.index, self.index + 1, seq_idx=seq_idx, observe=seen)


class Layers(Protocol):
    """Where a walk gets its weights from, in one dtype on one device. `streamed`: each walk reads them anew."""

    config: HybridConfig
    device: torch.device
    dtype: torch.dtype
    streamed: bool

    def in_turn(self, numbers: Sequence[int]) -> Iterator[Layer]:
        """These layers in turn; each may be used until the next one comes."""
        ...

    def embed(self, input_ids: Sequence[Tensor]) -> list[Tensor]:
        """The residual streams [B, T, hidden] before the first layer, for input_ids [B, T] each."""
        ...

    def tensor(self, name: str) -> Tensor: ...

    def head_pieces(self) -> Iterator[tuple[int, Tensor]]:
        """The head's rows, `HEAD_ROWS` at a time, each with the number of its first."""
        ...


class ResidentLayers:
    """The layers of a model in memory."""

    streamed = False

    def __init__(self, model: HybridLM) -> None:
        self.model, self.config = model, model.config
        self.device, self.dtype = model.embeddings.weight.device, model.embeddings.weight.dtype
        self.weights = model.state_dict()

    def in_turn(self, numbers: Sequence[int]) -> Iterator[Layer]:
        return (Layer(self.model, number, number) for number in numbers)

    def embed(self, input_ids: Sequence[Tensor]) -> list[Tensor]:
        return [self.model.embed(ids.to(self.device)) for ids in input_ids]

    def tensor(self, name: str) -> Tensor:
        return self.weights[name]

    def head_pieces(self) -> Iterator[tuple[int, Tensor]]:
        head = self.model.head_weight
        return ((start, head[start : start + HEAD_ROWS]) for start in range(0, len(head), HEAD_ROWS))


class StreamedLayers:
    """The layers of a checkpoint folder, read from their files whenever they are needed."""

    streamed = True

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint, self.config, self.device, self.dtype = checkpoint, checkpoint.config, device, dtype
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def in_turn(self, numbers: Sequence[int]) -> Iterator[Layer]:
        alone = processes.compute_alone
        with processes.computing_beside() as keep_threads, ThreadPoolExecutor(1, initializer=alone) as reader:
            ahead = [reader.submit(self.read, number) for number in numbers[:1]]
            for place in range(len(numbers)):
                layer = ahead.pop().result()
                keep_threads()
                if place + 1 < len(numbers):
                    ahead.append(reader.submit(self.read, numbers[place + 1]))
                if layer.ready is not None:  # copied in a stream of its own
                    torch.cuda.current_stream(self.device).wait_event(layer.ready)
                    for weight in (*layer.model.layers.parameters(), *layer.model.layers.buffers()):
                        weight.record_stream(torch.cuda.current_stream(self.device))
                yield layer
                layer.model.layers = nn.ModuleList()  # whoever still holds the layer holds no weights

    def read(self, number: int) -> Layer:
        """A model of one layer alone."""
        alone = self.config.replace(
            pattern=self.config.pattern[number], vocab_size=1, tie_word_embeddings=True, mtp_steps=0
        )
        model = HybridLM(alone, device="meta").eval()
        ready = None
        with torch.cuda.stream(self.copies):  # nothing without one
            for name in model.layers[0].state_dict():
                set_tensor(model.layers[0], name, self.tensor(f"layers.{number}.{name}"), trained=False)
            if self.copies is not None:
                ready = torch.cuda.Event()
                ready.record(self.copies)
        return Layer(model, 0, number, ready)

    def embed(self, input_ids: Sequence[Tensor]) -> list[Tensor]:
        shape = (self.config.hidden_size,)
        found = [torch.zeros(ids.shape + shape, device=self.device, dtype=self.dtype) for ids in input_ids]
        places = [ids.to("cpu") for ids in input_ids]
        name = "embeddings.weight"
        for start, stop in row_blocks((self.config.vocab_size, *shape), self.checkpoint.stored[name].dtype):
            inside = [(ids >= start) & (ids < stop) for ids in places]
            if any(bool(mask.any()) for mask in inside):
                rows = self.checkpoint.rows(name, start, stop)
                for hidden, ids, mask in zip(found, places, inside, strict=True):
                    hidden[mask.to(self.device)] = rows[ids[mask] - start].to(self.device, self.dtype)
        return [scaled(hidden, self.config.multipliers.embedding) for hidden in found]

    def tensor(self, name: str) -> Tensor:
        return self.placed(self.checkpoint.tensor(name), tensor_table_of(self.config)[name].dtype(self.dtype))

    def head_pieces(self) -> Iterator[tuple[int, Tensor]]:
        name = "embeddings.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        for start in range(0, self.config.vocab_size, HEAD_ROWS):
            stop = min(start + HEAD_ROWS, self.config.vocab_size)
            yield start, self.placed(self.checkpoint.rows(name, start, stop), self.dtype)

    def placed(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """On the device, in a dtype; to a GPU through pinned memory, without waiting."""
        if self.device.type != "cuda":
            return stored.to(self.device, dtype)
        return stored.pin_memory().to(self.device, non_blocking=True).to(dtype)


def layers_of(model: HybridLM | Layers) -> Layers:
    return ResidentLayers(model) if isinstance(model, HybridLM) else model


def open_layers(
    path: Path | str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    offload: str = "auto",
    stream_bytes: int = STREAM_BYTES,
) -> Layers:
    """The layers of a folder: loaded ("none"), read when needed ("disk"), or "auto": loaded where the weights and
    `stream_bytes` of residual streams fit the device's free memory. Raises InputError."""
    if offload not in OFFLOADS:
        raise InputError(f"offload is {offload!r}; known: {', '.join(OFFLOADS)}")
    checkpoint = open_checkpoint(path)
    if offload == "auto":
        needed = count_parameters(checkpoint.config) * dtype.itemsize + stream_bytes
        free = free_memory(device)
        offload = "none" if free is None or needed <= free else "disk"
    if offload == "disk":
        return StreamedLayers(checkpoint, device, dtype)
    return ResidentLayers(load_model(path, dtype, device))


def free_memory(device: torch.device) -> int | None:
    """Bytes that a process may still take: of the GPU, or its share of what the system calls available; None where it
    does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] // processes.count() if found else None
