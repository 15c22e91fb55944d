"""Intervals and paired tests against scipy, and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from geofast.effects.intervals import bootstrap_means, mcnemar, sign_flip


def test_bootstrap_is_scipys_within_its_noise():
    rng = np.random.default_rng(0)
    x = np.stack([rng.exponential(3, 60), rng.integers(0, 2, 60).astype(float)], 1)
    low, high = bootstrap_means(x, draws=20_000)
    for column in range(2):
        theirs = stats.bootstrap(
            (x[:, column],), np.mean, method="percentile", n_resamples=20_000, rng=1
        ).confidence_interval
        spread = x[:, column].std() / math.sqrt(60)
        assert low[column] == pytest.approx(theirs.low, abs=0.08 * spread)
        assert high[column] == pytest.approx(theirs.high, abs=0.08 * spread)


def test_bootstrap_of_two_rows_by_hand():
    """Means 0, .5 and 1 with probabilities 1/4, 1/2 and 1/4."""
    low, high = bootstrap_means([[0.0, 7.0], [1.0, 7.0]], level=0.4)
    assert (low.tolist(), high.tolist()) == ([0.5, 7.0], [0.5, 7.0])
    low, high = bootstrap_means([[0.0], [1.0]], level=0.95)
    assert (low.tolist(), high.tolist()) == ([0.0], [1.0])


def test_bootstrap_leaves_missing_values_out():
    x = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan], [5.0, np.nan]])
    low, high = bootstrap_means(x, draws=500)
    assert 1 <= low[0] < 3 < high[0] <= 5
    assert np.isnan([low[1], high[1]]).all()
    again = bootstrap_means(x, draws=500)
    np.testing.assert_array_equal(again, (low, high))
    normal = np.random.default_rng(0).normal(size=(50, 1))
    other = bootstrap_means(normal, draws=500, seed=2)
    assert other != bootstrap_means(normal, draws=500)


def test_a_rate_of_none_or_of_all_has_exact_ends():
    """By hand: of 2 in tails of 1/16, whose root is 1/4. Of 40 by scipy."""
    low, high = bootstrap_means([[0.0, 1.0], [0.0, 1.0]], rates=True, level=7 / 8)
    np.testing.assert_allclose([low, high], [[0.0, 0.25], [0.75, 1.0]])
    low, high = bootstrap_means([[0.0], [np.nan]], rates=True, level=0.95)
    np.testing.assert_allclose([low[0], high[0]], [0.0, 0.975])
    x = np.array([[0.0, 1.0, 0.0]] * 40)
    x[:30, 2] = 1.0
    exact = bootstrap_means(x, rates=[True, True, True], draws=500)
    for column, k in enumerate((0, 40)):
        theirs = stats.binomtest(k, 40).proportion_ci(method="exact")
        assert exact[0][column] == pytest.approx(theirs.low)
        assert exact[1][column] == pytest.approx(theirs.high)
    numbers = bootstrap_means(x, draws=500)
    assert [exact[0][2], exact[1][2]] == [numbers[0][2], numbers[1][2]]  # values that differ
    np.testing.assert_array_equal([numbers[0][:2], numbers[1][:2]], [[0, 1], [0, 1]])


def test_one_number_has_no_interval():
    x = np.array([[3.0, 3.0, 1.0, np.nan], [np.nan, 3.0, np.nan, np.nan]])
    low, high = bootstrap_means(x, rates=[False, False, True, True])
    np.testing.assert_allclose([low, high], [[np.nan, 3, 0.025, np.nan], [np.nan, 3, 1, np.nan]])
    assert np.isnan(bootstrap_means([[7.0]])).all()


def test_bootstrap_wants_rows():
    with pytest.raises(ValueError, match=r"\[n, m\] with rows; got \[0, 2\]"):
        bootstrap_means(np.empty((0, 2)))


@pytest.mark.parametrize("counts", [(24, 1), (3, 3), (0, 5), (0, 0), (7, 12), (1, 0)])
def test_mcnemar_is_the_binomial_test(counts):
    n10, n01 = counts
    a = [True] * n10 + [False] * n01 + [True, False]
    b = [False] * n10 + [True] * n01 + [True, False]
    wanted = stats.binomtest(n10, n10 + n01, 0.5).pvalue if n10 + n01 else 1.0
    assert mcnemar(a, b) == pytest.approx(wanted, rel=1e-12)
    assert mcnemar(b, a) == mcnemar(a, b)


def test_mcnemar_by_hand():
    """Five cases, all of one kind: 2 / 2^5."""
    assert mcnemar([True] * 5 + [False], [False] * 6) == 1 / 16
    with pytest.raises(ValueError, match=r"must be \[n\]"):
        mcnemar([True], [True, False])


def test_sign_flips_by_hand():
    """|1+2+3| is reached by all plus and all minus; |1+2-3| by every sign."""
    assert sign_flip([1.0, 2.0, 3.0]) == 2 / 8
    assert sign_flip([1.0, 2.0, -3.0]) == 1.0
    assert sign_flip([0.1, 0.2, -0.3]) == 1.0  # whose sum is 5.6e-17 in float64
    assert sign_flip([0.0] * 20) == 1.0
    assert math.isnan(sign_flip([]))
    with pytest.raises(ValueError, match="finite"):
        sign_flip([1.0, np.nan])


@pytest.mark.parametrize("n", [9, 40])
def test_sign_flips_are_scipys(n):
    d = np.random.default_rng(n).normal(0.35, 1, n)
    theirs = stats.permutation_test(
        (d, np.zeros(n)), lambda a, b: np.mean(a - b), permutation_type="samples",
        n_resamples=20_000, rng=0,
    ).pvalue  # fmt: skip
    assert sign_flip(d) == pytest.approx(theirs, abs=1e-9 if n == 9 else 0.012)
    assert 0.005 < theirs < 0.6


def test_many_differences_are_drawn_in_parts(monkeypatch):
    d = np.random.default_rng(3).normal(0.2, 1, 50)
    whole = sign_flip(d, draws=1000)
    monkeypatch.setattr("geofast.effects.intervals._AT_ONCE", 700)
    assert sign_flip(d, draws=1000) == whole
    assert sign_flip(d + 3, draws=1000) == 1 / 1001
