"""What pruning breaks, mended at once: rotation of the residual stream, norms rescaled, matrices refitted.

Three means, each an option, none of which leaves a trace in the architecture:

- Rotation (the idea is SliceGPT's, arXiv 2401.15024): RMSNorm without its weight commutes with any rotation of the
  residual stream, so the weights of the norms are folded into the matrices that follow, and the stream is turned
  into its principal directions on calibration data, one rotation for the whole model; the hidden axis is cut there.
- Norms: an RMS over fewer channels is another number. The weight takes the ratio: that of the counts, or the one
  that fits the original's output best on calibration data (within each group of a gated norm).
- Least squares: layer by layer, the matrices that read the stream are refitted so that the pruned model's narrower
  stream gives what the original's gives, and the matrices that write into it so that the stream stays where the
  original's is, the contributions of removed layers included. Both pull towards the sliced weights (ridge).

The walk holds one layer of either model and both streams of all calibration tokens, no more: it runs at any size.
Shapes: [N] counted tokens, [H] channels of the source, [h] those that stay, [K] inputs of a matrix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.norm import rms_norm
from ..models.axes import HIDDEN, Dimension, TensorAxes, tensor_table
from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.hybrid import HybridLM
from .importance import IGNORED_LABEL, TokenBatch
from .slice import Selection, cut, filled, is_norm, kept_rows, slice_config, slice_tensors, source_name

GetTensor = Callable[[str], Tensor]
OnStep = Callable[[int, int], None]
NORMS = ("none", "count", "measured")
# What enters the matrix that leads back into the residual stream, by the layer's letter.
INNER = {"M": "mamba_out", "*": "attn_heads", "-": "ffn_act"}


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


def repaired_config(config: HybridConfig, selection: Selection, repair: Repair) -> HybridConfig:
    """The config of the repaired model. A rotation folds the final norm into the head, which then is no longer the
    embedding: tied embeddings come apart."""
    found = slice_config(config, selection)
    return found.replace(tie_word_embeddings=False) if repair.rotate else found


def rotated_selection(selection: Selection) -> Selection:
    """The same selection with the first channels kept: after a rotation they are the principal directions."""
    if HIDDEN not in selection.kept:
        return selection
    return Selection(selection.layers, {**selection.kept, HIDDEN: tuple(range(len(selection.kept[HIDDEN])))})


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
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the pruned and repaired model (`repaired_config`), in the order of its table and in the
    source's dtypes. `get_tensor` reads a tensor of the source by its internal name; layers run in `dtype` on
    `device`. `on_step(done, total)` counts layers, once for each walk through the data. Raises InputError where the
    data has no counted token.
    """
    walks = repair.norms == "measured" or repair.least_squares
    total = config.num_layers * (repair.rotate + walks)
    if repair.rotate:
        count = None if on_step is None else lambda done: on_step(done, total)
        turn = principal_directions(get_tensor, config, batches, selection.layers, device, dtype, count)
        get_tensor, selection = rotated(get_tensor, config, turn), rotated_selection(selection)
        config = config.replace(tie_word_embeddings=False)
    if walks:
        done = total - config.num_layers
        walk = Walk(get_tensor, config, selection, batches, repair, device, dtype)
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
    return filled(repaired_config(model.config, selection, repair), tensors, model)


# --- rotation -------------------------------------------------------------------------------------------------------


def principal_directions(
    get_tensor: GetTensor,
    config: HybridConfig,
    batches: Sequence[TokenBatch],
    layers: Sequence[int],
    device: torch.device | str,
    dtype: torch.dtype,
    on_layer: Callable[[int], None] | None = None,
) -> Tensor:
    """The rotation [H, H] (float64, on the CPU) whose columns are the principal directions of the normed stream, the
    largest first: eigenvectors of the second moments, summed over the norms of `layers` and the final one."""
    moments = torch.zeros(config.hidden_size, config.hidden_size, dtype=torch.float64, device=device)
    streams = Streams(get_tensor, batches, device, dtype)
    for layer in range(config.num_layers + 1):
        if layer == config.num_layers or layer in layers:
            for rows in streams.counted():
                normed = torch.nn.functional.normalize(rows.double(), dim=-1)
                moments += normed.T @ normed
        if layer < config.num_layers:
            streams.advance(one_layer(config, layer, get_tensor, device, dtype))
            if on_layer is not None:
                on_layer(layer + 1)
    _, directions = torch.linalg.eigh(moments)
    return directions.flip(1).cpu()


def rotated(get_tensor: GetTensor, config: HybridConfig, turn: Tensor) -> GetTensor:
    """Tensors of the same function with the residual stream turned by `turn` [H, H] and the norms' weights folded into
    the matrices that read it. The embedding and the head come apart."""
    table = tensor_table(config.replace(tie_word_embeddings=False))

    def get(name: str) -> Tensor:
        axes = table[name]
        source = "embeddings.weight" if name == "lm_head.weight" and config.tie_word_embeddings else name
        tensor = get_tensor(source)
        if reads_stream(axes):
            norm = get_tensor(norm_before(axes))
            return ((tensor.double().cpu() * norm.double().cpu()) @ turn).to(tensor)
        if writes_stream(axes):
            return (turn.T @ tensor.double().cpu()).to(tensor)
        if name == "embeddings.weight":
            return (tensor.double().cpu() @ turn).to(tensor)
        return torch.ones_like(tensor) if is_norm(name) and axes.dimensions[0] == hidden_of(config) else tensor

    return get


def hidden_of(config: HybridConfig) -> Dimension:
    return tensor_table(config)["norm_f.weight"].dimensions[0]


def reads_stream(axes: TensorAxes) -> bool:
    """Whether a matrix's inputs are the normed residual stream."""
    return axes.name == "lm_head.weight" or (axes.layer is not None and on_hidden(axes, 1))


def writes_stream(axes: TensorAxes) -> bool:
    """Whether a matrix's outputs are added to the residual stream."""
    return axes.layer is not None and len(axes.dimensions) == 2 and on_hidden(axes, 0)


def on_hidden(axes: TensorAxes, number: int) -> bool:
    return len(axes.dimensions) == 2 and axes.dimensions[number][0][0].axis == HIDDEN


def norm_before(axes: TensorAxes) -> str:
    return "norm_f.weight" if axes.layer is None else f"layers.{axes.layer}.norm.weight"


# --- streams --------------------------------------------------------------------------------------------------------


class Streams:
    """The residual streams of all calibration batches, [B, T, H] each, moved on layer by layer."""

    def __init__(
        self, get_tensor: GetTensor, batches: Sequence[TokenBatch], device: torch.device | str, dtype: torch.dtype
    ) -> None:
        embedding = get_tensor("embeddings.weight")
        self.hidden = [embedding[batch.input_ids.to(embedding.device)].to(device, dtype) for batch in batches]
        self.seq_idx = [batch.seq_idx.to(device) for batch in batches]
        self.mask = [(batch.labels != IGNORED_LABEL).to(device) for batch in batches]
        if not any(bool(mask.any()) for mask in self.mask):
            raise InputError("repair: the data has no counted token; expected at least one sample of two tokens")

    def counted(self) -> Iterator[Tensor]:
        """The stream at the counted positions, [N, H] a batch."""
        for hidden, mask in zip(self.hidden, self.mask, strict=True):
            yield hidden[mask]

    def run(self, layer: HybridLM, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch `number` through a layer: the stream behind it, and at the counted positions what passed inside."""
        seen: dict[str, Tensor] = {}

        def observe(kind: str, _: int, tensor: Tensor) -> None:
            if kind in ("hidden", *INNER.values()):
                seen[kind] = tensor[self.mask[number]].flatten(1)

        out = layer.forward_layers(self.hidden[number], 0, 1, seq_idx=self.seq_idx[number], observe=observe)
        return out, seen

    def advance(self, layer: HybridLM) -> None:
        for number in range(len(self.hidden)):
            self.hidden[number] = self.run(layer, number)[0]


def one_layer(
    config: HybridConfig, layer: int, get_tensor: GetTensor, device: torch.device | str, dtype: torch.dtype
) -> HybridLM:
    """A model of one layer of `config` alone, whose `forward_layers` runs it."""
    alone = config.replace(pattern=config.pattern[layer], vocab_size=1, tie_word_embeddings=True)
    model = HybridLM(alone, device=device, dtype=dtype)
    for name, weight in model.state_dict().items():
        if name.startswith("layers.0."):
            weight.copy_(get_tensor(f"layers.{layer}." + name.removeprefix("layers.0.")))
    return model


# --- the walk -------------------------------------------------------------------------------------------------------


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


def nearest_ratio(pairs: Iterable[tuple[Tensor, Tensor]], groups: int) -> Tensor:
    """The factors [groups] (float64) that bring the second of each pair [N, C] nearest to the first, group by group
    of channels; 1 where the second is zero."""
    top, bottom = torch.zeros(groups, dtype=torch.float64), torch.zeros(groups, dtype=torch.float64)
    for target, found in pairs:
        wide, own = (rows.double().unflatten(1, (groups, -1)) for rows in (target, found))
        top += (wide * own).sum((0, 2)).cpu()
        bottom += own.square().sum((0, 2)).cpu()
    return torch.where(bottom > 0, top / bottom, 1)


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
    ) -> None:
        self.read, self.config, self.selection, self.repair = get_tensor, config, selection, repair
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
            if layer in self.selection.layers:
                after = one_layer(self.smaller, place, self.sliced, *self.place)
                self.mend(place, before, after)
                self.pruned.advance(after)
                found = {f"layers.{place}{name[8:]}": tensor for name, tensor in after.state_dict().items()}
                for name, axes in self.smaller_table.items():
                    if axes.layer == place:
                        yield self.finished(name, found[name])
                place += 1
            self.held.clear()
            self.original.advance(before)
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

    def sliced(self, name: str) -> Tensor:
        """A tensor of the pruned model as slicing alone gives it."""
        source = self.table[source_name(name, self.selection)]
        return cut(
            self.get_tensor(source.name),
            source,
            self.smaller_table[name],
            self.selection.kept,
            rescale_norms=self.repair.norms != "none",
        )

    def mend(self, place: int, before: HybridLM, after: HybridLM) -> None:
        """Layer `place` of the pruned model, in place."""
        letter, weights = after.config.pattern, after.state_dict()
        mine = [axes for axes in self.smaller_table.values() if axes.layer == place]
        readers = [axes.name for axes in mine if reads_stream(axes)]
        (writer,) = (axes.name for axes in mine if writes_stream(axes))
        inputs = self.table[source_name(writer, self.selection)].dimensions[1]
        inner = kept_rows(inputs, self.selection.kept).to(self.kept.device)

        def weight(name: str) -> Tensor:
            return weights["layers.0." + name.split(".", 2)[2]]

        if self.repair.norms == "measured":
            self.fit_norm(before, after, "hidden", self.kept, weights["layers.0.norm.weight"], 1)
        if self.repair.least_squares:
            fit = Fit()
            for number in range(len(self.original.hidden)):
                seen, found = self.original.run(before, number)[1], self.pruned.run(after, number)[1]
                fit.add(seen["hidden"], found["hidden"])
            mapping = fit.solve(self.selector(), self.repair.ridge)
            for name in readers:
                weight(name).copy_(self.refitted(name, mapping))
        if self.repair.norms == "measured" and letter == "M":
            norm = weights["layers.0.mixer.norm.weight"]
            self.fit_norm(before, after, INNER[letter], inner, norm, self.config.n_groups)
        if self.repair.least_squares:
            fit = Fit()
            for number, mask in enumerate(self.original.mask):
                ahead = self.original.run(before, number)[0]
                target = ahead[mask][:, self.kept] - self.pruned.hidden[number][mask]
                fit.add(target, self.pruned.run(after, number)[1][INNER[letter]])
            weight(writer).copy_(fit.solve(weight(writer), self.repair.ridge))

    def fit_norm(self, before: HybridLM, after: HybridLM, kind: str, kept: Tensor, weight: Tensor, groups: int) -> None:
        """Scales a norm's weight, group by group, so that its output is nearest to the original's where both are."""
        pairs = (
            (self.original.run(before, number)[1][kind][:, kept], self.pruned.run(after, number)[1][kind])
            for number in range(len(self.original.hidden))
        )
        ratio = nearest_ratio(pairs, groups).to(weight)
        weight.copy_((weight.unflatten(0, (groups, -1)) * ratio[:, None]).flatten())

    def selector(self) -> Tensor:
        """The matrix [H, h] that puts the kept channels where they were."""
        found = torch.zeros(self.config.hidden_size, len(self.kept), dtype=torch.float64, device=self.kept.device)
        found[self.kept, torch.arange(len(self.kept), device=self.kept.device)] = 1
        return found

    def refitted(self, name: str, mapping: Tensor) -> Tensor:
        """A matrix that reads the stream, for the stream that `mapping` [H, h] leads back to the original's."""
        source = self.table[source_name(name, self.selection)]
        rows = kept_rows(source.dimensions[0], self.selection.kept)
        return self.get_tensor(source.name)[rows].to(mapping) @ mapping

    def end(self) -> Iterator[tuple[str, Tensor]]:
        """The final norm, and the head where it is a matrix of its own."""
        eps = self.config.norm_eps
        source, weight = (get("norm_f.weight").to(*self.place) for get in (self.get_tensor, self.sliced))
        pairs = [
            (rms_norm(rows, source, eps), rms_norm(found, weight, eps))
            for rows, found in zip(self.original.counted(), self.pruned.counted(), strict=True)
        ]
        if self.repair.norms == "measured":
            kept = ((target[:, self.kept], found) for target, found in pairs)
            ratio = nearest_ratio(kept, 1).to(weight)
            weight = weight * ratio  # not in place: uncut, it is the source's own
            pairs = [(target, found * ratio) for target, found in pairs]
        yield "norm_f.weight", weight
        if not self.config.tie_word_embeddings:
            if not self.repair.least_squares:
                yield "lm_head.weight", self.sliced("lm_head.weight")
                return
            fit = Fit()
            for target, found in pairs:
                fit.add(target, found)
            yield "lm_head.weight", self.refitted("lm_head.weight", fit.solve(self.selector(), self.repair.ridge))
