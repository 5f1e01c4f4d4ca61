"""What pruning breaks, mended at once: rotation of the residual stream, norms rescaled, matrices refitted.

Three means, each an option, none of which leaves a trace in the architecture:

- Rotation (rotation.py): the stream is turned into its principal directions on calibration data, one rotation for the
  whole model, and the hidden axis is cut there.
- Norms: an RMS over fewer channels is another number. The weight takes the ratio: that of the counts, as if what goes
  were zero, or that of the RMS before and after on calibration data (within each group of a gated norm).
- Least squares: layer by layer, the matrices that read the stream are refitted so that the pruned model's narrower
  stream gives what the original's gives, and the matrices that write into it so that the stream stays where the
  original's is, the contributions of removed layers included. Both pull towards the sliced weights (ridge).

The walk holds one layer of either model and both streams of all calibration tokens, no more: it runs at any size.
Shapes: [N] counted tokens, [H] channels of the source, [h] those that stay, [K] inputs of a matrix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from ..kernels.norm import rms_norm
from ..models.axes import HIDDEN, tensor_table
from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.hybrid import HybridLM
from .importance import TokenBatch
from .rotation import hidden_of, principal_directions, rotated, rotated_selection
from .slice import Selection, chosen, cut, filled, kept_rows, slice_config, slice_tensors, source_name
from .streams import GetTensor, Streams, one_layer

OnStep = Callable[[int, int], None]
NORMS = ("none", "count", "measured")


@dataclasses.dataclass(frozen=True)
class Repair:
    """What to mend; see the module. `ridge`: relative to the mean second moment of a matrix's inputs."""

    rotate: bool = False
    norms: str = "count"
    least_squares: bool = False
    ridge: float = 0.01

    def __post_init__(self) -> None:
        if self.norms not in NORMS:
            raise InputError(f"repair.norms is {self.norms!r}; known: {', '.join(NORMS)}")
        if not 0 < self.ridge < math.inf:
            raise InputError(f"repair.ridge is {self.ridge}; expected more than 0")

    @property
    def needs_data(self) -> bool:
        return self.rotate or self.least_squares or self.norms == "measured"


@dataclasses.dataclass(frozen=True)
class RepairOptions:
    """`Repair`, and on how many tokens; what is None is done where there is data."""

    rotate: bool | None = None
    norms: str = "count"
    least_squares: bool | None = None
    ridge: float = 0.01
    tokens: PositiveInt = 32768

    def __post_init__(self) -> None:
        self.repair(with_data=False)  # which checks the rest

    def repair(self, with_data: bool) -> Repair:
        rotate, fit = (with_data if wish is None else wish for wish in (self.rotate, self.least_squares))
        return Repair(rotate, self.norms, fit, self.ridge)


@torch.no_grad()
def repair_tensors(
    get_tensor: GetTensor,
    config: HybridConfig,
    selection: Selection,
    batches: Sequence[TokenBatch],
    repair: Repair,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_step: OnStep | None = None,
    finished: Mapping[str, GetTensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the pruned and repaired model (`slice_config`), in the order of its table and in the
    source's dtypes. `get_tensor` reads a tensor of the source by its internal name; layers run in `dtype` on
    `device`. `on_step(done, total)` counts layers, once for each walk through the data. `finished` holds, by name, what
    reads a tensor that an interrupted run of just the same has made: a layer of which all are there is run, but not
    mended again. Raises InputError where the data has no counted token.
    """
    walks = repair.norms == "measured" or repair.least_squares
    turns = repair.rotate and len(selection.kept.get(HIDDEN, ())) not in (0, config.hidden_size)
    total = config.num_layers * (turns + walks)
    if turns:
        count = None if on_step is None else lambda done: on_step(done, total)
        turn = principal_directions(get_tensor, config, batches, selection, device, dtype, count)
        get_tensor, selection = rotated(get_tensor, config, turn, device), rotated_selection(selection)
    if walks:
        done = total - config.num_layers
        walk = Walk(get_tensor, config, selection, batches, repair, device, dtype, finished or {})
        yield from walk.tensors(None if on_step is None else lambda layer: on_step(done + layer, total))
    else:
        yield from slice_tensors(get_tensor, config, selection, rescale_norms=repair.norms == "count")


def repair_model(
    model: HybridLM, selection: Selection, batches: Sequence[TokenBatch], repair: Repair, on_step: OnStep | None = None
) -> HybridLM:
    """`slice.slice_model`, repaired: a smaller model on the same device and in the same dtype."""
    get_tensor, reference = model.state_dict().__getitem__, model.embeddings.weight
    place: dict[str, Any] = {"device": reference.device, "dtype": reference.dtype, "on_step": on_step}
    tensors = repair_tensors(get_tensor, model.config, selection, batches, repair, **place)
    return filled(slice_config(model.config, selection), tensors, model)


class Fit:
    """Least squares of targets [N, O] on inputs [N, K] that pulls towards given weights [O, K].

    Sums over batches are float64. `solve` gives W0 + E[(t - W0 a) a^T] (E[a a^T] + ridge mean(diag))^-1.
    """

    def __init__(self) -> None:
        self.moments: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0

    def add(self, targets: Tensor, inputs: Tensor) -> None:
        self.moments = self.moments + (inputs.T @ inputs).double()
        self.cross = self.cross + (targets.T @ inputs).double()

    def solve(self, weights: Tensor, ridge: float) -> Tensor:
        moments, cross = self.moments, self.cross
        assert isinstance(moments, Tensor) and isinstance(cross, Tensor)
        left = cross - weights.double() @ moments
        damp = ridge * moments.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        damped = moments + damp * torch.eye(len(moments), dtype=torch.float64, device=moments.device)
        return weights.double() + torch.linalg.solve(damped, left.T).T


def rms_ratios(normed: Iterable[Tensor], weight: Tensor, kept: Tensor, groups: int) -> Tensor:
    """The RMS of the kept channels [k] over that of all [C], in each of `groups` groups: [groups] (float64), the mean
    over rows. `normed` [N, C] a batch is what the norm of this weight [C] gives."""
    total, count = torch.zeros(groups, dtype=torch.float64, device=kept.device), 0
    scale = torch.where(weight == 0, 0, 1 / weight)
    for rows in normed:
        squares = (rows * scale).double().square()
        own, every = (part.unflatten(1, (groups, -1)).mean(2) for part in (squares[:, kept], squares))
        total += torch.where(every > 0, own / every, 1).sqrt().sum(0)
        count += len(rows)
    return total / count


class Walk:
    """Both models through the calibration data, layer by layer; what it yields is the pruned one, mended."""

    def __init__(
        self,
        get_tensor: GetTensor,
        config: HybridConfig,
        selection: Selection,
        batches: Sequence[TokenBatch],
        repair: Repair,
        device: torch.device | str,
        dtype: torch.dtype,
        finished: Mapping[str, GetTensor],
    ) -> None:
        self.read, self.config, self.selection, self.repair = get_tensor, config, selection, repair
        self.made = finished
        self.held: dict[str, Tensor] = {}
        self.place: Any = (device, dtype)
        self.smaller = slice_config(config, selection)
        self.table, self.smaller_table = tensor_table(config), tensor_table(self.smaller)
        self.kept = kept_rows(hidden_of(config), selection.kept).to(device)
        self.original = Streams(get_tensor, batches, device, dtype)
        self.pruned = Streams(get_tensor, batches, device, dtype)
        self.pruned.hidden = [hidden[..., self.kept] for hidden in self.original.hidden]

    def tensors(self, on_layer: Callable[[int], None] | None) -> Iterator[tuple[str, Tensor]]:
        """The pruned model's tensors in the order of its table, each in its source's dtype."""
        yield self.finished("embeddings.weight", self.sliced("embeddings.weight"))
        place = 0
        for layer in range(self.config.num_layers):
            before = one_layer(self.config, layer, self.get_tensor, *self.place)
            moved = False
            if layer in self.selection.layers:
                mine = [name for name, axes in self.smaller_table.items() if axes.layer == place]
                made = all(name in self.made for name in mine)
                after = one_layer(self.smaller, place, self.remade if made else self.sliced, *self.place)
                weights = {name[9:]: tensor for name, tensor in after.state_dict().items() if name[:9] == "layers.0."}
                if self.repair.norms == "measured" and not made:
                    self.measure_norms(layer, before, weights)
                if self.repair.least_squares and not made:
                    self.refit_readers(place, weights)
                    self.refit_writer(before, after, weights)
                    moved = True
                for name in mine:
                    name, tensor = self.finished(name, weights[name.split(".", 2)[2]])
                    weights[name.split(".", 2)[2]].copy_(tensor)  # what is stored is what the next layers mend
                    yield name, tensor
                self.pruned.advance(after)
                place += 1
            if not moved:
                self.original.advance(before)
            self.held.clear()
            if on_layer is not None:
                on_layer(layer + 1)
        for name, tensor in self.end():
            yield self.finished(name, tensor)

    def get_tensor(self, name: str) -> Tensor:
        """A tensor of the source, kept until its layer is done: from a file it is read, and turned, once."""
        if name not in self.held:
            self.held[name] = self.read(name)
        return self.held[name]

    def finished(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        return name, tensor.to(self.get_tensor(source_name(name, self.selection)).dtype).cpu()

    def remade(self, name: str) -> Tensor:
        return self.made[name](name)

    def sliced(self, name: str) -> Tensor:
        """A tensor of the pruned model as slicing alone gives it."""
        source = self.table[source_name(name, self.selection)]
        tensor = self.get_tensor(source.name)
        rescale = self.repair.norms == "count"
        return cut(tensor, source, self.smaller_table[name], self.selection.kept, rescale_norms=rescale)

    def rows_kept(self, name: str) -> Tensor:
        """What stays of the first dimension of a tensor of the source."""
        return kept_rows(self.table[name].dimensions[0], self.selection.kept).to(self.kept.device)

    def measure_norms(self, layer: int, before: HybridLM, weights: Mapping[str, Tensor]) -> None:
        """Scales the norms of a layer of the pruned model, in place."""
        norms = [("hidden", "norm.weight", 1)]
        for inner, how in self.config.kinds[layer].norms.items():
            norms.append((how.observed, f"mixer.{inner}", getattr(self.config, how.groups)))
        for kind, name, groups in norms:
            if name in weights:
                source = f"layers.{layer}.{name}"
                normed = (self.original.run(before, number)[1][kind] for number in range(len(self.original.hidden)))
                ratio = rms_ratios(normed, self.get_tensor(source).to(*self.place), self.rows_kept(source), groups)
                weights[name].copy_((weights[name].unflatten(0, (groups, -1)) * ratio[:, None]).flatten())

    def refit_readers(self, place: int, weights: Mapping[str, Tensor]) -> None:
        """Refits, in place, the matrices of layer `place` that read the stream."""
        norm = self.get_tensor(f"layers.{self.selection.layers[place]}.norm.weight").to(*self.place)
        fit = self.stream_fit(norm, weights["norm.weight"])
        mapping = fit.solve(self.selector(), self.repair.ridge)
        for name, axes in self.smaller_table.items():
            if axes.layer == place and axes.reads_stream:
                weights[name.split(".", 2)[2]].copy_(self.refitted(name, mapping))

    def refit_writer(self, before: HybridLM, after: HybridLM, weights: Mapping[str, Tensor]) -> None:
        """Refits, in place, the matrix that leads a layer back into the stream, and moves the original's streams on."""
        (writer,) = after.config.kinds[0].writers
        fit = Fit()
        for number, mask in enumerate(self.original.mask):
            inputs = self.pruned.run(after, number)[1][after.config.kinds[0].writers[writer]]
            ahead = self.original.hidden[number] = self.original.run(before, number)[0]
            fit.add(ahead[mask][:, self.kept] - self.pruned.hidden[number][mask], inputs)
        weights[f"mixer.{writer}"].copy_(fit.solve(weights[f"mixer.{writer}"], self.repair.ridge))

    def stream_fit(self, norm: Tensor, own: Tensor) -> Fit:
        """The original's normed stream on the pruned model's: weights `norm` [H] and `own` [h]."""
        fit, eps = Fit(), self.config.norm_eps
        for rows, found in zip(self.original.counted(), self.pruned.counted(), strict=True):
            fit.add(rms_norm(rows, norm, eps), rms_norm(found, own, eps))
        return fit

    def selector(self) -> Tensor:
        """The matrix [H, h] that puts the kept channels where they were."""
        found = torch.zeros(self.config.hidden_size, len(self.kept), dtype=torch.float64, device=self.kept.device)
        found[self.kept, torch.arange(len(self.kept), device=self.kept.device)] = 1
        return found

    def refitted(self, name: str, mapping: Tensor) -> Tensor:
        """A matrix that reads the stream, for the stream that `mapping` [H, h] leads back to the original's."""
        source = self.table[source_name(name, self.selection)]
        rows = [kept_rows(dimension, self.selection.kept) for dimension in source.dimensions[:-1]]
        return chosen(self.get_tensor(source.name), rows).to(mapping) @ mapping

    def end(self) -> Iterator[tuple[str, Tensor]]:
        """The final norm, and the head where it is a matrix of its own."""
        source, weight = (get("norm_f.weight").to(*self.place) for get in (self.get_tensor, self.sliced))
        if self.repair.norms == "measured":
            normed = (rms_norm(rows, source, self.config.norm_eps) for rows in self.original.counted())
            weight = weight * rms_ratios(normed, source, self.kept, 1).to(weight)  # uncut, it is the source's own
        fit = self.stream_fit(source, weight)
        if self.config.tie_word_embeddings:
            if self.repair.least_squares:
                weight = self.tied_norm(fit, weight)
            yield "norm_f.weight", weight
            return
        yield "norm_f.weight", weight
        if self.repair.least_squares:
            mapping = fit.solve(self.selector(), self.repair.ridge)
            yield "lm_head.weight", self.refitted("lm_head.weight", mapping)
        else:
            yield "lm_head.weight", self.sliced("lm_head.weight")

    def tied_norm(self, fit: Fit, weight: Tensor) -> Tensor:
        """The final norm's weight [h] with which a head that has to stay the embedding comes nearest to the logits.

        With e' = E' diag(d) x' for E diag(g) x, the normal equations of d are (E'^T E' * x'x'^T) d = diag of
        E'^T E (g x) x'^T; in units of `weight`, so that ridge pulls towards it.
        """
        embedding = self.get_tensor("embeddings.weight").to(self.kept.device, torch.float64)
        assert isinstance(fit.moments, Tensor) and isinstance(fit.cross, Tensor)
        small = embedding[:, self.kept]
        moments = (small.T @ small) * fit.moments
        right = ((small.T @ embedding) * fit.cross.T).sum(1)
        damp = self.repair.ridge * moments.diagonal().mean()
        eye = torch.eye(len(moments), dtype=torch.float64, device=moments.device)
        return weight * torch.linalg.solve(moments + damp * eye, right + damp).to(weight)
