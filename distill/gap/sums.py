"""Sums over a stream of tokens, from which every figure of a gap follows; how much text there is does not matter.

Documents are the units of the bootstrap. Beyond BLOCKS of them several share a place, as one unit: resampling blocks of
documents is as valid, and keeps memory bounded. Shapes: [T] tokens of a batch, [Q] quantities, [G] groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ...kernels.linear_figures import LinearFigures

BLOCKS = 8192
BINS = 15  # of confidence, as in arXiv 1706.04599
QUANTITIES = ("nats", "kl", "agree", "reverse_kl", "overlap", "rank", "top5")
GROUPED = ("tokens", "nats", "kl", "agree")  # of each token class, domain and stretch of context
BINNED = ("tokens", "confidence", "correct")  # of each confidence bin


class Sums:
    """Sums of one model: of every quantity a document [Q], of groups of its tokens [G, 4], of confidence bins
    [15, 3]; and over all text KL and tokens by position [2, T], and how many tokens had each rank [V + 1]."""

    def __init__(self) -> None:
        self.documents: dict[int, np.ndarray] = {}
        self.groups: dict[str, dict[int, np.ndarray]] = {}
        self.bins: dict[int, np.ndarray] = {}
        self.position = np.zeros((2, 0))
        self.ranks = np.zeros(0, dtype=np.int64)

    def add(
        self, figures: LinearFigures, teacher: LinearFigures, labels: Tensor, doc_id: Tensor, width: int,
        groups: Mapping[str, tuple[Tensor, int]],
    ) -> None:  # fmt: skip
        """Figures of a batch [T], flattened rows of `width` tokens, those of the labels that are not negative;
        `groups` numbers each token's group in each grouping, and says how many there are. All on the CPU."""
        counted = labels >= 0
        owner = doc_id[counted] % BLOCKS
        agree, one = (figures.choice == teacher.choice).double(), torch.ones(int(counted.sum()), dtype=torch.float64)
        values = torch.stack(
            [column.double() for column in (figures.cross_entropy, figures.kl, agree, figures.reverse_kl,
                                            figures.overlap, figures.rank, figures.top5)]
        )[:, counted]  # fmt: skip
        add_by(self.documents, owner, torch.zeros_like(owner), 1, values, squeeze=True)
        for name, (group, count) in groups.items():
            rows = torch.cat((one[None], values[:3]))
            add_by(self.groups.setdefault(name, {}), owner, group[counted], count, rows)
        confidence = figures.confidence[counted].double()
        correct = (figures.choice[counted] == labels[counted]).double()
        place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
        add_by(self.bins, owner, place, BINS, torch.stack((one, confidence, correct)))
        self.position = widened(self.position, width)
        for row, numbers in enumerate((figures.kl * counted, counted)):
            self.position[row, :width] += numbers.double().view(-1, width).sum(0).numpy()
        ranks = np.bincount(figures.rank[counted].numpy())
        if len(ranks) > len(self.ranks):
            self.ranks = np.pad(self.ranks, (0, len(ranks) - len(self.ranks)))
        self.ranks[: len(ranks)] += ranks

    def median_rank(self) -> int:
        """The smallest rank that at least half of the tokens do not exceed; 0 without tokens."""
        return int(np.searchsorted(self.ranks.cumsum(), self.ranks.sum() / 2)) if self.ranks.sum() else 0


def add_by(
    sums: dict[int, np.ndarray], owner: Tensor, group: Tensor, groups: int, values: Tensor, squeeze: bool = False
) -> None:
    """Adds values [K, tokens] to each owner's sums [G, K], or [K] where there is one group to squeeze."""
    owners, places = torch.unique(owner, return_inverse=True)
    total = torch.zeros(len(owners) * groups, values.shape[0], dtype=torch.float64)
    total.index_add_(0, places * groups + group, values.T)
    parts = total.view(len(owners), groups, values.shape[0]).numpy()
    for key, part in zip(owners.tolist(), parts, strict=True):
        sums[key] = sums.get(key, 0.0) + (part[0] if squeeze else part)


def add_sizes(sizes: dict[int, np.ndarray], owners: Tensor, n_bytes: Tensor) -> None:
    """Adds the tokens and bytes of a batch to those of each document (or block of documents)."""
    values = torch.stack((torch.ones_like(n_bytes), n_bytes)).double()
    add_by(sizes, owners % BLOCKS, torch.zeros_like(owners), 1, values, squeeze=True)


def widened(position: np.ndarray, width: int) -> np.ndarray:
    """Zeros after the columns, up to `width` of them."""
    return np.pad(position, ((0, 0), (0, max(width - position.shape[1], 0))))
