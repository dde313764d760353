"""The bootstrap keeps alpha and has the power it states: exactly for right/wrong rows, by a seeded simulation for groups of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from stages.resampling import Resampled
from stages.statistics import POWER
from tests.paired import ALPHA, draw_groups, not_above_alpha, region, resampled
from tests.test_right_wrong import BASES, shares

LIKENESS = [0.0, 0.1, 0.4, 1.0]


def alone(differences: np.ndarray) -> Resampled:
    return Resampled(sums=differences, sizes=np.ones(differences.size), largest=max(1.0, float(np.abs(differences).max())))


@pytest.mark.parametrize("rows", [40, 120, 500])
@pytest.mark.parametrize("margin", [0.0, 0.01, 0.02, 0.05])
def test_neither_a_worse_model_is_let_through_nor_a_sound_one_held_above_alpha(rows: int, margin: float) -> None:
    for share in {share for base in BASES for share in shares(base, margin)}:
        assert region("bootstrap", rows, margin).chance(share, -margin) <= ALPHA, f"promoted, with {share} discordant"
        assert region("bootstrap", rows, -margin).chance(share, margin) <= ALPHA, f"held, with {share} discordant"


@pytest.mark.parametrize("values", [[-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1], [-0.9, -0.31, -0.07, 0, 0.05, 0.2, 0.6]])
@pytest.mark.parametrize("margin", [0.0, 0.03])
def test_scores_between_right_and_wrong_keep_alpha(values: list[float], margin: float) -> None:
    random, times = np.random.default_rng(1), 1000
    weights = np.array([0.01, 0.02, 0.04, 0.86, 0.04, 0.02, 0.01])
    worse, sound = np.array(values) - weights @ np.array(values) - margin, np.array(values)
    assert weights @ worse == pytest.approx(-margin)
    drawn = [alone(random.choice(worse, 300, p=weights)) for _ in range(times)]
    assert not_above_alpha(sum(test.p_not_worse(margin) <= ALPHA for test in drawn), times)
    assert not_above_alpha(sum(test.mirrored().p_not_worse(-margin) <= ALPHA for test in drawn), times)
    assert sum(alone(random.choice(sound, 3000, p=weights)).p_not_worse(0.03) <= ALPHA for _ in range(20)) == 20, "it is no test that never rejects"


def draws_with_replacement(differences: np.ndarray, margin: float) -> float:
    """The p-value as a bootstrap by drawing finds it, tilted by Newton's method."""
    pool = np.concatenate([differences, [-1.0, 1.0]]) + margin
    by = 0.0
    for _ in range(100):
        weights = np.exp(by * pool) / np.exp(by * pool).sum()
        by -= (weights @ pool) / (weights @ pool**2)
    drawn = np.random.default_rng(0).choice(pool, (20_000, differences.size), p=weights).mean(axis=1)
    return float((drawn >= (differences + margin).mean() - 1e-9).mean())


@pytest.mark.parametrize("kind", ["right/wrong", "phrasings", "any"])
def test_the_distribution_is_what_drawing_would_find(kind: str) -> None:
    random = np.random.default_rng(5)
    values = {"right/wrong": [-1.0, 0, 0, 0, 0, 1], "phrasings": [-1, -1 / 3, 0, 0, 0, 2 / 3, 1], "any": random.normal(0, 0.3, 30)}[kind]
    for margin in (0.0, 0.05):
        differences = random.choice(values, 80)
        assert alone(differences).p_not_worse(margin) == pytest.approx(draws_with_replacement(differences, margin), abs=0.015)


@pytest.mark.parametrize("likeness", LIKENESS)
@pytest.mark.parametrize(
    ("groups", "size", "even"),
    [
        (100, 5, True),
        pytest.param(50, 10, False, marks=pytest.mark.slow),
        pytest.param(25, 20, True, marks=pytest.mark.slow),
        pytest.param(200, 10, True, marks=pytest.mark.slow),
        pytest.param(250, 2, False, marks=pytest.mark.slow),
    ],
)
def test_groups_keep_alpha(groups: int, size: int, even: bool, likeness: float) -> None:
    random, times = np.random.default_rng(2), 800
    for margin, share in ((0.0, 0.1), (0.02, 0.03), (0.02, 0.2), (0.05, 0.1)):
        drawn = [draw_groups(random, groups, size, likeness, -margin, share, even) for _ in range(times)]
        assert not_above_alpha(sum(test.p_not_worse(margin) <= ALPHA for test in drawn), times), f"promoted: margin {margin}, {share} discordant"
        assert not_above_alpha(sum(test.mirrored().p_not_worse(-margin) <= ALPHA for test in drawn), times), f"held: margin {margin}, {share} discordant"


def test_rows_of_a_group_taken_as_if_they_stood_alone_are_too_sure() -> None:
    random, times = np.random.default_rng(3), 400
    drawn = [draw_groups(random, 100, 5, 1.0, -0.02, 0.2) for _ in range(times)]
    apart = [resampled(int(-test.sums[test.sums < 0].sum()), int(test.sums[test.sums > 0].sum()), 500) for test in drawn]
    assert sum(test.p_not_worse(0.02) <= ALPHA for test in apart) / times > 3 * ALPHA
    assert not_above_alpha(sum(test.p_not_worse(0.02) <= ALPHA for test in drawn), times)


@pytest.mark.parametrize("rows", [500, 1500])
@pytest.mark.parametrize("margin", [0.0, 0.02, 0.05])
@pytest.mark.parametrize("discordant", [0.06, 0.2])
def test_the_power_that_is_stated_is_the_power_that_it_has(rows: int, margin: float, discordant: float) -> None:
    pairs = round(rows * discordant)
    test = resampled(pairs // 2, pairs - pairs // 2, rows)
    for difference in (0.0, 0.01, 0.03):
        stated = test.power(rows, difference, margin, ALPHA)
        assert stated == pytest.approx(region("bootstrap", rows, margin).chance(discordant, difference), abs=0.02)


@pytest.mark.parametrize(
    ("groups", "size", "even", "likeness"),
    [
        (200, 10, True, 0.4),
        pytest.param(1000, 3, False, 0.4, marks=pytest.mark.slow),
        pytest.param(200, 10, True, 0.0, marks=pytest.mark.slow),
        pytest.param(1000, 3, True, 1.0, marks=pytest.mark.slow),
        pytest.param(1000, 3, False, 0.1, marks=pytest.mark.slow),
        pytest.param(1000, 3, False, 1.0, marks=pytest.mark.slow),
    ],
)
def test_the_power_of_groups_that_is_stated_is_the_power_that_they_have(groups: int, size: int, even: bool, likeness: float) -> None:
    random, times, margin, share = np.random.default_rng(4), 6000, 0.03, 0.15
    seen = draw_groups(random, 50_000, size, likeness, 0.0, share, even)
    rows = round(groups * float(seen.sizes.mean()))
    effect = optimize.brentq(lambda effect: seen.power(rows, effect - margin, margin, ALPHA) - POWER, 0.0, 0.5)
    drawn = (draw_groups(random, groups, size, likeness, effect - margin, share, even) for _ in range(times))
    assert sum(test.p_not_worse(margin) <= ALPHA for test in drawn) / times == pytest.approx(POWER, abs=0.02)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=60), st.floats(0, 0.3), st.data())
def test_p_values_are_probabilities_and_fall_with_the_margin(differences: list[float], margin: float, data: st.DataObject) -> None:
    sizes = np.array(data.draw(st.lists(st.integers(1, 5), min_size=len(differences), max_size=len(differences))), dtype=float)
    test = Resampled(sums=np.array(differences) * sizes, sizes=sizes, largest=1.0)
    found = [test.p_not_worse(margin), test.mirrored().p_not_worse(-margin)]
    assert all(0 < p <= 1 for p in found)
    assert sum(found) >= 0.99
    assert test.p_not_worse(margin + 0.1) <= found[0] + 0.02
