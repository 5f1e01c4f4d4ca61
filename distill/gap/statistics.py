"""Intervals of ratios over documents by the bootstrap, paired differences, and how well confidence is calibrated.

A figure is a sum over documents divided by another (nats by tokens); a resample draws as many documents anew, with
replacement, the same draws for every figure, so that differences pair. The ends of an interval are percentiles of the
resampled figures, somewhat outside of 2.5 and 97.5 for few documents: the plain ones are those of a normal
distribution with the variance divided by n, and too narrow by sqrt(n / (n - 1)) t / z (Hesterberg, arXiv 1411.5279,
"expanded percentile interval"). The resampling is ours: scipy.stats.bootstrap draws anew for each figure, so that
differences would not pair, and holds [R, D] numbers for each. Shapes: [D] documents, [R] resamples, [B] bins.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

ALPHA = 0.05  # what an interval leaves out, both ends together
DRAWN = 64  # resamples at a time: [R, D] would not do for many documents


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval; None where there is none: one document says nothing of others."""

    value: float
    low: float | None
    high: float | None

    def holds(self, value: float) -> bool:
        """Whether a value lies within the interval; false where there is none."""
        return self.low is not None and self.high is not None and self.low <= value <= self.high

    @property
    def above_zero(self) -> bool:
        """Whether the value is above 0 and its interval, where there is one, leaves 0 out."""
        return self.value > 0 and not self.holds(0)


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums of a quantity over all documents, and over each resample's [R] of as many documents; `documents` are those
    that have any of it (of a ratio, of what it is divided by)."""

    all: float
    drawn: np.ndarray
    documents: int

    def over(self, other: Totals, scale: float = 1.0) -> Totals:
        """The ratio; nan where a resample has nothing to divide by."""
        ratios = np.divide(self.drawn * scale, other.drawn, out=np.full(len(self.drawn), np.nan), where=other.drawn > 0)
        return Totals(self.all * scale / other.all, ratios, other.documents)

    def minus(self, other: Totals) -> Totals:
        return Totals(self.all - other.all, self.drawn - other.drawn, self.documents)

    def estimate(self) -> Estimate:
        """The value and its interval, of the resamples that have one."""
        drawn = self.drawn[~np.isnan(self.drawn)]
        if self.documents < 2 or not len(drawn):
            return Estimate(float(self.all), None, None)
        beyond = 100 * tail(self.documents)
        low, high = np.percentile(drawn, [beyond, 100 - beyond])
        return Estimate(float(self.all), float(low), float(high))

    def p_value(self) -> float | None:
        """Two-sided, of the hypothesis that a difference is 0: the smaller share of resamples on a side of it, with one
        resample more counted there, turned into p as an interval's tail is. Below 0.05 exactly where the interval of
        `estimate` leaves 0 out; but no p is below 2 / (R + 1), so that it takes 40 resamples. None
        where there is no interval."""
        drawn = self.drawn[~np.isnan(self.drawn)]
        least = 1 / (len(drawn) + 1)
        share = least * (1 + min(int(side.sum()) for side in (drawn <= 0, drawn >= 0)))
        p, interval = min(1.0, 2 * plain_tail(share, self.documents)), self.estimate()
        if interval.low is None:
            return None
        if interval.holds(0):
            return max(p, ALPHA)
        return min(1.0, max(2 * least, min(p, math.nextafter(ALPHA, 0))))


def tail(documents: int) -> float:
    """The share of resamples that an interval leaves out at each end: that of a normal distribution beyond
    sqrt(n / (n - 1)) t, with t the quantile of Student's with n - 1 degrees."""
    if documents < 2:
        return ALPHA / 2
    from scipy.special import ndtr, stdtrit  # seconds into a command, not at its start

    return float(ndtr(math.sqrt(documents / (documents - 1)) * stdtrit(documents - 1, ALPHA / 2)))


def plain_tail(share: float, documents: int) -> float:
    """The level whose interval leaves out `share` at each end: the inverse of `tail`."""
    if documents < 2 or share >= 0.5:
        return share
    from scipy.special import ndtri, stdtr

    return float(stdtr(documents - 1, ndtri(share) * math.sqrt((documents - 1) / documents)))


def resampled(columns: Mapping[str, np.ndarray], resamples: int, seed: int) -> dict[str, Totals]:
    """The sum of each column [D], and its sums [R] with the documents drawn anew, the same draws for every column."""
    generator = np.random.default_rng(seed)
    matrix = np.stack(list(columns.values()), 1)
    documents, filled = len(matrix), (matrix != 0).sum(0)
    drawn = np.empty((resamples, matrix.shape[1]))
    for start in range(0, resamples, DRAWN):
        rows = slice(start, min(start + DRAWN, resamples))
        counts = generator.multinomial(documents, np.full(documents, 1 / documents), size=rows.stop - start)
        drawn[rows] = counts.astype(np.float64) @ matrix
    sums = matrix.sum(0)
    return {name: Totals(float(sums[i]), drawn[:, i], int(filled[i])) for i, name in enumerate(columns)}


def calibration_error(excess: list[Totals], tokens: Totals) -> Totals:
    """ECE: sum_b |sum of (correct - confidence) over the tokens of bin b| / tokens, from each bin's sums `excess` [B]
    (arXiv 1706.04599, equation 3). Noise makes it larger, never smaller: the interval is a little too high."""
    total = sum(abs(one.all) for one in excess)
    drawn = sum((np.abs(one.drawn) for one in excess), np.zeros_like(tokens.drawn))
    return Totals(total, drawn, tokens.documents).over(tokens)
