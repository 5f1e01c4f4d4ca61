"""What pruning breaks, repaired before training: the residual stream rotated, norms rescaled, layers refitted.

Six means, each an option, none of which leaves a trace in the architecture:

- Rotation (rotation.py): the stream is turned into its principal directions on calibration data, one rotation for the
  whole model, and the hidden axis is cut there.
- Experts that go: merged into those that stay (expert_merge.py), instead of dropped.
- Norms: an RMS over fewer channels is another number. The weight takes the ratio: that of the counts, as if what goes
  were zero, or that of the RMS before and after on calibration data (within each group of a gated norm).
- Neurons (reselect.py): chosen by what least squares lose without them, instead of by their scores.
- Least squares: layer by layer, the matrices that read the stream are refitted so that the pruned model's narrower
  stream gives what the original's gives, and the matrices that write into it so that the stream stays where the
  original's is, the contributions of removed layers included. Both pull towards the sliced weights (ridge).
- Local distillation (local_distill.py): gradient steps on all weights of a layer, towards the original's stream.

One layer of either model and both streams of all calibration tokens are in memory, no more: it runs at any size.
Shapes: [N] counted tokens, [H] channels of the source, [h] those that stay, [K] inputs of a matrix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from ..kernels.norm import rms_norm
from ..models.axes import HIDDEN, tensor_table
from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.hybrid import HybridLM
from ..models.multipliers import scaled
from .expert_merge import merged_experts
from .expert_repair import refit_experts
from .importance import TokenBatch
from .local_distill import distill_layer
from .reselect import reselected
from .ridge import RidgeFit
from .rotation import hidden_of, rotated, rotated_selection
from .slice import Selection, chosen, cut, filled, kept_rows, slice_config, slice_tensors, source_name
from .source_pass import source_pass
from .streams import GetTensor, Streams, one_layer, rms_ratios

OnStep = Callable[[int, int], None]
NORMS = ("none", "count", "measured")


@dataclasses.dataclass(frozen=True)
class Repair:
    """What to repair; see the module. `ridge`: relative to the mean second moment of a matrix's inputs.
    `whole_experts`: of the experts that stay, the share that is kept whole while the others take in those that go
    (expert_merge.py); None: they are dropped. `local_steps`, `local_rate`: of local distillation, a layer. `reselect`:
    least squares choose the neurons."""

    rotate: bool = False
    norms: str = "count"
    least_squares: bool = False
    ridge: float = 0.1
    whole_experts: float | None = None
    local_steps: int = 0
    local_rate: float = 0.02
    reselect: bool = False

    def __post_init__(self) -> None:
        if self.reselect and not self.least_squares:
            raise InputError(
                "repair.reselect chooses neurons for least squares; give repair.least_squares=true beside it"
            )
        if self.norms not in NORMS:
            raise InputError(f"repair.norms is {self.norms!r}; known: {', '.join(NORMS)}")
        if not 0 < self.ridge < math.inf:
            raise InputError(f"repair.ridge is {self.ridge}; expected more than 0")
        if self.whole_experts is not None and not 0 <= self.whole_experts <= 1:
            raise InputError(f"repair.whole_experts is {self.whole_experts}; expected a share of 0 to 1, or null")
        if self.local_steps < 0:
            raise InputError(f"repair.local_steps is {self.local_steps}; expected 0 or more")
        if not 0 < self.local_rate < 1:
            raise InputError(f"repair.local_rate is {self.local_rate}; expected more than 0 and less than 1")

    @property
    def needs_data(self) -> bool:
        return self.rotate or self.by_layers

    @property
    def by_layers(self) -> bool:
        """Whether both models run side by side, layer by layer."""
        merges = self.whole_experts is not None
        return self.least_squares or self.norms == "measured" or merges or self.local_steps > 0


@dataclasses.dataclass(frozen=True)
class RepairOptions:
    """`Repair`, and on how many tokens; what is None is done where there is data."""

    rotate: bool | None = None
    norms: str = "count"
    least_squares: bool | None = None
    ridge: float = 0.1
    whole_experts: float | None = None
    local_steps: int = 0
    local_rate: float = 0.02
    reselect: bool | None = None
    tokens: PositiveInt = 32768

    def __post_init__(self) -> None:
        self.repair(with_data=True)  # which checks the rest

    def repair(self, with_data: bool) -> Repair:
        rotate, fit = (with_data if wish is None else wish for wish in (self.rotate, self.least_squares))
        reselect = fit if self.reselect is None else self.reselect
        local = self.local_steps, self.local_rate
        return Repair(rotate, self.norms, fit, self.ridge, self.whole_experts, *local, reselect)


def kept_units(selection: Selection, config: HybridConfig, repair: Repair) -> dict[str, Any]:
    """What stays, as selection.json says it; of a rotated stream a number of the source's principal directions."""
    kept = {str(axis): list(units) for axis, units in selection.kept.items()}
    content = {"layers": list(selection.layers), "kept": kept}
    turned = turns(selection, config, repair)
    return content | {"principal_directions": len(kept.pop("hidden"))} if turned else content


def turns(selection: Selection, config: HybridConfig, repair: Repair) -> bool:
    """Whether the stream is rotated: where all of it stays it is left as it is."""
    return repair.rotate and len(selection.kept.get(HIDDEN, ())) not in (0, config.hidden_size)


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
    on_selection: Callable[[Selection], None] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the pruned and repaired model (`slice_config`), in the order of its table and in the
    source's dtypes. `get_tensor` reads a tensor of the source by its internal name; layers run in `dtype` on
    `device`. `on_step(done, total)` counts layers, once for each pass through the data. `finished` holds, by name, what
    reads a tensor that an interrupted run of just the same has made: a layer of which all are there is run, but not
    repaired again. `on_selection` is told, before the first tensor, which units stay. Raises InputError where the data
    has no counted token.
    """
    layerwise = repair.by_layers
    rotates = turns(selection, config, repair)
    reselects = repair.reselect and bool(reselected(config, selection))
    total = config.num_layers * ((rotates or reselects) + layerwise)
    if rotates or reselects:
        count = None if on_step is None else lambda done: on_step(done, total)
        turn, selection = source_pass(
            get_tensor, config, batches, selection, device, dtype,
            rotate=rotates, reselect=reselects, on_layer=count,
        )  # fmt: skip
        if on_selection is not None:
            on_selection(selection)
        if turn is not None:
            get_tensor, selection = rotated(get_tensor, config, turn, device), rotated_selection(selection)
    if layerwise:
        done = total - config.num_layers
        layers = LayerwiseRepair(get_tensor, config, selection, batches, repair, device, dtype, finished or {})
        yield from layers.tensors(None if on_step is None else lambda layer: on_step(done + layer, total))
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


class LayerwiseRepair:
    """Takes the original and the pruned model through the calibration data side by side, a layer at a time, and repairs
    each layer of the pruned one before its stream moves on."""

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
        self.source_tensor, self.config, self.selection, self.repair = get_tensor, config, selection, repair
        self.finished = finished
        self.held: dict[str, Tensor] = {}
        self.form: Any = (device, dtype)  # of weights and streams at work
        self.smaller = slice_config(config, selection)
        self.table, self.smaller_table = tensor_table(config), tensor_table(self.smaller)
        self.kept = kept_rows(hidden_of(config), selection.kept).to(device)
        self.original = Streams(config, get_tensor, batches, device, dtype)
        self.pruned = Streams(config, get_tensor, batches, device, dtype)
        self.pruned.hidden = [hidden[..., self.kept] for hidden in self.original.hidden]

    def tensors(self, on_layer: Callable[[int], None] | None) -> Iterator[tuple[str, Tensor]]:
        """The pruned model's tensors in the order of its table, each in its source's dtype."""
        yield self.stored("embeddings.weight", self.sliced("embeddings.weight"))
        place = 0
        for layer in range(self.config.num_layers):
            original = one_layer(self.config, layer, self.get_tensor, *self.form)
            if layer in self.selection.layers:
                yield from self.repaired_layer(place, original)
                place += 1
            else:  # the pruned stream stays where it is: the next writer that is refitted adds what this layer did
                self.original.advance(original)
            self.held.clear()
            if on_layer is not None:
                on_layer(layer + 1)
        for name, tensor in self.head():
            yield self.stored(name, tensor)
        for name, spec in self.smaller_table.items():
            if spec.ahead is not None:  # nothing here runs it: it is cut, and its norms count what is left
                source, rescale = self.table[name], self.repair.norms != "none"
                tensor = self.source_tensor(name)
                yield name, cut(tensor, source, spec, self.selection.kept, rescale_norms=rescale).cpu()

    def repaired_layer(self, place: int, original: HybridLM) -> Iterator[tuple[str, Tensor]]:
        """The tensors of layer `place` of the pruned model; both streams move through their layers."""
        names = [name for name, spec in self.smaller_table.items() if spec.layer == place]
        # A layer that an interrupted run has stored moves the streams on as it did then, so that the layers after it
        # are refitted on the very numbers that they would have seen.
        resumed = all(name in self.finished for name in names)
        if self.repair.whole_experts is not None and not resumed:
            self.merge_experts(self.selection.layers[place], original, self.repair.whole_experts)
        tensor_of = (lambda name: self.finished[name](name)) if resumed else self.sliced
        pruned = one_layer(self.smaller, place, tensor_of, *self.form)
        weights = {name[9:]: tensor for name, tensor in pruned.state_dict().items() if name[:9] == "layers.0."}
        if self.repair.norms == "measured" and not resumed:
            self.measure_norms(place, original, weights)
        if self.repair.least_squares and not resumed:
            # Norms, readers, experts, writers: each is fitted on what the ones before it make of the stream.
            self.refit_readers(place, weights)
            if pruned.config.kinds[0].experts is not None:
                streams, residual = (self.original, self.pruned), self.config.multipliers.residual
                refit_experts(original, pruned, *streams, self.kept, self.repair.ridge, residual)
            self.refit_writers(place, original, pruned, weights)
        else:
            self.original.advance(original)
        if self.repair.local_steps and not resumed:
            steps, rate = self.repair.local_steps, self.repair.local_rate
            distill_layer(pruned, self.pruned, self.original, self.kept, steps, rate)
        for name in names:
            own = weights[name.split(".", 2)[2]]
            _, tensor = self.stored(name, own)
            own.copy_(tensor)  # rounded as it is stored: the next layers make up for the rounding, too
            yield name, tensor
        self.pruned.advance(pruned)

    def merge_experts(self, layer: int, original: HybridLM, whole: float) -> None:
        """Has the source's experts of a layer that stay take in those that go, until the layer is done."""
        for axis, kept in self.selection.kept.items():
            if axis.layer == layer and axis.kind == "experts" and original.config.kinds[0].experts is not None:
                for part, tensor in merged_experts(original, self.original, kept, whole).items():
                    name = f"layers.{layer}.mixer.{part}"
                    self.held[name] = tensor.to(self.get_tensor(name).dtype)

    def get_tensor(self, name: str) -> Tensor:
        """A tensor of the source, kept until its layer is done: from a file it is read, and turned, once."""
        if name not in self.held:
            self.held[name] = self.source_tensor(name)
        return self.held[name]

    def stored(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        return name, tensor.to(self.get_tensor(source_name(name, self.selection)).dtype).cpu()

    def sliced(self, name: str) -> Tensor:
        """A tensor of the pruned model as slicing alone gives it."""
        source = self.table[source_name(name, self.selection)]
        tensor = self.get_tensor(source.name)
        rescale = self.repair.norms == "count"
        return cut(tensor, source, self.smaller_table[name], self.selection.kept, rescale_norms=rescale)

    def rows_kept(self, name: str) -> Tensor:
        """What stays of the first dimension of a tensor of the source."""
        return kept_rows(self.table[name].dimensions[0], self.selection.kept).to(self.kept.device)

    def measure_norms(self, place: int, original: HybridLM, weights: Mapping[str, Tensor]) -> None:
        """Scales the norms of a layer of the pruned model, in place."""
        norms = [("hidden", "norm.weight", 1)]
        for name, norm in original.config.kinds[0].norms.items():
            if f"mixer.{name}" in weights:
                norms.append((norm.observed, f"mixer.{name}", getattr(self.config, norm.groups)))
        for observed, name, groups in norms:
            source, batches = f"layers.{self.selection.layers[place]}.{name}", range(len(self.original.hidden))
            normed = (self.original.output(original, number)[1][observed] for number in batches)
            ratio = rms_ratios(normed, self.get_tensor(source).to(*self.form), self.rows_kept(source), groups)
            weights[name].copy_((weights[name].unflatten(0, (groups, -1)) * ratio[:, None]).flatten())

    def refit_readers(self, place: int, weights: Mapping[str, Tensor]) -> None:
        """Refits, in place, the matrices of layer `place` that read the stream: W' = W M, where M [H, h] leads the
        pruned model's normed stream back to the original's. One fit serves all readers, whatever their outputs."""
        norm = self.get_tensor(f"layers.{self.selection.layers[place]}.norm.weight").to(*self.form)
        mapping = self.stream_fit(norm, weights["norm.weight"]).solve(self.selector(), self.repair.ridge)
        for name, spec in self.smaller_table.items():
            if spec.layer == place and spec.reads_stream:
                weights[name.split(".", 2)[2]].copy_(self.through(mapping, name))

    def refit_writers(self, place: int, original: HybridLM, pruned: HybridLM, weights: Mapping[str, Tensor]) -> None:
        """Refits, in place, the matrices that lead a layer back into the stream, and moves the original's streams on.

        The target is where the original's stream is after the layer, less where the pruned one's is before it: beside
        the layer's own part the errors of the layers before, and whole layers that were removed. Several writers add
        up, so that they are one matrix on their inputs side by side: the joint fit is never worse than one after the
        other, and asks for no order among them. What the layer adds by other ways, as experts do, stays as it is.
        """
        known = {f"mixer.{name}": observed for name, observed in pruned.config.kinds[0].writers.items()}
        writers = {name: observed for name, observed in known.items() if name in weights}
        others = any(s.writes_stream and s.part not in writers for s in self.smaller_table.values() if s.layer == place)
        if not writers:
            return self.original.advance(original)
        sizes = [weights[name].shape[1] for name in writers]
        # What a writer gives is multiplied and added: its inputs are multiplied instead, and its bias is taken off.
        factors = [self.writer_multiplier(pruned, name) for name in writers]
        biases: Any = 0
        for name, factor in zip(writers, factors, strict=True):
            if (bias := name.replace(".weight", ".bias")) in weights:
                biases = biases + factor * weights[bias]
        fit, whole = RidgeFit(), torch.cat([weights[name] for name in writers], 1)
        for number, mask in enumerate(self.original.mask):
            stream, seen = self.pruned.output(pruned, number)
            inputs = torch.cat([scaled(seen[o], by) for o, by in zip(writers.values(), factors, strict=True)], 1)
            ahead = self.original.hidden[number] = self.original.output(original, number)[0]
            target = ahead[mask][:, self.kept] - self.pruned.hidden[number][mask] - biases
            if others:
                target -= (stream - self.pruned.hidden[number])[mask] - biases - inputs @ whole.T
            fit.add(target, inputs)
        joint = fit.solve(whole, self.repair.ridge, sizes)
        for name, part in zip(writers, joint.split(sizes, 1), strict=True):
            weights[name].copy_(part)

    def writer_multiplier(self, pruned: HybridLM, name: str) -> float:
        """What the product with a layer's writer is multiplied by before it is added to the stream."""
        own = pruned.config.kinds[0].multipliers.get(name.removeprefix("mixer."))
        return self.config.multipliers.residual * (1.0 if own is None else own(self.config))

    def stream_fit(self, norm: Tensor, own: Tensor) -> RidgeFit:
        """The original's normed stream on the pruned model's: norms of weights `norm` [H] and `own` [h]."""
        fit, eps = RidgeFit(), self.config.norm_eps
        for rows, own_rows in zip(self.original.counted(), self.pruned.counted(), strict=True):
            fit.add(rms_norm(rows, norm, eps), rms_norm(own_rows, own, eps))
        return fit

    def selector(self) -> Tensor:
        """The matrix [H, h] that puts the kept channels where they were: M where nothing is refitted."""
        matrix = torch.zeros(self.config.hidden_size, len(self.kept), dtype=torch.float64, device=self.kept.device)
        matrix[self.kept, torch.arange(len(self.kept), device=self.kept.device)] = 1
        return matrix

    def through(self, mapping: Tensor, name: str) -> Tensor:
        """W M: the rows that stay of the source's matrix, for a stream that `mapping` [H, h] leads back to its own."""
        source = self.table[source_name(name, self.selection)]
        rows = [kept_rows(dimension, self.selection.kept) for dimension in source.dimensions[:-1]]
        return chosen(self.get_tensor(source.name), rows).to(mapping) @ mapping

    def head(self) -> Iterator[tuple[str, Tensor]]:
        """The final norm, and the head where it is a matrix of its own, which reads as a layer's matrices do."""
        norm, weight = (get("norm_f.weight").to(*self.form) for get in (self.get_tensor, self.sliced))
        if self.repair.norms == "measured":
            normed = (rms_norm(rows, norm, self.config.norm_eps) for rows in self.original.counted())
            weight = weight * rms_ratios(normed, norm, self.kept, 1).to(weight)  # uncut, it is the source's own
        tied, fit = self.config.tie_word_embeddings, None
        if self.repair.least_squares:
            fit = self.stream_fit(norm, weight)
        yield "norm_f.weight", self.tied_norm(fit, weight) if fit and tied else weight
        if not tied:
            mapping = None if fit is None else fit.solve(self.selector(), self.repair.ridge)
            head = "lm_head.weight"
            yield head, self.sliced(head) if mapping is None else self.through(mapping, head)

    def tied_norm(self, fit: RidgeFit, weight: Tensor) -> Tensor:
        """The final norm's weight [h] with which a head that has to stay the embedding comes nearest to the logits.

        Only h numbers are free. With d for the norm's weight in units of `weight`, logits are E' diag(d) x' (E' the
        kept columns, x' normed) and should be E x: the normal equations are
        (E'^T E' * S_x'x') d = diag(E'^T E S_xx'), with * entry by entry, and ridge pulls d towards 1.
        """
        embedding = self.get_tensor("embeddings.weight").to(self.kept.device, torch.float64)
        second, cross = fit.sums()
        small = embedding[:, self.kept]
        moments = (small.T @ small) * second
        right = ((small.T @ embedding) * cross.T).sum(1)
        damp = self.repair.ridge * moments.diagonal().mean()
        eye = torch.eye(len(moments), dtype=torch.float64, device=moments.device)
        return weight * torch.linalg.solve(moments + damp * eye, right + damp).to(weight)
