"""Fewer rows than features: X X' instead of X'X."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .scores import fold_r2, r2_score
from .solution import Solution, penalties
from .training import TrainingRows, refuse_constant


def solve_wide(rows: TrainingRows, alphas: Sequence[float], select: str, inner: bool) -> Solution:
    """Solve through X X' of each training part, in float64, for n < d."""
    grid = penalties(alphas)
    x = rows.x.double()
    alpha, coef, intercept, inner_r2 = [], [], [], []
    for f in range(rows.folds):
        who = rows.training[:, f]
        if select == "folds" or inner:
            curve, table = _wide_inner(x, rows, f, grid)
        path = _WidePath(x[who], rows.y[who])
        best = int((curve if select == "folds" else path.criterion(grid, select)).argmin())
        w = path.coef(grid[best : best + 1])[0]
        alpha.append(grid[best])
        coef.append(w)
        intercept.append(path.y_mean - path.mean @ w)
        if inner:
            inner_r2.append(table[best])
    found = torch.stack(coef)
    r2 = mse = held = None
    if int(rows.fold.min()) >= 0:
        everyone = torch.stack([x @ w + c for w, c in zip(coef, intercept, strict=True)], 1)
        held = everyone[torch.arange(len(x)), rows.fold]
        r2, mse = fold_r2(held, rows.y, rows.fold, rows.folds)
    method = f"{select}; eigenvectors of X X' in float64 (fewer rows than features)"
    stacked = torch.stack(inner_r2) if inner else None
    return Solution(
        torch.stack(alpha), found, torch.stack(intercept), r2, mse, held, stacked, method
    )


class _WidePath:
    """All alphas of one training part from the eigenvectors of its centred X X'."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.mean, self.y_mean = x.mean(0), y.mean(0)
        refuse_constant((y == y[0]).all(0))
        self.x, self.n = x - self.mean, len(x)
        values, self.vectors = torch.linalg.eigh(self.x @ self.x.mT)
        self.values = values.clamp_min(0)
        self.rotated = self.vectors.mT @ (y - self.y_mean)

    def _dual(self, alphas: torch.Tensor) -> torch.Tensor:
        dual: torch.Tensor = self.vectors @ (
            self.rotated / (self.values + alphas[:, None])[..., None]
        )
        return dual

    def coef(self, alphas: torch.Tensor) -> torch.Tensor:
        """Coefficients at every alpha: [A, d, k]."""
        return self.x.mT @ self._dual(alphas)

    def criterion(self, alphas: torch.Tensor, select: str) -> torch.Tensor:
        """GCV or mean squared leave-one-out error of every alpha: [A]."""
        error = alphas[:, None, None] * self._dual(alphas)
        shrink = alphas[:, None] / (self.values + alphas[:, None])
        if select == "gcv":
            free = (shrink.sum(1) - 1.0).clamp_min(1e-9 * self.n)
            gcv: torch.Tensor = self.n * error.square().sum((1, 2)) / free.square()
            return gcv
        free = shrink @ self.vectors.square().mT - 1.0 / self.n
        loo: torch.Tensor = (error / free.clamp_min(1e-12)[..., None]).square().mean((1, 2))
        return loo


def _wide_inner(
    x: torch.Tensor, rows: TrainingRows, f: int, alphas: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `inner_folds`, for one training part: [A] and [A, k]."""
    scores = [
        wide_scores(x, rows, (rows.fold != f) & (rows.fold != j), rows.fold == j, alphas)
        for j in range(rows.folds)
        if j != f
    ]
    r2, mse = (torch.stack(s).mean(0) for s in zip(*scores, strict=True))
    return mse.sum(-1), r2


def wide_scores(
    x: torch.Tensor,
    rows: TrainingRows,
    train: torch.Tensor,
    test: torch.Tensor,
    alphas: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """R2 and MSE [A, k] on rows `test` of fits to rows `train`."""
    path = _WidePath(x[train], rows.y[train])
    predicted = (x[test] - path.mean) @ path.coef(alphas) + path.y_mean
    y = rows.y[test]
    mse = (y - predicted).square().mean(1)
    return r2_score(mse, y.var(0, correction=0), y.square().mean(0)), mse
