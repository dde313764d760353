"""Comparisons as the gate asks for them: intervals, effects and rows that agree with the tests, over one task and over several."""

from __future__ import annotations

import time
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.right_wrong import RightWrong
from stages.statistics import MOST, POWER, Comparison, compare, holm
from tests.paired import ALPHA, draw_groups, not_above_alpha, region, scores

MARGIN = 0.02
let_through = cache(lambda lost, gained, rows: RightWrong(lost=lost, gained=gained, rows=rows).p_not_worse(MARGIN))


def compared(lost: int, gained: int, rows: int, margin: float = MARGIN, method: str = "exact", groups: list[int] | None = None) -> Comparison:
    same = [1.0] * ((rows - lost - gained) // 2)
    wrong = [0.0] * (rows - lost - gained - len(same))
    return compare([1.0] * lost + [0.0] * gained + same + wrong, [0.0] * lost + [1.0] * gained + same + wrong, margin, method, groups)  # type: ignore[arg-type]


def test_a_naive_comparison_lets_one_in_four_through_and_ours_does_not() -> None:
    times, rows, share = 4000, 500, 0.1
    tables = np.random.default_rng(2).multinomial(rows, [(share + 0.01) / 2, (share - 0.01) / 2, 1 - share], size=times)
    assert (tables[:, 1] >= tables[:, 0]).mean() > 0.22
    assert region("exact", rows, 0.01).chance(share, -0.01) <= ALPHA


def test_the_percentile_bootstrap_would_be_too_bold() -> None:
    times, rows, random = 4000, 500, np.random.default_rng(3)
    tables, counts = np.unique(random.multinomial(rows, [MARGIN, 0, 1 - MARGIN], size=times), axis=0, return_counts=True)
    passed = 0
    for (lost, gained, same), count in zip(tables, counts, strict=True):
        means = random.multinomial(rows, np.array([lost, gained, same]) / rows, size=4000) @ np.array([-1, 1, 0]) / rows
        passed += count * bool(np.quantile(means, ALPHA) > -MARGIN)
    assert passed / times > 0.06
    assert region("bootstrap", rows, MARGIN).chance(MARGIN, -MARGIN) <= ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("worse", [1, 3])
def test_over_several_tasks_a_false_promotion_stays_at_alpha(worse: int) -> None:
    """Three tasks, one of each method, of which the first so many are worse by the margin: any of these let through is a false promotion."""
    random, times, rows, share = np.random.default_rng(6), 600, 100, 0.1
    wrong = 0
    for _ in range(times):
        losses = [MARGIN if task < worse else -0.05 for task in range(3)]
        p_values = []
        for method, loss in zip(("exact", "bootstrap", "groups"), losses, strict=True):
            drawn = draw_groups(random, rows if method != "groups" else 60, 1 if method != "groups" else 4, 0.3 if method == "groups" else 0.0, -loss, share)
            if method == "exact":
                p_values.append(let_through(int((drawn.sums < 0).sum()), int((drawn.sums > 0).sum()), rows))
            else:
                p_values.append(drawn.p_not_worse(MARGIN))
        if min(p_values[:worse]) <= ALPHA:  # else none can be let through, and Holm of statsmodels takes its time
            wrong += min(holm(p_values, ALPHA)[:worse]) <= ALPHA
    assert not_above_alpha(wrong, times)
    assert wrong, "a test that never rejects would pass too"


@settings(deadline=None, max_examples=25)
@given(st.integers(5, 300), st.sampled_from([0.0, 0.01, 0.05]), st.sampled_from(["exact", "bootstrap", "grouped"]), st.data())
def test_the_interval_leaves_out_the_margin_just_when_the_test_rejects(rows: int, margin: float, method: str, data: st.DataObject) -> None:
    lost = data.draw(st.integers(0, rows // 3))
    gained = data.draw(st.integers(0, rows // 3))
    groups = [row // 4 for row in range(rows)] if method == "grouped" else None
    found = compared(lost, gained, rows, margin, "bootstrap" if groups else method, groups)
    low, high = found.interval(ALPHA)
    assert -1 <= low <= found.difference <= high <= 1
    if found.p_not_worse <= ALPHA:
        assert low >= -margin
    else:
        assert low <= -margin
    assert high <= -margin if found.p_worse <= ALPHA else high >= -margin


@pytest.mark.parametrize("method", ["exact", "bootstrap"])
def test_the_ends_of_the_interval_are_the_margins_at_which_the_tests_turn(method: str) -> None:
    found = compared(14, 9, 200, method=method)
    low, high = found.interval(ALPHA)
    for step, rejects in ((-0.001, False), (0.001, True)):
        assert (found.test.p_not_worse(-low + step) <= ALPHA) is rejects
        assert (found.test.mirrored().p_not_worse(high + step) <= ALPHA) is rejects


def test_the_interval_is_tangos_where_there_are_many_rows() -> None:
    """Root of Tango's score at 1.645 standard errors, by its definition."""
    from scipy import optimize

    from stages.right_wrong import score

    def end(lost: int, gained: int) -> float:
        return float(optimize.brentq(lambda loss: score(np.array([lost]), np.array([gained]), 2000, loss)[0] - 1.6449, -0.5, 0.5))

    assert compared(120, 90, 2000).interval(ALPHA) == pytest.approx((-end(120, 90), end(90, 120)), abs=3e-4)


@pytest.mark.parametrize("likeness", [pytest.param(0.0, marks=pytest.mark.slow), 0.4, pytest.param(1.0, marks=pytest.mark.slow)])
def test_intervals_of_groups_hold_the_true_difference(likeness: float) -> None:
    random, times, difference = np.random.default_rng(7), 300, -0.03
    missed = 0
    for _ in range(times):
        low, high = compare(*scores(draw_groups(random, 100, 5, likeness, difference, 0.15))[:2], 0.0, "exact", _groups(100, 5)).interval(ALPHA)
        missed += not low <= difference <= high
    assert not_above_alpha(missed, times, 2 * ALPHA)


def _groups(groups: int, size: int) -> list[int]:
    return [group for group in range(groups) for _ in range(size)]


def test_groups_take_the_place_of_the_exact_test_and_count_for_less() -> None:
    drawn = draw_groups(np.random.default_rng(8), 100, 5, 1.0, 0.0, 0.2)
    old, new, groups = scores(drawn)
    together, apart = compare(old, new, MARGIN, "exact", groups), compare(old, new, MARGIN, "exact")
    assert (together.method, together.groups, together.rows) == ("grouped bootstrap", 100, 500)
    assert (apart.method, apart.groups) == ("exact", None)
    assert together.design_effect == pytest.approx(5, rel=0.01) and apart.design_effect == pytest.approx(1)
    assert together.p_not_worse > apart.p_not_worse
    widths = [np.diff(found.interval(ALPHA))[0] for found in (together, apart)]
    assert widths[0] > 2 * widths[1]
    effects = [found.minimum_detectable_effect(ALPHA) for found in (together, apart)]
    assert effects[0] > 2 * effects[1]
    needed = [found.rows_needed(ALPHA) for found in (together, apart)]
    assert needed[0] == pytest.approx(5 * needed[1], rel=0.1), "five rows of a group say as much as one"
    assert compare(old, new, MARGIN, "exact", [str(row) for row in range(500)]).method == "exact", "groups of one row are none"


def test_the_order_of_rows_and_the_names_of_groups_change_nothing() -> None:
    drawn = draw_groups(np.random.default_rng(9), 60, 4, 0.4, 0.0, 0.2, even=False)
    old, new, groups = scores(drawn)
    order = np.random.default_rng(0).permutation(old.size)
    first = compare(old, new, MARGIN, "exact", groups)
    other = compare(old[order], new[order], MARGIN, "exact", [f"customer {groups[row]}" for row in order])
    assert (other.p_not_worse, other.p_worse, other.groups) == pytest.approx((first.p_not_worse, first.p_worse, first.groups))


def test_rows_needed_of_groups_have_the_power() -> None:
    random, times, share = np.random.default_rng(10), 3000, 0.15
    old, new, groups = scores(draw_groups(np.random.default_rng(11), 5000, 4, 0.3, 0.0, share))
    needed = compare(old, new, 0.05, "exact", groups).rows_needed(ALPHA)
    assert needed is not None
    drawn = (draw_groups(random, round(needed / 4), 4, 0.3, 0.0, share) for _ in range(times))
    assert sum(test.p_not_worse(0.05) <= ALPHA for test in drawn) / times == pytest.approx(POWER, abs=0.02)


def test_rows_that_no_number_would_settle() -> None:
    assert compared(10, 10, 500, 0.0).rows_needed(ALPHA) is None, "an equal model against margin 0: its loss is the margin"
    assert compared(20, 10, 500, 0.02).rows_needed(ALPHA, -0.02) is None
    near = compared(20, 10, 500, 0.02).rows_needed(ALPHA, -0.0199)
    assert near is None, f"more than {MOST}"
    assert compared(3, 3, 6, 0.0).minimum_detectable_effect(ALPHA) is not None and compared(1, 1, 3, 0.0).minimum_detectable_effect(ALPHA) is None


def test_a_candidate_worse_than_the_margin_is_found_out_with_the_rows_that_are_named() -> None:
    found = compared(36, 12, 300, 0.02)
    needed = found.rows_needed(ALPHA, found.difference)
    assert found.difference == pytest.approx(-0.08) and needed is not None
    assert region("exact", needed, -0.02).chance(48 / 300, 0.08) == pytest.approx(POWER, abs=0.02)


@pytest.mark.parametrize("method", ["exact", "bootstrap", "grouped", "any score"])
def test_ten_thousand_rows_are_compared_in_a_third_of_a_second(method: str) -> None:
    random = np.random.default_rng(0)
    old, new = (random.choice([0.0, 1.0], 10_000) if method != "any score" else random.normal(0, 0.3, 10_000) for _ in range(2))
    groups = [row // 5 for row in range(10_000)] if method == "grouped" else None
    taken = []
    for _ in range(3):
        started = time.process_time()
        compare(old, new, MARGIN, "exact" if method == "exact" else "bootstrap", groups)
        taken.append(time.process_time() - started)
    assert min(taken) < 0.3


@pytest.mark.parametrize(
    ("champion", "candidate", "method", "groups", "message"),
    [
        ([], [], "exact", None, "0 rows"),
        ([1.0], [1.0, 0.0], "exact", None, "1 rows of the champion, 2"),
        ([float("nan")], [1.0], "bootstrap", None, "finite"),
        ([0.5], [1.0], "exact", None, "neither 0 nor 1"),
        ([0.0, 1.0], [1.0, 1.0], "exact", ["a"], "2 rows, and groups of 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(champion: list[float], candidate: list[float], method: str, groups: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(champion, candidate, MARGIN, method, groups)  # type: ignore[arg-type]


def test_holm_is_stricter_than_none_and_keeps_the_order() -> None:
    assert holm([0.03, 0.01], 0.05) == pytest.approx([0.03, 0.02])
    assert holm([], 0.05) == []
