"""The residual stream turned into its principal directions, and the weights with it.

The idea is SliceGPT's (arXiv 2401.15024): RMSNorm without its weight commutes with any rotation of the stream, so the
weights of the norms are folded into the matrices that follow. What a matrix is for that the table of axes says.
Shapes: [N] counted tokens, [H] channels.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..models.axes import HIDDEN, Dimension, Role, TensorSpec, on_hidden, tensor_table
from ..models.config import HybridConfig
from .ridge import check_finite, products
from .slice import Selection
from .streams import GetTensor, Streams

TIED_TOLERANCE = 0.2
AHEAD = ("eh_proj.weight", "final_layernorm.weight")  # of multi-token prediction: they belong to the head's stream, too


def rotated_selection(selection: Selection) -> Selection:
    """The same selection with the first channels kept: after a rotation they are the principal directions."""
    if HIDDEN not in selection.kept:
        return selection
    kept = {**selection.kept, HIDDEN: tuple(range(len(selection.kept[HIDDEN])))}
    return dataclasses.replace(selection, kept=kept)


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Of the residual stream: the new directions are the columns of `turn` [H, H] (float64). The first `fixed` of them
    are channels that stay as they are, because a final norm in front of a tied embedding has to keep its weights.
    `scale` is the RMS, over tokens, of what the final norm gives in the source: that of the rotated model's is 1."""

    turn: Tensor
    fixed: int
    scale: float = 1.0


class Directions:
    """The principal directions of the normed stream, the largest first: eigenvectors of the second moments, summed over
    the norms of the layers that stay and the final one, which counts as much as they do together: what the head does
    not see is in the logits at once, what one layer does not see the others can make up for."""

    def __init__(self, config: HybridConfig, selection: Selection, device: torch.device | str) -> None:
        self.config, self.selection = config, selection
        size = config.hidden_size
        self.moments = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.last = torch.zeros_like(self.moments)

    def see(self, layer: int, streams: Streams) -> None:
        """Takes in the streams before a layer, or before the final norm, whose number is num_layers."""
        final = layer == self.config.num_layers
        if not final and layer not in self.selection.layers:
            return
        self.last = torch.zeros_like(self.moments)
        for rows in streams.counted():
            normed = torch.nn.functional.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
            self.last += products(normed, normed)
        self.moments += self.last * len(self.selection.layers) if final else self.last

    def rotation(self, weight: Tensor) -> Rotation:
        """The rotation into them, for a final norm of that weight [H].

        Tied embeddings leave no matrix after the final norm to fold its weights into, and weights survive a rotation
        only where they are equal. So the channels whose weight is off the median (by more than `TIED_TOLERANCE` of it;
        half of those that stay at most, the farthest) are not turned, and the others share one weight.
        """
        check_finite(self.moments)
        weight, tied = weight.to(self.moments), self.config.tie_word_embeddings
        off = (weight / weight.median() - 1).abs()
        most = len(self.selection.kept[HIDDEN]) // 2
        count = min(int((off > TIED_TOLERANCE).sum()), most) if tied else 0
        order = off.argsort(descending=True, stable=True)
        fixed, free = order[:count], order[count:].sort().values
        _, directions = torch.linalg.eigh(self.moments[free][:, free])
        turn = torch.zeros_like(self.moments)
        turn[fixed, torch.arange(count, device=turn.device)] = 1
        turn[free, count:] = directions.flip(1)
        energy = self.last.diagonal() / self.last.diagonal().sum()
        return Rotation(turn, count, 1.0 if tied else float((energy * weight.square()).sum().sqrt()))


def rotated(get_tensor: GetTensor, config: HybridConfig, rotation: Rotation, device: torch.device | str) -> GetTensor:
    """Tensors of the same function with the residual stream turned and the norms' weights folded into the matrices
    that read it (with tied embeddings the final norm's as far as `Rotation` allows).

    Multi-token prediction is turned as far as one head allows that two norms stand before: the final norm's weights w
    are folded into the head, so that what a step gives it has to carry f / w of its own final_layernorm f, in the new
    directions a matrix R^T diag(f / w) R. Its diagonal takes the weights' place (the least squares, where directions
    are alike). hnorm divides by the RMS of what the head reads, which no longer has w; its mean is made up for. Both
    are exact where w and f / w are constant.
    """
    table = tensor_table(config)
    turns: dict[torch.dtype, Tensor] = {}

    def turn_like(tensor: Tensor) -> Tensor:
        work = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        return turns.setdefault(work, rotation.turn.to(device, work))

    def ahead(name: str, tensor: Tensor, turn: Tensor) -> Tensor:
        """What joins the streams at the start of a step, or its last norm."""
        folded = torch.ones_like(turn[0]) if config.tie_word_embeddings else get_tensor("norm_f.weight").to(turn)
        if name.endswith("final_layernorm.weight"):
            weight = torch.where(folded == 0, 0, tensor.to(turn) / folded)
            return weight @ turn.square()
        layer = name.removesuffix("eh_proj.weight")
        read, kept = tensor.to(turn).chunk(2, -1)
        read = read * get_tensor(f"{layer}enorm.weight").to(turn)
        kept = kept * get_tensor(f"{layer}hnorm.weight").to(turn) * folded / rotation.scale
        return turn.T @ torch.cat((read @ turn, kept @ turn), -1)

    def get(name: str) -> Tensor:
        axes, tensor = table[name], get_tensor(name)
        turn = turn_like(tensor)
        if axes.ahead is not None and axes.part in AHEAD:
            return ahead(name, tensor, turn).to(tensor)
        if axes.reads_stream:
            return ((tensor.to(turn) * get_tensor(norm_before(axes)).to(turn)) @ turn).to(tensor)
        if axes.writes_stream:
            return (turn.T @ tensor.to(turn)).to(tensor)
        if axes.role is Role.TABLE:
            return (tensor.to(turn) @ turn).to(tensor)
        if not on_hidden(axes.dimensions[0]):
            return tensor
        if axes.role is Role.VECTOR:  # a bias, which is added to the stream
            return (tensor.to(turn) @ turn).to(tensor)
        if name == "norm_f.weight" and config.tie_word_embeddings:
            own, shared = (tensor.to(turn) @ turn)[: rotation.fixed], tensor.median().to(turn)
            return torch.cat([own, shared.expand(len(tensor) - rotation.fixed)]).to(tensor)
        return torch.ones_like(tensor)

    return get


def hidden_of(config: HybridConfig) -> Dimension:
    return tensor_table(config)["norm_f.weight"].dimensions[0]


def norm_before(axes: TensorSpec) -> str:
    if axes.ahead is not None:
        return f"mtp.layers.{axes.ahead}.norm.weight"
    return "norm_f.weight" if axes.layer is None else f"layers.{axes.layer}.norm.weight"
