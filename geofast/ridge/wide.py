"""Fewer rows than features: X X' instead of X'X."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _ops
from .scores import fold_r2, r2_score
from .solution import Solution, least, penalties
from .training import TrainingRows, refuse_constant


def solve_wide(rows: TrainingRows, alphas: Sequence[float], select: str, inner: bool) -> Solution:
    """Solve through X X' of each training part, in float64, for n < d."""
    x = rows.x.double()
    grid = _ops.send(penalties(alphas), x.device)
    paths = [_WidePath(x[who], rows.y[who]) for who in rows.training.T]
    inner_r2 = None
    if select == "folds":
        curve, table = _inner_folds(x, rows, grid.expand(rows.folds, -1))
        best = least(curve)
        inner_r2 = table[torch.arange(rows.folds, device=x.device), best] if inner else None
    else:
        best = torch.stack([least(path.criterion(grid, select)) for path in paths])
        if inner:
            inner_r2 = _inner_folds(x, rows, grid[best, None])[1][:, 0]
    alpha = grid[best]
    coef = torch.stack([path.coef(a) for path, a in zip(paths, alpha, strict=True)])
    means = [path.y_mean - path.mean @ w for path, w in zip(paths, coef, strict=True)]
    intercept = torch.stack(means)
    r2 = mse = held = None
    if int(rows.fold.min()) >= 0:
        everyone = torch.stack([x @ w + c for w, c in zip(coef, intercept, strict=True)], 1)
        held = everyone[torch.arange(len(x), device=x.device), rows.fold]
        r2, mse = fold_r2(held, rows.y, rows.fold, rows.folds)
    method = f"{select}; eigenvectors of X X' in float64 (fewer rows than features)"
    return Solution(alpha, coef, intercept, r2, mse, held, inner_r2, method).cpu()


class _Dual:
    """All alphas of one training part from the eigenvectors of its centred X X' [n, n]."""

    def __init__(self, kernel: torch.Tensor, y: torch.Tensor) -> None:
        refuse_constant((y == y[0]).all(0))
        self.y_mean = y.mean(0)
        values, self.vectors = torch.linalg.eigh(kernel)
        self.values = values.clamp_min(0)
        self.rotated = self.vectors.mT @ (y - self.y_mean)

    def at(self, alphas: torch.Tensor) -> torch.Tensor:
        """(X X' + alpha I)^-1 y at every alpha: [A, n, k]."""
        dual: torch.Tensor = self.vectors @ (
            self.rotated / (self.values + alphas[:, None])[..., None]
        )
        return dual


class _WidePath(_Dual):
    """The same with the rows [n, d] themselves."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.mean, self.n = x.mean(0), len(x)
        self.x = x - self.mean
        super().__init__(self.x @ self.x.mT, y)

    def coef(self, alpha: torch.Tensor) -> torch.Tensor:
        """Coefficients at one alpha: [d, k]."""
        return self.x.mT @ self.at(alpha[None])[0]

    def criterion(self, alphas: torch.Tensor, select: str) -> torch.Tensor:
        """GCV or mean squared leave-one-out error of every alpha: [A]."""
        error = alphas[:, None, None] * self.at(alphas)
        shrink = alphas[:, None] / (self.values + alphas[:, None])
        if select == "gcv":
            free = (shrink.sum(1) - 1.0).clamp_min(1e-9 * self.n)
            gcv: torch.Tensor = self.n * error.square().sum((1, 2)) / free.square()
            return gcv
        free = shrink @ self.vectors.square().mT - 1.0 / self.n
        loo: torch.Tensor = (error / free.clamp_min(1e-12)[..., None]).square().mean((1, 2))
        return loo


def _inner_folds(
    x: torch.Tensor, rows: TrainingRows, alphas: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `inner.inner_folds`, at the alphas [F, A] of each training part: [F, A] and [F, A, k]."""
    folds, kernel = rows.folds, inner_products(x)
    mse = x.new_zeros(alphas.shape)
    r2 = x.new_zeros(*alphas.shape, rows.y.shape[1])
    for i in range(folds):
        for j in range(i):
            train = (rows.fold != i) & (rows.fold != j)
            both = torch.cat([alphas[i], alphas[j]]).unique()
            parts = [rows.fold == j, rows.fold == i]
            scores = wide_scores(kernel, rows.y, train, parts, both)
            for outer, (score, error) in zip((i, j), scores, strict=True):
                at = torch.searchsorted(both, alphas[outer])
                mse[outer] += error[at].sum(-1) / (folds - 1)
                r2[outer] += score[at] / (folds - 1)
    return mse, r2


def inner_products(x: torch.Tensor) -> torch.Tensor:
    """X X' about the mean of all rows: [n, n]."""
    centred = x - x.mean(0)
    return centred @ centred.mT


def wide_scores(
    kernel: torch.Tensor,
    y: torch.Tensor,
    train: torch.Tensor,
    tests: list[torch.Tensor],
    alphas: torch.Tensor,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """R2 and MSE [A, k] on each of `tests` of fits to rows `train`, from X X' about any mean."""
    inside = kernel[train][:, train]
    mean = inside.mean(0)  # about the mean of the training rows, here and below
    dual = _Dual(inside - mean - mean[:, None] + mean.mean(), y[train])
    solved = dual.at(alphas)
    scores = []
    for test in tests:
        across, held = kernel[test][:, train], y[test]
        across = across - across.mean(1, keepdim=True) - mean + mean.mean()
        mse = (held - across @ solved - dual.y_mean).square().mean(1)
        scores.append((r2_score(mse, held.var(0, correction=0), held.square().mean(0)), mse))
    return scores
