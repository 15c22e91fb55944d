"""Intervals and tests for what is measured of the same pairs under several arms.

Pairs that share a source or a target are not independent: where a source serves in several pairs,
intervals over pairs are somewhat too narrow.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

_EXACT = 14  # pairs: all 2^14 signs are fewer than the draws
_AT_ONCE = 1 << 22  # signs in memory


def bootstrap_means(
    values: ArrayLike,
    *,
    rates: ArrayLike = False,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Percentile bootstrap intervals of column means; rows are drawn whole.

    Values that all agree give every draw the same mean, which says nothing of how sure it is. Of
    a rate the exact ends are taken then; a number of which there is one value has no interval.

    Parameters
    ----------
    values
        [n, m]; a missing value is nan, and is left out of the means of its column.
    rates
        bool [m], or one for all: columns of true (1) and false (0).
    draws
        How often n rows are drawn with replacement.
    level
        Share of the draws that lies between the ends.
    seed
        Of the draws.

    Returns
    -------
    low, high : ndarray, float64 [m]
        The (1 - level) / 2 and (1 + level) / 2 quantiles of the means, linearly interpolated; nan
        for a column without a value, or with one that is no rate. Of a rate of 0 of n: 0 and
        1 - ((1 - level) / 2)^(1 / n), beyond which 0 of n is less likely than (1 - level) / 2; of
        n of n its mirror image.

    Raises
    ------
    ValueError
        When `values` are not [n, m] with n above 0.

    References
    ----------
    Efron, Bootstrap methods: another look at the jackknife, Annals of Statistics 7 (1979); the
    percentile interval is that of Efron and Tibshirani, An Introduction to the Bootstrap (1993),
    section 13.3. The exact ends are those of Clopper and Pearson, The use of confidence or fiducial
    limits illustrated in the case of the binomial, Biometrika 26 (1934).
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 2 or not len(x):
        raise ValueError(f"values must be [n, m] with rows; got {list(x.shape)}")
    there = ~np.isnan(x)
    # How often each row was drawn: two products of matrices give the means of every draw.
    times = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), draws)
    times = times.astype(np.float64)
    with np.errstate(invalid="ignore"):
        means = (times @ np.where(there, x, 0.0)) / (times @ there.astype(np.float64))
    counts, tail = there.sum(0), (1 - level) / 2
    rate = np.broadcast_to(np.asarray(rates, dtype=bool), x.shape[1])
    low, high = np.full((2, x.shape[1]), np.nan)
    for column in np.flatnonzero(rate | (counts > 1)):
        seen = x[there[:, column], column]
        if rate[column] and len(seen) and (seen == seen[0]).all():
            end = tail ** (1 / len(seen))
            low[column], high[column] = (end, 1.0) if seen[0] else (0.0, 1 - end)
        elif len(seen):
            # A draw may hold none of the few values that there are.
            low[column], high[column] = np.nanquantile(means[:, column], [tail, 1 - tail])
    return low, high


def mcnemar(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided exact p-value that two treatments of the same cases succeed equally often.

    Parameters
    ----------
    a, b
        bool [n]: whether each case succeeded.

    Returns
    -------
    float
        Of the cases that succeeded once, n = n10 + n01, a number as far from n / 2 as n10 or
        farther under a fair coin: min(1, 2 P(K <= min(n10, n01))), K ~ Binomial(n, 1/2); 1 where
        there is none.

    Raises
    ------
    ValueError
        When they are not of one length.

    References
    ----------
    McNemar, Note on the sampling error of the difference between correlated proportions,
    Psychometrika 12 (1947); the exact form is the sign test of the cases that differ.
    """
    first, second = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"a and b must be [n]; got {list(first.shape)} and {list(second.shape)}")
    n10, n01 = int((first & ~second).sum()), int((second & ~first).sum())
    n = n10 + n01
    below = sum(math.comb(n, k) for k in range(min(n10, n01) + 1))
    p: float = 2 * below / 2**n
    return min(1.0, p)


def sign_flip(differences: ArrayLike, *, draws: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value that paired differences are symmetric about 0, by flipping their signs.

    Parameters
    ----------
    differences
        [n], of the same pairs under two treatments; none missing.
    draws
        Random signs, where n is above 14; below, all 2^n signs are tried.
    seed
        Of the random signs.

    Returns
    -------
    float
        The share of signs under which the mean difference is as far from 0 as it is, or farther;
        of m draws (1 + as far) / (1 + m), which counts the signs that there are as one of them.
        nan for no difference.

    Raises
    ------
    ValueError
        When `differences` are not [n] or one is missing.

    References
    ----------
    Fisher, The Design of Experiments (1935), section 21; Phipson and Smyth, Permutation p-values
    should never be zero, Statistical Applications in Genetics and Molecular Biology 9 (2010).
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or not np.isfinite(d).all():
        raise ValueError(f"differences must be finite [n]; got {list(d.shape)}")
    if not len(d):
        return math.nan
    # Sums that are equal on paper differ by rounding.
    least = abs(d.sum()) - 1e-12 * np.abs(d).sum()
    if len(d) <= _EXACT:
        bits = (np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1
        return float((np.abs((1 - 2 * bits) @ d) >= least).mean())
    random, far, left = np.random.default_rng(seed), 0, draws
    while left:
        some = min(left, max(1, _AT_ONCE // len(d)))
        signs = 1.0 - 2.0 * random.integers(0, 2, (some, len(d)))
        far += int((np.abs(signs @ d) >= least).sum())
        left -= some
    return (1 + far) / (1 + draws)
