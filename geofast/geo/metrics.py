"""Scores of held-out predictions, for all sites at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FoldScores:
    """Scores of S sites in F folds for k targets. A score that is not defined is nan.

    Attributes
    ----------
    r2 : ndarray [S, F, k]
        1 - SSE / SST with the mean of the fold's own targets, as scikit-learn's `r2_score` on the
        fold. nan where the target is constant in the fold.
    rmse, mae : ndarray [S, F, k]
        Root mean squared and mean absolute error, in the target's unit.
    spearman : ndarray [S, F, k]
        Rank correlation; ties get their average rank. nan where either side is constant.
    """

    r2: Array
    rmse: Array
    mae: Array
    spearman: Array


def fold_scores(p: ArrayLike, y: ArrayLike, fold: ArrayLike) -> FoldScores:
    """Score held-out predictions fold by fold.

    Parameters
    ----------
    p : array_like [S, N, k]
        Predictions of S sites; computed in float64.
    y : array_like [N, k]
        Targets.
    fold : array_like of int [N]
        Fold that tested each sample, 0 to F - 1, each at least once.

    Returns
    -------
    FoldScores

    Raises
    ------
    ValueError
        When shapes disagree, a fold is empty, or a value is not finite.
    """
    p, y = np.asarray(p, dtype=np.float64), np.asarray(y, dtype=np.float64)
    fold = np.asarray(fold)
    _check(p, y, fold)
    sites, _, k = p.shape
    folds = int(fold.max()) + 1
    r2, rmse, mae, spearman = (np.empty((sites, folds, k)) for _ in range(4))
    for f in range(folds):
        members = np.flatnonzero(fold == f)
        # Samples last and contiguous: every reduction and every sort runs along them.
        truth = np.ascontiguousarray(y[members].T)
        guess = np.ascontiguousarray(p[:, members].transpose(0, 2, 1))
        r2[:, f], rmse[:, f], mae[:, f] = _errors(guess, truth)
        spearman[:, f] = _spearman(guess, truth)
    return FoldScores(r2, rmse, mae, spearman)


def _check(p: Array, y: Array, fold: NDArray[np.generic]) -> None:
    if p.ndim != 3 or y.shape != p.shape[1:] or fold.shape != p.shape[1:2] or not fold.size:
        msg = (
            "predictions [S, N, k], targets [N, k] and folds [N] must agree and hold a sample, "
            f"got {p.shape}, {y.shape} and {fold.shape}."
        )
        raise ValueError(msg)
    if not np.issubdtype(fold.dtype, np.integer) or fold.min() < 0 or not np.bincount(fold).all():
        msg = "folds must be whole numbers 0 to F - 1, each with at least one sample."
        raise ValueError(msg)
    if not np.isfinite(y).all():
        row, column = np.argwhere(~np.isfinite(y))[0]
        msg = f"target {column} of sample {row} is {y[row, column]}; drop the sample."
        raise ValueError(msg)
    if not np.isfinite(p).all():
        site, row, column = np.argwhere(~np.isfinite(p))[0]
        msg = f"the prediction of site {site}, sample {row}, target {column} is not finite."
        raise ValueError(msg)


def _errors(guess: Array, truth: Array) -> tuple[Array, Array, Array]:
    """R2, RMSE and MAE [S, k] of one fold: guess [S, k, n] against truth [k, n]."""
    error = guess - truth
    mae = np.abs(error).mean(axis=-1)
    sse = np.einsum("skn,skn->sk", error, error)
    deviation = truth - truth.mean(axis=-1, keepdims=True)
    sst = np.einsum("kn,kn->k", deviation, deviation)
    # The rounded mean of a constant need not equal it, so sst may be a speck instead of 0.
    sst[truth.max(axis=-1) == truth.min(axis=-1)] = np.nan
    return 1 - sse / sst, np.sqrt(sse / truth.shape[-1]), mae


def _spearman(guess: Array, truth: Array) -> Array:
    """Spearman's rank correlation [S, k]: Pearson's of average ranks."""
    a, b = _centred_ranks(guess), _centred_ranks(truth)
    product = np.einsum("skn,kn->sk", a, b)
    norm = np.sqrt(np.einsum("skn,skn->sk", a, a) * np.einsum("kn,kn->k", b, b))
    norm[norm == 0] = np.nan
    correlation: Array = product / norm
    return correlation


def _centred_ranks(x: Array) -> Array:
    """Average ranks along the last axis, minus their mean."""
    n = x.shape[-1]
    order = np.argsort(x, axis=-1)
    ascending = np.take_along_axis(x, order, axis=-1)
    first = np.ones(x.shape, dtype=bool)  # opens a run of equal values
    np.not_equal(ascending[..., 1:], ascending[..., :-1], out=first[..., 1:])
    place = np.broadcast_to(np.arange(n, dtype=np.float64), x.shape)
    if not first.all():
        last = np.ones_like(first)
        last[..., :-1] = first[..., 1:]
        low = np.maximum.accumulate(np.where(first, place, 0), axis=-1)
        high = np.minimum.accumulate(np.where(last, place, n)[..., ::-1], axis=-1)[..., ::-1]
        place = (low + high) / 2
    ranks = np.empty_like(x)
    np.put_along_axis(ranks, order, place - (n - 1) / 2, axis=-1)
    return ranks
