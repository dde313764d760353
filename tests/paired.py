"""Error rates of the gate's tests: added up over every table of right/wrong pairs, or simulated for rows in groups."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property

import numpy as np
from scipy import stats

from stages.resampling import Floats, Resampled
from stages.right_wrong import RightWrong

ALPHA = 0.05


def right_wrong(lost: int, gained: int, rows: int) -> RightWrong:
    return RightWrong(lost=lost, gained=gained, rows=rows)


def resampled(lost: int, gained: int, rows: int) -> Resampled:
    sums = np.array([-1.0] * lost + [1.0] * gained + [0.0] * (rows - lost - gained))
    return Resampled(sums=sums, sizes=np.ones(rows), largest=1.0)


class Region:
    """Every table of so many rows that lets a candidate through."""

    def __init__(self, make: Callable[[int, int, int], RightWrong | Resampled], rows: int, margin: float, alpha: float = ALPHA) -> None:
        self.make, self.rows, self.margin, self.alpha = make, rows, margin, alpha
        self.known: dict[int, int] = {}

    @cached_property
    def passes(self) -> Callable[[int, int], bool]:
        return cache(lambda lost, gained: self.make(lost, gained, self.rows).p_not_worse(self.margin) <= self.alpha)

    def fewest(self, pairs: int) -> int:
        """Of so many discordant pairs, the fewest gained ones that pass (one more than all: none)."""
        if pairs not in self.known:
            near = self.known.get(pairs - 1, pairs // 2)
            while near <= pairs and not self.passes(pairs - near, near):
                near += 1
            while near > 0 and self.passes(pairs - near + 1, near - 1):
                near -= 1
            self.known[pairs] = near
        return self.known[pairs]

    def chance(self, share: float, difference: float) -> float:
        """Probability of getting through with this share of discordant pairs and this true difference."""
        pairs = np.arange(self.rows + 1)
        weights = stats.binom.pmf(pairs, self.rows, share)
        gain = (share + difference) / (2 * share)
        return float(sum(weights[k] * stats.binom.sf(self.fewest(int(k)) - 1, k, gain) for k in np.flatnonzero(weights > 1e-6)))


@cache
def region(kind: str, rows: int, margin: float) -> Region:
    return Region(right_wrong if kind == "exact" else resampled, rows, margin)


def draw_groups(random: np.random.Generator, groups: int, size: int, likeness: float, difference: float, share: float, even: bool = True) -> Resampled:
    """Rows in groups, right/wrong: the Dirichlet-multinomial, whose rows of one group correlate by `likeness` (0: alone, 1: all the same).

    Args:
        random: where chance comes from.
        groups: how many.
        size: rows of a group, on average.
        likeness: correlation within a group.
        difference: true one, candidate less champion.
        share: of rows on which the two differ.
        even: false: sizes from 1 to four times the average, small ones more often.
    """
    sizes = np.full(groups, size) if even else np.minimum(random.geometric(1 / size, groups), 4 * size)
    cells = np.array([(share - difference) / 2, (share + difference) / 2, 1 - share])
    if likeness == 0:
        chances = np.tile(cells, (groups, 1))
    elif likeness == 1:
        chances = random.multinomial(1, cells, groups).astype(float)
    else:
        drawn = random.gamma(np.maximum(cells * (1 - likeness) / likeness, 1e-9), size=(groups, 3)) + 1e-300
        chances = drawn / drawn.sum(axis=1, keepdims=True)
    lost = random.binomial(sizes, chances[:, 0])
    gained = random.binomial(sizes - lost, np.clip(chances[:, 1] / np.maximum(1 - chances[:, 0], 1e-12), 0, 1))
    return Resampled(sums=(gained - lost).astype(float), sizes=sizes.astype(float), largest=1.0)


def scores(found: Resampled) -> tuple[Floats, Floats, list[int]]:
    """Champion's and candidate's right/wrong scores and the groups of rows that fell out like this (a win and a loss of one group cancel)."""
    old, new, groups = [], [], []
    for group, (total, size) in enumerate(zip(found.sums.astype(int), found.sizes.astype(int), strict=True)):
        old += [1.0] * max(-total, 0) + [0.0] * (size - max(-total, 0))
        new += [1.0] * max(total, 0) + [0.0] * (size - max(total, 0))
        groups += [group] * size
    return np.array(old), np.array(new), groups


def not_above_alpha(passed: int, times: int, alpha: float = ALPHA) -> bool:
    """Whether a simulated error rate is no higher than chance would make one of alpha (once in a thousand)."""
    return bool(stats.binomtest(passed, times, alpha, alternative="greater").pvalue > 0.001)
