"""Ridge refits on nested sets of dimensions, from one Cholesky factor of each order.

With the dimensions in an order, the leading p x p block of the factor L of the permuted A + alpha I
is the factor of the first p of them, and the first p entries of z = L^-1 b are theirs too. So the
solution on the first p is L^-T applied to z with zeros after p: one triangular solve serves all p.
"""

from __future__ import annotations

import numpy as np
import torch

from .. import _ops
from ..ridge.factor import Factor
from ..ridge.solution import least
from ..ridge.training import NotPositiveError, Training

_BLOCK = 128  # columns that are mirrored at once


class Room:
    """Memory for the matrices of some training sets of d dimensions, after those of others.

    Fresh pages cost more than half of what is done in them: of d = 768 a permuted matrix takes
    0.9 ms here and 4.4 ms in a tensor of its own, and its factor 5 ms.
    """

    def __init__(self, d: int, sets: int, orders: int) -> None:
        self._matrices = _ops.empty(sets, d, d, dtype=torch.float64)
        self._rows = _ops.empty(d * d, dtype=torch.float64)
        self._taken = _ops.empty(sets * orders * d * d, dtype=torch.float64)

    def symmetric(self, train: Training, alpha: torch.Tensor) -> torch.Tensor:
        """A + alpha I of every training set, whole: float64 [m, d, d] for `alpha` [m]."""
        matrices = train.matrix(alpha, torch.float64, self._matrices[: len(train)])
        for matrix in matrices:
            for i in range(0, train.dim, _BLOCK):
                j = i + _BLOCK
                matrix[i:j, j:] = matrix[j:, i:j].mT
                block = matrix[i:j, i:j].tril_()
                block += block.tril(-1).mT
        return matrices

    def copy(self, matrices: torch.Tensor) -> torch.Tensor:
        """Return a copy of matrices [m, d, d], which the next call of `taken` takes back."""
        return self._taken[: matrices.numel()].view_as(matrices).copy_(matrices)

    def taken(self, matrices: torch.Tensor, dims: torch.Tensor) -> torch.Tensor:
        """Rows and columns `dims` [g, q], in their order, of matrices [m, d, d]: [g, q, q].

        Each matrix serves g / m of the orders, one after the other. The next call takes the memory
        back; where there is an order for each matrix, these may lie in it.
        """
        (m, d, _), (groups, q) = matrices.shape, dims.shape
        out = self._taken[: groups * q * q].view(groups, q, q)
        rows = self._rows[: q * d].view(q, d).numpy()
        for i in range(groups):
            at = dims[i].numpy()
            # NumPy takes a third of the time of torch for this; `clip` spares it a buffer.
            np.take(matrices[i * m // groups].numpy(), at, axis=0, out=rows, mode="clip")
            np.take(rows, at, axis=1, out=out[i].numpy(), mode="clip")
        return out


def refits(
    matrix: torch.Tensor, b: torch.Tensor, order: torch.Tensor, sizes: torch.Tensor, room: Room
) -> torch.Tensor:
    """Solve on the first `sizes` dimensions of an order: float64 [P, k, d], zero elsewhere.

    Parameters
    ----------
    matrix
        float64 [d, d], symmetric, with alpha on its diagonal.
    b
        float64 [k, d].
    order
        int64 [k, d], best dimension first, or [1, d] for all targets.
    sizes
        int64 [P], ascending.

    Raises
    ------
    NotPositiveError
        When the matrix is not positive definite in float64.
    """
    if not len(sizes):
        return b.new_empty(0, *b.shape)
    factor, z = _nested(matrix, b, order[:, : sizes[-1]], room)
    return _in_place(_back(factor, z, sizes), order, b.shape[1])


def refits_by_gcv(
    train: Training,
    alphas: torch.Tensor,
    order: torch.Tensor,
    sizes: torch.Tensor,
    room: Room,
) -> torch.Tensor:
    """As `refits` with one order [1, d] for all targets, and an alpha for each size and target.

    The alpha of every size and target is that of least generalised cross-validation error; every
    alpha takes one factor and its inverse. `train` is one training set.
    """
    b, n = train.b[0], train.n[0]
    ordered = b.gather(1, order.expand_as(b))
    lowest, best = torch.tensor(torch.inf, dtype=torch.float64), b.new_zeros(())
    for alpha in alphas:
        factor, z = _nested(room.symmetric(train, alpha[None])[0], b, order, room)
        w = _back(factor, z, sizes)  # [k, P, d]
        rss = train.yy[0, :, None] - torch.einsum("kpd,kd->kp", w, ordered)
        rss -= alpha * w.square().sum(-1)
        eye = torch.eye(train.dim, dtype=torch.float64)
        inverse = torch.linalg.solve_triangular(factor.lower[0].tril(), eye, upper=False)
        trace = inverse.square().sum(1).cumsum(0)[sizes - 1]
        free = n - 1.0 - (sizes - alpha * trace)
        error = (rss / free.clamp_min(1e-9 * n).square()).clamp_min(0)
        # Ascending alphas: of equal ones the first, as the solver has it.
        better = least(torch.stack([lowest.expand_as(error), error], -1)) == 1
        lowest = torch.where(better, error, lowest)
        best = torch.where(better[..., None], w, best)
    return _in_place(best, order, train.dim)


def _nested(
    matrix: torch.Tensor, b: torch.Tensor, order: torch.Tensor, room: Room
) -> tuple[Factor, torch.Tensor]:
    """Factors of g permuted matrices, and z [g, k / g, q], for `order` [g, q]."""
    (k, _), (groups, q) = b.shape, order.shape
    factor, info = Factor.of(room.taken(matrix[None], order))
    if info.any():
        raise NotPositiveError([0])
    z = b.gather(1, order.expand(k, q)).view(groups, k // groups, q)
    factor.solve_lower(z, False)
    return factor, z


def _back(factor: Factor, z: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """L^-T applied to the first `sizes` entries of every z [g, k / g, q]: [k, P, q]."""
    q = z.shape[2]
    keep = torch.arange(q) < sizes[:, None]
    w = (z[:, :, None] * keep).flatten(1, 2)
    factor.solve_lower(w, True)
    return w.view(-1, len(sizes), q)


def _in_place(w: torch.Tensor, order: torch.Tensor, d: int) -> torch.Tensor:
    """Put w [k, P, q] back into the order of the features: [P, k, d]."""
    at = order[:, None, : w.shape[2]].expand_as(w)
    return w.new_zeros(*w.shape[:2], d).scatter_(2, at, w).transpose(0, 1)
