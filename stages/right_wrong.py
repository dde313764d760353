"""The exact test of paired right/wrong rows, and its power: both by adding up probabilities, nothing is drawn.

Margin 0 is McNemar's test, conditional on the discordant pairs. Any other margin is Tango's score statistic (Stat Med 17:891, 1998) with
the unconditional probability of as much or more (Hsueh, Liu & Chen, Biometrics 57:478, 2001), at the worst share of discordant pairs
that the rows do not exclude (Berger & Boos, JASA 89:1012, 1994): at or under alpha.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats
from statsmodels.stats.proportion import proportion_confint

EXCLUDED = 1e-4
"""Probability of the true share of discordant pairs lying outside the shares that are tried; it is added to the p-value."""
SHARES = 21
"""Shares that are tried, and again around the worst of them."""

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RightWrong:
    """How the pairs fell out, each pair a row of its own."""

    lost: int
    """Pairs that only the champion has right."""
    gained: int
    """Pairs that only the candidate has right."""
    rows: int
    """All pairs."""
    largest: float = 1.0
    """The largest difference that a row can show."""

    def p_not_worse(self, margin: float) -> float:
        """Of the hypothesis that the true loss is at least the margin (from -1 to 1)."""
        return exact(self.lost, self.gained, self.rows, margin)

    def mirrored(self) -> RightWrong:
        """The champion in the candidate's place."""
        return RightWrong(lost=self.gained, gained=self.lost, rows=self.rows)

    def power(self, rows: int, difference: float, margin: float, alpha: float, critical: float | None = None) -> float:
        """Probability that so many rows let a candidate of this true difference through, differing on the share of rows seen here.

        Args:
            rows: of the comparison to come.
            difference: candidate less champion, of the population.
            margin: of the rule.
            alpha: of the rule.
            critical: least score that passes; None: that of the normal distribution. Margin 0 needs none.
        """
        share = self.share(difference)
        pairs = likely(rows, share, share)
        if margin == 0:
            fewest = stats.binom.isf(alpha, pairs, 0.5).astype(np.int64) + 1
        else:
            fewest = fewest_gained(critical or float(stats.norm.isf(alpha)), pairs, rows, margin)
        return float(stats.binom.pmf(pairs, rows, share) @ stats.binom.sf(fewest - 1, pairs, (share + difference) / (2 * share)))

    def critical(self, rows: int, difference: float, margin: float, alpha: float) -> float:
        """The least score that passes with so many rows, if as many of them are discordant as is likely."""
        normal = float(stats.norm.isf(alpha))
        if margin == 0:
            return normal
        pairs = round(rows * max(self.share(difference), abs(margin)))

        def excess(least: float) -> float:
            return worst(least, pairs, rows, margin) - alpha

        low, high = normal / 2, normal * 2
        return float(optimize.brentq(excess, low, high, xtol=1e-2)) if excess(low) > 0 > excess(high) else normal

    def share(self, difference: float) -> float:
        """Share of discordant pairs to plan with: as seen here (one, where there was none), and no less than the difference takes."""
        return min(1.0, max((self.lost + self.gained) / self.rows, 1 / self.rows, abs(difference)))


def exact(lost: int, gained: int, rows: int, margin: float) -> float:
    """P-value of the hypothesis P(lost) - P(gained) >= margin, from `lost` and `gained` of `rows` pairs.

    Args:
        lost: pairs that only the champion has right.
        gained: pairs that only the candidate has right.
        rows: all pairs.
        margin: from -1 to 1; negative turns the question round.
    """
    if margin == 0:
        return float(stats.binomtest(gained, lost + gained, 0.5, alternative="greater").pvalue) if lost + gained else 1.0
    return worst(float(score(np.array([lost]), np.array([gained]), rows, margin)[0]), lost + gained, rows, margin)


def worst(least: float, pairs: int, rows: int, margin: float) -> float:
    """Probability of a score of `least` or more under a loss of `margin`, at the worst share that `pairs` of `rows` do not exclude."""
    low, high = (max(bound, abs(margin)) for bound in proportion_confint(pairs, rows, EXCLUDED, method="beta"))
    discordant = likely(rows, low, high)
    fewest = fewest_gained(least, discordant, rows, margin)

    def probability(shares: Floats) -> Floats:
        """Of a score as large, were so large a share of the pairs discordant and the loss just the margin."""
        gain = np.clip((shares - margin) / (2 * shares), 0.0, 1.0)
        weights = stats.binom.pmf(discordant, rows, shares[:, None])
        share, some = np.nonzero(weights > 1e-14)
        weights = weights[share, some] * stats.binom.sf(fewest[some] - 1, discordant[some], gain[share])
        return np.bincount(share, weights, shares.size).astype(np.float64)

    shares = np.linspace(low, high, SHARES)
    peak = int((found := probability(shares)).argmax())
    around = np.linspace(shares[max(peak - 1, 0)], shares[min(peak + 1, SHARES - 1)], SHARES)
    return min(1.0, float(max(found[peak], probability(around).max())) + EXCLUDED)


def likely(rows: int, low: float, high: float) -> Counts:
    """Numbers of discordant pairs that are not beyond belief where their share is from `low` to `high`."""
    return np.arange(int(stats.binom.ppf(1e-16, rows, low)) if low > 0 else 0, int(stats.binom.isf(1e-16, rows, high)) + 1)


def score(lost: Counts, gained: Counts, rows: int, margin: float) -> Floats:
    """Tango's statistic: how far gained - lost lies above a loss of `margin`, in standard errors under that loss."""
    linear = -(lost + gained) + (2 * rows - lost + gained) * margin
    root = np.sqrt(np.maximum(linear**2 + 8 * rows * gained * margin * (1 - margin), 0.0))  # rounding can leave a 0 below it
    gain = (root - linear) / (4 * rows)
    variance = rows * (2 * gain + margin * (1 - margin))
    distance = gained - lost + rows * margin
    return np.asarray(np.where(variance > 1e-12, distance / np.sqrt(np.maximum(variance, 1e-12)), np.sign(distance) * 1e9))


def fewest_gained(least: float, discordant: Counts, rows: int, margin: float) -> Counts:
    """For each number of discordant pairs, the fewest gained ones whose score reaches `least` (one more than all: none)."""
    low, high = np.zeros_like(discordant), discordant + 1
    while (low < high).any():
        middle = np.minimum((low + high) // 2, discordant)
        reaches = (score(discordant - middle, middle, rows, margin) >= least - 1e-9) | (low >= high)
        low, high = np.where(reaches, low, middle + 1), np.where(reaches & (low < high), middle, high)
    return low
