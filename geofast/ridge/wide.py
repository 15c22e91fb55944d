"""Fewer rows than features: X X' instead of X'X, for the training parts of many layers at once.

With K = X X' about the mean of the training rows, u = (K + alpha I)^-1 (y - mean) are the dual
coefficients: the solution is w = X'u, the training errors are alpha u, and the leave-one-out errors
are u_i over what (K + alpha I)^-1_ii has beside the direction of ones. A single penalty takes a
Cholesky factor. A whole grid of them takes the CPU less time by eigenvectors; a GPU is quicker at
as many factors.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property

import torch

from .. import _ops
from .factor import Factor
from .scores import fold_r2, r2_score
from .solution import Solution, least, penalties
from .training import TrainingRows, refuse_constant

_TINY = torch.finfo(torch.float64).tiny


def solve_wide(
    rows: TrainingRows, alphas: Sequence[float], select: str, inner: bool
) -> list[Solution]:
    """Solve every layer of `rows`, whose x is [L, n, d], in float64, for n < d."""
    layers, folds = len(rows.x), rows.folds
    grid = _ops.send(penalties(alphas), rows.x.device)
    shift, kernel = inner_products(rows.x)
    parts = _Parts(kernel, rows.y, rows.training.T)
    inner_r2 = None
    if select == "folds":
        curve, table = _inner_folds(kernel, rows, grid.expand(layers, folds, -1))
        best = least(curve)
        inner_r2 = table.take_along_dim(best[..., None, None], 2)[:, :, 0] if inner else None
        dual = parts.dual(grid[best])
    else:
        best, dual = parts.least(grid, select)
        inner_r2 = _inner_folds(kernel, rows, grid[best][..., None])[1][:, :, 0] if inner else None
    coef = _coefficients(rows.x, shift, dual)
    intercept = parts.y_mean - parts.offset(dual) - (coef @ shift[:, None, :, None])[..., 0]
    r2 = mse = held = None
    if int(rows.fold.min()) >= 0:
        held, r2, mse = _held_out(parts.predict(dual), rows)
    way = "eigenvectors" if parts.by_spectrum else "Cholesky"
    method = f"{select}; {way} of X X' in float64 (fewer rows than features)"
    scored = [[None] * layers if t is None else [*t] for t in (r2, mse, held, inner_r2)]
    each = zip(grid[best], coef.mT, intercept, *scored, [method] * layers, strict=True)
    return [Solution(*one).cpu() for one in each]


def inner_products(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean rows [L, d] of x [L, n, d], and X X' about them [L, n, n], float64."""
    mean = x.mean(1, keepdim=True, dtype=torch.float64)
    centred = x - mean
    return mean[:, 0], centred @ centred.mT


def wide_fold_errors(rows: TrainingRows, alphas: torch.Tensor) -> torch.Tensor:
    """Held-out squared error of every fold and alpha, mean over targets: [L, F, A]."""
    _, kernel = inner_products(rows.x)
    parts = _Parts(kernel, rows.y, rows.training.T)
    each = [a.expand(len(kernel), rows.folds) for a in _ops.send(alphas, kernel.device)]
    fits = [parts.predict(parts.dual(alpha)) for alpha in each]
    return torch.stack([_held_out(fit, rows)[2].mean(-1) for fit in fits], -1)


class _Parts:
    """S training parts of L layers, from X X' [L, n, n] about any mean.

    Parts may differ in size: each is t by t, as many as the largest has, with zeros at the end.

    Parameters
    ----------
    kernel
        float64 [L, n, n].
    y
        float64 [n, k].
    who
        bool [S, n]: the rows of each part.
    """

    def __init__(self, kernel: torch.Tensor, y: torch.Tensor, who: torch.Tensor) -> None:
        top, low = (y.masked_fill(~who[..., None], end) for end in (-torch.inf, torch.inf))
        refuse_constant((top.amax(1) == low.amin(1)).any(0))
        self.kernel, self.by_spectrum = kernel, False
        weight = who.to(torch.float64)
        self.n = weight.sum(1)  # [S]
        most = int(self.n.max())
        self.order = (~who).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]  # [S, t]
        self.there = weight.gather(1, self.order)  # [S, t]: 1 where a part has a row
        self.y_mean = weight @ y / self.n[:, None]  # [S, k]
        self.target = (y[self.order] - self.y_mean[:, None]) * self.there[..., None]  # [S, t, k]
        self.mean = weight @ kernel / self.n[:, None]  # [L, S, n]: of the products with its rows
        square = (self.mean * weight).sum(-1)  # [L, S]: n times the mean row, squared
        # The mean eigenvalue of the centred products: [L, S].
        self.level = (kernel.diagonal(dim1=1, dim2=2) @ weight.mT - square) / self.n
        self._square = square
        self._about = self.mean.gather(2, self.order.expand(len(kernel), -1, -1))

    @cached_property
    def centred(self) -> torch.Tensor:
        """X X' of each part about its own mean: [L, S, t, t].

        In the direction of ones, which centred products and targets lack, it has `level`: left at
        0, it would weigh 1 / alpha in the inverse, and hide the rest.
        """
        inside = self.kernel[:, self.order[:, :, None], self.order[:, None]]
        inside -= self._about[..., None]
        inside -= (self._about - ((self._square + self.level) / self.n)[..., None])[..., None, :]
        return inside.mul_(self.there[..., None]).mul_(self.there[:, None])

    def least(self, alphas: torch.Tensor, select: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Index of the best of `alphas` [A] for each part [L, S], and the dual coefficients there.

        By `gcv` or exact leave-one-out error (`loo`).
        """
        self.by_spectrum = self.kernel.is_cpu
        curve, dual = [], []
        for alpha in alphas:
            u, diagonal = self._solved(alpha.expand(self.centred.shape[:2]), diagonal=True)
            curve.append(self._criterion(alpha, u, diagonal, select))
            dual.append(u)
        best = least(torch.stack(curve, -1))
        chosen = torch.stack(dual, -1).take_along_dim(best[..., None, None, None], -1)[..., 0]
        return best, self._of_all_rows(chosen)

    def dual(self, alpha: torch.Tensor) -> torch.Tensor:
        """Dual coefficients at `alpha` [L, S], 0 for rows of no part: [L, S, k, n]."""
        return self._of_all_rows(self._solved(alpha)[0])

    def offset(self, dual: torch.Tensor) -> torch.Tensor:
        """What the mean row of each part is fitted, about the mean of X X': [L, S, k]."""
        return (dual @ self.mean[..., None])[..., 0]

    def predict(self, dual: torch.Tensor) -> torch.Tensor:
        """Predictions for all rows: [L, n, S, k]."""
        fitted = (dual.flatten(1, 2) @ self.kernel).view_as(dual)  # [L, S, k, n]
        return (fitted + (self.y_mean - self.offset(dual))[..., None]).permute(0, 3, 1, 2)

    def _of_all_rows(self, u: torch.Tensor) -> torch.Tensor:
        found = u.new_zeros(*u.shape[:3], self.kernel.shape[-1])
        return found.scatter_(3, self.order[:, None].expand_as(u), u)

    def _solved(
        self, alpha: torch.Tensor, *, diagonal: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(K + alpha I)^-1 y [L, S, k, t] and, if asked for, the diagonal of the inverse."""
        target = self.target.mT.expand(len(alpha), -1, -1, -1)
        if not self.by_spectrum:
            a = self.centred.clone(memory_format=torch.contiguous_format)
            a.diagonal(dim1=2, dim2=3).add_(alpha[..., None])
            factor, info = Factor.of(a.flatten(0, 1))
            if not info.any():
                u = factor.solve(target.flatten(0, 1)).view_as(target)
                found = factor.inverse_diagonal() if diagonal else u.new_empty(0)
                return self._balanced(u), found.view(*alpha.shape, -1)
            self.by_spectrum = True  # too badly scaled for a factor, at the penalties to come too
        values, vectors = self._spectrum
        inverse = 1.0 / (values + alpha[..., None])
        u = (target @ vectors * inverse[:, :, None]) @ vectors.mT
        return self._balanced(u), (vectors.square() @ inverse[..., None])[..., 0]

    def _balanced(self, u: torch.Tensor) -> torch.Tensor:
        """Dual coefficients add up to 0: what rounding leaves, a row far out would multiply."""
        return u - (u.sum(-1) / self.n[:, None])[..., None] * self.there[:, None]

    @cached_property
    def _spectrum(self) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = torch.linalg.eigh(self.centred)
        return values.clamp_min(0), vectors

    def _criterion(
        self, alpha: torch.Tensor, u: torch.Tensor, diagonal: torch.Tensor, select: str
    ) -> torch.Tensor:
        """GCV or mean squared leave-one-out error of each part: [L, S]."""
        error, free = alpha * u, alpha * diagonal * self.there
        ones = alpha / (self.level + alpha)  # what the direction of ones has of `free`
        if select == "gcv":
            left = (free.sum(-1) - ones).clamp_min(_TINY)
            gcv: torch.Tensor = self.n * error.square().sum((2, 3)) / left.square()
            return gcv
        # Where a part has no row, the error is 0 and anything else may be.
        left = (free - (ones / self.n)[..., None]).clamp_min(_TINY)
        loo: torch.Tensor = (error / left[:, :, None]).square().mean(2).sum(-1) / self.n
        return loo


def _coefficients(x: torch.Tensor, shift: torch.Tensor, dual: torch.Tensor) -> torch.Tensor:
    """Sums of rows by their dual coefficients [L, S, k, n], which add up to 0: [L, S, k, d]."""
    layers, sets, k, n = dual.shape
    out = dual.new_empty(layers, sets * k, x.shape[2])
    weights = dual.view(layers, -1, n).mT.contiguous()
    ops = _ops.backend(x.device)
    if x.is_cpu:
        for i in range(layers):
            ops.project_t(x[i], shift[i], weights[i], out[i])
    else:
        ops.project_t(x, shift, weights, out)
    return out.view(layers, sets, k, -1)


def _held_out(
    everyone: torch.Tensor, rows: TrainingRows
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Held-out predictions [L, n, k], R2 and MSE [L, F, k], from predictions [L, n, F, k]."""
    layers, n = everyone.shape[:2]
    held = everyone[:, torch.arange(n, device=everyone.device), rows.fold]
    both = fold_r2(held.transpose(0, 1).flatten(1), rows.y.repeat(1, layers), rows.fold, rows.folds)
    r2, mse = (one.view(rows.folds, layers, -1).transpose(0, 1) for one in both)
    return held, r2, mse


def _inner_folds(
    kernel: torch.Tensor, rows: TrainingRows, alphas: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `inner.inner_folds`, at `alphas` [L, F, A] of each part: [L, F, A] and [L, F, A, k]."""
    folds, k = rows.folds, rows.y.shape[1]
    mse, r2 = torch.zeros_like(alphas), alphas.new_zeros(*alphas.shape, k)
    for i, j in itertools.combinations(range(folds), 2):
        part = _Parts(kernel, rows.y, ((rows.fold != i) & (rows.fold != j))[None])
        # Mostly both outer folds have the same penalties, and then one factor serves both.
        once, at = torch.cat([alphas[:, i], alphas[:, j]], 1).unique(dim=1, return_inverse=True)
        fits = [part.predict(part.dual(alpha[:, None]))[:, :, 0] for alpha in once.unbind(1)]
        for outer, test, mine in zip((i, j), (j, i), at.view(2, -1), strict=True):
            scores = [_scores(fit, rows.y, rows.fold == test) for fit in fits]
            score, error = (torch.stack(one, 1)[:, mine] for one in zip(*scores, strict=True))
            mse[:, outer] += error.sum(-1) / (folds - 1)
            r2[:, outer] += score / (folds - 1)
    return mse, r2


def _scores(
    predicted: torch.Tensor, y: torch.Tensor, test: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """R2 and MSE [L, k] of predictions [L, n, k] on the rows of `test`."""
    held = y[test]
    mse = (held - predicted[:, test]).square().mean(1)
    return r2_score(mse, held.var(0, correction=0), held.square().mean(0)), mse
