from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from geofast.geo import error_km, fold_scores, great_circle_km


def problem(S=3, N=203, k=2, F=4, seed=0):
    rng = np.random.default_rng(seed)
    y = np.stack(
        [rng.uniform(-80, 80, N), rng.uniform(-180, 180, N)] + [rng.normal(size=N)] * (k - 2), 1
    )
    p = y[None] + rng.normal(scale=30, size=(S, N, k))
    return p, y, rng.permutation(np.arange(N) % F)


def test_every_score_against_its_oracle():
    p, y, fold = problem()
    scores = fold_scores(p, y, fold)
    assert scores.r2.shape == (3, 4, 2)
    for s in range(3):
        for f in range(4):
            a, b = p[s, fold == f], y[fold == f]
            expected = {
                "r2": metrics.r2_score(b, a, multioutput="raw_values"),
                "rmse": metrics.root_mean_squared_error(b, a, multioutput="raw_values"),
                "mae": metrics.mean_absolute_error(b, a, multioutput="raw_values"),
                "spearman": [stats.spearmanr(b[:, j], a[:, j]).statistic for j in range(2)],
            }
            for name, value in expected.items():
                np.testing.assert_allclose(getattr(scores, name)[s, f], value, rtol=0, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 10**6))
def test_spearman_with_ties(n, levels, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, levels, (n, 1)).astype(float)
    p = np.stack([rng.integers(0, levels, (n, 1)), rng.normal(size=(n, 1))])
    got = fold_scores(p, y, np.zeros(n, int)).spearman[:, 0, 0]
    for s in range(2):
        if np.ptp(y) == 0 or np.ptp(p[s]) == 0:
            assert np.isnan(got[s])
        else:
            assert got[s] == pytest.approx(
                stats.spearmanr(y[:, 0], p[s, :, 0]).statistic, abs=1e-12
            )


def test_by_hand():
    y = np.array([[0.0], [2.0], [4.0]])
    p = np.array([[[1.0], [2.0], [3.0]], [[4.0], [2.0], [0.0]]])
    scores = fold_scores(p, y, [0, 0, 0])
    np.testing.assert_allclose(scores.r2[:, 0, 0], [1 - 2 / 8, 1 - 32 / 8])
    np.testing.assert_allclose(scores.mae[:, 0, 0], [2 / 3, 8 / 3])
    np.testing.assert_allclose(scores.rmse[:, 0, 0], np.sqrt([2 / 3, 32 / 3]))
    np.testing.assert_allclose(scores.spearman[:, 0, 0], [1, -1])


@pytest.mark.parametrize("constant", [7.0, 0.1])
def test_a_constant_target_has_no_r2(constant):
    p, y, fold = problem()
    y[fold == 2, 1] = constant  # ten times 0.1 does not average to 0.1
    scores = fold_scores(p, y, fold)
    assert np.isnan(scores.r2[:, 2, 1]).all()
    assert np.isnan(scores.spearman[:, 2, 1]).all()
    assert np.isfinite(np.delete(scores.r2, 2, axis=1)).all()
    assert np.isfinite(scores.r2[:, 2, 0]).all()
    assert np.isfinite(scores.mae).all()


def test_predicted_places_that_do_not_exist():
    km = error_km([80.0, 0.0], [170.0, 0.0], [100.0, 0.0], [190.0, 360.0])
    np.testing.assert_allclose(km, [great_circle_km(80, 170, 90, 0), 0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, y, f: (p[:, 1:], y, f), "must agree and hold a sample"),
        (lambda p, y, f: (p[:, :0], y[:0], f[:0]), "must agree and hold a sample"),
        (lambda p, y, f: (p, y, f + 1), "each with at least one sample"),
        (lambda p, y, f: (p, y, f.astype(float)), "whole numbers 0 to F - 1"),
        (lambda p, y, f: (p, np.where(y == y[5, 1], np.nan, y), f), "target 1 of sample 5 is nan"),
        (
            lambda p, y, f: (np.where(p == p[2, 7, 1], np.inf, p), y, f),
            "site 2, sample 7, target 1 is not finite",
        ),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        fold_scores(*change(*problem()))
