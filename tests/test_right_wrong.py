"""The exact test keeps alpha and has the power it states: added up over every table, nothing is drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.right_wrong import RightWrong, exact, fewest_gained, score
from stages.statistics import POWER, compare
from tests.paired import ALPHA, region

BASES = [0.5, 0.8, 0.95, 0.99]
"""Share of rows that the champion has right."""


def shares(base: float, margin: float) -> list[float]:
    """Shares of discordant pairs: nearly the fewest that the margin takes, and half and nearly all of what two models of this base can differ on."""
    most = 2 * min(base, 1 - base) + margin
    return [margin + part * (most - margin) for part in (0.02, 0.5, 0.95)]


@pytest.mark.parametrize("rows", [120, pytest.param(40, marks=pytest.mark.slow), pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("margin", [0.0, 0.02, 0.05])
def test_neither_a_worse_model_is_let_through_nor_a_sound_one_held_above_alpha(rows: int, margin: float) -> None:
    for share in {share for base in BASES for share in shares(base, margin)}:
        assert region("exact", rows, margin).chance(share, -margin) <= ALPHA, f"promoted, with {share} discordant"
        assert region("exact", rows, -margin).chance(share, margin) <= ALPHA, f"held, with {share} discordant"


@pytest.mark.parametrize("rows", [120, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("margin", [0.0, 0.02, 0.05])
@pytest.mark.parametrize("discordant", [0.05, 0.2])
def test_the_power_that_is_stated_is_the_power_that_it_has(rows: int, margin: float, discordant: float) -> None:
    pairs = round(rows * discordant)
    test = RightWrong(lost=pairs // 2, gained=pairs - pairs // 2, rows=rows)
    for difference in (-margin, 0.0, 0.02, 0.06):
        share = test.share(difference)
        stated = test.power(rows, difference, margin, ALPHA, test.critical(rows, difference, margin, ALPHA))
        assert stated == pytest.approx(region("exact", rows, margin).chance(share, difference), abs=0.02)


@pytest.mark.parametrize(
    ("rows", "discordant", "margin"),
    [
        (120, 7, 0.0),
        (120, 7, 0.05),
        (120, 24, 0.0),
        (120, 24, 0.05),
        pytest.param(500, 30, 0.02, marks=pytest.mark.slow),
        pytest.param(500, 100, 0.02, marks=pytest.mark.slow),
    ],
)
def test_the_minimum_detectable_effect_and_the_rows_needed_have_the_power(rows: int, discordant: int, margin: float) -> None:
    lost = discordant // 2
    old = [1.0] * lost + [0.0] * (rows - lost)
    new = [0.0] * lost + [1.0] * (discordant - lost) + [0.0] * (rows - discordant)
    found = compare(old, new, margin, "exact")
    effect = found.minimum_detectable_effect(ALPHA)
    assert effect is not None
    share = max(discordant / rows, abs(effect - margin))
    assert region("exact", rows, margin).chance(share, effect - margin) == pytest.approx(POWER, abs=0.02)
    for difference in (0.0, 0.02):
        needed = found.rows_needed(ALPHA, difference)
        if difference == -margin:
            assert needed is None
        elif needed is not None and needed < 700:
            assert region("exact", needed, margin).chance(discordant / rows, difference) == pytest.approx(POWER, abs=0.02)


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
