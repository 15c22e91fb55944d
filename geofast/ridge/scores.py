"""Held-out R2 and mean squared error, from rows or from statistics."""

from __future__ import annotations

import torch

from .refine import predict
from .training import Training, TrainingRows


def score_rows(
    train: Training, rows: TrainingRows, projected: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Held-out predictions [n, L, k] of every layer, R2 and MSE [M, k]."""
    n, k = rows.y.shape
    everyone = predict(train, rows, projected, rows.training_of(train.sets))
    everyone = everyone.view(n, -1, rows.folds, k).transpose(1, 2)
    held = everyone[torch.arange(n, device=rows.fold.device), rows.fold]
    layers = held.shape[1]
    both = fold_r2(held.flatten(1), rows.y.repeat(1, layers), rows.fold, rows.folds)
    r2, mse = (one.view(-1, layers, k).transpose(0, 1).flatten(0, 1) for one in both)
    return held, r2, mse


def fold_r2(
    predicted: torch.Tensor, y: torch.Tensor, fold: torch.Tensor, folds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """R2 and mean squared error of held-out predictions: [F, k] each, from [n, k]."""
    member = (fold[:, None] == torch.arange(folds, device=fold.device)).to(torch.float64)
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
    """R2 and MSE [M, k] of each training set on its own held-out part."""
    r2, mse = scores_on(train.stats.held.flatten(0, 1), train, w[:, None])
    return r2[:, 0], mse[:, 0]


def scores_on(
    held: torch.Tensor, train: Training, w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """R2 and MSE [M, A, k] of solutions w [M, A, k, d] on statistics `held` [M, p, p].

    The error of target t is v'[x, 1, y] with v = (-w, w m - y_mean, 1 at t): its sum of squares is
    the quadratic form v' H v of the held-out Gram.
    """
    m, a, k, d = w.shape
    v = w.new_zeros(m, a, k, d + 1 + k)
    v[..., :d] = -w
    v[..., d] = (w @ train.mean[:, None, :, None])[..., 0] - train.y_mean[:, None]
    v[..., d + 1 :].diagonal(dim1=2, dim2=3).fill_(1.0)
    v = v.view(m, a * k, -1)
    diagonal = held.diagonal(dim1=1, dim2=2)
    sse = 2.0 * ((v @ held) * v).sum(-1) - (v.square() @ diagonal[..., None])[..., 0]
    n = held[:, d, d, None, None]
    squares = diagonal[:, None, d + 1 :]
    sst = squares - held[:, None, d + 1 :, d].square() / n
    sse = sse.view(m, a, k)
    return r2_score(sse, sst, squares), sse / n
