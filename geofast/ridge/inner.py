"""Inner folds: every pair of folds left out of one training set, from statistics alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from .scores import scores_on
from .training import Training, apply_inverse, training_sets


def inner_folds(train: Training, alphas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Score every alpha on the inner folds of every training set.

    Returns the mean squared error, summed over targets, [F, A], and the mean R2 [F, A, k]. The
    training set without folds i and j serves twice: fold j inside i, and fold i inside j.
    """
    held = train.stats.held
    folds, k = len(held), train.yy.shape[1]
    mse = torch.zeros(folds, len(alphas), dtype=torch.float64)
    r2 = torch.zeros(folds, len(alphas), k, dtype=torch.float64)
    for i in range(folds):
        for j in range(i):
            pair = training_sets(replace(train.stats, held=(held[i] + held[j])[None]), k)
            w = path(pair, alphas)
            for outer, part in ((i, j), (j, i)):
                score, error = scores_on(held[part], pair, w)
                mse[outer] += error.sum(-1) / (folds - 1)
                r2[outer] += score / (folds - 1)
    return mse, r2


def inner_at(train: Training, alpha: torch.Tensor) -> torch.Tensor:
    """Mean R2 of each training set on its inner folds at its own alpha: [F, k]."""
    held = train.stats.held
    folds, k = len(held), train.yy.shape[1]
    r2 = torch.zeros(folds, k, dtype=torch.float64)
    for i in range(folds):
        for j in range(i):
            pair = training_sets(replace(train.stats, held=(held[i] + held[j])[None]), k)
            both = alpha[[i, j]].unique()
            w = path(pair, both)
            for outer, part in ((i, j), (j, i)):
                at = int((both == alpha[outer]).nonzero()[0])
                r2[outer] += scores_on(held[part], pair, w)[0][at] / (folds - 1)
    return r2


def path(train: Training, alphas: torch.Tensor) -> torch.Tensor:
    """Solutions of one training set at every alpha, by one float64 factor each: [A, k, d]."""
    factor = replace(train, sets=train.sets.expand(len(alphas)).contiguous()).factor(
        alphas, torch.float64
    )
    return apply_inverse(factor, train.b.expand(len(alphas), -1, -1))
