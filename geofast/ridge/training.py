"""Training sets: statistics about their own means, their factors, and their rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .. import _ops
from ..gram import Totals

_SMALL = 256  # up to so many features, float64 and whole spectra cost no more than the quick way
_WIDE_ROWS = 1000  # up to here X X' takes a moment whatever the width


@dataclass(frozen=True)
class Training:
    """Statistics of M training sets about their own means, all float64."""

    stats: Totals
    sets: torch.Tensor  # int64 [M]: which part of stats.held each leaves out
    n: torch.Tensor  # [M]
    mean: torch.Tensor  # [M, d]
    y_mean: torch.Tensor  # [M, k]
    b: torch.Tensor  # [M, k, d]
    yy: torch.Tensor  # [M, k]

    @property
    def dim(self) -> int:
        return self.mean.shape[1]

    def factor(
        self, alpha: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Cholesky factors of A + alpha I, lower, [M, d, d]; raises NotPositiveError."""
        a = self.matrix(alpha, dtype, out)
        info = torch.zeros(len(a), dtype=torch.int32)
        _ops.backend(a.device).cholesky(a, info)
        if info.any():
            raise NotPositiveError
        return a

    def matrix(
        self, alpha: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A + alpha I, lower triangles, [M, d, d]."""
        total, held, d = self.stats.total, self.stats.held, self.dim
        a = _ops.empty(len(alpha), d, d, dtype=dtype) if out is None else out
        _ops.backend(total.device).training_matrix(total, held, self.sets, alpha, a)
        return a


class NotPositiveError(Exception):
    """A + alpha I is not positive definite in the precision at hand."""


def is_small(dim: int) -> bool:
    """Whether so few features are best solved in float64 and by eigenvectors."""
    return dim <= _SMALL


def training_sets(stats: Totals, k: int) -> Training:
    d = stats.total.shape[0] - 1 - k
    # The row of the ones and the rows of the targets are whole in the lower triangle.
    part = stats.total[d:] - stats.held[:, d:]
    n, sums = part[:, 0, d], part[:, 0, :d]
    y_sums = part[:, 1:, d]
    mean, y_mean = sums / n[:, None], y_sums / n[:, None]
    b = part[:, 1:, :d] - y_sums[..., None] * mean[:, None]
    yy = part[:, 1:, d + 1 :].diagonal(dim1=1, dim2=2) - y_sums * y_mean
    if bool((n < 2).any()):
        raise ValueError("a training part has fewer than two rows; use fewer folds or more samples")
    constant = yy <= 1e-14 * (
        part[:, 1:, d + 1 :].diagonal(dim1=1, dim2=2) + n[:, None] * stats.shift[d:] ** 2
    )
    refuse_constant(constant.any(0))
    return Training(stats, torch.arange(len(n)), n, mean, y_mean, b, yy)


def refuse_constant(constant: torch.Tensor) -> None:
    if bool(constant.any()):
        msg = (
            f"target {int(constant.nonzero()[0])} is constant over a training part: there is "
            "nothing to regress; leave it out"
        )
        raise ValueError(msg)


def subset(train: Training, sets: torch.Tensor | slice) -> Training:
    fields = {f: getattr(train, f)[sets] for f in ("sets", "n", "mean", "y_mean", "b", "yy")}
    return replace(train, **fields)


@dataclass(frozen=True)
class TrainingRows:
    """The rows themselves: float64 residuals, leave-one-out and held-out predictions."""

    x: torch.Tensor
    y: torch.Tensor
    fold: torch.Tensor
    folds: int

    @property
    def training(self) -> torch.Tensor:
        """Bool [n, F]: who trains for which fold."""
        return self.fold[:, None] != torch.arange(self.folds)

    @property
    def are_wide(self) -> bool:
        """Whether X X' is the cheaper way: its eigenvectors cost as much as 40 factors of X'X."""
        n, d = int(self.training.sum(0).min()), self.x.shape[1]
        return n < d and (n <= _WIDE_ROWS or 3 * n < d)


def apply_inverse(factor: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(L L')^-1 b for `factor` [M, d, d] and `b` [M, k, d]: float64 [M, k, d]."""
    ops = _ops.backend(factor.device)
    w = b.to(factor.dtype, copy=True, memory_format=torch.contiguous_format)
    ops.solve_lower(factor, w, False)
    ops.solve_lower(factor, w, True)
    return w.double()
