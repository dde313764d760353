"""Is the candidate worse than the champion by more than a margin? Tests on the same rows, asked of both.

All test the hypothesis `the true loss is at least the margin`, whose rejection lets a model through, and have an interval, a minimum
detectable effect and numbers of rows that belong to them:

exact      for right/wrong rows that stand alone: stages/right_wrong.py.
bootstrap  for the rest: scores of any kind, and rows that are means over phrasings: stages/resampling.py.
grouped    the same of whole groups, where rows share their luck (those of one customer, of one document), right/wrong or not.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize
from statsmodels.stats.multitest import multipletests

from stages.resampling import Floats, Resampled
from stages.right_wrong import RightWrong

POWER = 0.8
"""Probability with which the minimum detectable effect would be seen."""
MOST = 1_000_000
"""No larger number of rows is looked for."""

Method = Literal["exact", "bootstrap"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the paired rows say of candidate and champion. A difference is candidate less champion; above 0 is better."""

    rows: int
    groups: int | None
    """Independent groups of rows; null where each row stands alone."""
    better: int
    """Rows on which the candidate scores more."""
    worse: int
    """Rows on which it scores less."""
    difference: float
    margin: float
    p_not_worse: float
    """Of a result this good or better, were the true loss the margin. Small: the loss is less than the margin."""
    p_worse: float
    """Of a result this bad or worse, were the true loss the margin. Small: the loss is more than the margin."""
    design_effect: float
    """How many rows of these say as much as one that stands alone."""
    method: Literal["exact", "bootstrap", "grouped bootstrap"]
    test: RightWrong | Resampled

    def interval(self, alpha: float) -> tuple[float, float]:
        """Every true difference that the test does not reject at `alpha`, to either side: 1 - 2 alpha of such intervals hold the true one."""
        tested = ((self.margin, self.p_not_worse, self.p_worse),) + (((0.0, *_p_values(self.test, 0.0)),) if self.margin else ())
        low, high = -_largest_loss(self.test, -self.difference, alpha), _largest_loss(self.test.mirrored(), self.difference, alpha)
        for margin, not_worse, worse in tested:  # the p-value is not quite steady in the margin: where it was asked, it decides
            low = max(low, -margin) if not_worse <= alpha else min(low, -margin)
            high = min(high, -margin) if worse <= alpha else max(high, -margin)
        return low, high

    def minimum_detectable_effect(self, alpha: float) -> float | None:
        """How far above a loss of the margin the true difference must lie to be let through with the probability POWER.

        Rows are taken to differ as often as these do, or as the effect takes. null: these are too few rows for any effect.
        """

        def lacking(effect: float, critical: float | None) -> float:
            return self.test.power(self.rows, effect - self.margin, self.margin, alpha, critical) - POWER

        most = self.margin + self.test.largest
        if lacking(most, None) < 0:
            return None
        rough = float(optimize.brentq(lacking, 0.0, most, args=(None,), xtol=1e-5))
        critical = self.test.critical(self.rows, rough - self.margin, self.margin, alpha)
        return float(optimize.brentq(lacking, 0.0, most, args=(critical,), xtol=1e-6)) if lacking(most, critical) > 0 else None

    def rows_needed(self, alpha: float, difference: float = 0.0) -> int | None:
        """Rows with which a candidate of this true difference is settled with the probability POWER: let through, or found worse than the margin.

        Rows are taken to differ as often as these do, and to come in such groups. null: no number would settle it, for the true loss
        is the margin; or none up to MOST.
        """
        test, margin = self.test, self.margin
        if abs(difference + margin) < 1e-9:
            return None
        if difference < -margin:
            test, margin, difference = test.mirrored(), -margin, -difference

        def power(rows: int, critical: float | None) -> float:
            return test.power(rows, difference, margin, alpha, critical)

        rough = 1 + bisect_left(range(1, MOST + 1), POWER, key=lambda rows: power(rows, None))
        if rough > MOST:
            return None
        critical = test.critical(rough, difference, margin, alpha)
        found = 1 + bisect_left(range(1, MOST + 1), POWER, key=lambda rows: power(rows, critical))
        while found <= MOST and power(found, test.critical(found, difference, margin, alpha)) < POWER:
            found += 1 + found // 100  # few discordant pairs: the power goes up in a saw's teeth
        return found if found <= MOST else None


def compare(champion: Sequence[float], candidate: Sequence[float], margin: float, method: Method, groups: Sequence[Hashable] | None = None) -> Comparison:
    """Test paired scores, one pair per row; more is better.

    Args:
        champion: scores.
        candidate: scores of the same rows, in the same order.
        margin: the loss that is still acceptable.
        method: `exact` for right/wrong; of rows in groups, both are the grouped bootstrap.
        groups: for each row, what it shares with others of its group; None: each row stands alone.

    Raises:
        ValueError: no rows, unequal lengths, a score that is not finite, or one other than 0 and 1 for `exact`.
    """
    old, new = np.asarray(champion, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if old.shape != new.shape or old.ndim != 1 or not old.size:
        raise ValueError(f"{old.size} rows of the champion, {new.size} of the candidate")
    if groups is not None and len(groups) != old.size:
        raise ValueError(f"{old.size} rows, and groups of {len(groups)}")
    if not (np.isfinite(old).all() and np.isfinite(new).all()):
        raise ValueError("a score is not a finite number")
    if method == "exact" and not np.isin(np.concatenate([old, new]), (0.0, 1.0)).all():
        raise ValueError("a score is neither 0 nor 1")
    difference = new - old
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    resampled = _grouped(difference, groups)
    grouped = resampled.sums.size < old.size
    test = RightWrong(lost=worse, gained=better, rows=old.size) if method == "exact" and not grouped else resampled
    p_not_worse, p_worse = _p_values(test, margin)
    return Comparison(
        rows=old.size,
        groups=resampled.sums.size if grouped else None,
        better=better,
        worse=worse,
        difference=float(difference.mean()),
        margin=margin,
        p_not_worse=p_not_worse,
        p_worse=p_worse,
        design_effect=_design_effect(difference, resampled),
        method="grouped bootstrap" if grouped else method,
        test=test,
    )


def holm(p_values: Sequence[float], alpha: float) -> list[float]:
    """The p-values adjusted for being several, in their order: each may be compared with alpha."""
    return [float(p) for p in multipletests(p_values, alpha=alpha, method="holm")[1]] if p_values else []


def _p_values(test: RightWrong | Resampled, margin: float) -> tuple[float, float]:
    """(not worse, worse) of a test."""
    return test.p_not_worse(margin), test.mirrored().p_not_worse(-margin)


def _grouped(difference: Floats, groups: Sequence[Hashable] | None) -> Resampled:
    """The differences added up by group, in the order of the groups' first rows."""
    first: dict[Hashable, int] = {}
    places = np.array([first.setdefault(group, len(first)) for group in (groups if groups is not None else range(difference.size))])
    sums, sizes = np.bincount(places, difference).astype(np.float64), np.bincount(places).astype(np.float64)
    return Resampled(sums=sums, sizes=sizes, largest=max(1.0, float(np.abs(difference).max())))


def _design_effect(difference: Floats, grouped: Resampled) -> float:
    """Variance of the mean difference over that of as many rows that stand alone; 1 where no row differs from another."""
    alone = float(((difference - difference.mean()) ** 2).sum())
    return float(((grouped.sums - difference.mean() * grouped.sizes) ** 2).sum()) / alone if alone > 1e-12 else 1.0


def _largest_loss(test: RightWrong | Resampled, loss: float, alpha: float) -> float:
    """The largest true loss that is not rejected at `alpha`, from the observed loss up."""
    reach, step = test.largest - 1e-9, 0.001
    while (upper := min(loss + step, reach)) < reach and test.p_not_worse(upper) > alpha:
        step *= 2

    def excess(margin: float) -> float:
        return test.p_not_worse(margin) - alpha

    lower = loss if upper == reach or step == 0.001 else loss + step / 2
    return float(optimize.brentq(excess, lower, upper, xtol=1e-5)) if lower < upper and excess(lower) > 0 > excess(upper) else test.largest
