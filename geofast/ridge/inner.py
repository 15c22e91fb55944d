"""Inner folds: every pair of folds left out of one training set, from statistics alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from .. import _ops
from .scores import scores_on
from .training import Training, subset, training_sets


def inner_folds(train: Training, alphas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Score every alpha on the inner folds of every training set.

    Returns the mean squared error, summed over targets, [M, A], and the mean R2 [M, A, k]. The
    training set without folds i and j serves twice: fold j inside i, and fold i inside j.
    """
    held = train.stats.held
    layers, folds, k = *held.shape[:2], train.yy.shape[1]
    mse = held.new_zeros(layers, folds, len(alphas))
    r2 = held.new_zeros(layers, folds, len(alphas), k)
    every = torch.arange(layers).repeat_interleave(len(alphas))
    for i, j, pair in _pairs(train):
        w = _solutions(pair, every, alphas.repeat(layers)).view(layers, len(alphas), k, -1)
        for outer, part in ((i, j), (j, i)):
            score, error = scores_on(held[:, part], pair, w)
            mse[:, outer] += error.sum(-1) / (folds - 1)
            r2[:, outer] += score / (folds - 1)
    return mse.flatten(0, 1), r2.flatten(0, 1)


def inner_at(train: Training, alpha: torch.Tensor) -> torch.Tensor:
    """Mean R2 of each training set on its inner folds at its own `alpha` [M]: [M, k]."""
    held = train.stats.held
    layers, folds, k = *held.shape[:2], train.yy.shape[1]
    own, r2 = alpha.view(layers, folds), held.new_zeros(layers, folds, k)
    for i, j, pair in _pairs(train):
        wanted = [(layer, float(own[layer, f])) for f in (i, j) for layer in range(layers)]
        once = sorted(set(wanted))
        sets, alphas = zip(*once, strict=True)
        w = _solutions(pair, torch.tensor(sets), torch.tensor(alphas, dtype=torch.float64))
        for outer, part, mine in ((i, j, wanted[:layers]), (j, i, wanted[layers:])):
            at = _ops.send(torch.tensor([once.index(one) for one in mine]), train.device)
            r2[:, outer] += scores_on(held[:, part], pair, w[at, None])[0][:, 0] / (folds - 1)
    return r2.flatten(0, 1)


def _pairs(train: Training) -> Iterator[tuple[int, int, Training]]:
    """The training sets that lack two folds, one of each layer."""
    held, k = train.stats.held, train.yy.shape[1]
    for i in range(held.shape[1]):
        for j in range(i):
            both = (held[:, i] + held[:, j])[:, None]
            yield i, j, training_sets(replace(train.stats, held=both), k)


def path(train: Training, alphas: torch.Tensor) -> torch.Tensor:
    """Solutions of the only training set at every alpha: [A, k, d]."""
    return _solutions(train, torch.zeros(len(alphas), dtype=torch.int64), alphas)


def _solutions(train: Training, sets: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """Solutions of training `sets` at `alphas`, by one float64 factor each: [len(sets), k, d]."""
    chosen = subset(train, sets)
    return chosen.factor(alphas, torch.float64).solve(chosen.b)
