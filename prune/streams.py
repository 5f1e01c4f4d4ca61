"""The residual streams of calibration batches, moved on layer by layer, a layer to move them through, and what fewer
channels do to their size.

Shapes: [B, T] tokens, [N] counted ones, [H] channels, [K] inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.hybrid import HybridLM
from ..models.multipliers import scaled
from .importance import IGNORED_LABEL, TokenBatch
from .ridge import check_finite

GetTensor = Callable[[str], Tensor]


class Streams:
    """The residual streams of all calibration batches, [B, T, H] each, moved on layer by layer."""

    def __init__(
        self,
        config: HybridConfig,
        get_tensor: GetTensor,
        batches: Sequence[TokenBatch],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        embedding, by = get_tensor("embeddings.weight"), config.multipliers.embedding
        rows = (embedding[batch.input_ids.to(embedding.device)] for batch in batches)
        self.hidden = [scaled(row.to(device, dtype), by) for row in rows]
        self.seq_idx = [batch.seq_idx.to(device) for batch in batches]
        self.mask = [(batch.labels != IGNORED_LABEL).to(device) for batch in batches]
        if not any(bool(mask.any()) for mask in self.mask):
            raise InputError("calibration: the data has no counted token; expected at least one sample of two tokens")

    def counted(self) -> Iterator[Tensor]:
        """The stream at the counted positions, [N, H] a batch."""
        for hidden, mask in zip(self.hidden, self.mask, strict=True):
            yield hidden[mask]

    def output(self, layer: HybridLM, number: int, also: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch `number` through a layer: the stream after it, and at the counted positions what passed inside: what
        norms, readers and writers see, and `also` what is named."""
        kind, seen = layer.config.kinds[0], dict[str, Tensor]()
        wanted = {"hidden", *also, *kind.writers.values(), *(norm.observed for norm in kind.norms.values())}

        def observe(name: str, _: int, tensor: Tensor) -> None:
            if name in wanted:
                seen[name] = tensor[self.mask[number]].flatten(1)

        out = layer.forward_layers(self.hidden[number], 0, 1, seq_idx=self.seq_idx[number], observe=observe)
        return out, seen

    def advance(self, layer: HybridLM, see: Callable[[dict[str, Tensor]], None] | None = None) -> None:
        """Moves all batches on through a layer; `see` is shown what passes inside, as `output` gives it, of each."""
        for number in range(len(self.hidden)):
            self.hidden[number], seen = self.output(layer, number)
            if see is not None:
                see(seen)


def one_layer(
    config: HybridConfig, layer: int, get_tensor: GetTensor, device: torch.device | str, dtype: torch.dtype
) -> HybridLM:
    """A model of one layer of `config` alone, whose `forward_layers` runs it."""
    alone = config.replace(pattern=config.pattern[layer], vocab_size=1, tie_word_embeddings=True, mtp_steps=0)
    model = HybridLM(alone, device=device, dtype=dtype)
    for name, weight in model.state_dict().items():
        if name.startswith("layers.0."):
            weight.copy_(get_tensor(f"layers.{layer}." + name.removeprefix("layers.0.")))
    return model


def rms_ratios(normed: Iterable[Tensor], weight: Tensor, kept: Tensor, groups: int) -> Tensor:
    """The RMS of the kept channels [k] over that of all [C], in each of `groups` groups: [groups] (float64), the mean
    over rows. `normed` [N, C] a batch is what the norm of this weight [C] gives."""
    total, count = torch.zeros(groups, dtype=torch.float64, device=kept.device), 0
    scale = torch.where(weight == 0, 0, 1 / weight)
    for rows in normed:
        squares = (rows * scale).double().square()
        check_finite(squares)
        own, every = (part.unflatten(1, (groups, -1)).mean(2) for part in (squares[:, kept], squares))
        total += torch.where(every > 0, own / every, 1).sqrt().sum(0)
        count += len(rows)
    return total / count
