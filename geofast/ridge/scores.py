"""Held-out R2 and mean squared error, from rows or from statistics."""

from __future__ import annotations

import torch

from .refine import predict
from .training import Training, TrainingRows, subset


def score_rows(
    train: Training, rows: TrainingRows, projected: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Held-out predictions [n, k], R2 and MSE [F, k]."""
    everyone = predict(train, rows, projected, rows.training)
    held = everyone[torch.arange(len(rows.x)), rows.fold]
    r2, mse = fold_r2(held, rows.y, rows.fold, rows.folds)
    return held, r2, mse


def fold_r2(
    predicted: torch.Tensor, y: torch.Tensor, fold: torch.Tensor, folds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """R2 and mean squared error of held-out predictions: [F, k] each, from [n, k]."""
    member = torch.nn.functional.one_hot(fold, folds).to(torch.float64)
    n = member.sum(0)[:, None]
    mean = member.mT @ y / n
    sse = member.mT @ (y - predicted).square()
    sst = member.mT @ (y - mean[fold]).square()
    return r2_score(sse, sst, member.mT @ y.square()), sse / n


def r2_score(sse: torch.Tensor, sst: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """R2 from sums of squares: of errors, about the mean, and of the targets themselves.

    NaN where a target is constant: there `sst` is a rounding error of `squares`.
    """
    return torch.where(sst > 1e-14 * squares, 1.0 - sse / sst, torch.nan)


def score_held_out(train: Training, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """R2 and MSE of each training set on its own held-out part: [F, k] each."""
    scores = [
        scores_on(h, subset(train, slice(i, i + 1)), w[i : i + 1])
        for i, h in enumerate(train.stats.held)
    ]
    return torch.cat([s[0] for s in scores]), torch.cat([s[1] for s in scores])


def scores_on(
    held: torch.Tensor, train: Training, w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """R2 and MSE [A, k] of solutions w [A, k, d] of one training set, on statistics `held` [p, p].

    The error of target t is v'[x, 1, y] with v = (-w, w m - y_mean, 1 at t): its sum of squares is
    the quadratic form v' H v of the held-out Gram.
    """
    a, k, d = w.shape
    v = torch.zeros(a, k, d + 1 + k, dtype=torch.float64)
    v[..., :d] = -w
    v[..., d] = w @ train.mean[0] - train.y_mean[0]
    v[:, range(k), range(d + 1, d + 1 + k)] = 1.0
    sse = 2.0 * ((v @ held) * v).sum(-1) - (v.square() @ held.diagonal())
    n = held[d, d]
    squares = held.diagonal()[d + 1 :]
    sst = squares - held[d + 1 :, d].square() / n
    return r2_score(sse, sst, squares), sse / n
