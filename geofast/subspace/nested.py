"""Ridge refits on nested sets of dimensions, from one Cholesky factor of each order.

With the dimensions in an order, the leading p x p block of the factor L of the permuted A + alpha I
is the factor of the first p of them, and the first p entries of z = L^-1 b are theirs too. So the
solution on the first p is L^-T applied to z with zeros after p: one triangular solve serves all p.
"""

from __future__ import annotations

import numpy as np
import torch

from ..ridge.factor import Factor
from ..ridge.solution import least
from ..ridge.training import NotPositiveError, Training


def symmetric(train: Training, alpha: torch.Tensor) -> torch.Tensor:
    """A + alpha I of every training set, whole: float64 [M, d, d] for `alpha` [M]."""
    lower = train.matrix(alpha, torch.float64).tril_()
    return lower + lower.tril(-1).mT


def refits(
    matrix: torch.Tensor, b: torch.Tensor, order: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor:
    """Solve on the first `sizes` dimensions of an order: float64 [M, P, k, d], zero elsewhere.

    Parameters
    ----------
    matrix
        float64 [M, d, d], symmetric, with alpha on its diagonal.
    b
        float64 [M, k, d].
    order
        int64 [M, k, d], best dimension first, or [M, 1, d] for all targets.
    sizes
        int64 [P].

    Raises
    ------
    NotPositiveError
        When a matrix is not positive definite in float64.
    """
    m, k, d = b.shape
    factor, z = _nested(matrix, b, order)
    keep = torch.arange(d) < sizes[:, None]
    w = (z[:, :, None] * keep).flatten(1, 2)
    factor.solve_lower(w, True)
    return _in_place(w.view(m, k, len(sizes), d), order)


def refits_by_gcv(
    train: Training, alphas: torch.Tensor, order: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor:
    """As `refits` with one order [M, 1, d] for all targets, and an alpha for each size and target.

    The alpha of every size and target is that of least generalised cross-validation error; every
    alpha takes one factor and its inverse.
    """
    keep = torch.arange(train.dim) < sizes[:, None]
    ordered = train.b.gather(2, order.expand_as(train.b))
    lowest, best = torch.tensor(torch.inf, dtype=torch.float64), train.b.new_zeros(())
    for alpha in alphas:
        factor, z = _nested(symmetric(train, alpha.repeat(len(train))), train.b, order)
        w = (z[:, :, None] * keep).flatten(1, 2)
        factor.solve_lower(w, True)
        w = w.view(*z.shape[:2], len(sizes), -1)  # [M, k, P, d]
        rss = train.yy[..., None] - torch.einsum("mkpd,mkd->mkp", w, ordered)
        rss -= alpha * w.square().sum(-1)
        eye = torch.eye(train.dim, dtype=torch.float64)
        inverse = torch.linalg.solve_triangular(factor.lower.tril(), eye, upper=False)
        trace = inverse.square().sum(2).cumsum(1)[:, sizes - 1]
        free = train.n[:, None] - 1.0 - (sizes - alpha * trace)
        error = (rss / free.clamp_min(1e-9 * train.n[:, None])[:, None].square()).clamp_min(0)
        # Ascending alphas: of equal ones the first, as the solver has it.
        better = least(torch.stack([lowest.expand_as(error), error], -1)) == 1
        lowest = torch.where(better, error, lowest)
        best = torch.where(better[..., None], w, best)
    return _in_place(best, order)


def _nested(
    matrix: torch.Tensor, b: torch.Tensor, order: torch.Tensor
) -> tuple[Factor, torch.Tensor]:
    """Factors of M g permuted matrices, and z [M g, k / g, d], for `order` [M, g, d]."""
    (m, k, d), groups = b.shape, order.shape[1]
    permuted = matrix.new_empty(m * groups, d, d)
    for i, one in enumerate(order.reshape(-1, d).numpy()):
        # NumPy takes a fifth of the time of torch for this; `clip` spares it a buffer.
        rows = matrix[i // groups].numpy()[one]
        np.take(rows, one, axis=1, out=permuted[i].numpy(), mode="clip")
    factor, info = Factor.of(permuted)
    if info.any():
        raise NotPositiveError((info.nonzero()[:, 0] // groups).tolist())
    z = b.gather(2, order.expand(m, k, d)).reshape(m * groups, k // groups, d)
    factor.solve_lower(z, False)
    return factor, z


def _in_place(w: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Put w [M, k, P, d] back into the order of the features: [M, P, k, d]."""
    at = order[:, :, None].expand_as(w)
    return torch.zeros_like(w).scatter_(3, at, w).transpose(1, 2)
