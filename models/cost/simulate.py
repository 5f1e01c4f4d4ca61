"""The inference path on tensors without memory: what is live, operator by operator, and where the peak is.

A model, its cache and its prompt are fake tensors (`torch._subclasses.fake_tensor`) on a CUDA device or a CPU, neither
of which need be there; the path is that of `generate`: `prefill`, then a step of `decode`. A tracker counts every
storage from the operator that makes it to the moment that Python lets go of it, rounded up as torch's CUDA allocator
does (512 bytes; its splitting of segments is not modelled), and adds what an operator takes while it runs.

Chunks of a long prompt differ by their past alone, on which every allocation depends monotonically: the first, the
last two whole ones and the rest after them are run, those between are skipped.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...kernels import causal_conv1d, linear_kl, mamba_step, norm, ssd
from ...kernels.attention import cpu_workspace, decode_workspace, flash_backward_workspace, flash_workspace
from ...kernels.tracing import STATE
from ..config import HybridConfig
from ..errors import InputError
from ..generate.cache import Cache
from ..generate.decode import DecodingStep
from ..generate.generate import decode_one_token, prefill
from ..hybrid import HybridLM
from .hardware import Place, check_load, libraries, round_up

LARGEST = 8  # of what is live at the peak, by size, a simulation names


@dataclasses.dataclass(frozen=True)
class Simulation:
    """Peak bytes of a run, and how it came about: weights, caches and prompt, which are there all the time, the phase,
    operator and layer (None: outside of the layers), and the largest of what else was live: (operator, shape, bytes).
    """

    peak: int
    weights: int
    caches: int
    prompt: int
    phase: str
    operator: str
    layer: int | None
    letter: str
    largest: tuple[tuple[str, tuple[int, ...], int], ...]

    @property
    def transient(self) -> int:
        """Bytes of the peak that come and go: activations, logits, workspaces."""
        return self.peak - self.weights - self.caches - self.prompt


@torch.no_grad()
def simulate(
    config: HybridConfig,
    context: int,
    batch: int = 1,
    *,
    chunk: int = 512,
    weight_dtype: torch.dtype = torch.bfloat16,
    ssm_dtype: torch.dtype = torch.float32,
    place: Place = Place(),  # noqa: B008 (frozen)
) -> Simulation:
    """The run of `batch` sequences of `context` tokens, the last of them decoded, the others prefilled in chunks.

    Keys, values and convolution states have the weights' dtype, as the inference path keeps them. Raises InputError
    where context, batch or chunk is below 1, or the GPU's path has no kernels for the dtype.
    """
    check_load(context, batch, chunk)
    if place.device == "cuda" and weight_dtype not in (torch.bfloat16, torch.float16):
        raise InputError(f"simulation: weights are {weight_dtype}; on a GPU expected bfloat16 or float16")
    empty = HybridLM(config, device="meta", dtype=weight_dtype)
    tracker = Tracker(place)
    with FakeTensorMode(), tracker, Stand():
        model = tracker.watch(without_memory(empty, place.device))
        weights = tracker.now
        cache = Cache(config, batch, context, dtype=weight_dtype, device=place.device, ssm_dtype=ssm_dtype)
        caches = tracker.now - weights
        ids = torch.empty(batch, max(context - 1, 1), dtype=torch.int64, device=place.device)
        prompt = tracker.now - weights - caches
        tracker.begin()
        pass_through(model, ids, cache, chunk, tracker, decodes=context > 1)
        peak = tracker.peak
        del model, cache, ids
    letter = "" if peak.layer is None else config.pattern[peak.layer]
    found = peak.bytes + libraries(place, context)
    return Simulation(
        found, weights, caches, prompt, peak.phase, str(peak.operator), peak.layer, letter, peak.largest(LARGEST)
    )


def pass_through(model: HybridLM, ids: Tensor, cache: Cache, chunk: int, tracker: Tracker, decodes: bool) -> None:
    """Prefill of ids [B, T], and one decoding step where it fits the cache."""
    skipped = max(ids.shape[1] // chunk - 3, 0) * chunk  # between the first chunk and the last two
    rest = ids
    if skipped:
        tracker.phase = "prefill, first chunk"
        model.hidden_states(ids[:, :chunk], cache=cache)
        advance(cache, skipped)
        rest = ids[:, chunk + skipped :]
    tracker.phase = "prefill, last chunks" if skipped else "prefill"
    logits = prefill(model, rest, cache, chunk)
    if not decodes:
        return
    tracker.phase = "decode"
    decode(model, logits.argmax(-1), cache)


def decode(model: HybridLM, token: Tensor, cache: Cache) -> Any:
    """A decoding step of token [B], on a GPU as `decode.Decoder` binds it, and `GraphedStep` warms up and captures:
    what is there until the next step."""
    if token.is_cpu:
        return decode_one_token(model, token, cache)
    step = DecodingStep(model, cache)
    step.load(token, cache.lengths)
    with step.unmoved():
        step.logits_of_loaded()
    return step, step.logits_of_loaded()


def advance(cache: Cache, tokens: int) -> None:
    """Lets a cache believe that it holds `tokens` more."""
    cache.length += tokens


def without_memory(model: HybridLM, device: str) -> HybridLM:
    """A model on `meta` with weights on a device that, under FakeTensorMode, need not exist."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            fake = torch.empty(weight.shape, dtype=weight.dtype, device=device)
            module.register_parameter(name, nn.Parameter(fake, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
    return model


@dataclasses.dataclass
class Live:
    """A storage: the operator that made it, as what shape, its bytes, in which layer, and how its end is noticed."""

    operator: Any
    shape: tuple[int, ...]
    size: int
    layer: int | None
    end: Any


@dataclasses.dataclass
class Peak:
    """The most bytes so far, when and where; what else than weights, caches and prompt was live, and the bytes that the
    operator took while it ran."""

    bytes: int = 0
    phase: str = ""
    operator: Any = ""
    layer: int | None = None
    live: list[Live] = dataclasses.field(default_factory=list)
    workspace: int = 0

    def largest(self, count: int) -> tuple[tuple[str, tuple[int, ...], int], ...]:
        """The largest of what was live: (operator, shape, bytes)."""
        entries = [(str(live.operator), live.shape, live.size) for live in self.live]
        entries += [(f"{self.operator}, workspace", (), self.workspace)] if self.workspace else []
        return tuple(sorted(entries, key=lambda entry: -entry[2])[:count])


class Tracker(TorchDispatchMode):
    """Counts the bytes of storages on one kind of device while it is the innermost mode."""

    def __init__(self, place: Place, device: str = "") -> None:
        """Of a `place`; its tensors are on a `device` (by default the place's)."""
        super().__init__()
        self.place, self.device, self.now, self.phase = place, device or place.device, 0, ""
        self.layer: int | None = None
        self.live: dict[int, Live] = {}
        self.peak = Peak()
        self.fixed: set[int] | None = None  # what was there at `begin`; None: it did not begin yet
        self.uneven = False  # whether since then an operator's workspace was one that does not grow evenly

    def watch(self, model: HybridLM) -> HybridLM:
        """Learns from a model which layer runs."""
        for number, block in enumerate(model.layers):
            block.mixer.register_forward_pre_hook(lambda *_, number=number: self.enter(number))  # type: ignore[union-attr]
            block.mixer.register_forward_hook(lambda *_: self.enter(None))  # type: ignore[union-attr]
        return model

    def enter(self, layer: int | None) -> None:
        self.layer = layer

    def begin(self) -> int:
        """From here on peaks count; what is live already is no transient. Gives the bytes of it."""
        self.fixed, self.peak, self.uneven = set(self.live), Peak(self.now), False
        return self.now

    def bytes_of(self, keys: Iterable[int]) -> int:
        """Of those of some storages that are still there."""
        return sum(self.live[key].size for key in keys if key in self.live)

    def left(self) -> dict[int, int]:
        """Bytes that are live since `begin` of what each layer made."""
        sizes: dict[int, int] = {}
        for key, live in self.live.items():
            if live.layer is not None and key not in (self.fixed or ()):
                sizes[live.layer] = sizes.get(live.layer, 0) + live.size
        return sizes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in (outputs,) if isinstance(outputs, Tensor) else tree_leaves(outputs):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                self.add(func, tensor)
        more = self.workspace(func.name(), args)
        if self.fixed is not None and self.now + more > self.peak.bytes:
            live = [entry for key, entry in self.live.items() if key not in self.fixed]
            self.peak = Peak(self.now + more, self.phase, func, self.layer, live, more)
        return outputs

    def workspace(self, name: str, args: Any) -> int:
        """Bytes that an operator takes beside its answer."""
        sizes = WORKSPACES[name](args, self.place.processors) if name in WORKSPACES else ()
        self.uneven |= name in UNEVEN and any(sizes)
        return sum(round_up(size, self.place) for size in sizes)

    def add(self, func: Any, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.live:
            size = round_up(storage.nbytes(), self.place)
            gone = weakref.ref(storage, lambda _: self.drop(key))
            self.live[key] = Live(func, tuple(tensor.shape), size, self.layer, gone)
            self.now += size

    def drop(self, key: int) -> None:
        self.now -= self.live.pop(key).size


# The operators that allocate more than they give back: of the others the Triton kernels work in registers, and the
# torch paths are seen operator by operator.
WORKSPACES: dict[str, Callable[[Any, int], tuple[int, ...]]] = {
    "limbeck::decode_attention": lambda args, processors: decode_workspace(
        args[0].shape[0], args[0].shape[1], args[1].shape[1], args[0].shape[2], processors
    ),
    "aten::_scaled_dot_product_flash_attention": lambda args, processors: flash_workspace(
        args[0].shape[0], args[0].shape[1], args[0].shape[2], args[1].shape[2], args[0].shape[3], processors
    ),
    "aten::_scaled_dot_product_flash_attention_backward": lambda args, _: flash_backward_workspace(*args[1:3]),
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda args, processors: cpu_workspace(
        args[0].shape[2], args[1].shape[2], args[0].shape[3], processors
    ),
    "limbeck::causal_conv1d_backward": lambda args, _: causal_conv1d.backward_workspace(*args[1:3]),
    "limbeck::ssd_scan": lambda args, _: ssd.forward_workspace(args[0]),
    "limbeck::ssd_scan_backward": lambda args, _: ssd.backward_workspace(args[2], args[5], args[6], args[14]),
    "limbeck::norm_backward": lambda args, processors: norm.backward_workspace(args[1], args[4], processors),
    "limbeck::mamba_step": lambda args, _: mamba_step.step_workspace(args[1], args[11]),
    "limbeck::linear_kl": lambda args, _: linear_kl.linear_kl_workspace(*args[:3], *args[11:14]),
}
UNEVEN = {"aten::_scaled_dot_product_flash_attention"}  # shares that jump up and down with the number of keys


class Stand(TorchFunctionMode):
    """Stands in for what a fake tensor on a device that is not there cannot do: indexing and copying by Python's ways
    ask for the device's driver, and SDPA for its properties. The operators that they call do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return picked(*args)
        if func is Tensor.__setitem__:
            tensor, index, value = args
            rest, where = views(tensor, index)
            if where:
                return torch.ops.aten.index_put_.default(rest, where, value)
            return torch.ops.aten.copy_.default(rest, value) if isinstance(value, Tensor) else rest.fill_(value)
        if func is Tensor.copy_:
            return torch.ops.aten.copy_.default(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            return attended(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def picked(tensor: Tensor, index: Any) -> Tensor:
    """tensor[index]"""
    rest, where = views(tensor, index)
    return torch.ops.aten.index.Tensor(rest, where) if where else rest


def views(tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """What numbers, slices, None and an ellipsis of an index make of a tensor, and the tensors in it by dimension."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(entry is Ellipsis for entry in entries):
        place = next(number for number, entry in enumerate(entries) if entry is Ellipsis)
        missing = tensor.dim() - sum(entry is not None and entry is not Ellipsis for entry in entries)
        entries[place : place + 1] = [slice(None)] * missing
    where: list[Tensor | None] = []
    dimension = 0
    for entry in entries:
        if isinstance(entry, int):
            tensor = torch.ops.aten.select.int(tensor, dimension, entry)
            continue
        if entry is None:
            tensor = torch.ops.aten.unsqueeze.default(tensor, dimension)
        elif isinstance(entry, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dimension, entry.start, entry.stop, entry.step or 1)
        else:
            where += [None] * (dimension - len(where)) + [torch.as_tensor(entry, device=tensor.device)]
        dimension += 1
    return tensor, where


def attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """SDPA by the kernel that torch would choose: FlashAttention on a GPU without a mask, on a CPU where rows are
    contiguous, else torch's mathematics."""
    aten = torch.ops.aten
    if (q.device.type == "cuda" or STATE.gpu) and attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if q.device.type == "cpu" and all(tensor.stride(-1) == 1 for tensor in (q, k, v)):
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, torch.tensor(float("-inf"), dtype=q.dtype, device=q.device))
        flash = aten._scaled_dot_product_flash_attention_for_cpu
        return flash(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    mathematics = aten._scaled_dot_product_attention_math
    return mathematics(q, k, v, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa)[0]
