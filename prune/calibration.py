"""Weights rounded on calibration data: column by column, each column's error made up for by the columns after it.

Source: GPTQ (arXiv 2210.17323). For a matrix W [N, K] with inputs x the loss is sum |(W - Q) x|^2, whose Hessian for
every row is H = sum x x^T. With the upper triangular U of H^-1 = U^T U, rounding column j to q leaves the error
e = (w_j - q) / U_jj, and w_k -= e U_jk for the columns k after it. The diagonal of H is damped by 1% of its mean;
columns that no input reaches are rounded to the nearest. Columns keep their order (no act-order, whose layouts readers
do not share), and a group of columns has its scale of what its numbers are when its turn comes.

Layers are rounded in turn on the streams of those before them, as these will be read. Within a layer the matrices that
read what others of it give come after those. An expert has the moments of the tokens that chose it, and of what its
last matrix reads with the routing weight, as its output counts. Activations are not rounded here.
One layer and the streams of all calibration tokens are in memory, no more.
Shapes: [N] outputs, [K] inputs of a matrix, [U] experts (1: no stack), [T] counted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.axes import HIDDEN, Role, TensorSpec
from ..models.checkpoint import Checkpoint
from ..models.config import HybridConfig
from ..models.families.family import pieces_of, stored_tensors, tensor_table_of
from ..models.hybrid import HybridLM
from ..models.quantise import RoundedWeight, group_of, layer_of, nearest, scales_of
from ..models.rounding import Rounding
from ..models.stored import open_file
from ..models.tensors import save_tensors
from .expert_repair import SUM_BYTES
from .importance import TokenBatch
from .streams import Streams, one_layer

BLOCK = 128  # columns whose errors reach the columns after them at once
DAMP = 0.01  # of the mean of the Hessian's diagonal
SCALE = ".scale"  # ends the name of a weight's scales in the files of finished layers
F8 = torch.float8_e4m3fn


def inverse_factor(moments: Tensor) -> Tensor:
    """U [U, K, K], upper triangular, with (moments + damping)^-1 = U^T U, for symmetric moments [U, K, K] (float64)."""
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    damped = torch.where(diagonal > 0, diagonal + DAMP * diagonal.mean(-1, keepdim=True), 1)
    whole = moments - torch.diag_embed(diagonal) + torch.diag_embed(damped)
    # R upper with R R^T = H is the lower Cholesky factor of H turned around; then U = R^-1, without H^-1.
    factor = torch.linalg.cholesky(whole.flip(-1, -2)).flip(-1, -2)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=True)


def rounded_on(weight: Tensor, moments: Tensor, rounding: Rounding, group: int) -> RoundedWeight:
    """Weights [U, N, K] at numbers of a format, column by column, for inputs of these second moments [U, K, K]. `group`
    columns have a scale (K: all); it divides K."""
    factor = inverse_factor(moments.double()).float()
    left = weight.float().clone()
    numbers, columns = torch.empty_like(left), left.shape[-1]
    scales: list[Tensor] = []
    for start in range(0, columns, BLOCK):
        block = slice(start, min(start + BLOCK, columns))
        errors = torch.empty_like(left[..., block])
        for column in range(block.start, block.stop):
            if column % group == 0:
                scales.append(scales_of(left[..., column : column + group], rounding, group))
            scale = scales[-1][..., 0].float()
            numbers[..., column] = nearest(left[..., column] / scale, rounding)
            error = left[..., column] - numbers[..., column] * scale
            error = error / factor[:, column, column, None]
            within = slice(column, block.stop)
            left[..., within] -= error[..., None] * factor[:, None, column, within]
            errors[..., column - start] = error
        if block.stop < columns:
            left[..., block.stop :] -= errors @ factor[:, block, block.stop :]
    return RoundedWeight(numbers, torch.cat(scales, -1))


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint,
    names: set[str],
    rounding: Rounding,
    batches: Sequence[TokenBatch],
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    on_layer: Callable[[int], None] | None = None,
) -> Callable[[str], RoundedWeight]:
    """Rounds the stored tensors `names` of a checkpoint (`quantise.rounded_names`) on the counted positions of batches,
    and gives what reads one of them. Each layer's are a file in `folder` once they are whole: those that an interrupted
    run of just the same has left are taken as they are. `on_layer` counts layers. Raises InputError where the data has
    no counted token."""
    config, table = checkpoint.config, tensor_table_of(checkpoint.config)
    folder.mkdir(exist_ok=True)
    layers = [set[str]() for _ in range(config.num_layers)]
    for name in names:
        number = layer_of(config, name)
        assert number is not None
        layers[number].add(name)
    files = [folder / f"{number:05}.safetensors" for number in range(config.num_layers)]

    def rounded_tensor(name: str) -> RoundedWeight:
        number = layer_of(config, name)
        assert number is not None
        with open_file(files[number]) as file:
            return RoundedWeight(file.get_tensor(name), file.get_tensor(name + SCALE))

    rounds = {piece.ours for name in names for piece in stored_tensors(config)[name].pieces}

    def as_stored(name: str) -> Tensor:
        tensor = checkpoint.tensor(name)
        return tensor if name in rounds else tensor.to(table[name].dtype(torch.bfloat16))

    if all(file.exists() for file, own in zip(files, layers, strict=True) if own):
        return rounded_tensor
    group = group_of(config, names) if rounding.grouped else None
    streams = Streams(config, as_stored, batches, device, torch.float32)
    for number, own in enumerate(layers):
        layer = one_layer(config, number, as_stored, device, torch.float32)
        if own:
            work = LayerRounding(config, number, layer, streams, own, rounding, group)
            if files[number].exists():
                work.take({name: rounded_tensor(name) for name in own})
            else:
                work.round_all()
                found = work.result.items()
                save_tensors(files[number], {name: each.numbers for name, each in found}
                             | {name + SCALE: each.scale for name, each in found})  # fmt: skip
        streams.advance(layer)
        if on_layer is not None:
            on_layer(number + 1)
    return rounded_tensor


class LayerRounding:
    """A layer, a model of one, whose weights are rounded in place; `result` has them as they are stored."""

    def __init__(
        self,
        config: HybridConfig,
        number: int,
        layer: HybridLM,
        streams: Streams,
        names: set[str],
        rounding: Rounding,
        group: int | None,
    ) -> None:
        self.config, self.layer, self.streams = config, layer, streams
        self.rounding, self.group = rounding, group
        table = tensor_table_of(config)
        ours = {piece.ours for name in names for piece in stored_tensors(config)[name].pieces}
        self.specs = [spec for name, spec in table.items() if name in ours and spec.layer == number]
        self.result: dict[str, RoundedWeight] = {}

    def round_all(self) -> None:
        later = [spec for spec in self.specs if reads_another(spec, self.specs)]
        for specs in ([spec for spec in self.specs if spec not in later], later):
            matrices = [spec for spec in specs if spec.role is not Role.EXPERTS]
            moments = input_moments(self.layer, self.streams, [spec.part for spec in matrices])
            for spec in matrices:
                self.round(spec, moments.pop(spec.part), 0)
            self.round_experts([spec for spec in specs if spec.role is Role.EXPERTS])

    def round_experts(self, specs: Sequence[TensorSpec]) -> None:
        """Stacks that read the same, as many experts at once as there is memory for."""
        if not specs:
            return
        experts, _, columns = specs[0].shape
        at_once = max(1, SUM_BYTES // (32 * columns**2))  # moments, their factor, and what comes and goes between
        for start in range(0, experts, at_once):
            units = range(start, min(start + at_once, experts))
            moments = expert_moments(self.layer, self.streams, specs[0].part, units)
            for spec in specs:
                self.round(spec, moments, start)

    def round(self, spec: TensorSpec, moments: Tensor, start: int) -> None:
        """Rounds units start.. of a tensor, as many as there are moments [U, K, K]."""
        units, weight = len(moments), self.weight(spec)  # [units of all, rows, K]
        rows = weight.shape[1]
        pieces = [p for p in pieces_of(self.config)[spec.name] if start <= p.start // rows < start + units]
        scale = torch.cat([torch.full((p.rows, 1), p.scale) for p in pieces]).view(units, rows, 1).to(weight)
        stored = weight[start : start + units] / scale
        found = rounded_on(stored, moments, self.rounding, self.group or weight.shape[2])
        numbers, scales = found.numbers.flatten(0, 1), found.scale.flatten(0, 1)
        done = 0
        for piece in pieces:
            own = slice(done, done + piece.rows)
            done += piece.rows
            whole = self.whole(piece.stored, scales.shape[1])
            whole.numbers[piece.begin : piece.begin + piece.rows] = numbers[own].to(whole.numbers)
            whole.scale[piece.begin : piece.begin + piece.rows] = scales[own].to(whole.scale)
        self.place(spec)

    def whole(self, name: str, groups: int) -> RoundedWeight:
        """The result of a stored tensor, which is filled piece by piece."""
        if name not in self.result:
            rows, columns = stored_tensors(self.config)[name].shape
            kind = F8 if self.rounding.kind == "float" else torch.int8
            numbers = torch.zeros(rows, columns, dtype=kind)
            self.result[name] = RoundedWeight(numbers, torch.ones(rows, groups, dtype=torch.bfloat16))
        return self.result[name]

    def weight(self, spec: TensorSpec) -> Tensor:
        """The layer's own tensor as [units, rows, K]."""
        weight = self.layer.layers[0].get_parameter(spec.part).data
        return weight if weight.dim() == 3 else weight[None]

    def take(self, finished: Mapping[str, RoundedWeight]) -> None:
        """Puts in place what an earlier run has rounded."""
        self.result = dict(finished)
        for spec in self.specs:
            self.place(spec)

    def place(self, spec: TensorSpec) -> None:
        """Puts into the layer, as a reader in bfloat16 has it, what of a tensor is rounded."""
        flat = self.weight(spec).flatten(0, 1)
        for piece in pieces_of(self.config)[spec.name]:
            if piece.stored in self.result:
                values = self.result[piece.stored].values()[piece.begin : piece.begin + piece.rows]
                flat[piece.start : piece.start + piece.rows] = values.bfloat16() * piece.scale


def reads_another(spec: TensorSpec, others: Sequence[TensorSpec]) -> bool:
    """Whether a matrix reads what another of its layer gives: it has columns on an axis of the other's rows."""
    read = axes_of(spec, -1) - {HIDDEN}
    return any(read & axes_of(other, -2) for other in others if other is not spec)


def axes_of(spec: TensorSpec, dimension: int) -> set[object]:
    return {factor.axis for segment in spec.dimensions[dimension] for factor in segment if factor.axis is not None}


@torch.no_grad()
def input_moments(layer: HybridLM, streams: Streams, parts: Sequence[str]) -> dict[str, Tensor]:
    """sum x x^T [1, K, K] (float64) of what the matrices `parts` of a layer, a model of one, read at counted tokens."""
    modules: dict[nn.Module, str] = {layer.layers[0].get_submodule(part.rpartition(".")[0]): part for part in parts}
    sums: dict[str, Tensor] = {}
    if not parts:
        return sums
    for number, mask in enumerate(streams.mask):
        seen: list[tuple[Tensor, Tensor]] = []  # matrices that read the same share its products

        def note(module: nn.Module, x: Tensor, mask: Tensor = mask, seen: list[tuple[Tensor, Tensor]] = seen) -> Tensor:
            if module in modules:
                own = next((products for other, products in seen if other is x), None)
                if own is None:
                    rows = x[mask].float()
                    own = (rows.T @ rows).double()[None]
                    seen.append((x, own))
                part = modules[module]
                sums[part] = sums[part] + own if part in sums else own
            return x

        layer.round_input = note
        try:
            streams.output(layer, number)
        finally:
            layer.round_input = None
    return sums


@torch.no_grad()
def expert_moments(layer: HybridLM, streams: Streams, part: str, experts: range) -> Tensor:
    """sum x x^T [U, K, K] (float64) of what the stack `part` reads of those of a layer's experts, each at the counted
    tokens that chose it; zeros where none did."""
    stacks = layer.config.kinds[0].experts
    assert stacks is not None
    last = part.removeprefix("mixer.") == stacks.down
    name = stacks.read if last else stacks.inputs
    size = layer.layers[0].get_parameter(part).shape[-1]
    sums = torch.zeros(len(experts), size, size, dtype=torch.float64, device=streams.hidden[0].device)
    for number in range(len(streams.hidden)):
        seen = streams.output(layer, number, (stacks.choice, name))[1]
        choice, inputs = seen[stacks.choice], seen[name]
        if last:
            inputs = inputs.unflatten(1, (-1, choice.shape[1]))
        for place, expert in enumerate(experts):
            tokens, places = (choice == expert).nonzero(as_tuple=True)
            rows = (inputs[tokens, :, places] if last else inputs[tokens]).float()
            sums[place] += (rows.T @ rows).double()
    return sums
