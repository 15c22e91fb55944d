"""Ridge refits on nested sets of dimensions, from one Cholesky factor of each order.

With the dimensions in an order, the leading p x p block of the factor L of the permuted A + alpha I
is the factor of the first p of them, and the first p entries of z = L^-1 b are theirs too. So the
solution on the first p is L^-T applied to z with zeros after p: one triangular solve serves all p.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from ..ridge.factor import Factor
from ..ridge.solution import least
from ..ridge.training import NotPositiveError, Training


def symmetric(train: Training, alpha: torch.Tensor) -> torch.Tensor:
    """A + alpha I of every training set, whole: float64 [M, d, d] for `alpha` [M]."""
    matrix = train.matrix(alpha, torch.float64).tril_()
    matrix += matrix.tril(-1).mT
    return matrix


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
        int64 [M, k, q], best dimension first, or [M, 1, q] for all targets; q of d dimensions.
    sizes
        int64 [P], q at most.

    Raises
    ------
    NotPositiveError
        When a matrix is not positive definite in float64.
    """
    (m, k, d), q = b.shape, order.shape[2]
    factor, z = _nested(matrix, b, order)
    keep = torch.arange(q) < sizes[:, None]
    w = (z[:, :, None] * keep).flatten(1, 2)
    factor.solve_lower(w, True)
    return _in_place(w.view(m, k, len(sizes), q), order, d)


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
    return _in_place(best, order, train.dim)


def taken(matrices: torch.Tensor, dims: torch.Tensor) -> torch.Tensor:
    """Rows and columns `dims` [M, g, q] of matrices [M, d, d], in their order: [M g, q, q]."""
    m, groups, q = dims.shape
    out = matrices.new_empty(m, groups, q, q)
    for i, j in itertools.product(range(m), range(groups)):
        at = dims[i, j].numpy()
        # NumPy takes a fifth of the time of torch for this; `clip` spares it a buffer.
        np.take(matrices[i].numpy()[at], at, axis=1, out=out[i, j].numpy(), mode="clip")
    return out.flatten(0, 1)


def _nested(
    matrix: torch.Tensor, b: torch.Tensor, order: torch.Tensor
) -> tuple[Factor, torch.Tensor]:
    """Factors of M g permuted matrices, and z [M g, k / g, q], for `order` [M, g, q]."""
    (m, k, _), (_, groups, q) = b.shape, order.shape
    factor, info = Factor.of(taken(matrix, order))
    if info.any():
        raise NotPositiveError((info.nonzero()[:, 0] // groups).tolist())
    z = b.gather(2, order.expand(m, k, q)).reshape(m * groups, k // groups, q)
    factor.solve_lower(z, False)
    return factor, z


def _in_place(w: torch.Tensor, order: torch.Tensor, d: int) -> torch.Tensor:
    """Put w [M, k, P, q] back into the order of the features: [M, P, k, d]."""
    at = order[:, :, None].expand_as(w)
    return w.new_zeros(*w.shape[:3], d).scatter_(3, at, w).transpose(1, 2)
