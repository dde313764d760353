"""The relative rule's error rate is shown, not claimed: exactly where that can be computed, else by a seeded simulation."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stages.statistics import bootstrap, compare, exact, fewest_gained, holm, score

ALPHA, ROWS, MARGIN = 0.05, 500, 0.02
cached = cache(exact)


def differences(lost: int, gained: int, rows: int) -> np.ndarray:
    return np.array([-1.0] * lost + [1.0] * gained + [0.0] * (rows - lost - gained))


def draw(rows: int, loss: float, discordant: float, times: int, seed: int) -> list[tuple[int, int, int]]:
    """(lost, gained, how often) over so many evaluations of a candidate whose true loss is `loss`."""
    cells = [(discordant + loss) / 2, (discordant - loss) / 2, 1 - discordant]
    tables, counts = np.unique(np.random.default_rng(seed).multinomial(rows, cells, size=times)[:, :2], axis=0, return_counts=True)
    return [(int(lost), int(gained), int(count)) for (lost, gained), count in zip(tables, counts, strict=True)]


@pytest.mark.parametrize(("rows", "margin"), [(ROWS, MARGIN), (ROWS, 0.01), (120, 0.05)])
@pytest.mark.parametrize("extra", [0.0, 0.03, 0.15])
def test_a_model_worse_by_the_margin_is_let_through_at_most_at_alpha_computed_exactly(rows: int, margin: float, extra: float) -> None:
    share, low = margin + extra, 0
    gain = (share - margin) / (2 * share)
    size, discordant = 0.0, np.arange(rows + 1)
    weights = stats.binom.pmf(discordant, rows, share)
    for pairs in np.flatnonzero(weights > 1e-7):
        low = min(low, int(pairs))
        while low > 0 and cached(int(pairs) - low + 1, low - 1, rows, margin) <= ALPHA:
            low -= 1
        while low <= pairs and cached(int(pairs) - low, low, rows, margin) > ALPHA:
            low += 1
        size += weights[pairs] * stats.binom.sf(low - 1, pairs, gain)
    assert size <= ALPHA


@pytest.mark.parametrize("discordant", [0.02, 0.04, 0.1])
def test_the_bootstrap_lets_a_model_worse_by_the_margin_through_at_most_at_alpha(discordant: float) -> None:
    times = 3000
    passed = sum(
        count for lost, gained, count in draw(ROWS, MARGIN, discordant, times, seed=1) if bootstrap(differences(lost, gained, ROWS), MARGIN)[0] <= ALPHA
    )
    assert passed / times <= ALPHA


def test_a_naive_comparison_lets_one_in_four_through_and_ours_does_not() -> None:
    times = 3000
    tables = draw(ROWS, 0.01, 0.1, times, seed=2)
    naive = sum(count for lost, gained, count in tables if gained >= lost) / times
    ours = sum(count for lost, gained, count in tables if cached(lost, gained, ROWS, 0.01) <= ALPHA) / times
    assert naive > 0.22
    assert ours <= ALPHA


def test_the_percentile_bootstrap_would_be_too_bold() -> None:
    times, random = 4000, np.random.default_rng(3)
    passed = 0
    for lost, gained, count in draw(ROWS, MARGIN, MARGIN, times, seed=3):
        means = random.multinomial(ROWS, np.array([lost, gained, ROWS - lost - gained]) / ROWS, size=4000) @ np.array([-1, 1, 0]) / ROWS
        passed += count * bool(np.quantile(means, ALPHA) > -MARGIN)
    assert passed / times > 0.06


def test_phrasings_averaged_within_rows_keep_alpha() -> None:
    """Three phrasings that fall together: taken as 1,500 independent rows they would be three times too sure."""
    random, times, passed, pooled = np.random.default_rng(4), 250, 0, 0
    for _ in range(times):
        row = random.choice([-1.0, 1.0, 0.0], p=[0.08, 0.06, 0.86], size=ROWS)
        passed += bootstrap(row, MARGIN)[0] <= ALPHA
        pooled += bootstrap(np.repeat(row, 3), MARGIN)[0] <= ALPHA
    assert passed / times <= ALPHA + 2 * (ALPHA * (1 - ALPHA) / times) ** 0.5
    assert pooled / times > 2 * ALPHA


def test_an_equal_model_gets_through_when_there_are_rows_enough() -> None:
    found = compare([1.0] * 400 + [0.0] * 100, [1.0] * 395 + [0.0] * 100 + [1.0] * 5, MARGIN, "exact")
    assert found.p_not_worse <= ALPHA
    assert found.minimum_detectable_effect(ALPHA) < MARGIN
    needed = found.rows_needed(ALPHA, MARGIN)
    assert needed is not None and needed < ROWS
    tables = draw(needed, 0.0, 0.02, 2000, seed=5)
    assert sum(n for lost, gained, n in tables if cached(lost, gained, needed, MARGIN) <= ALPHA) / 2000 > 0.7


def test_margin_zero_is_exact_mcnemar() -> None:
    from statsmodels.stats.contingency_tables import mcnemar

    assert exact(4, 15, 100, 0.0) == pytest.approx(mcnemar([[60, 4], [15, 21]], exact=True).pvalue / 2)
    assert exact(0, 0, 100, 0.0) == 1.0


@pytest.mark.parametrize(("lost", "gained", "rows", "margin"), [(5, 9, 60, 0.1), (20, 12, 200, 0.05), (3, 14, 80, -0.1), (0, 4, 40, 0.02)])
def test_the_score_uses_the_most_likely_cells_under_the_margin(lost: int, gained: int, rows: int, margin: float) -> None:
    gain = np.linspace(max(0.0, -margin) + 1e-9, (1 - margin) / 2 - 1e-9, 200_001)
    fit = gain[(lost * np.log(gain + margin) + gained * np.log(gain) + (rows - lost - gained) * np.log(1 - 2 * gain - margin)).argmax()]
    z = (gained - lost + rows * margin) / (rows * (2 * fit + margin - margin**2)) ** 0.5
    assert score(np.array([lost]), np.array([gained]), rows, margin)[0] == pytest.approx(z, abs=1e-3)


@settings(deadline=None, max_examples=60)
@given(st.integers(10, 80), st.floats(-0.5, 0.5).filter(lambda m: m == 0 or abs(m) > 1e-3), st.data())
def test_more_gained_is_never_weaker_evidence(rows: int, margin: float, data: st.DataObject) -> None:
    pairs = data.draw(st.integers(1, rows))
    gained = np.arange(pairs + 1)
    scores = score(pairs - gained, gained, rows, margin)
    assert (np.diff(scores) >= -1e-9).all()
    least = float(scores[data.draw(st.integers(0, pairs))])
    first = int(fewest_gained(least, np.array([pairs]), rows, margin)[0])
    assert first == int(np.flatnonzero(scores >= least - 1e-9)[0])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=60), st.floats(0, 0.3))
def test_p_values_are_probabilities_and_repeat(differences: list[float], margin: float) -> None:
    first = bootstrap(np.array(differences), margin)
    assert first == bootstrap(np.array(differences), margin)
    assert all(0 < p <= 1 for p in first)
    assert sum(first) >= 1


@pytest.mark.parametrize(
    ("champion", "candidate", "method", "message"),
    [
        ([], [], "exact", "0 rows"),
        ([1.0], [1.0, 0.0], "exact", "1 rows of the champion, 2"),
        ([float("nan")], [1.0], "bootstrap", "finite"),
        ([0.5], [1.0], "exact", "neither 0 nor 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(champion: list[float], candidate: list[float], method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(champion, candidate, MARGIN, method)  # type: ignore[arg-type]


def test_holm_is_stricter_than_none_and_keeps_the_order() -> None:
    assert holm([0.03, 0.01], 0.05) == pytest.approx([0.03, 0.02])
    assert holm([], 0.05) == []
