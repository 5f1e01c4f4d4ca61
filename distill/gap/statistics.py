"""Intervals of ratios over documents by the bootstrap, paired differences, and how well confidence is calibrated.

A figure is a sum over documents divided by another (nats by tokens); a resample draws as many documents anew, with
replacement, the same draws for every figure, so that differences pair. The ends of an interval are percentiles of the
resampled figures, somewhat outside of 2.5 and 97.5 for few documents: the plain ones are those of a normal
distribution with the variance divided by n, and too narrow by sqrt(n / (n - 1)) t / z (Hesterberg, arXiv 1411.5279,
"expanded percentile interval"). Shapes: [D] documents, [R] resamples, [B] bins.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from statistics import NormalDist

import numpy as np

ALPHA = 0.05  # what an interval leaves out, both ends together
NORMAL = NormalDist()
DRAWN = 64  # resamples at a time: [R, D] would not do for many documents


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums of a quantity over all documents, and over each resample's [R] of as many documents; `documents` are those
    that have any of it (of a ratio, of what it is divided by)."""

    all: float
    drawn: np.ndarray
    documents: int

    def over(self, other: Totals, scale: float = 1.0) -> Totals:
        """The ratio; nan where a resample has nothing to divide by."""
        found = np.divide(self.drawn * scale, other.drawn, out=np.full(len(self.drawn), np.nan), where=other.drawn > 0)
        return Totals(self.all * scale / other.all, found, other.documents)

    def minus(self, other: Totals) -> Totals:
        return Totals(self.all - other.all, self.drawn - other.drawn, self.documents)

    def estimate(self) -> Estimate:
        """The value and its interval, of the resamples that have one."""
        beyond = 100 * tail(self.documents)
        drawn = self.drawn[~np.isnan(self.drawn)]
        low, high = np.percentile(drawn, [beyond, 100 - beyond]) if len(drawn) else (self.all, self.all)
        return Estimate(float(self.all), float(low), float(high))

    def p_value(self) -> float:
        """Two-sided, of the hypothesis that a difference is 0: the smaller share of resamples on a side of it, with one
        resample more counted there, turned into p as an interval's tail is. Below 0.05 exactly where the interval of
        `estimate` leaves 0 out; but no p is below 2 / (R + 1), so that it takes 40 resamples."""
        drawn = self.drawn[~np.isnan(self.drawn)]
        least = 1 / (len(drawn) + 1)
        share = least * (1 + min(int(side.sum()) for side in (drawn <= 0, drawn >= 0)))
        p, interval = min(1.0, 2 * plain_tail(share, self.documents)), self.estimate()
        if interval.low <= 0 <= interval.high:
            return max(p, ALPHA)
        return min(1.0, max(2 * least, min(p, math.nextafter(ALPHA, 0))))


def tail(documents: int) -> float:
    """The share of resamples that an interval leaves out at each end."""
    if documents < 2:
        return ALPHA / 2
    return normal_tail(expanded(-NORMAL.inv_cdf(ALPHA / 2), documents))


def normal_tail(z: float) -> float:
    """The share of a normal distribution beyond z."""
    return math.erfc(z / math.sqrt(2)) / 2


def plain_tail(share: float, documents: int) -> float:
    """The tail of a normal distribution for which an interval leaves out `share` at each end: what `tail` turns round,
    by bisection."""
    if documents < 2 or share >= 0.5:
        return share
    reached = -NORMAL.inv_cdf(share)
    low, high = 0.0, reached
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expanded(middle, documents) < reached else (low, middle)
    return normal_tail(high)


def expanded(z: float, documents: int) -> float:
    """Where the end of an interval is, in standard deviations of the resamples, for a normal one's z."""
    return math.sqrt(documents / (documents - 1)) * student_t(z, documents - 1)


def student_t(z: float, degrees: int) -> float:
    """The quantile of Student's t where a normal's is z: Cornish and Fisher's expansion, to 1e-3 from 5 degrees on
    (Abramowitz and Stegun, 26.7.5)."""
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))


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
    total = sum(abs(found.all) for found in excess)
    drawn = sum((np.abs(found.drawn) for found in excess), np.zeros_like(tokens.drawn))
    return Totals(total, drawn, tokens.documents).over(tokens)
