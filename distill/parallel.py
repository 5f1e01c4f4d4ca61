"""A model in training, on one process or many: what the optimizer moves, and which part of it lies in this process.

Many processes share a batch's rows, or groups of them do, in which each has a part of every row (row_parts.py). Their
models are whole, or every matrix is split by rows among them (FSDP2, `torch.distributed.fsdp.fully_shard`: a layer's
matrices are put together when its turn comes, and dropped after it). Vectors (A_log, D, dt_bias, norms, biases) are
whole everywhere, in float32: they are small, and a group of FSDP's has one dtype. Gradients are sums over all rows of
the batch, never means of parts.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..models import processes
from ..models.axes import WHOLE, TensorSpec, tensor_table
from ..models.checkpoint import load_model, open_checkpoint
from ..models.errors import InputError
from ..models.hybrid import HybridLM, set_tensor
from ..models.row_split import check_context

BUCKET = 2**25  # numbers of gradients that are summed over the processes at a time


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedWeight:
    """A parameter in training. `local` is what the optimizer moves here: the parameter, its rows that are this
    process's (`split`), or a float32 copy where the model keeps it in fewer bits; `used` makes of it, row by row, what
    the model computes with, where that is another."""

    spec: TensorSpec
    parameter: nn.Parameter
    local: nn.Parameter
    split: bool = False
    used: Callable[[Tensor], Tensor] | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def rows(self) -> slice:
        """The rows of the whole that `local` holds."""
        if not self.split:
            return slice(0, self.shape[0] if self.shape else None)
        size = -(-self.shape[0] // processes.count())
        start = min(size * processes.rank(), self.shape[0])
        return slice(start, min(start + size, self.shape[0]))

    def whole(self, part: Tensor) -> Tensor:
        """All rows of a tensor of which every process has those of its own. Every process has to call it."""
        if not self.split:
            return part
        size = -(-self.shape[0] // processes.count())
        padded = part.new_zeros((size, *self.shape[1:]))
        padded[: part.shape[0]] = part
        parts = [torch.empty_like(padded) for _ in range(processes.count())]
        distributed.all_gather(parts, padded)
        return torch.cat(parts)[: self.shape[0]]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model and what its optimizer moves, made by `prepare`."""

    model: HybridLM
    weights: tuple[TrainedWeight, ...]

    @property
    def device(self) -> torch.device:
        return self.weights[0].local.device

    def carried(self) -> dict[str, Tensor]:
        """What belongs to the model and no optimizer moves, whole in every process, by name: buffers, and layers of
        multi-token prediction that are frozen."""
        frozen = {name: weight for name, weight in self.model.named_parameters() if not weight.requires_grad}
        return {name: weight.detach() for name, weight in frozen.items()} | dict(self.model.named_buffers())

    def gradients(self) -> list[Tensor]:
        """The gradients of the locals, summed over the processes. Every process has to call it."""
        for weight in self.weights:
            if weight.split and weight.parameter.grad is not None:
                gradient: Any = weight.parameter.grad
                weight.local.grad = gradient.to_local()
        if processes.count() > 1:
            sum_over_processes([w.local.grad for w in self.weights if not w.split and w.local.grad is not None])
        return [weight.local.grad for weight in self.weights if weight.local.grad is not None]

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.local.grad = weight.parameter.grad = None

    @torch.no_grad()
    def moved(self) -> None:
        """Tells the model that the locals have new values."""
        for weight in self.weights:
            value = weight.local if weight.used is None else weight.used(weight.local)
            if weight.split and weight.used is not None:
                rows: Any = weight.parameter
                rows.to_local().copy_(value)  # the memory that FSDP puts whole matrices together from
            elif not weight.split and weight.local is not weight.parameter:
                weight.parameter.copy_(value)
        reshard(self.model)


def prepare(model: HybridLM, dtype: torch.dtype | None = None) -> Trained:
    """A model as it is, or already split by `shard`. A `dtype` narrower than the model's becomes that of the matrices
    in forward and backward, while the optimizer moves copies in the model's; gradients are added up there, too."""
    weights = []
    table = tensor_table(model.config)
    for name, parameter in list(model.named_parameters()):
        if not parameter.requires_grad:
            continue
        spec = table[name]
        mine: Any = parameter.detach()
        if hasattr(mine, "to_local"):  # a DTensor: fully_shard was here
            weights.append(TrainedWeight(spec, parameter, nn.Parameter(mine.to_local()), split=True))
        elif dtype is not None and dtype.itemsize < parameter.dtype.itemsize and spec.role not in WHOLE:
            weights.append(TrainedWeight(spec, lowered(model, name, parameter, dtype), parameter))
        else:
            weights.append(TrainedWeight(spec, parameter, parameter))
    return Trained(model, tuple(weights))


def lowered(model: nn.Module, name: str, master: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """Puts a copy in `dtype` in the place of a parameter, to which its gradients go as soon as they are known."""
    copy = nn.Parameter(master.detach().to(dtype, copy=True))

    def hand_over(copy: Tensor) -> None:
        assert copy.grad is not None
        gradient = copy.grad.to(master.dtype)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        copy.grad = None

    copy.register_post_accumulate_grad_hook(hand_over)
    placed(model, name, copy)
    return copy


def released(trained: Trained) -> None:
    """The model has parameters of its own again, in place of those of `lowered`, whose gradients go to others."""
    for weight in trained.weights:
        if not weight.split and weight.local is not weight.parameter:
            placed(trained.model, weight.spec.name, nn.Parameter(weight.parameter.detach()))


def placed(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Makes it the model's parameter of that name."""
    place, _, field = name.rpartition(".")
    setattr(model.get_submodule(place), field, parameter)


def shard(model: HybridLM, dtype: torch.dtype | None = None, read: Callable[[str], Tensor] | None = None) -> None:
    """Splits a model's matrices among all processes, in place; in forward and backward they have `dtype`.

    With `read` the model is on the meta device, and `read(name)` gives its weights when their turn comes, so that one
    layer at a time is whole. Every process has to call it.
    """
    from torch.distributed.device_mesh import init_device_mesh  # seconds that one process does not wait for
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # What hidden_states returns is read, and never changed in place, which is what this warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    groups: list[nn.Module] = list(model.layers)
    if not model.config.tie_word_embeddings:
        groups.append(model.embeddings)
    groups.append(model)
    table = tensor_table(model.config)
    prefixes = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    for group in groups:
        prefix = prefixes[group]
        if read is not None:
            materialize(group, prefix, read)
        device = next(group.parameters()).device
        mesh = init_device_mesh(device.type, (processes.count(),))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
        own = {parameter: table[prefix + name] for name, parameter in group.named_parameters()}
        whole = {parameter for parameter, spec in own.items() if spec.role in WHOLE or spec.ahead is not None}
        fully_shard(group, mesh=mesh, mp_policy=policy, ignored_params=whole)
        assert isinstance(group, FSDPModule)
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)  # gloo knows sums, but not sums of what is scaled first
    register_fsdp_forward_method(model, "hidden_states")  # after it the head is whole, as the losses read it


def materialize(module: nn.Module, prefix: str, read: Callable[[str], Tensor]) -> None:
    """Gives every parameter and buffer on the meta device its values."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta:
            set_tensor(module, name, read(prefix + name), trained=tensor.requires_grad)


def process_device(device: torch.device) -> torch.device:
    """The device of this process: of several GPUs its own."""
    if device.type == "cuda" and device.index is None and processes.count() > 1:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """What weights in training are kept in: float32 at least."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def narrower(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype, if matrices are used in it and not kept in it."""
    return None if dtype == stored_dtype(dtype) else dtype


def load_trained(path: Path, dtype: torch.dtype, device: torch.device, split: bool, ahead: bool = False) -> Trained:
    """A checkpoint to be trained: matrices in `dtype` where they are used, and what the optimizer moves in float32;
    with `split` divided among the processes. Multi-token prediction is trained with `ahead`, and else carried along.
    Raises InputError."""
    stored = stored_dtype(dtype)
    if split and processes.count() > 1:
        return prepare(with_ahead(load_sharded(path, stored, device, dtype=narrower(dtype)).train(), ahead))
    return prepare(with_ahead(load_model(path, stored, device).train(), ahead), dtype)


def with_ahead(model: HybridLM, trained: bool) -> HybridLM:
    """The model, whose multi-token prediction is trained or frozen."""
    if model.config.mtp_steps:
        model.mtp.requires_grad_(trained)
    return model


def placed_model(model: HybridLM, dtype: torch.dtype, split: bool) -> Trained:
    """A model that is whole in every process, to be trained; with `split` divided among them."""
    if split and processes.count() > 1:
        shard(model, narrower(dtype))
        return prepare(model)
    return prepare(model, dtype)


def load_frozen(path: Path, dtype: torch.dtype, device: torch.device, split: bool, offload: bool = False) -> HybridLM:
    """A checkpoint to learn from, in `dtype`, without gradients and multi-token prediction; with `offload` its layers
    stay in main memory (each process's own), and each comes to the device when its turn comes. Raises InputError."""
    if offload:
        from accelerate import cpu_offload

        model = load_model(path, dtype, torch.device("cpu"), ahead=False).requires_grad_(False)
        layers = model.layers
        model.layers = nn.ModuleList()
        model.to(device)
        model.layers = layers
        for layer in layers:
            cpu_offload(layer, execution_device=device, preload_module_classes=[type(layer).__name__])
        return model
    if split and processes.count() > 1:
        return load_sharded(path, dtype, device, frozen=True)
    return load_model(path, dtype, device, ahead=False).requires_grad_(False)


def load_sharded(
    path: Any, stored: torch.dtype, device: torch.device, *, dtype: torch.dtype | None = None, frozen: bool = False
) -> HybridLM:
    """A checkpoint whose matrices are split among all processes, kept in the dtype `stored` and used in `dtype`.

    Raises InputError, as `load_model` does.
    """
    checkpoint = open_checkpoint(path)
    config = checkpoint.config.replace(mtp_steps=0) if frozen else checkpoint.config
    model = HybridLM(config, device="meta").requires_grad_(not frozen)
    shard(model, dtype, lambda name: checkpoint.loaded(name, stored, device))
    return model.eval()


def reshard(model: nn.Module) -> None:
    """Drops what a forward pass has put together and left whole, such as the head."""
    for module in model.modules():
        if callable(drop := getattr(module, "reshard", None)):  # fully_shard was here
            drop()


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Every tensor, in place, becomes the sum of all processes'."""
    for bucket in buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        distributed.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def buckets(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Runs of tensors of one dtype with `BUCKET` numbers at most, one tensor at least."""
    runs: list[list[Tensor]] = []
    filled = 0
    for tensor in tensors:
        if not runs or runs[-1][0].dtype != tensor.dtype or filled + tensor.numel() > BUCKET:
            runs.append([])
            filled = 0
        runs[-1].append(tensor)
        filled += tensor.numel()
    return runs


def row_groups(context_parallel: int) -> int:
    """Among how many groups of processes a batch's rows are shared; the processes of a group split each of its rows."""
    return processes.count() // context_parallel


def sharers_of(context_parallel: int) -> str:
    """In words, for errors."""
    if context_parallel == 1:
        return f"{processes.count()} processes"
    return f"{row_groups(context_parallel)} groups of {context_parallel} processes (context_parallel)"


def check_share(batch: int, seq_len: int, context_parallel: int) -> None:
    """Raises InputError where the processes cannot share a batch's rows evenly, or split its rows."""
    check_context(context_parallel, seq_len)
    sharers = row_groups(context_parallel)
    if batch % sharers:
        raise InputError(
            f"distill.batch is {batch} rows, which {sharers_of(context_parallel)} cannot share evenly; give a multiple"
            f" of {sharers}"
        )


def share(rows: int, context_parallel: int = 1) -> range:
    """The rows of a batch that this process works on, with the others of its group; their number is a multiple of the
    groups'."""
    each, group = rows // row_groups(context_parallel), processes.rank() // context_parallel
    return range(each * group, each * (group + 1))


def squares(trained: Trained) -> tuple[float, float]:
    """Sums of the squared gradients, in float64: of what lies here alone, and of what every process has."""
    parts = [0.0, 0.0]
    for split in (True, False):
        gradients = [w.local.grad for w in trained.weights if w.split == split and w.local.grad is not None]
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients))
            parts[not split] = float(norms.double().square().sum())
    return parts[0], parts[1]
