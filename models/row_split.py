"""Rows split over the processes of a group (context parallelism): each has a run of every row's tokens, and what of
the others' its layers need comes from them.

A mixer asks its part of the rows for the state that enters it, the inputs before it, or the keys and values up to its
end; what it computes of them is what it computes of whole rows. Documents are known everywhere, since every process
reads whole batches. Each exchange is one operator (`Gathered`) that every process of the group calls at the same places
of its forward and backward pass, whether it needs the answer or not: one that left out an exchange would leave the
others waiting. Shapes: [n] processes, [B] rows, [T] tokens of a row, [t] of a part.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from ..kernels.entering_state import entering_state
from ..kernels.ssd import document_numbers
from . import processes
from .errors import InputError

# Of one tensor, which torch 2.13 calls otherwise than those before it.
ALL_GATHER: Any = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
REDUCE_SCATTER: Any = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


class Gathered(torch.autograd.Function):
    """A tensor of every process of a group, [n, ...] in the order of the ranks. Backward: the sum over the group of
    what each has for this process's, in float32 at least."""

    @staticmethod
    def forward(ctx, mine, split):
        ctx.split = split
        parts = mine.new_empty((split.count, *mine.shape))
        split.all_gather(parts.flatten(0, 1), mine.contiguous())
        return parts

    @staticmethod
    def backward(ctx, dparts):
        wide = dparts.to(torch.promote_types(dparts.dtype, torch.float32)).contiguous()
        mine = wide.new_empty(wide.shape[1:])
        ctx.split.reduce_scatter(mine, wide.flatten(0, 1))
        return mine.to(dparts.dtype), None


@dataclasses.dataclass(frozen=True, eq=False)
class RowSplit:
    """The processes that share rows with this one: their group, how many they are, and which of them it is."""

    group: Any
    count: int
    index: int

    def gather(self, mine: Tensor) -> Tensor:
        """[n, ...] of every process's [...]; every process of the group has to call it."""
        parts: Tensor = Gathered.apply(mine, self)
        return parts

    def all_gather(self, parts: Tensor, mine: Tensor) -> None:
        """Fills parts [n a, ...] with every process's [a, ...], one below the other."""
        ALL_GATHER(parts, mine, group=self.group)

    def reduce_scatter(self, mine: Tensor, parts: Tensor) -> None:
        """Fills [a, ...] with the sum of what every process has for this one in its [n a, ...]."""
        REDUCE_SCATTER(mine, parts, group=self.group)

    def borders(self, tokens: int) -> list[int]:
        """Where the parts of a row begin, and its end [n + 1]; the first parts are a token longer where the rows do not
        divide. Raises InputError where a part would be empty."""
        check_length(self.count, tokens)
        each, longer = divmod(tokens, self.count)
        return [number * each + min(number, longer) for number in range(self.count + 1)]

    def part(self, tokens: int, seq_idx: Tensor | None) -> RowPart:
        """This process's part of rows of so many tokens, whose documents `seq_idx` [B, T] tells apart."""
        return RowPart(self, self.borders(tokens), None if seq_idx is None else document_numbers(seq_idx))

    @torch.no_grad()
    def whole(self, mine: Tensor, tokens: int) -> Tensor:
        """[B, T, ...] of the parts [B, t, ...] of all."""
        borders = self.borders(tokens)
        parts = self.gather(padded(mine, 1, borders[1]))
        sizes = [stop - start for start, stop in itertools.pairwise(borders)]
        return torch.cat([part.narrow(1, 0, size) for part, size in zip(parts, sizes, strict=True)], 1)


@dataclasses.dataclass(frozen=True, eq=False)
class RowPart:
    """One process's tokens of some rows: `borders` [n + 1] of all parts, and the rows' `document` [B, T], numbered
    upwards along each (None: each row is one). What all layers need of these is `known` from the first on."""

    split: RowSplit
    borders: list[int]
    document: Tensor | None
    known: dict[str | int, Any] = dataclasses.field(default_factory=dict)

    @property
    def start(self) -> int:
        return self.borders[self.split.index]

    @property
    def stop(self) -> int:
        return self.borders[self.split.index + 1]

    def own(self, rows: Tensor) -> Tensor:
        """[B, t] of [B, T]"""
        return rows[:, self.start : self.stop]

    def own_and_before(self, rows: Tensor) -> Tensor:
        """[B, stop] of [B, T]"""
        return rows[:, : self.stop]

    def continues(self, device: torch.device) -> Tensor:
        """Which tokens [B or 1, t] are of the document of the last token before the part."""
        if "continues" not in self.known:
            if self.document is None:
                same = torch.ones(1, self.stop - self.start, dtype=torch.bool, device=device)
            else:
                same = self.own(self.document) == self.document[:, max(self.start - 1, 0), None]
            self.known["continues"] = same
        return self.known["continues"]

    def entering_state(self, state: Tensor, decay: Tensor) -> Tensor:
        """The state [B, H, P, N] that enters this part, where every part leaves `state` when it begins with none, and
        decays by `decay` [B, H] from its start to its end (0 where a document begins in it)."""
        both = torch.cat((state.flatten(1), decay.to(state.dtype)), 1)
        states, decays = self.split.gather(both).split((state[0].numel(), decay.shape[1]), 2)
        return entering_state(states.unflatten(2, state.shape[1:]), decays, self.split.index)

    def inputs_before(self, x: Tensor, count: int) -> Tensor | None:
        """The last `count` of x [B, t, C] before this part as [B, C, count], 0 where they are of another document than
        its first token; None of a count of 0."""
        if not count:
            return None
        width = min(count, x.shape[1])
        tails = self.split.gather(padded(x.narrow(1, x.shape[1] - width, width), 1, count, front=True))
        if count not in self.known:
            self.known[count] = self.places_before(count, x.device)
        index, same = self.known[count]
        before = tails.transpose(1, 2).flatten(0, 1).index_select(0, index)  # [count, B, C]
        return torch.where(same.unsqueeze(1), before.permute(1, 2, 0), 0)

    def places_before(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where the tokens before this part stand among the parts' last `count`, [count] of [n count], and whether they
        are of its first token's document [B or 1, count]. A part can be shorter than that, so that they are several
        parts' tokens; what would lie before the row stands anywhere."""
        places = range(self.start - count, self.start)
        owners = [max(bisect.bisect_right(self.borders, place) - 1, 0) for place in places]
        index = [
            (owner + 1) * count + max(place - self.borders[owner + 1], -count)
            for place, owner in zip(places, owners, strict=True)
        ]
        same = torch.tensor([[place >= 0 for place in places]], device=device)
        if self.document is not None:
            there = torch.tensor(places, device=device).clamp(min=0)
            same = same & (self.document.index_select(1, there) == self.document[:, self.start, None])
        return torch.tensor(index, device=device), same

    def keys_and_values(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all tokens up to this part's last, [B, K, stop, D], of each part's own [B, K, t, D]."""
        parts = self.split.gather(padded(torch.stack((k, v)), 3, self.borders[1]))
        sizes = [stop - start for start, stop in zip(self.borders, self.borders[1:], strict=False)]
        seen = [parts[number].narrow(3, 0, sizes[number]) for number in range(self.split.index + 1)]
        keys, values = torch.cat(seen, 3).unbind()
        return keys, values


def padded(tensor: Tensor, dimension: int, size: int, front: bool = False) -> Tensor:
    """With zeros after it (or in front of it) up to a size."""
    missing = size - tensor.shape[dimension]
    pair = (missing, 0) if front else (0, missing)
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1 - dimension) + pair) if missing else tensor


def check_context(count: int, tokens: int) -> None:
    """Raises InputError where the processes do not make groups of so many, or rows of so many tokens not as many
    parts."""
    check_groups(count)
    check_length(count, tokens)


def check_groups(count: int) -> None:
    if (every := processes.count()) % count:
        there = "1 process" if every == 1 else f"{every} processes"
        raise InputError(
            f"context_parallel is {count}, which does not divide {there}; give a divisor, or start {count} processes or"
            " a multiple of them (torchrun --nproc_per_node)"
        )


def check_length(count: int, tokens: int) -> None:
    if tokens < count:
        raise InputError(
            f"context_parallel is {count}, but a row has {tokens} tokens; give longer rows (seq_len), or fewer parts"
        )


def row_split(count: int) -> RowSplit | None:
    """The group of so many processes, neighbours by rank, that this one shares rows with; None for 1. Every process has
    to call it. Raises InputError where the processes do not make such groups."""
    check_groups(count)
    return None if count == 1 else groups_of(distributed.group.WORLD, count)


@functools.lru_cache(maxsize=8)
def groups_of(world: Any, count: int) -> RowSplit:
    """Made once for all stages of a run: a group costs sockets, or a GPU's communicators."""
    size, rank, own = distributed.get_world_size(), distributed.get_rank(), None
    for first in range(0, size, count):  # every process has to make all groups
        group = distributed.new_group(list(range(first, first + count)))
        own = group if first <= rank < first + count else own
    return RowSplit(own, count, rank % count)
